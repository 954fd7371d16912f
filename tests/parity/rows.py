"""The parity table itself, and how one row of it is run. Knows nothing of this package.

To add a row, add an entry to `ROWS`: a name, and the arguments of `generate` (or a function of the model that returns
them). `windows` is the length of the features in encoder windows, `batch` the number of recordings.
"""

import dataclasses
from collections.abc import Callable

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..conftest import tiny_features


SHAPES = {
    "plain": {},
    "one-head": {"d_model": 16, "decoder_attention_heads": 1, "encoder_attention_heads": 4, "decoder_layers": 1},
    "wide-decoder": {"decoder_attention_heads": 8, "decoder_ffn_dim": 96, "decoder_layers": 4, "encoder_layers": 1},
    "english": {"multilingual": False},
}
LONG = {"return_timestamps": True}
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclasses.dataclass(frozen=True)
class Row:
    arguments: dict | Callable
    batch: int = 1
    windows: float = 1.0
    attention_mask: bool = False
    multilingual_only: bool = False


class Favour(LogitsProcessor):
    """A processor of the user's own: a bonus that depends on the history."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, (input_ids.shape[1] * 7) % 90] += 3.0
        return scores


class StopAt(StoppingCriteria):
    """A criterion of the user's own: each row stops at another length."""

    def __call__(self, input_ids, scores, **kwargs):
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        return input_ids.shape[1] >= 8 + 2 * rows


