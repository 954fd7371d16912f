"""Word error rate, speed and bytes of a Whisper model, per configuration of its decoder.

    python benchmarks/wer.py --models tiny.en base --configurations fp32 8:64 4:64 3:32 2:16 --output rows.jsonl
    python benchmarks/wer.py --configurations fp32 fp16 --cross-dtypes none int8 --output rows.jsonl
    python benchmarks/wer.py --models openai/whisper-large-v2 --configurations fp16 4:64 --dtype float16 \\
        --datasets librispeech.clean ami earnings22 tedlium-long-form

The speech is a folder in LibriSpeech's layout (`<speaker>/<chapter>/*.flac` and `*.trans.txt`), short form by
utterance and long form by chapter, its utterances joined with half a second of silence; or sets of the Open ASR
leaderboard, where a hub can be reached. Decoding is greedy, without temperature fallback. Texts are compared after
transformers' `EnglishTextNormalizer({})`. The seconds are those of `generate`, encoder included, from log-mel
features, after a first call that is not counted. One JSON line a configuration and style, with the machine and the
versions.
"""

import argparse
import copy
import gc
import itertools
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from decode_speed import machine, synchronize
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

import whisper_static_cache
from whisper_static_cache.audio import load_audio
from whisper_static_cache.checkpoints import load_checkpoint


SPEECH = Path(__file__).resolve().parents[2] / "shared" / "data" / "librispeech" / "test-other"
SAMPLING_RATE = 16000
SILENCE = SAMPLING_RATE // 2
CROSS_DTYPES = {"none": None, "int8": torch.int8}
DENSE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Name -> (style, hub name, configuration, split, column of the reference).
LEADERBOARD = "hf-audio/esb-datasets-test-only-sorted"
DATASETS = {
    "librispeech.clean": ("short", LEADERBOARD, "librispeech", "test.clean", "text"),
    "librispeech.other": ("short", LEADERBOARD, "librispeech", "test.other", "text"),
    **{
        name: ("short", LEADERBOARD, name, "test", "text")
        for name in ("ami", "earnings22", "gigaspeech", "spgispeech", "tedlium", "voxpopuli")
    },
    "tedlium-long-form": ("long", "distil-whisper/tedlium-long-form", "default", "test", "text"),
    "meanwhile": ("long", "distil-whisper/meanwhile", "default", "test", "text"),
}


class Recording(NamedTuple):
    """Samples, float32 ``(length,)`` at 16 kHz, and what is said in them."""

    samples: np.ndarray
    text: str


def read_folder(folder):
    """Chapters of a folder in LibriSpeech's layout, each a list of `Recording` in the order of the book."""
    chapters = []
    for transcript in sorted(folder.rglob("*.trans.txt")):
        lines = [line.split(" ", 1) for line in transcript.read_text().splitlines()]
        chapters.append([Recording(load_audio(transcript.parent / f"{name}.flac"), text) for name, text in lines])
    return chapters


def join(utterances):
    """One `Recording` of several, with half a second of silence between them."""
    silence = np.zeros(SILENCE, dtype=np.float32)
    pieces = [piece for one in utterances for piece in (one.samples, silence)][:-1]
    return Recording(np.concatenate(pieces), " ".join(one.text for one in utterances))


def read_dataset(name, limit):
    """Style and recordings of one of `DATASETS`, from the Hugging Face hub."""
    try:
        import datasets
    except ImportError as error:
        raise SystemExit("--datasets needs the datasets package: pip install 'datasets[audio]'.") from error
    style, path, configuration, split, column = DATASETS[name]
    try:
        rows = datasets.load_dataset(path, configuration, split=split, streaming=True)
        rows = rows.cast_column("audio", datasets.Audio(sampling_rate=SAMPLING_RATE))
        rows = [
            Recording(np.asarray(row["audio"]["array"], dtype=np.float32), row[column])
            for row in itertools.islice(rows, limit)
        ]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"--datasets {name} cannot be read from {path} on the Hugging Face hub: {reason}") from error
    return style, rows


