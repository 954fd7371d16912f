"""Decode speed through `model.generate`, stock and patched, in one run.

    python benchmarks/decode_speed.py --shapes large-v2 turbo --cases stock-static compile --output rows.jsonl

Every case generates 64 and 192 forced tokens several times; the speed is the slope between the two medians, so that
the encoder, the prompt and the call itself cancel out. Weights are random at the real shape: speed needs no others.
Each case's tokens are compared with those of the run's first case, which should be stock; the share that agrees is
in the row, since in half precision random weights make near-ties. With `--bits` below 16 the decoder's linears are
rounded to that width, by plain rounding since the values do not matter, and stock's generate runs on them as it can;
with `--head-bits` the output head is, too.
One JSON line a case, with the machine and the versions. A first call counts as one where it is the process's first.

    python benchmarks/decode_speed.py --window --shapes large-v2 --cases stock-static triton

times a whole window besides: 30 s of samples, log-mel features on the device, encoder, prompt, 128 tokens, and their
ids on the host.

    python benchmarks/decode_speed.py --quantising --shapes large-v2 --bits 4 3 2 1.58 --head-bits 4

times `quantize_decoder` with hqq's solver instead, and on a GPU says by how much its peak passes the model's bytes.

    python benchmarks/decode_speed.py --breakdown --shapes large-v2 --bits 16 4

profiles the Triton engine's step kernel by kernel: the time from the end of the kernel before to its own end, so that
the kernels' times add up to the step although they overlap, and the bytes that it must read. Where all layers are one
persistent kernel, that one is named; `--by-kernels` has them apart.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

import whisper_static_cache
from whisper_static_cache.triton_engine import CHAINED_STEPS, TritonEngine


# d_model, layers of encoder and decoder, heads, mel bins, vocabulary (openai/whisper model cards).
SHAPES = {
    "tiny": (384, 4, 4, 6, 80, 51865),
    "base": (512, 6, 6, 8, 80, 51865),
    "small": (768, 12, 12, 12, 80, 51865),
    "medium": (1024, 24, 24, 16, 80, 51865),
    "large-v2": (1280, 32, 32, 20, 80, 51865),
    "turbo": (1280, 32, 4, 20, 128, 51866),
}
CROSS_DTYPES = {"none": None, "int8": torch.int8}
CASES = ("stock-dynamic", "stock-static", "eager", "compile", "triton")
SHORT, LONG, WINDOW = 64, 192, 128
# A case is timed for at least as long.
LEAST_SECONDS = 3
GROUP_SIZES = {8: 64, 4: 64, 3: 32, 2: 16, 1.58: 16}


def build_model(shape, device, dtype):
    """A Whisper model of the named shape with random weights, and a complete generation configuration."""
    d_model, encoder_layers, decoder_layers, heads, mel_bins, vocab_size = SHAPES[shape]
    config = WhisperConfig(
        d_model=d_model,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * d_model,
        decoder_ffn_dim=4 * d_model,
        num_mel_bins=mel_bins,
        vocab_size=vocab_size,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model = model.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(0.0, 0.03)
    model.tie_weights()
    no_timestamps = vocab_size - 1502
    model.generation_config = GenerationConfig(
        pad_token_id=50257,
        bos_token_id=50257,
        eos_token_id=50257,
        decoder_start_token_id=50258,
        is_multilingual=True,
        lang_to_id={"<|en|>": 50259},
        task_to_id={"transcribe": 50359, "translate": 50358},
        no_timestamps_token_id=no_timestamps,
        max_initial_timestamp_index=50,
        suppress_tokens=[1, 2, 7, 8, 9, 10, 14, 25],
        begin_suppress_tokens=[220, 50257],
        max_length=448,
        return_timestamps=False,
    )
    return model


def generate(model, states, tokens, timestamps, **arguments):
    """One window decoded to exactly `tokens` new tokens, from encoder states, or with None from `arguments`."""
    if states is not None:
        arguments["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
    return model.generate(
        # One inner call: a random model's timestamps would start windows that speech would not.
        force_unique_generate_call=True,
        language="en",
        task="transcribe",
        return_timestamps=timestamps,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        **arguments,
    )


def time_quantising(model, bits, group_size, head_bits):
    """Seconds that `quantize_decoder` takes, and its bytes on a GPU; returns its part of the row."""
    device = model.device
    layer = sum(p.numel() * p.element_size() for p in model.model.decoder.layers[0].parameters())
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    whisper_static_cache.quantize_decoder(model, bits, group_size, head_bits=head_bits, progress=False)
    synchronize(device)
    row = {"head_bits": head_bits, "seconds": round(time.perf_counter() - start, 2), "layer_bytes": layer}
    if device.type == "cuda":
        row["model_bytes"] = before
        row["peak_over_model_bytes"] = torch.cuda.max_memory_allocated(device) - before
        row["after_bytes"] = torch.cuda.memory_allocated(device)
    linears = [module for module in model.modules() if hasattr(module, "requested_backend")]
    return {**row, "linears": len(linears), "backends": sorted({linear.backend for linear in linears})}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_window(model, timestamps, repeats, **arguments):
    """Median seconds from 30 s of samples to the ids of `WINDOW` tokens on the host."""
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    samples = torch.randn(30 * extractor.sampling_rate, generator=torch.Generator().manual_seed(2)).mul(0.1).numpy()

    def transcribe():
        features = extractor(
            samples, sampling_rate=extractor.sampling_rate, return_tensors="pt", device=model.device.type
        ).input_features
        features = features.to(model.device, model.dtype)
        return generate(model, None, WINDOW, timestamps, input_features=features, **arguments).cpu()

    transcribe()
    times = []
    for _ in range(max(repeats, 5)):
        synchronize(model.device)
        start = time.perf_counter()
        transcribe()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def kernels_on_disk():
    """How many kernels Triton's cache has, where the persistent ones are kept, too."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