class Recorder(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.seen.append("end")


def encoded(model, batch):
    features = tiny_features(batch, config=model.config, dtype=model.dtype)
    with torch.no_grad():
        return {"input_features": None, "encoder_outputs": model.model.encoder(features)}


ROWS = {
    "short": Row({}),
    "short-batch2": Row({}, batch=2),
    "short-batch5": Row({}, batch=5),
    "language-task": Row({"language": "de", "task": "translate"}, batch=2, multilingual_only=True),
    "language-list": Row({"language": ["en", "fr"]}, batch=2, multilingual_only=True),
    "timestamps": Row({"return_timestamps": True}, batch=2),
    "max-new-tokens": Row({"max_new_tokens": 9}, batch=2),
    "max-length": Row({"max_length": 12}, batch=2),
    "prompt": Row({"prompt_ids": torch.tensor([108, 3, 4, 5])}, batch=2),
    "prompt-timestamps": Row({"prompt_ids": torch.tensor([108, 3, 4, 5]), "return_timestamps": True}, batch=2),
    "sampling": Row({"do_sample": True, "temperature": 0.7}, batch=3),
    "sampling-top-k": Row({"do_sample": True, "top_k": 5, "temperature": 1.3}, batch=2),
    "sampling-top-p": Row({"do_sample": True, "top_p": 0.8, "top_k": 0}, batch=2),
    "sampling-min-p": Row({"do_sample": True, "min_p": 0.02}, batch=2),
    "num-return-sequences": Row({"do_sample": True, "num_return_sequences": 3}, batch=2),
    "repetition-penalty": Row({"repetition_penalty": 1.7}, batch=2),
    "no-repeat-ngram": Row({"no_repeat_ngram_size": 2}, batch=2),
    "min-new-tokens": Row({"min_new_tokens": 8, "max_new_tokens": 12}, batch=2),
    "bad-words": Row({"bad_words_ids": [[5], [9, 11]]}, batch=2),
    "scores": Row({"return_dict_in_generate": True, "output_scores": True, "output_logits": True}, batch=2),
    "dict-only": Row({"return_dict_in_generate": True}, batch=2),
    "fallback": Row({"temperature": (0.0, 0.3), "logprob_threshold": -0.5}, batch=3),
    "fallback-dict": Row(
        {"temperature": (0.0, 0.3), "compression_ratio_threshold": 1.0, "return_dict_in_generate": True}, batch=2
    ),
    "dict-timestamps": Row(
        {"return_dict_in_generate": True, "output_scores": True, "return_timestamps": True}, batch=2
    ),
    "attentions": Row({"return_dict_in_generate": True, "output_attentions": True}),
    "hidden-states": Row({"return_dict_in_generate": True, "output_hidden_states": True}),
    "beams": Row({"num_beams": 3}, batch=2),
    "beams-2": Row({"num_beams": 2}, batch=3),
    "beams-5": Row({"num_beams": 5, "num_return_sequences": 2}, batch=1),
    "beams-timestamps": Row({"num_beams": 3, "return_timestamps": True}, batch=2),
    "beams-short": Row({"num_beams": 3, "length_penalty": -1.0, "early_stopping": True}, batch=2),
    "beams-never": Row({"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"}, batch=2),
    "beams-sampling": Row({"num_beams": 3, "do_sample": True, "top_k": 20}, batch=2),
    "beams-penalties": Row({"num_beams": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3}, batch=2),
    "beams-scores": Row(
        {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}, batch=2
    ),
    "beams-prompt": Row({"num_beams": 3, "prompt_ids": torch.tensor([108, 3, 4, 5])}, batch=2),
    "beams-processor": Row(
        lambda model: {"num_beams": 3, "logits_processor": LogitsProcessorList([Favour()])}, batch=2
    ),
    "no-cache": Row({"use_cache": False}),
    "static-cache-asked-for": Row({"cache_implementation": "static"}, batch=2),
    "logits-processor": Row(lambda model: {"logits_processor": LogitsProcessorList([Favour()])}, batch=2),
    "stopping-criteria": Row(lambda model: {"stopping_criteria": StoppingCriteriaList([StopAt()])}, batch=3),
    "streamer": Row(lambda model: {"streamer": Recorder()}),
    "prefix-function": Row(
        lambda model: {"prefix_allowed_tokens_fn": lambda row, ids: [3 + ids.shape[0] % 7, 40 + row, 100]}, batch=2
    ),
    "encoder-outputs": Row(lambda model: encoded(model, 1)),
    "attention-mask": Row({}, batch=2, attention_mask=True),
    "long": Row(LONG, windows=3.4),
    "long-batch2": Row(LONG, batch=2, windows=3.4, attention_mask=True),
    "long-batch5": Row(LONG, batch=5, windows=2.3, attention_mask=True),
    "long-static": Row({**LONG, "cache_implementation": "static"}, batch=2, windows=2.3, attention_mask=True),
    "long-segments": Row({**LONG, "return_segments": True}, batch=2, windows=2.3, attention_mask=True),
    "long-segments-dict": Row(
        {**LONG, "return_segments": True, "return_dict_in_generate": True, "output_scores": True}, windows=2.3
    ),
    "long-condition": Row({**LONG, "condition_on_prev_tokens": True}, batch=2, windows=3.4, attention_mask=True),
    "long-condition-static": Row(
        {**LONG, "condition_on_prev_tokens": True, "cache_implementation": "static"}, windows=2.3
    ),
    "long-prompt-first": Row(
        {**LONG, "prompt_ids": torch.tensor([108, 3, 4, 5]), "prompt_condition_type": "first-segment"}, windows=2.3
    ),
    "long-prompt-all": Row(
        {
            **LONG,
            "prompt_ids": torch.tensor([108, 3, 4, 5]),
            "prompt_condition_type": "all-segments",
            "condition_on_prev_tokens": True,
        },
        batch=2,
        windows=2.3,
        attention_mask=True,
    ),
    "long-fallback": Row(
        {**LONG, "temperature": TEMPERATURES, "logprob_threshold": -0.5, "compression_ratio_threshold": 1.35},
        batch=2,
        windows=2.3,
        attention_mask=True,
    ),
    "long-fallback-all": Row(
        {
            **LONG,
            "temperature": TEMPERATURES,
            "logprob_threshold": -1.0,
            "compression_ratio_threshold": 1.0,
            "no_speech_threshold": 0.001,
            "condition_on_prev_tokens": True,
        },
        batch=3,
        windows=2.3,
        attention_mask=True,
    ),
    "long-beams": Row({**LONG, "num_beams": 5}, batch=2, windows=2.3, attention_mask=True),
    "long-beams-condition": Row(
        {**LONG, "num_beams": 2, "condition_on_prev_tokens": True}, batch=2, windows=2.3, attention_mask=True
    ),
    "long-beams-fallback": Row(
        {
            **LONG,
            "num_beams": 3,
            "temperature": TEMPERATURES,
            "logprob_threshold": -0.5,
            "compression_ratio_threshold": 1.35,
            "no_speech_threshold": 0.1,
        },
        batch=2,
        windows=2.3,
        attention_mask=True,
    ),
    "long-fallback-segments": Row(
        {
            **LONG,
            "temperature": TEMPERATURES,
            "logprob_threshold": -0.5,
            "compression_ratio_threshold": 1.35,
            "return_segments": True,
        },
        windows=2.3,
    ),
    "long-no-speech": Row(
        {**LONG, "no_speech_threshold": 0.0, "logprob_threshold": 0.0, "temperature": (0.0, 0.5)},
        batch=2,
        windows=2.3,
        attention_mask=True,
    ),
}


def run(model, row, seed=0, overrides=None):
    """One call of `generate`, from the same random state, on a fresh set of arguments and those of `overrides`."""
    arguments = row.arguments(model) if callable(row.arguments) else dict(row.arguments)
    arguments.update(overrides or {})
    if "input_features" not in arguments:
        arguments["input_features"] = tiny_features(row.batch, row.windows, seed, model.config, model.dtype)
    if row.attention_mask:
        frames = arguments["input_features"].shape[-1]
        mask = torch.ones(row.batch, frames, dtype=torch.long)
        for index in range(1, row.batch):
            mask[index, frames - 11 * index :] = 0
        arguments["attention_mask"] = mask
    torch.manual_seed(1234)
    result = model.generate(**arguments)
    after = torch.rand(4)
    streamer = arguments.get("streamer")
    return {"result": result, "random state afterwards": after, "streamed": streamer and streamer.seen}
