"""The persistent kernel's layers by themselves: versions of its source side by side, in one run.

    python benchmarks/layers_speed.py --bits 16 4 2
    python benchmarks/layers_speed.py --bits 4 --sources old.cu new.cu --defines A=1,B=2 A=2

Random weights at large-v2's shape, one row at 100 slots. Every version is compiled for every width with each of the
`--defines`, checked, and timed in turn with all others, `--rounds` times: two machines of a kind differ by more than
most changes are worth. A line each: the median, least and most microseconds of a launch, the error of the result
against float64, of its norm, and whether all launches gave the same bits. This is what the tables of NOTES.md hold.
"""

import argparse
import itertools
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from decode_speed import GROUP_SIZES, machine


sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.ops.test_decode_layers import Model
from whisper_static_cache.ops import decode_layers as ops


SLOT, LAUNCHES = 100, 20


class Version:
    """A source compiled for one model, and what was measured of it."""

    def __init__(self, name, code, model, stream):
        self.name, self.model, self.stream, self.times = name, model, stream, []
        self.kernel = ops._Kernel(model.shape, code)
        outputs, inputs = model.operands(SLOT, 0)
        self.keep = model.keep
        self.arguments = ops.arguments_for(*outputs, *inputs)

    def launch(self):
        self.kernel.launch(self.arguments, self.stream.cuda_stream)

    def check(self, expected):
        """The error of a launch, and whether five more give the same."""
        for tensor in self.model.work:
            tensor.zero_()
        self.model.gained.fill_(torch.nan)
        results = []
        for _ in range(6):
            torch.cuda.synchronize()
            self.launch()
            torch.cuda.synchronize()
            results.append(self.model.gained.clone())
        self.error = ((results[0].double() - expected).norm() / expected.norm()).item()
        self.same = all(torch.equal(result, results[0]) for result in results)

    def time(self):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.launch()
        start.record(self.stream)
        for _ in range(LAUNCHES):
            self.launch()
        end.record(self.stream)
        torch.cuda.synchronize()
        self.times.append(start.elapsed_time(end) * 1000 / LAUNCHES)


def shape_for(bits):
    properties = torch.cuda.get_device_properties(0)
    memory = properties.shared_memory_per_block_optin
    size = 1280, 5120, 32, 448, 1500, False, int(bits) if bits != 1.58 else bits, GROUP_SIZES.get(bits, 0)
    return ops.Shape(*size, properties.multi_processor_count, memory, bandwidth=ops.bandwidth_of(properties))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=float, choices=(16, *GROUP_SIZES), default=[16, 4])
    parser.add_argument("--sources", nargs="+", type=Path, default=[ops._SOURCE])
    parser.add_argument("--defines", nargs="+", default=[""], help="of each version, with commas between them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != ops.CAPABILITY:
        raise SystemExit(
            "layers_speed.py needs a GPU of compute capability 9.0, which the persistent kernel is made for."
        )
    torch.zeros(1, device="cuda")

    cases = list(itertools.product(options.bits, options.sources, options.defines))

    def compiled(case):
        bits, source, defines = case
        given = [f"-D{define}" for define in defines.split(",") if define]
        return ops.compile_source(source.read_text(), [*ops.compile_options(shape_for(bits)), *given])

    with ThreadPoolExecutor() as threads:
        codes = list(threads.map(compiled, cases))
    stream, versions, models = torch.cuda.Stream(), [], {}
    for (bits, source, defines), code in zip(cases, codes):
        if bits not in models:
            model = Model(shape_for(bits), "cuda")
            model.operands(SLOT, 0)
            models[bits] = model, model.expected(SLOT, 0)[0] * model.last_norm.double()
        model, expected = models[bits]
        versions.append(Version(" ".join([source.stem, defines]).strip(), code, model, stream))
        versions[-1].check(expected)
    for _ in range(options.rounds):
        for version in versions:
            version.time()

    facts = machine(torch.device("cuda"))
    for version in versions:
        shape = version.model.shape
        row = {
            "version": version.name,
            "bits": shape.bits,
            "us": round(statistics.median(version.times), 1),
            "us_least": round(min(version.times), 1),
            "us_most": round(max(version.times), 1),
            "error": float(f"{version.error:.2e}"),
            "same_bits": version.same,
        }
        print(json.dumps(row), flush=True)
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps({**row, **facts}) + "\n")


if __name__ == "__main__":
    main()