@contextlib.contextmanager
def never_chosen_timestamps(model):
    """Timestamps that random weights do not choose where none are asked for: their logits are zero, never the best.

    Of every two in a row `generate` makes a segment, by a dozen small kernels behind the loop. A row that happens to
    repeat them takes 80 us a token longer, none of it decoding.
    """
    first, head = model.generation_config.no_timestamps_token_id + 1, model.get_output_embeddings()
    weight = head.scales if hasattr(head, "packed") else head.weight.detach()
    kept = weight[first:].clone()
    weight[first:] = 0
    try:
        yield
    finally:
        weight[first:] = kept


def time_case(case, model, batch, timestamps, repeats, reference, cross_dtype=None, window=False):
    """Time one case; returns its part of the row, and the tokens it gave."""
    device, dtype = model.device, model.dtype
    generator = torch.Generator(device).manual_seed(1)
    shape = (batch, model.config.max_source_positions, model.config.d_model)
    states = torch.randn(shape, generator=generator, device=device).to(dtype)
    stock = case.startswith("stock")
    arguments = {"cache_implementation": "static"} if case == "stock-static" else {}
    if not stock:
        whisper_static_cache.patch(model, engine=case, cross_dtype=cross_dtype)
    try:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        kept, start = kernels_on_disk(), time.perf_counter()
        generate(model, states, SHORT, timestamps, **arguments)
        synchronize(device)
        first = time.perf_counter() - start
        tokens = generate(model, states, LONG, timestamps, **arguments)
        times = {SHORT: [], LONG: []}
        begun = time.perf_counter()
        # Of a fast model, 128 tokens take no longer than the host's own scatter: more of them then.
        while len(times[LONG]) < repeats or time.perf_counter() - begun < LEAST_SECONDS:
            for length, seconds in times.items():
                synchronize(device)
                start = time.perf_counter()
                generate(model, states, length, timestamps, **arguments)
                synchronize(device)
                seconds.append(time.perf_counter() - start)
        slope = (statistics.median(times[LONG]) - statistics.median(times[SHORT])) / (LONG - SHORT)
        row = {
            "engine": case,
            "ms_per_token": round(1000 * slope, 4),
            "tok_s": round(batch / slope, 1),
            "first_call_s": round(first, 2),
            "repeats": len(times[LONG]),
        }
        if device.type == "cuda":
            row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        if not stock:
            report = whisper_static_cache.last_run(model)
            row.update(served_by=report.engine, reason=report.reason, compiles_when_warm=report.compiles)
            if report.engine == "triton":
                row["kernels_built"] = kernels_on_disk() > kept
        if window and batch == 1:
            row.update(
                window_tokens=WINDOW, window_ms=round(1000 * time_window(model, timestamps, repeats, **arguments), 1)
            )
        if reference is not None:
            row["tokens_equal_to_first_case"] = round((tokens == reference).float().mean().item(), 4)
        return row, tokens
    finally:
        if not stock:
            whisper_static_cache.unpatch(model)


def linear_bytes(*modules):
    """Bytes of linears' weights, scales and zero points."""
    tensors = [t for m in modules for t in ((m.packed, m.scales, m.zeros) if hasattr(m, "packed") else (m.weight,))]
    return sum(t.numel() * t.element_size() for t in tensors)


