"""Seconds to transcribe a folder of speech: transformers' two paths and the patched one, turn by turn in one run.

    python benchmarks/transcription_speed.py --models tiny.en base --threads 2 --output rows.jsonl

The folder has LibriSpeech's layout (`<speaker>/<chapter>/*.flac`). Every file is transcribed by every engine in
turn, so that a machine that slows down slows them all; the row has the sum over files of the medians over turns, the
ratio to the faster of stock's two paths, and whether all tokens are the same. Two figures are taken: of `generate`
from log-mel features, which includes the encoder, and from encoder states, which is the decoder's share.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from decode_speed import machine
from transformers.modeling_outputs import BaseModelOutput

import whisper_static_cache
from whisper_static_cache.audio import load_audio
from whisper_static_cache.checkpoints import load_checkpoint


SPEECH = Path(__file__).resolve().parents[2] / "shared" / "data" / "librispeech" / "test-other"
STOCK = {"stock-dynamic": {}, "stock-static": {"cache_implementation": "static"}}


def transcribe(model, one, max_new_tokens, **arguments):
    """Seconds, and the tokens of one input."""
    given = {"input_features": one}
    if not isinstance(one, torch.Tensor):
        given = {"encoder_outputs": BaseModelOutput(last_hidden_state=one["states"])}
    start = time.perf_counter()
    tokens = model.generate(**given, max_new_tokens=max_new_tokens, **arguments)
    return time.perf_counter() - start, tokens


def compare(model, inputs, engines, rounds, max_new_tokens, num_beams):
    """Each engine's seconds (sum over inputs of medians over `rounds` turns), and whether all tokens were the same."""
    # A copy is patched and the model itself is not: unpatching would drop what is compiled.
    ours = copy.deepcopy(model)
    seconds = {name: [[] for _ in inputs] for name in (*STOCK, *engines)}
    same = True
    for turn in range(rounds + 1):
        for index, one in enumerate(inputs):
            reference = None
            for name, times in seconds.items():
                if name in STOCK:
                    elapsed, tokens = transcribe(model, one, max_new_tokens, num_beams=num_beams, **STOCK[name])
                else:
                    whisper_static_cache.patch(ours, engine=name)
                    elapsed, tokens = transcribe(ours, one, max_new_tokens, num_beams=num_beams)
                reference = tokens if reference is None else reference
                same &= torch.equal(reference, tokens)
                if turn:  # the first turn warms up
                    times[index].append(elapsed)
    whisper_static_cache.unpatch(ours)
    return {name: sum(map(statistics.median, times)) for name, times in seconds.items()}, same


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny.en", "base"])
    parser.add_argument("--engines", nargs="+", default=["eager", "compile"])
    parser.add_argument("--folder", type=Path, default=SPEECH)
    parser.add_argument("--files", type=int, default=10, help="files to take, spread over the folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    options = parser.parse_args()
    paths = sorted(options.folder.rglob("*.flac")) or parser.error(f"--folder {options.folder} holds no .flac file")
    paths = paths[:: max(len(paths) // options.files, 1)][: options.files]
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    for name in options.models:
        model, processor = load_checkpoint(name)
        recordings = [load_audio(path) for path in paths]
        features = [processor(r, sampling_rate=16000, return_tensors="pt").input_features for r in recordings]
        with torch.no_grad():
            states = [{"states": model.model.encoder(one).last_hidden_state} for one in features]
        for measured, inputs in (("generate", features), ("decoder", states)):
            seconds, same = compare(
                model, inputs, options.engines, options.rounds, options.max_new_tokens, options.num_beams
            )
            best = min(seconds[one] for one in STOCK)
            for engine, median in seconds.items():
                row = {
                    "model": name,
                    "measured": measured,
                    "engine": engine,
                    "seconds": round(median, 3),
                    "real_time_factor": round(sum(map(len, recordings)) / 16000 / median, 2),
                    "speed_up_over_faster_stock": round(best / median, 3),
                    "tokens_identical": same,
                    "files": len(paths),
                    "rounds": options.rounds,
                    "num_beams": options.num_beams,
                    "dtype": "float32",
                    **machine(torch.device("cpu")),
                }
                print(json.dumps(row), flush=True)
                if options.output:
                    with options.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
