"""4-bit decoding on the CPU against float32 and against faster-whisper's int8, on the same audio, turn by turn.

    python benchmarks/cpu_quantized.py --models tiny.en base --threads 2 --output rows.jsonl

Every engine transcribes every file once a round, the engines in turn, so that a machine that slows down slows them
all; greedy, without timestamps or temperature fallback, from the samples to the text. Rows have the median seconds
over rounds, the ratios to float32 and to faster-whisper, and the same of the decoder alone, which is what the bits
are about: prompt and steps by the package's own clock, and for faster-whisper the whole less its features and its
encoder, timed apart. Memory: the bytes of the decoder, of ours alone since CTranslate2 does not tell, and by how much
a process of its own grew from loading the model to the end of its first transcription (what a compiler took on the
way included), with the most it held. faster-whisper is used where it is installed; without it its
rows and ratios are left out, and a line says so.
"""

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from decode_speed import machine
from wer import SPEECH, word_errors

import whisper_static_cache
from whisper_static_cache.audio import load_audio
from whisper_static_cache.checkpoints import CHECKPOINTS, fetch_checkpoint, load_checkpoint


def memory_bytes(key):
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM), or None where /proc is not.

    The most that getrusage tells is at least what the process that started this one held.
    """
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else ()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


class Ours:
    """The patched generate on a float32 model, or on one with a 4-bit decoder."""

    def __init__(self, name, bits, compute_dtype, head_bits, engine, max_new_tokens):
        self.model, self.processor = load_checkpoint(name)
        if bits:
            options = {"compute_dtype": compute_dtype, "head_bits": head_bits, "progress": False}
            whisper_static_cache.quantize_decoder(self.model, bits, **options)
        footprint = whisper_static_cache.decoder_footprint(self.model)
        self.bytes = {"decoder_bytes": footprint.total - footprint.caches}
        self.max_new_tokens = max_new_tokens
        whisper_static_cache.patch(self.model, engine=engine)

    def __call__(self, samples):
        """Text, seconds, and those of the decoder."""
        start = time.perf_counter()
        features = self.processor(samples, sampling_rate=16000, return_tensors="pt").input_features
        language = {"language": "en", "task": "transcribe"} if self.model.generation_config.is_multilingual else {}
        tokens = self.model.generate(features, max_new_tokens=self.max_new_tokens, **language)
        text = self.processor.batch_decode(tokens, skip_special_tokens=True)[0]
        seconds = time.perf_counter() - start
        run = whisper_static_cache.last_run(self.model)
        return text, seconds, run.prefill_seconds + run.decode_seconds


class FasterWhisper:
    """faster-whisper in int8, on the same weights."""

    def __init__(self, name, threads, max_new_tokens):
        from faster_whisper import WhisperModel

        folder = fetch_checkpoint(name) if name in CHECKPOINTS else Path(name)
        with tempfile.TemporaryDirectory() as copy:
            # CTranslate2 wants the tokens in a file of its own beside the weights.
            for file in folder.resolve().iterdir():
                (Path(copy) / file.name).symlink_to(file)
            if not any(folder.glob("vocabulary.*")):
                tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
                tokens = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
                (Path(copy) / "vocabulary.json").write_text(json.dumps(sorted(tokens, key=tokens.get)))
            self.model = WhisperModel(copy, device="cpu", compute_type="int8", cpu_threads=threads)
        self.bytes = {"decoder_bytes": None}
        self.max_new_tokens = max_new_tokens

    def __call__(self, samples):
        """Text, seconds, and those of all but features and encoder, which are run again to be timed."""
        from faster_whisper.audio import pad_or_trim

        start = time.perf_counter()
        text = self.transcribe(samples)
        middle = time.perf_counter()
        self.model.encode(pad_or_trim(self.model.feature_extractor(samples)))
        return text, middle - start, (middle - start) - (time.perf_counter() - middle)

    def transcribe(self, samples):
        segments, _ = self.model.transcribe(
            samples,
            beam_size=1,
            temperature=0.0,
            language="en",
            without_timestamps=True,
            condition_on_previous_text=False,
            max_new_tokens=self.max_new_tokens,
        )
        return " ".join(segment.text for segment in segments)


# Bits of the linears, their dtype, and bits of the output head, which is most of what a step of a small model reads.
CONFIGURATIONS = {
    "fp32": (None, None, None),
    "4-bit float32": (4, None, None),
    "4-bit bfloat16": (4, torch.bfloat16, None),
    "4-bit bfloat16, 8-bit head": (4, torch.bfloat16, 8),
    "4-bit bfloat16, 4-bit head": (4, torch.bfloat16, 4),
}
OTHER = "faster-whisper int8"


def make(label, name, options):
    """The engine of one configuration."""
    torch.set_num_threads(options.threads)
    if label == OTHER:
        return FasterWhisper(name, options.threads, options.max_new_tokens)
    return Ours(name, *CONFIGURATIONS[label], options.engine, options.max_new_tokens)


def grow(label, name, options, samples):
    """In a process of its own: bytes that it grew by, and the most that it held."""
    before = memory_bytes("VmRSS")
    engine = make(label, name, options)
    engine(samples)
    after = memory_bytes("VmRSS")
    grew = None if before is None else after - before
    return {"process_grew_bytes": grew, "process_peak_bytes": memory_bytes("VmHWM")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny.en", "base"], help="names or folders with a model.bin")
    parser.add_argument("--folder", type=Path, default=SPEECH, help="speech in LibriSpeech's layout")
    parser.add_argument("--files", type=int, default=10, help="files to take, spread over the folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine", choices=("eager", "compile"), default="compile")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    paths = sorted(options.folder.rglob("*.flac")) or parser.error(f"--folder {options.folder} holds no .flac file")
    paths = paths[:: max(len(paths) // options.files, 1)][: options.files]
    recordings = [load_audio(path) for path in paths]
    said = dict(
        line.split(" ", 1) for path in options.folder.rglob("*.trans.txt") for line in path.read_text().splitlines()
    )
    facts = machine(torch.device("cpu"))
    facts["command"] = " ".join(part.rsplit("/", 1)[-1] for part in facts["command"].split(" "))
    labels = [*CONFIGURATIONS, OTHER]
    if not importlib.util.find_spec("faster_whisper"):
        print("faster-whisper is not installed: pip install faster-whisper for its rows.", file=sys.stderr)
        labels.remove(OTHER)
    for name in options.models:
        memory = {}
        for label in labels:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory[label] = pool.apply(grow, (label, name, options, recordings[0]))
        engines = {label: make(label, name, options) for label in labels}
        for engine in engines.values():
            engine(recordings[0])
        totals, decoders, texts = {label: [] for label in labels}, {label: [] for label in labels}, {}
        for _ in range(options.rounds):
            for label, engine in engines.items():
                texts[label], seconds, decoding = zip(*(engine(samples) for samples in recordings))
                totals[label].append(sum(seconds))
                decoders[label].append(sum(decoding))
        totals = {label: statistics.median(times) for label, times in totals.items()}
        decoders = {label: statistics.median(times) for label, times in decoders.items()}
        for label in labels:
            row = {
                "model": Path(name).name,
                "configuration": label,
                "engine": "CTranslate2" if label == OTHER else options.engine,
                "seconds": round(totals[label], 3),
                "decoder_seconds": round(decoders[label], 3),
                "real_time_factor": round(sum(map(len, recordings)) / 16000 / totals[label], 2),
                "speed_over_fp32": round(totals["fp32"] / totals[label], 3),
                "decoder_speed_over_fp32": round(decoders["fp32"] / decoders[label], 3),
                "wer": round(100 * word_errors([said[path.stem] for path in paths], texts[label]).wer, 2),
                **engines[label].bytes,
                **memory[label],
                "files": len(paths),
                "rounds": options.rounds,
                **facts,
            }
            if OTHER in labels:
                row["speed_over_faster_whisper"] = round(totals[OTHER] / totals[label], 3)
                row["decoder_speed_over_faster_whisper"] = round(decoders[OTHER] / decoders[label], 3)
            print(json.dumps(row), flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