def step_bytes(model, batch, cross_dtype=None):
    """Bytes that one step must read: decoder linears with their scales, output head, cross-attention K/V."""
    config, decoder = model.config, model.model.decoder
    # Cross-attention's own k and v are projected once a window, not once a step.
    once = {id(m) for layer in decoder.layers for m in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)}
    linears = [
        module for module in decoder.modules() if isinstance(module, torch.nn.Linear) or hasattr(module, "packed")
    ]
    total = linear_bytes(model.proj_out, *(module for module in linears if id(module) not in once))
    size = decoder.embed_positions.weight.element_size()
    vectors = 2 * batch * config.decoder_layers * config.max_source_positions * config.decoder_attention_heads
    head_dim = config.d_model // config.decoder_attention_heads
    # In 8 bits each vector of a head has a scale.
    return total + vectors * (size * head_dim if cross_dtype is None else head_dim + size)


def break_down(model, bandwidth, by_kernels=False, tokens=96):
    """Where one step of the Triton engine spends its time: a list of dicts, one a kind of kernel."""
    device, dtype = model.device, model.dtype
    decoder, layers = model.model.decoder, len(model.model.decoder.layers)
    states = torch.randn(1, model.config.max_source_positions, model.config.d_model, device=device).to(dtype)
    whisper_static_cache.patch(model, engine="triton")
    if by_kernels:
        # The engine takes the persistent kernel wherever it can.
        TritonEngine._whole = lambda *arguments: None
    try:
        generate(model, states, tokens, False)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            generate(model, states, tokens, False)
            synchronize(device)
        report = whisper_static_cache.last_run(model)
    finally:
        whisper_static_cache.unpatch(model)
    if report.engine != "triton":
        raise SystemExit(f"--breakdown needs the triton engine, but {report.engine} served: {report.reason}")

    first = decoder.layers[0]
    own, cross = first.self_attn, first.encoder_attn
    states_bytes = 2 * states.numel() * states.element_size()
    kinds = [
        ("query, key, value", linear_bytes(own.q_proj, own.k_proj, own.v_proj)),
        ("self-attention", 0),
        ("its output", linear_bytes(own.out_proj)),
        ("cross-attention's query", linear_bytes(cross.q_proj)),
        ("cross-attention", states_bytes),
        ("its output", linear_bytes(cross.out_proj)),
        ("fc1", linear_bytes(first.fc1)),
        ("fc2", linear_bytes(first.fc2)),
    ]
    names = ["embedding", *range(len(kinds)), "head", "best of each block", "choice"]
    order = [names[0], *list(range(len(kinds))) * layers, *names[-3:]]
    begins = "_embed", "_decode", "_best", "_choose", "decode_layers"
    kernels = [event for event in profiler.events() if event.name.startswith(begins)]
    kernels.sort(key=lambda event: event.time_range.start)
    starts = [i for i, event in enumerate(kernels) if event.name.startswith(("_embed", "decode_layers"))]
    one, following = (kernels[starts[-2] + i].name for i in range(2))
    several = 1
    if following.startswith("decode_layers"):
        # One kernel for several whole steps: the longest launches are those of as many as the engine chains.
        several, took = 2 * CHAINED_STEPS, [event.time_range.end - event.time_range.start for event in kernels]
        kernels = [event for event, us in zip(kernels, took) if us > max(took) / 2]
        starts = range(len(kernels) + 1)
        size = layers * sum(size for _, size in kinds) + linear_bytes(model.proj_out)
        kinds, names, order, layers = [("embedding, layers, head, choice", size)], [0], [0], 1
    elif one.startswith("decode_layers"):
        # One kernel for the embedding and all layers, and for the head if no kernel of its own comes next.
        size = layers * sum(size for _, size in kinds)
        if following.startswith("_best"):
            kinds, names = [("embedding, layers, head", size + linear_bytes(model.proj_out))], [0, *names[-2:]]
        else:
            kinds, names = [("embedding and layers", size)], [0, *names[-3:]]
        order, layers = names, 1
    # Whole steps with the choice of the token, the first ones aside.
    steps = [kernels[a:b] for a, b in itertools.pairwise(starts) if b - a == len(order)]
    steps = steps[8:] if several == 1 else steps
    total = dict.fromkeys(names, 0.0)
    for step in steps:
        last = step[0].time_range.start
        for name, event in zip(order, step):
            total[name] += event.time_range.end - last
            last = event.time_range.end
    rows = []
    for name in names:
        calls = layers if isinstance(name, int) else 1
        label, size = kinds[name] if isinstance(name, int) else (name, linear_bytes(model.proj_out) * (name == "head"))
        us = total[name] / (len(steps) * several)
        row = {"kernel": label, "calls": calls, "us": round(us, 1), "us_per_call": round(us / calls, 2)}
        row["bytes"] = size * calls
        row["percent_of_copy_bandwidth"] = round(100 * row["bytes"] / (us * 1e-6) / bandwidth, 1)
        rows.append(row)
    return {"steps": len(steps) * several, "us_per_step": round(sum(row["us"] for row in rows), 1), "kernels": rows}


