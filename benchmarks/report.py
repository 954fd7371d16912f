"""Rewrite the measured tables of README.md from the rows in benchmarks/results.

python benchmarks/report.py            # rewrite
python benchmarks/report.py --check    # exit 1 if README.md is not what the rows give
"""

import argparse
import json
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SPEEDS = ("speed", "decoder_speed")
START, END = "<!-- measured:start -->\n", "<!-- measured:end -->"


def rows(pattern):
    """The rows of every results file that matches `pattern`, in order."""
    return [json.loads(line) for path in sorted(RESULTS.glob(pattern)) for line in path.read_text().splitlines()]


def commits_of(found):
    """The commits that rows were measured at."""
    return "commit " + ", ".join(dict.fromkeys(row.get("commit") or "not recorded" for row in found))


def table(header, lines):
    """A Markdown table."""
    return "\n".join(["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)])


def decode_section():
    """Decode speed on GPUs, ours beside stock's of the same run."""
    found = rows("decode_*.jsonl")
    gpus = sorted({row["gpu"] for row in found})
    return "\n".join(decode_table([row for row in found if row["gpu"] == gpu]) for gpu in gpus)


def first_call(row):
    """The cell of a process's first call: with the kernels to be built, or from disk."""
    if not row.get("first_in_process", "first_call_s" in row):
        return ""
    built = {True: ", kernels built", False: ", kernels on disk"}.get(row.get("kernels_built"), "")
    return f"{row['first_call_s']} s{built}"


def decode_table(found):
    """The table of one GPU."""
    lines = []
    case = ("shape", "bits", "head_bits", "batch", "timestamps", "dtype", "command", "commit")
    for row in found:
        if row["engine"].startswith("stock"):
            continue
        same = [r for r in found if r["engine"].startswith("stock") and all(r.get(k) == row.get(k) for k in case)]
        best = max((r["tok_s"] for r in same), default=None)
        agree = row.get("tokens_equal_to_first_case")
        name = f"{row['shape']}, " + (f"{row['bits']:g}:{row['group_size']}, " if row["group_size"] else "")
        name += f"head in {row['head_bits']} bits, " if row.get("head_bits") else ""
        name += f"{row['dtype']}, batch {row['batch']}" + (", timestamps" if row["timestamps"] else "")
        name += ", cross-attention in int8" if row.get("cross_dtype") else ""
        lines.append(
            [
                name,
                row["engine"],
                "" if best is None else f"{best:,.0f}",
                f"{row['tok_s']:,.0f}",
                "" if best is None else f"{row['tok_s'] / best:.2f}x",
                "" if agree is None else f"{agree:.0%}",
                f"{row['percent_of_copy_bandwidth']:.0f}%",
                f"{row['peak_memory_gib']:.2f} GiB",
                first_call(row),
                f"{row['window_ms']:.0f} ms" if "window_ms" in row else "",
                row["commit"],
            ]
        )
    first = found[0]
    machine = f"{first['gpu']}, torch {first['torch']}, transformers {first['transformers']}"
    header = [
        "case",
        "engine",
        "stock static, tok/s",
        "patched, tok/s",
        "ratio",
        "same tokens",
        "of the copy bandwidth",
        "peak memory",
        "first call",
        "a window",
        "commit",
    ]
    return (
        "Decoding on a GPU, random weights at the real shape, slope between 64 and 192 tokens; random weights in half "
        "precision make near-ties. Stock's figures are of the same run; the bandwidth is that of the bytes a step has "
        "to read; a first call is that of a process; a window is 30 s of samples to 128 tokens. "
        "Measured at the commit named "
        f"({machine}; `{first['command']}`, and so on: each row's own command stands with it in "
        f"benchmarks/results/decode_*.jsonl):\n\n{table(header, lines)}\n"
    )


def transcription_section():
    """Seconds to transcribe real speech on a CPU, ours beside stock's two paths."""
    found = rows("transcription_*.jsonl")
    if not found:
        return ""
    keys = list(dict.fromkeys((r["model"], r["measured"]) for r in found))
    lines = []
    for model, measured in keys:
        group = {r["engine"]: r for r in found if (r["model"], r["measured"]) == (model, measured)}
        what = "generate" if measured == "generate" else "decoder only"
        seconds = [f"{group[e]['seconds']:.2f} s" for e in ("stock-dynamic", "stock-static")]
        ours = [f"{group[e]['seconds']:.2f} s ({group[e]['speed_up_over_faster_stock']:.2f}x)" for e in group][2:]
        same = "yes" if all(r["tokens_identical"] for r in group.values()) else "no"
        lines.append([f"{model}, {what}", *seconds, *ours, same])
    first = found[0]
    machine = (
        f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}, transformers {first['transformers']}, "
        f"{commits_of(found)}"
    )
    header = ["model", "stock dynamic", "stock static", "patched eager", "patched compile", "tokens identical"]
    return (
        f"Real speech on a CPU, fp32, {first['files']} utterances, medians of {first['rounds']} turns in one run; in "
        f"brackets the speed-up over the faster stock path ({machine}; only the ratios carry over to another machine; "
        f"`{first['command']}`):\n\n{table(header, lines)}\n"
    )


def wer_section():
    """Word error rate by bits, short and long form."""
    found = rows("wer_*.jsonl")
    if not found:
        return ""
    chosen = {}
    for row in found:
        # hqq's solver runs in half precision on a GPU; where both are there, the row solved on the CPU is shown.
        key = row["model"], row["configuration"], row["style"]
        if key not in chosen or row["solved_on"] == "cpu":
            chosen[key] = row
    lines = []
    for model, config in dict.fromkeys(key[:2] for key in chosen):
        pair = [chosen.get((model, config, form)) for form in ("short", "long")]
        some = next(row for row in pair if row)
        wer = [f"{row['wer']:.2f}" if row else "not measured" for row in pair]
        size = f"{some['decoder_bytes'] / 2**20:.0f} MiB"
        lines.append([model, config, *wer, f"{some['bits_per_weight']:g}", size, some["solved_on"] or ""])
    lines.sort(key=lambda line: (line[0], line[1] != "fp32", -float(line[4])))
    machines = " and ".join(dict.fromkeys(row["gpu"] or "a CPU" for row in found))
    header = [
        "model",
        "bits:group",
        "WER short, %",
        "WER long, %",
        "bits a weight with scales",
        "decoder",
        "solved on",
    ]
    return (
        "Word error rate of quantised decoders, plain HQQ, greedy, on 50 utterances of LibriSpeech test-other, by "
        f"themselves and joined by chapter (fp32 arithmetic, on {machines}, {commits_of(found)} and not since; "
        f"benchmarks/results/wer_*.jsonl):\n\n"
        f"{table(header, lines)}\n\n"
        "![Word error rate against speed](benchmarks/results/wer.png)\n\n"
        "`benchmarks/results/wer.html` is the same with the facts of each point on hover.\n"
    )


def cpu_quantized_section():
    """A 4-bit decoder on a CPU beside float32 and faster-whisper."""
    found = rows("cpu_quantized.jsonl")
    if not found:
        return ""
    lines = []
    for row in found:
        ratios = [row.get(f"{what}_over_{other}") for other in ("fp32", "faster_whisper") for what in SPEEDS]
        grew, peak, decoder = (row[key] for key in ("process_grew_bytes", "process_peak_bytes", "decoder_bytes"))
        lines.append(
            [
                f"{row['model']}, {row['configuration']}",
                *("not measured" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
                "not told" if decoder is None else f"{decoder / 2**20:.0f} MiB",
                "not measured" if grew is None else f"{grew / 2**20:.0f} MiB",
                "not measured" if peak is None else f"{peak / 2**20:.0f} MiB",
                f"{row['wer']:.1f}",
            ]
        )
    first = found[0]
    header = [
        "model, decoder",
        "speed over fp32",
        "decoder's alone",
        "speed over faster-whisper int8",
        "decoder's alone",
        "decoder",
        "process grew",
        "process at most",
        "WER, %",
    ]
    return (
        "A 4-bit decoder on a CPU, beside fp32 and faster-whisper's int8 on the same audio, turn by turn in one run: "
        f"{first['files']} utterances of LibriSpeech test-other, greedy, medians of {first['rounds']} turns, on "
        f"`{first['engine']}`. The speed is from samples to text, with the encoder, which is float32 here and int8 "
        "there; the decoder's alone is without. The process, weighed apart from the timing, loads the checkpoint, "
        f"quantises, compiles and transcribes once ({first['cpu']}, {first['threads']} threads, torch "
        f"{first['torch']}, transformers {first['transformers']}, {commits_of(found)} and not since; "
        f"`{first['command']}`):\n\n{table(header, lines)}\n"
    )


def head_section():
    """Word error rate with the output head quantised as well."""
    found = rows("head_*.jsonl")
    if not found:
        return ""
    errors = {(row["model"], row["style"], row["head_bits"]): row for row in found}
    widths = list(dict.fromkeys(row["head_bits"] for row in found))
    lines = []
    for model, style in dict.fromkeys(key[:2] for key in errors):
        group = [errors[model, style, width] for width in widths]
        sizes = ", ".join(f"{row['decoder_bytes'] / 2**20:.0f}" for row in group)
        lines.append([f"{model}, {style}", *(f"{row['wer']:.2f}" for row in group), f"{sizes} MiB"])
    first = found[0]
    names = ["its own precision" if width is None else f"{width} bits" for width in widths]
    return (
        "The output head quantised as well (`head_bits`): word error rate in %, plain HQQ, the decoder in "
        f"{first['bits']:g}:{first['group_size']}, greedy, 50 utterances of LibriSpeech {first['set']}, by themselves "
        f"and joined by chapter ({first['dtype']} arithmetic, a CPU, torch {first['torch']}, transformers "
        f"{first['transformers']}, {commits_of(found)}; `{first['command']}`):\n\n"
        f"{table(['model, form', *(f'head in {name}' for name in names), 'decoder'], lines)}\n"
    )


# Decoder layers and d_model of the shapes whose saving is worked out (openai/whisper model cards).
CROSS_SHAPES = {"base": (6, 512), "small": (12, 768), "medium": (24, 1024), "large-v2": (32, 1280), "turbo": (4, 1280)}


def cross_section():
    """Word error rate with cross-attention in 8 bits, and the bytes that it saves."""
    found = rows("cross_int8_*.jsonl")
    if not found:
        return ""
    lines = []
    for row in found:
        if row["cross_dtype"] is None:
            continue
        same = "model", "configuration", "dtype", "style", "command"
        case = [row[key] for key in same]
        plain = next(other for other in found if other["cross_dtype"] is None and case == [other[key] for key in same])
        bits, group_size, head_bits = (*row["configuration"].split(":"), "", "")[:3]
        name = f"{bits}:{group_size}" if group_size else bits
        lines.append(
            [
                f"{row['model']}, {name}{f', head in {head_bits} bits' if head_bits else ''}, {row['style']}",
                f"{plain['wer']:.2f}",
                f"{row['wer']:.2f}",
                f"{row['wer'] - plain['wer']:+.2f}",
                f"{plain['seconds']:.1f} s",
                f"{row['seconds']:.1f} s",
            ]
        )
    sizes = []
    for name, (layers, width) in CROSS_SHAPES.items():
        # 1500 positions of keys and of values, with a scale of 2 bytes for each 64 of them in 8 bits.
        elements = 2 * layers * 1500 * width
        half, eight = elements * 2 / 1e6, elements * (1 + 2 / 64) / 1e6
        sizes.append([name, f"{half:.1f} MB", f"{eight:.1f} MB", f"{half - eight:.1f} MB"])
    first = found[0]
    commands = ", ".join(dict.fromkeys(f"`{row['command']}`" for row in found))
    engines = " and ".join(dict.fromkeys(f"`{row['engine']}`" for row in found))
    header = ["model, decoder, form", "WER, %", "WER with int8, %", "difference", "generate", "generate with int8"]
    return (
        "Cross-attention's keys and values in 8 bits (`patch(cross_dtype=torch.int8)`), greedy, 50 utterances of "
        f"LibriSpeech {first['set']}, by themselves and joined by chapter ({first['dtype']}, a CPU, "
        f"{first['threads']} thread, {engines}, batch {first['batch']}, torch {first['torch']}, "
        f"transformers {first['transformers']}, {commits_of(found)}; {commands}; other work "
        "shared the machine, so the seconds are rough):\n\n"
        f"{table(header, lines)}\n\n"
        "What a row of the cache holds for cross-attention, and a step reads of it, worked out from the shapes:\n\n"
        f"{table(['shape', 'in half precision', 'in 8 bits', 'saved'], sizes)}\n\n"
        "On `eager` and `compile` every step makes the full keys and values from the 8 bits and is the slower for it; "
        "only the `triton` engine's kernels read the 8 bits themselves. The GPU table above has both at batch 1 and "
        "16, where they save memory and, but for one row of 1.58 bits, time.\n"
    )


def quantising_section():
    """Seconds and memory of quantising a large decoder on a GPU."""
    found = rows("quantising_*.jsonl")
    if not found:
        return ""
    lines = []
    for row in found:
        peak, layer = row["peak_over_model_bytes"], row["layer_bytes"]
        name = f"{row['shape']}, {row['dtype']}, {row['bits']:g}:{row['group_size']}"
        name += f", head {row['head_bits']:g} bits" if row["head_bits"] else ""
        sizes = [f"{size / 2**20:,.0f} MiB" for size in (peak, layer, row["model_bytes"], row["after_bytes"])]
        lines.append([name, f"{row['seconds']:.2f} s", *sizes])
    first = found[0]
    commands = ", ".join(dict.fromkeys(f"`{row['command']}`" for row in found))
    versions = f"torch {first['torch']}, transformers {first['transformers']}"
    header = ["decoder", "quantised in", "peak above the model", "one layer", "model before", "after"]
    return (
        f"Quantising with hqq's solver on a GPU, random weights at the real shape ({first['gpu']}, {versions}, "
        f"{commits_of(found)} and not since; {commands}):\n\n"
        f"{table(header, lines)}\n"
    )


def releases_section():
    """Release by release: tests, parity, and speed beside that release's own."""
    tests = rows("releases_tests.jsonl")
    if not tests:
        return ""
    speeds = {row["release"]: row for row in rows("releases_speed.jsonl")}
    lines = []
    for row in tests:
        speed = speeds.get(row["release"])
        name = row["release"] if row["release"] == row["transformers"] else f"{row['release']}: {row['transformers']}"
        ratio = f"{speed['ratio']:.2f}x" if speed else "not measured"
        same = "not measured" if speed is None else "yes" if speed["tokens_identical"] else "no"
        counts = [str(row[key]) for key in ("passed", "skipped", "parity_identical")]
        lines.append([name, *counts, f"{row['seconds']} s", ratio, same])
    first = tests[0]
    where = f"torch {first['torch']}, Python {first['python']}, {commits_of(tests)}; `{first['command']}`"
    if speeds:
        one = next(iter(speeds.values()))
        load = max(row["load"] for row in speeds.values())
        where += (
            f"; speed: random weights of whisper-tiny.en's shape, fp32, {one['new_tokens']} tokens, {one['threads']} "
            f"thread, {one['engine']} engine, medians of {one['rounds']} turns, load of the machine up to {load:g}, "
            f"`{one['command']}`"
        )
    header = [
        "transformers",
        "tests passed",
        "skipped",
        "calls of `generate` with stock's result",
        "time",
        "decoder's speed beside stock's, CPU",
        "tokens identical",
    ]
    return (
        "Releases of transformers, each in an environment of its own, on tiny random models. Skipped, by name, is "
        f"what needs a GPU and what stock itself fails at or does not have on that release ({where}):\n\n"
        f"{table(header, lines)}\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    makers = (
        decode_section,
        transcription_section,
        cpu_quantized_section,
        wer_section,
        head_section,
        cross_section,
        quantising_section,
        releases_section,
    )
    sections = [section for section in (make() for make in makers) if section]
    new = before + START + "\n" + "\n".join(sections) + "\n" + END + after
    if options.check:
        sys.exit(new != text and "README.md differs from benchmarks/results: run python benchmarks/report.py")
    readme.write_text(new)


if __name__ == "__main__":
    main()
