"""Tokens of the patched model beside stock's, on real checkpoints and real speech.

    python benchmarks/token_parity.py --models tiny.en base --engines triton compile --output rows.jsonl
    python benchmarks/token_parity.py --bits 4 2 --head-bits 0 4 --dtypes float16 --output rows.jsonl

Speech as in wer.py: each utterance by itself, in every one of `--batches`, and `--chapters` as long recordings with
timestamps. Greedy. Stock runs once, in the largest of the batches.

In float32 every token must be stock's. In half precision a first difference is allowed where rounding decides: a
float32 model with the same weights is given the window and the tokens before it, and its margin between stock's token
and ours must be at most twice `rounding`, once for either side. `rounding` is measured on stock: the largest error,
over all tokens of the run, that its logits in the dtype make in the margin of the two best tokens, against the same
float32 model. With `--bits` below 16 stock generates on the same quantised decoder, whose weights it writes out in its
dtype. What follows a first difference has another history and is not compared. The word error rates must be within
0.1, which takes the whole of a test set to mean anything. One JSON line a case; exit status 1 if one failed.
"""

import argparse
import copy
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from decode_speed import GROUP_SIZES, machine
from transformers import WhisperTimeStampLogitsProcessor
from wer import SAMPLING_RATE, SPEECH, join, read_folder, word_errors

import whisper_static_cache
from whisper_static_cache.checkpoints import load_checkpoint


class Window(NamedTuple):
    """One window of a recording as it was decoded: its prompt, and the tokens up to the one that ends it."""

    prompt: list
    tokens: list


class Difference(NamedTuple):
    """The first difference of a recording, and by how much float32 prefers stock's token to ours."""

    place: int
    stock: int
    ours: int
    margin: float


def windows_of(segments, eos):
    """The windows of one recording, from the segments that `generate` returns for it."""
    windows, last = [], None
    for segment in segments:
        if segment["result"] is last:
            continue
        last = segment["result"]
        ids, start = last.tolist(), segment["idxs"][0]
        end = ids.index(eos, start) + 1 if eos in ids[start:] else len(ids)
        windows.append(Window(ids[:start], ids[start:end]))
    return windows


def decode(model, processor, recordings, size, long_form, options):
    """Texts and windows of the recordings: a list each, an entry a recording."""
    texts, windows = [], []
    arguments = {"return_timestamps": long_form}
    if model.generation_config.is_multilingual:
        arguments.update(language="en", task="transcribe")
    for start in range(0, len(recordings), size):
        batch = processor(
            [one.samples for one in recordings[start : start + size]],
            sampling_rate=SAMPLING_RATE,
            return_tensors="pt",
            return_attention_mask=long_form,
            **({"truncation": False, "padding": "longest"} if long_form else {}),
        )
        if long_form:
            arguments["attention_mask"] = batch.attention_mask.to(model.device)
        found = model.generate(
            batch.input_features.to(model.device, model.dtype),
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            num_beams=1,
            return_segments=True,
            **arguments,
        )
        texts += processor.batch_decode(found["sequences"], skip_special_tokens=True)
        windows += [windows_of(segments, model.config.eos_token_id) for segments in found["segments"]]
    return texts, windows


def decode_watched(model, *arguments):
    """What `decode` returns, and the features of every window."""
    features = []
    # Also in the middle of a long recording, what the encoder is given is a window's features. Not for the patched
    # model: an encoder with a hook is not captured.
    hook = model.model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: features.extend((args or (kwargs["input_features"],))[0].clone()), with_kwargs=True
    )
    try:
        texts, windows = decode(model, *arguments)
    finally:
        hook.remove()
    if len(features) != sum(map(len, windows)):
        raise RuntimeError(f"the encoder was given {len(features)} windows, and {sum(map(len, windows))} came back")
    # Utterance by utterance, or, the long ones having gone one at a time, window by window.
    rows = iter(features)
    return texts, windows, [list(itertools.islice(rows, len(ones))) for ones in windows]


@torch.no_grad()
def teacher_forced(model, features, ids):
    """Float32 logits ``(len(ids), vocab_size)`` of a window decoded to these tokens."""
    ids = torch.tensor([ids], device=model.device)
    return model(features[None].to(model.dtype), decoder_input_ids=ids).logits[0].float()


def rounding_of(model, reference, features, windows):
    """Largest error of `model`'s margin between the two tokens that are best in `reference`, over all windows."""
    worst = 0.0
    for feature, window in zip(features, windows):
        ids, first = window.prompt + window.tokens[:-1], len(window.prompt) - 1
        exact, rounded = (teacher_forced(one, feature, ids)[first:] for one in (reference, model))
        best = exact.topk(2).indices
        errors = (rounded - exact).gather(1, best)
        worst = max(worst, (errors[:, 0] - errors[:, 1]).abs().max().item())
    return worst


def margin_of(reference, features, prompt, tokens, stock, ours):
    """By how much `reference` prefers one token to another after `prompt` and `tokens`."""
    logits = teacher_forced(reference, features, prompt + tokens)[-1]
    begin = reference.generation_config.no_timestamps_token_id + 1
    if (stock >= begin) == (ours >= begin):
        return (logits[stock] - logits[ours]).item()
    # Between a text token and a timestamp, Whisper compares the text token with all timestamps allowed, summed.
    rules = WhisperTimeStampLogitsProcessor(reference.generation_config, len(prompt))
    ids = torch.tensor([prompt + tokens], device=logits.device)
    margin = logits[min(stock, ours)] - rules(ids, logits[None].clone())[0, begin:].logsumexp(0)
    return margin.item() if stock < begin else -margin.item()