def copy_bandwidth(device):
    """Bytes a second of a large device-to-device copy, read plus written; None on the CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(20):
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * source.numel() / statistics.median(times)


def machine(device):
    """What the figures were measured on."""

    def run(*command):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip() or None

    facts = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "package": whisper_static_cache.__version__,
        "commit": run("git", "rev-parse", "--short", "HEAD"),
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if device.type == "cuda":
        import triton

        facts["triton"] = triton.__version__
        facts["driver"] = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["turbo"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--timestamps", nargs="+", type=int, choices=(0, 1), default=[0])
    parser.add_argument("--bits", nargs="+", type=float, choices=(16, *GROUP_SIZES), default=[16])
    parser.add_argument("--group-size", type=int, help="of all widths below 16 bits, in place of each one's own")
    parser.add_argument(
        "--cross-dtypes", nargs="+", choices=CROSS_DTYPES, default=["none"], help="as patch takes it; stock has none"
    )
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="at least so many of each length, and three seconds")
    parser.add_argument("--window", action="store_true", help="time a window from its samples to its ids as well")
    parser.add_argument("--quantising", action="store_true", help="time quantize_decoder, not decoding")
    parser.add_argument("--breakdown", action="store_true", help="time the Triton engine's step kernel by kernel")
    parser.add_argument("--by-kernels", action="store_true", help="with --breakdown: without the persistent kernel")
    parser.add_argument("--head-bits", nargs="+", type=int, choices=(0, 8, 4, 3, 2), default=[0], help="0: no head")
    parser.add_argument("--output", type=Path, help="file to append JSON lines to")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    facts, first_in_process = machine(device), True

    def write(row):
        row.update(facts)
        print(json.dumps(row), flush=True)
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def group_size_of(bits):
        return None if bits == 16 else options.group_size or GROUP_SIZES[bits]

    if options.quantising:
        for shape, bits, head_bits in itertools.product(options.shapes, options.bits, options.head_bits):
            bits = bits if bits == 1.58 else int(bits)
            group_size = group_size_of(bits) or parser.error("--quantising needs --bits below 16")
            row = {"shape": shape, "bits": bits, "group_size": group_size, "dtype": options.dtype}
            model = build_model(shape, device, dtype)
            write({**row, **time_quantising(model, bits, group_size, head_bits or None)})
            del model
        return
    bandwidth = copy_bandwidth(device)
    for shape, bits, head_bits in itertools.product(options.shapes, options.bits, options.head_bits):
        model = build_model(shape, device, dtype)
        group_size = group_size_of(bits)
        of_model = {"shape": shape, "bits": 8 * dtype.itemsize, "group_size": group_size}
        if group_size:
            of_model["bits"] = bits if bits == 1.58 else int(bits)
            # Without a size each width has groups as by default, and the head by its own.
            arguments = {"method": "rtn", "backend": "torch", "progress": False, "head_bits": head_bits or None}
            whisper_static_cache.quantize_decoder(model, of_model["bits"], options.group_size, **arguments)
            if head_bits:
                of_model["head_bits"] = head_bits
        if options.breakdown:
            row = dict(of_model)
            row.update(engine="triton", dtype=options.dtype, copy_bandwidth_tb_s=round(bandwidth / 1e12, 3))
            write({**row, **break_down(model, bandwidth, options.by_kernels)})
            del model
            continue
        for batch, timestamps in itertools.product(options.batches, map(bool, options.timestamps)):
            reference = None
            for case, name in itertools.product(options.cases, options.cross_dtypes):
                cross_dtype = CROSS_DTYPES[name]
                if cross_dtype is not None and case.startswith("stock"):
                    continue
                with contextlib.nullcontext() if timestamps else never_chosen_timestamps(model):
                    measured, tokens = time_case(
                        case, model, batch, timestamps, options.repeats, reference, cross_dtype, options.window
                    )
                reference = tokens if reference is None else reference
                row = dict(of_model)
                row.update(batch=batch, timestamps=timestamps, dtype=options.dtype, **measured)
                if cross_dtype is not None:
                    row["cross_dtype"] = name
                row["bytes_per_step"] = step_bytes(model, batch, cross_dtype)
                if bandwidth:
                    achieved = row["bytes_per_step"] / (measured["ms_per_token"] / 1000)
                    row["copy_bandwidth_tb_s"] = round(bandwidth / 1e12, 3)
                    row["percent_of_copy_bandwidth"] = round(100 * achieved / bandwidth, 1)
                row["first_in_process"], first_in_process = first_in_process, False
                write(row)
        del model
        gc.collect()


if __name__ == "__main__":
    main()
