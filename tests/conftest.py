"""Tiny random models and shared skips. Nothing here needs a network, a GPU or a checkpoint."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch


SPEECH = Path(__file__).resolve().parents[2] / "shared" / "data" / "librispeech" / "test-other"

# Two cores, several workers: more threads per worker only make them wait for each other.
torch.set_num_threads(int(os.environ.get("WSC_TEST_THREADS", "1")))


# Where there is no GPU the Triton kernels run in its interpreter, which has to be known before anything imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def interpreter_without_idle_work():
    """Triton's interpreter works out a check of every integer sum, and then, without `debug`, does not look at it."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None and os.environ.get("TRITON_INTERPRET") == "1":
        builder = interpreter.interpreter_builder
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False"))
        if "speech" in item.keywords and not SPEECH.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs the speech data in ../shared/data/librispeech/test-other"))
        if "checkpoint" in item.keywords:
            from whisper_static_cache.checkpoints import checkpoint_available

            reason = checkpoint_available("tiny.en") or checkpoint_available("base")
            if reason:
                item.add_marker(pytest.mark.skip(reason=f"needs the real checkpoints: {reason}"))


@pytest.fixture(scope="module", autouse=True)
def unpatched_afterwards():
    """No module's tests find transformers patched by those before them."""
    yield
    import whisper_static_cache

    whisper_static_cache.unpatch()


def tiny_config(**overrides):
    """A Whisper configuration small enough for thousands of calls, every size of it different from the others."""
    from transformers import WhisperConfig

    values = {
        "vocab_size": 200,
        "num_mel_bins": 8,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 64,
        "max_source_positions": 30,
        "max_target_positions": 40,
        "pad_token_id": 100,
        "bos_token_id": 100,
        "eos_token_id": 100,
        "decoder_start_token_id": 101,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    return WhisperConfig(**{**values, **overrides})


# Token layout of the tiny vocabulary, in the order of the real one: text, <eot>, <sot>, languages, tasks, ...,
# timestamps.
TINY_TOKENS = {
    "eos": 100,
    "sot": 101,
    "languages": {"<|en|>": 102, "<|de|>": 103, "<|fr|>": 104},
    "tasks": {"translate": 105, "transcribe": 106},
    "prev_sot": 108,
    "no_speech": 109,
    "no_timestamps": 110,
}


def tiny_model(seed=0, *, multilingual=True, dtype=torch.float32, **overrides):
    """A random Whisper model whose generation configuration is complete: languages, tasks, timestamps, suppression.

    Weights are drawn wide enough that logits differ clearly from token to token: with the usual 0.02 every logit of a
    model this small is nearly the same, and a comparison of tokens would test rounding and nothing else.
    """
    from transformers import GenerationConfig, WhisperForConditionalGeneration

    config = tiny_config(**overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.25)
    model.generation_config = GenerationConfig(
        pad_token_id=TINY_TOKENS["eos"],
        bos_token_id=TINY_TOKENS["eos"],
        eos_token_id=TINY_TOKENS["eos"],
        decoder_start_token_id=TINY_TOKENS["sot"],
        is_multilingual=multilingual,
        **({"lang_to_id": TINY_TOKENS["languages"], "task_to_id": TINY_TOKENS["tasks"]} if multilingual else {}),
        no_timestamps_token_id=TINY_TOKENS["no_timestamps"],
        prev_sot_token_id=TINY_TOKENS["prev_sot"],
        max_initial_timestamp_index=10,
        # The earliest timestamps too: where a random model ends a segment at 0.00 s, transformers' loop over the
        # windows of a recording stands still for ever.
        suppress_tokens=[1, 2, 7, TINY_TOKENS["prev_sot"], TINY_TOKENS["no_speech"], *range(111, 116)],
        begin_suppress_tokens=[20, TINY_TOKENS["eos"]],
        return_timestamps=False,
        max_length=config.max_target_positions,
    )
    return model.to(dtype)


def tiny_features(batch_size=1, windows=1.0, seed=0, config=None, dtype=torch.float32):
    """Random log-mel features ``(batch_size, num_mel_bins, frames)``; one window is what the encoder takes at once."""
    config = config or tiny_config()
    frames = int(2 * config.max_source_positions * windows)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, config.num_mel_bins, frames, generator=generator).to(dtype)