def read_speech(options):
    """Set name and style -> recordings."""
    if options.datasets:
        read = {name: read_dataset(name, options.limit) for name in options.datasets}
        return {(name, style): rows for name, (style, rows) in read.items()}
    chapters = read_folder(options.folder)
    if not chapters:
        raise SystemExit(f"--folder {options.folder} holds no *.trans.txt: give a folder in LibriSpeech's layout.")
    styles = {
        "short": list(itertools.chain.from_iterable(chapters)),
        "long": [join(chapter) for chapter in chapters],
    }
    return {(options.folder.name, style): styles[style][: options.limit] for style in options.styles}


def transcribe(model, processor, batch, style, max_new_tokens, language):
    """Texts of a batch of recordings, and the seconds that `generate` took."""
    long_form = style == "long"
    inputs = processor(
        [one.samples for one in batch],
        sampling_rate=SAMPLING_RATE,
        return_tensors="pt",
        return_attention_mask=long_form,
        **({"truncation": False, "padding": "longest"} if long_form else {}),
    )
    features = inputs.input_features.to(model.device, model.dtype)
    arguments = {"return_timestamps": long_form}
    if long_form:
        arguments["attention_mask"] = inputs.attention_mask.to(model.device)
    if language and model.generation_config.is_multilingual:
        arguments.update(language=language, task="transcribe")
    synchronize(model.device)
    start = time.perf_counter()
    tokens = model.generate(features, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **arguments)
    synchronize(model.device)
    seconds = time.perf_counter() - start
    return processor.batch_decode(tokens, skip_special_tokens=True), seconds


def word_errors(references, hypotheses):
    """`jiwer.process_words` of normalised texts, references that are empty then left out."""
    import jiwer

    normalize = EnglishTextNormalizer({})
    pairs = [(normalize(r), normalize(h)) for r, h in zip(references, hypotheses)]
    pairs = [(r, h) for r, h in pairs if r]
    return jiwer.process_words([r for r, _ in pairs], [h for _, h in pairs])


def configure(original, configuration, options):
    """A copy of the model on the device in one configuration, and the part of the row that names it."""
    model = copy.deepcopy(original).to(options.solve_on or options.device)
    if configuration in DENSE:
        dtype = DENSE[configuration]
        model = model.to(dtype)
        row = {"bits": 8 * dtype.itemsize, "group_size": None, "method": None, "backends": None}
    else:
        dtype = getattr(torch, options.dtype)
        model = model.to(dtype)
        bits, group_size, head_bits = (*configuration.split(":"), "", "")[:3]
        bits = float(bits) if "." in bits else int(bits)
        group_size, head_bits = (int(number) if number else None for number in (group_size, head_bits))
        arguments = {"method": options.method, "backend": options.backend, "head_bits": head_bits}
        whisper_static_cache.quantize_decoder(model, bits, group_size, progress=False, **arguments)
        model = model.to(options.device)
        linears = [m for m in model.model.decoder.modules() if hasattr(m, "requested_backend")]
        row = {"bits": bits, "group_size": linears[0].group_size, "head_bits": head_bits, "method": options.method}
        row["solved_on"] = str(options.solve_on or options.device)
        row["backends"] = sorted({linear.backend for linear in linears})
    model = model.to(options.device)
    footprint = whisper_static_cache.decoder_footprint(model)
    row["bits_per_weight"] = round(footprint.bits_per_weight, 3)
    row["linear_bytes"] = footprint.weights + footprint.scales
    row["decoder_bytes"] = footprint.total - footprint.caches
    row["dtype"] = str(dtype).removeprefix("torch.")
    return model, row


def cross_states(model, cross_dtype, rows):
    """The part of the row that says how the encoder's keys and values are held for `rows` recordings."""
    cache = whisper_static_cache.EncoderDecoderStaticCache(
        model.config, rows, device="meta", dtype=model.dtype, cross_dtype=cross_dtype
    )
    held = [buffer for layer in cache.layer_buffers for buffer in layer[2:]]
    name = None if cross_dtype is None else str(cross_dtype).removeprefix("torch.")
    return {"cross_dtype": name, "cross_bytes": sum(buffer.nbytes for buffer in held), "cache_rows": rows}