def compare(reference, features, stock, ours):
    """Tokens that are stock's, and the first `Difference` or None, of one recording's windows."""
    same = 0
    for feature, one, other in itertools.zip_longest(features, stock, ours):
        if one is None or other is None or one.prompt != other.prompt:
            raise RuntimeError("the windows differ before their tokens do: nothing here explains that")
        for place, (expected, found) in enumerate(itertools.zip_longest(one.tokens, other.tokens)):
            if expected is None or found is None:
                raise RuntimeError("one of two equal windows goes on after the other's end")
            if expected != found:
                margin = margin_of(reference, feature, one.prompt, one.tokens[:place], expected, found)
                return same, Difference(place, expected, found, margin)
            same += 1
    return same, None


def run_cases(model, reference, processor, recordings, sizes, long_form, options):
    """One JSON row for each engine and batch size, without the machine."""
    references = [one.text for one in recordings]
    texts, stock, features = decode_watched(model, processor, recordings, max(sizes), long_form, options)
    stock_wer = 100 * word_errors(references, texts).wer
    tokens = sum(len(window.tokens) for windows in stock for window in windows)
    rounding = 0.0
    if model.dtype != torch.float32:
        every = (list(itertools.chain.from_iterable(lists)) for lists in (features, stock))
        rounding = rounding_of(model, reference, *every)
    for engine, size in itertools.product(options.engines, sizes):
        with whisper_static_cache.patched(model, engine=engine):
            texts, ours = decode(model, processor, recordings, size, long_form, options)
            report = whisper_static_cache.last_run(model)
        if report.engine != engine:
            raise SystemExit(f"--engines {engine} cannot be had: {report.engine} served, because {report.reason}.")
        compared = [compare(reference, *recording) for recording in zip(features, stock, ours)]
        differences = [difference for _, difference in compared if difference]
        margin = max((abs(one.margin) for one in differences), default=0.0)
        wer = 100 * word_errors(references, texts).wer
        allowed = margin <= 2 * rounding if rounding else not differences
        yield {
            "dtype": str(model.dtype).removeprefix("torch."),
            "engine": engine,
            "style": "long" if long_form else "short",
            "batch": size,
            "stock_batch": max(sizes),
            "recordings": len(recordings),
            "tokens": tokens,
            # Up to each recording's first difference.
            "identical_fraction": round(sum(same for same, _ in compared) / tokens, 4),
            "differences": len(differences),
            "differences_in_our_favour": sum(one.margin < 0 for one in differences),
            "largest_margin": round(margin, 5),
            "rounding": round(rounding, 5),
            "each_difference": [one._asdict() for one in differences],
            "wer_stock": round(stock_wer, 2),
            "wer_engine": round(wer, 2),
            # Few recordings can pass this and not the next: one word of a few hundred is more than 0.1.
            "within_rounding": allowed,
            "passed": allowed and abs(wer - stock_wer) <= 0.1,
        }


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny.en", "base"], help="as load_checkpoint takes them")
    dtypes = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--bits", nargs="+", type=float, choices=(16, *GROUP_SIZES), default=[16])
    parser.add_argument("--head-bits", nargs="+", type=int, choices=(0, 8, 4, 3, 2), default=[0], help="0: no head")
    parser.add_argument("--engines", nargs="+", choices=("eager", "compile", "triton"), default=["triton"])
    parser.add_argument("--folder", type=Path, default=SPEECH, help="speech in LibriSpeech's layout")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--utterances", type=int, help="to take, of all")
    parser.add_argument("--chapters", type=int, default=2, help="to take as long recordings; 0 for none")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    options = parser.parse_args(argv)
    if any(options.head_bits) and min(options.bits) == 16:
        parser.error("--head-bits quantises the head of a quantised decoder: give --bits below 16 as well")
    return options


def main():
    options = parse()
    transformers.utils.logging.set_verbosity_error()
    # float32 means float32: cuDNN's convolutions in the encoder would take TF32 otherwise.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    facts = machine(torch.device(options.device))
    # A row names no folders of the machine it comes from.
    facts["command"] = " ".join(part.rsplit("/", 1)[-1] for part in facts["command"].split(" "))
    chapters = read_folder(options.folder)
    if not chapters:
        raise SystemExit(f"--folder {options.folder} holds no *.trans.txt: give a folder in LibriSpeech's layout.")
    utterances = list(itertools.chain.from_iterable(chapters))[: options.utterances]
    cases = [(utterances, options.batches, False)]
    if options.chapters:
        cases.append(([join(chapter) for chapter in chapters[: options.chapters]], [1], True))
    failed = 0
    for name, dtype, bits, head_bits in itertools.product(
        options.models, options.dtypes, options.bits, options.head_bits
    ):
        if head_bits and bits == 16:
            continue  # Only a quantised decoder's head is quantised.
        model, processor = load_checkpoint(name, dtype=getattr(torch, dtype), device=options.device)
        group_size = GROUP_SIZES.get(bits)
        bits = bits if bits == 1.58 else int(bits)
        if group_size:
            whisper_static_cache.quantize_decoder(
                model, bits, group_size, head_bits=head_bits or None, backend="torch", progress=False
            )
        # The weights as the dtype has them: bfloat16 rounds the file's float16.
        reference = copy.deepcopy(model).float()
        for case in cases:
            for row in run_cases(model, reference, processor, *case, options):
                failed += not row["passed"]
                of_model = {"model": Path(name).name, "bits": bits, "group_size": group_size}
                if head_bits:
                    of_model["head_bits"] = head_bits
                row = {**of_model, **row, **facts}
                print(json.dumps(row), flush=True)
                if options.output:
                    with options.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    sys.exit(f"{failed} cases differ from stock by more than rounding, or in their word error rate" if failed else 0)


if __name__ == "__main__":
    main()