def measure(model, processor, recordings, style, options, cross_dtype=None):
    """Word errors and speed of one configuration on one set."""
    batches = [recordings[i : i + options.batch] for i in range(0, len(recordings), options.batch)]
    arguments = (style, options.max_new_tokens, options.language)
    if options.engine != "stock":
        whisper_static_cache.patch(model, engine=options.engine, cross_dtype=cross_dtype)
    try:
        for batch in {len(batch): batch for batch in batches}.values():
            transcribe(model, processor, batch, *arguments)
        texts, seconds = [], 0.0
        for batch in batches:
            found, elapsed = transcribe(model, processor, batch, *arguments)
            texts += found
            seconds += elapsed
        engine = "stock" if options.engine == "stock" else whisper_static_cache.last_run(model).engine
    finally:
        if options.engine != "stock":
            whisper_static_cache.unpatch(model)
    errors = word_errors([one.text for one in recordings], texts)
    audio = sum(len(one.samples) for one in recordings) / SAMPLING_RATE
    return {
        "wer": round(100 * errors.wer, 2),
        "substitutions": errors.substitutions,
        "deletions": errors.deletions,
        "insertions": errors.insertions,
        "words": errors.hits + errors.substitutions + errors.deletions,
        "recordings": len(recordings),
        "audio_seconds": round(audio, 2),
        "seconds": round(seconds, 3),
        "real_time_factor": round(audio / seconds, 2),
        "engine": engine,
        **({} if options.engine == "stock" else cross_states(model, cross_dtype, options.batch)),
    }


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny.en", "base"], help="as load_checkpoint takes them")
    parser.add_argument(
        "--configurations",
        nargs="+",
        default=["fp32", "8:64", "4:64", "3:32", "2:16", "1.58:16"],
        help="fp32, fp16, bf16, bits:group_size, or bits:group_size:head_bits",
    )
    parser.add_argument("--method", choices=("hqq", "rtn"), default="hqq")
    parser.add_argument("--backend", default="auto", help="as quantize_decoder takes it")
    parser.add_argument(
        "--cross-dtypes", nargs="+", choices=CROSS_DTYPES, default=["none"], help="as patch takes it; not with stock"
    )
    parser.add_argument("--styles", nargs="+", choices=("short", "long"), default=["short", "long"])
    parser.add_argument("--folder", type=Path, default=SPEECH, help="speech in LibriSpeech's layout")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, help="sets on the hub, instead of --folder")
    parser.add_argument("--limit", type=int, help="recordings to take of each set")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--engine", choices=("auto", "eager", "compile", "triton", "stock"), default="auto")
    parser.add_argument("--dtype", default="float32", help="of what is not quantised, beside bits:group_size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--solve-on", help="device to quantise on, if not --device: hqq solves in half on CUDA")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--language", default="en", help='of multilingual models; "" to let them detect it')
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    options = parser.parse_args(argv)
    if options.engine == "stock" and options.cross_dtypes != ["none"]:
        parser.error("--cross-dtypes is not for --engine stock: stock's cache has no such option")
    return options


def main():
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    # float32 means float32: cuDNN's convolutions in the encoder would take TF32 otherwise.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    facts = machine(torch.device(options.device))
    # A row names no folders of the machine it comes from.
    facts["command"] = " ".join(part.rsplit("/", 1)[-1] for part in facts["command"].split(" "))
    speech = read_speech(options)
    for name in options.models:
        original, processor = load_checkpoint(name)
        for configuration in options.configurations:
            model, described = configure(original, configuration, options)
            for ((source, style), recordings), cross_dtype in itertools.product(speech.items(), options.cross_dtypes):
                row = {"model": Path(name).name, "configuration": configuration, **described, "set": source}
                row.update(style=style, batch=options.batch, language=options.language)
                row.update(measure(model, processor, recordings, style, options, CROSS_DTYPES[cross_dtype]), **facts)
                print(json.dumps(row), flush=True)
                if options.output:
                    options.output.parent.mkdir(parents=True, exist_ok=True)
                    with options.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            del model
            gc.collect()


if __name__ == "__main__":
    main()
