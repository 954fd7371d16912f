"""All decoder layers of a one-token step as one persistent CUDA kernel: launcher and reference.

Of one row the head is part of it, too, and of packed weights the choice of the token and with it several steps.

Between two kernels of a step the machine drains and fills, and a step of eight kernels a layer does so hundreds of
times. `decode_layers.cu` keeps one program on every multiprocessor for the whole step instead; it says how the
programs exchange their results. It is CUDA C++ because it rests on what Triton has no words for: bulk copies into
shared memory that run ahead of the arithmetic, and words that tell by themselves whether they are new.
NVRTC, which comes with torch, compiles it; the result is kept in Triton's cache.
"""

import ctypes
import functools
import glob
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .packing import PLANES, plane_width


HEAD_DIM = 64
# Programs that a head's keys are split among at most: the kernel's buffers have so many runs to a head.
MAX_SPLITS = 8
# Widths of the head's weight that the kernel for one row knows.
HEAD_BITS = (16, 8, 4)
# Rows that the kernel for several takes at most.
MAX_ROWS = 16
# Device pointers of a layer, in the order of the kernel's table; with 8-bit cross-attention two more.
POINTERS = 40
# Threads of a program: eight warps that multiply, and four that fetch and finish.
THREADS = 384
# The compute capability whose instructions the kernel is made of.
CAPABILITY = (9, 0)
_SOURCE = Path(__file__).with_suffix(".cu")
_ROWS_SOURCE = _SOURCE.with_name("decode_rows.cu")
_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
# The kernel's own: keys of a run of self-attention, how often it publishes what every program reads, floats from one
# head's logarithms to the next one's, its warps that finish what is multiplied, sixteen features each.
_SELF_RUN = 128
_COPIES = 4
_LOGS = 32
_FINISHERS = 3
# Of the kernel for several rows: runs that a head's keys are in at most.
_MAX_RUNS = 4


def _ratio(a, b):
    return -(-a // b)


class Shape(NamedTuple):
    """What the kernel is compiled for.

    `bits` is 16 for weights in float16 or bfloat16, else the width of packed ones, all of one `group_size`;
    `programs` is the number of multiprocessors and `memory` a program's bytes of shared memory. Of the `batch` rows,
    `beams` have one input's cross-attention in common. `vocab` is the size of the vocabulary where the head is part of
    the kernel, else 0, and `head_bits` and `head_group_size` are of its weight; `chooses` says whether the choice of
    tokens is, too, with several steps to a launch.
    `bandwidth` is how many bytes the device's memory moves in a cycle of the multiprocessors' clock, at most.
    """

    width: int
    ffn: int
    layers: int
    slots: int
    source: int
    bfloat16: bool
    bits: float
    group_size: int
    programs: int
    memory: int
    batch: int = 1
    cross_int8: bool = False
    beams: int = 1
    vocab: int = 0
    chooses: bool = False
    bandwidth: int = 1693  # Of an H100: 3.35 TB/s at 1.98 GHz.
    head_bits: int = 16
    head_group_size: int = 0

    @property
    def heads(self):
        return self.width // HEAD_DIM

    @property
    def rows(self):
        """Output features of a program, where there are `width` of them."""
        return _ratio(self.width, 2 * self.programs) * 2

    @property
    def givers(self):
        """Programs that have some of `width` features; each leaves its sums for the layer norm of the head."""
        return _ratio(self.width, self.rows)

    @property
    def pace(self):
        """Bytes a cycle that a program asks for, at most, where there is one row.

        More would stand in front of what the programs exchange. Packed weights need less than the memory has, and a
        tenth less than that is the fastest, 12 on an H100; 16 bits need all of it, and a seventh more: 15 on an H100,
        and of 18, 20 and 28 on an H200 20 (`benchmarks/NOTES.md`).
        """
        return max(round(self.bandwidth / self.givers * (8 / 7 if self.bits == 16 else 9 / 10)), 1)

    @property
    def cross_splits(self):
        """Programs that share a head's keys of cross-attention."""
        splits = min(self.givers // self.heads, MAX_SPLITS)
        while splits > 1 and (splits - 1) * _ratio(self.source, splits) >= self.source:
            splits -= 1
        return splits


def bandwidth_of(properties):
    """`Shape.bandwidth` of a device with these properties: data moves twice in a cycle of the memory's clock.

    An H100's where the driver, or a torch too old, does not tell.
    """
    clocks = [getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width", "clock_rate")]
    if not all(clocks):
        return Shape._field_defaults["bandwidth"]
    memory_clock, bits, clock = clocks
    return max(round(memory_clock * 2 * bits / 8 / clock), 1)


def shape_for(config, cache_layer, weight, device, head=None, may_choose=False):
    """The `Shape` of a model's step on `device`.

    Args:
        config: the model's.
        cache_layer: the buffers of a layer of the cache.
        weight: a `decode_linear.Weight` of the decoder.
        device: a CUDA device.
        head: the head's `decode_linear.Weight` if it is to be part of the kernel.
        may_choose: whether the choice may be as well. It is where that is faster.
    """
    properties = torch.cuda.get_device_properties(device)
    return Shape(
        config.d_model,
        config.decoder_ffn_dim,
        config.decoder_layers,
        cache_layer[0].shape[2],
        cache_layer[2].shape[2],
        cache_layer[0].dtype == torch.bfloat16,
        weight.bits,
        weight.group_size,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        len(cache_layer[0]),
        cache_layer[2].dtype == torch.int8,
        len(cache_layer[0]) // len(cache_layer[2]),
        0 if head is None else head.out_features,
        # In 16 bits what it adds to the code costs more than it saves, if there are 32 layers (`benchmarks/NOTES.md`).
        may_choose and head is not None and weight.bits != 16,
        bandwidth_of(properties),
        *((16, 0) if head is None else (head.bits, head.group_size)),
    )


def why_not(shape, capability=CAPABILITY):
    """Why the kernel has no place for a step of this shape, or None. What else it needs, its compilation shows."""
    if capability != CAPABILITY:
        return f"the persistent kernel is made for compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    if shape.batch > MAX_ROWS:
        return f"{shape.batch} rows; the persistent kernel takes {MAX_ROWS}"
    if shape.width % HEAD_DIM or shape.ffn % HEAD_DIM:
        return "heads are of 64 dimensions, and decoder_ffn_dim is a multiple of 64"
    if shape.layers % 2:
        # The bits that tell new words from old ones would differ from launch to launch, and with them the last bits.
        return f"{shape.layers} layers; the persistent kernel takes an even number"
    if shape.rows > 16:
        return f"{shape.rows} features to a multiprocessor exceed the 16 of a tensor-core tile"
    ffn_programs = _ratio(shape.ffn, _ratio(shape.ffn, 8 * shape.programs) * 8)
    if ffn_programs > shape.givers:
        return f"{ffn_programs} multiprocessors share the hidden layer, but {shape.givers} have output features"
    if shape.batch == 1:
        chunks = _ratio(_ratio(shape.ffn, 8 * shape.programs) * 8, shape.rows)
        # Each lane of a warp plans the copies of one of the source's `PLANS` chunks; `fc2` has no more parts.
        plans = 6 + chunks + 2 * _ratio(shape.ffn, shape.width) + 1
        if _ratio(chunks * shape.rows, 16) > _FINISHERS or plans > 32:
            return f"decoder_ffn_dim {shape.ffn} is too much for {shape.programs} multiprocessors"
        splits = max(1, _ratio(shape.slots, _SELF_RUN))
        if shape.heads * splits > shape.givers or splits > MAX_SPLITS or not shape.cross_splits:
            return f"{shape.heads} heads are too many for {shape.programs} multiprocessors"
    if shape.bits == 3 and (shape.width % 128 or shape.ffn % 128):
        return "in 3 bits, widths are multiples of 128"
    if shape.bits != 16:
        if shape.group_size % 16:
            return f"group_size {shape.group_size} is no multiple of 16"
        if plane_width(PLANES[shape.bits][0], shape.width) % 32:
            return f"in {shape.bits} bits, a width of {shape.width} does not divide into runs of 32 bytes"
    return None


def why_no_head(weight, dtype):
    """Why the kernel for one row cannot have this head, a `decode_linear.Weight` of a model in `dtype`, or None."""
    packed = weight.scales is not None
    if weight.bits not in HEAD_BITS:
        return f"a head in {weight.bits:g} bits; the persistent kernel takes {', '.join(map(str, HEAD_BITS))}"
    if packed and weight.group_size % 16:
        return f"the head's group_size {weight.group_size} is no multiple of 16"
    if (weight.scales if packed else weight.values).dtype != dtype:
        return "the head is of another dtype than the layers"
    tensors = (weight.values, weight.scales, weight.zeros) if packed else (weight.values,)
    if any(tensor.data_ptr() % 16 or not tensor.is_contiguous() for tensor in tensors):
        return "the head is not contiguous or not aligned to 16 bytes"
    if weight.out_features >= 1 << 16:
        return f"{weight.out_features} tokens; the persistent kernel exchanges them as 16 bits"
    return None


def scales_fit(weights):
    """Whether the kernel for several rows can bring the integers of these `decode_linear.Weight` to halves.

    In float16 it multiplies scales by 512. No scale of weights that are numbers of use comes near the limit.
    """
    scales = [weight.scales for weight in weights if weight.scales is not None]
    scales = [scale for scale in scales if scale.dtype == torch.float16]
    return not scales or torch.stack([scale.abs().max() for scale in scales]).max().item() < 127


# -- Compiling and loading --------------------------------------------------------------------------------------------


@functools.cache
def _nvrtc():
    major = torch.version.cuda.split(".")[0]
    beside_torch = os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), "nvidia", "*", "lib")
    names = [f"libnvrtc.so.{major}", *glob.glob(os.path.join(beside_torch, f"libnvrtc.so.{major}*"))]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"libnvrtc.so.{major} was not found: install the nvidia-cuda-nvrtc package of torch's CUDA")


def compile_source(source, options):
    """Machine code of CUDA C++ `source` for NVRTC's `options`; RuntimeError with the compiler's words if it fails."""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"decode_layers.cu", 0, None, None):
        raise RuntimeError("NVRTC could not create a program")
    try:
        encoded = [option.encode() for option in options]
        failed = nvrtc.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
        size = ctypes.c_size_t()
        if failed:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"decode_layers.cu did not compile: {log.value.decode(errors='replace').strip()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def definitions(shape):
    """The constants that the source expects, by name."""
    return {
        "WIDTH": shape.width,
        "FFN": shape.ffn,
        "HEADS": shape.heads,
        "LAYERS": shape.layers,
        "SLOTS": shape.slots,
        "SOURCE": shape.source,
        "BATCH": shape.batch,
        "CROSS8": int(shape.cross_int8),
        "BEAMS": shape.beams,
        "VOCAB": shape.vocab,
        "HEAD_BITS": shape.head_bits,
        "HEAD_GROUP": max(shape.head_group_size, 1),
        "CHOOSES": int(shape.chooses),
        "CROSS_SPLITS": shape.cross_splits,
        "BF16": int(shape.bfloat16),
        "BITS": 158 if shape.bits == 1.58 else int(shape.bits),
        "GROUP": max(shape.group_size, 1),
        "PROGRAMS": shape.programs,
        "MEMORY": shape.memory,
        "PACE": shape.pace,
    }


def source_of(shape):
    """The kernel's source for `shape`."""
    source = _SOURCE.read_text()
    return source if shape.batch == 1 else source + _ROWS_SOURCE.read_text()


def compile_options(shape):
    """NVRTC's options for `shape`."""
    defines = [f"-D{name}={value}" for name, value in definitions(shape).items()]
    # With "a", what this very architecture has and no later one: registers handed from warps to warps.
    return ["--gpu-architecture=sm_90a", "--std=c++17", "-default-device", *defines]


def _code(shape):
    """The kernel's machine code, from Triton's cache where it was compiled before."""
    import hashlib

    from triton.runtime.cache import get_cache_manager

    source, options = source_of(shape), compile_options(shape)
    key = hashlib.sha256("\n".join([source, torch.version.cuda, *options]).encode()).hexdigest()
    cache = get_cache_manager(key)
    kept = cache.get_file("decode_layers.cubin")
    if kept is not None:
        return Path(kept).read_bytes()
    code = compile_source(source, options)
    cache.put(code, "decode_layers.cubin", binary=True)
    return code


class Arguments(ctypes.Structure):
    """The kernel's `Arguments`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("table", "stream", "heads", "query", "stats")),
        *((name, ctypes.c_void_p) for name in ("own_runs", "cross_runs", "own_logs", "cross_logs", "hidden")),
        *((name, ctypes.c_void_p) for name in ("result", "choices", "tokens", "length", "offset", "valid")),
        *((name, ctypes.c_void_p) for name in ("embedding", "positions", "first_gain", "gained", "last_stats")),
        *((name, ctypes.c_void_p) for name in ("eps", "finished", "logits")),
        *((name, ctypes.c_void_p) for name in ("head", "last_gain", "head_constant", "head_folded")),
        *((name, ctypes.c_void_p) for name in ("head_scales", "head_zeros")),
        *((name, ctypes.c_void_p) for name in ("logprobs", "unfinished", "steps", "seen", "marks", "rules", "ends")),
        *((name, ctypes.c_float) for name in ("scale", "head_eps")),
        *((name, ctypes.c_int) for name in ("count", "token_stride", "valid_stride")),
    ]


def _check(driver, status, what):
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: {(text.value or b'unknown error').decode()}")


class _Kernel:
    """The machine code for one `Shape`, loaded into the current context of one device."""

    def __init__(self, shape, code):
        self._driver = driver = ctypes.CDLL("libcuda.so.1")
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver, driver.cuModuleLoadData(ctypes.byref(module), code), "loading decode_layers")
        found = driver.cuModuleGetFunction(ctypes.byref(self._function), module, b"decode_layers")
        _check(driver, found, "finding decode_layers")
        asked = driver.cuFuncSetAttribute(self._function, _DYNAMIC_SHARED_MEMORY, shape.memory)
        _check(driver, asked, "asking for shared memory")
        self._shape = shape

    def launch(self, arguments, stream):
        # Cooperative: programs wait for each other, so that all of them must be resident together, or none.
        parameters = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.byref(arguments), ctypes.c_void_p))
        status = self._driver.cuLaunchCooperativeKernel(
            self._function,
            *(self._shape.programs, 1, 1),
            *(THREADS, 1, 1),
            self._shape.memory,
            ctypes.c_void_p(stream),
            parameters,
        )
        _check(self._driver, status, "launching decode_layers")


@functools.cache
def kernel_for(shape, device_index):
    """The kernel of this shape on this device, compiled and loaded at the first call.

    Raises:
        RuntimeError: it could not be compiled or loaded.
    """
    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # The device's context exists from here on.
        return _Kernel(shape, _code(shape))


# -- The op -----------------------------------------------------------------------------------------------------------


def work_space(shape, device):
    """What the programs exchange their results through: int16 tensors, zeros before the first launch.

    A session has its own; two launches with one of them must not overlap.
    """
    runs = shape.heads * (MAX_SPLITS if shape.batch == 1 else _MAX_RUNS) * HEAD_DIM
    logs = shape.heads * _LOGS * 2
    # Of one row, who multiplies adds up the moments of the stream.
    moments = 4 * (shape.givers + shape.givers % 2) if shape.batch > 1 else 0
    copied = 2 * shape.width, moments, runs, runs, logs, logs, shape.ffn
    copies = _COPIES if shape.batch == 1 else 1
    stream, stats, *others = (copies * size * shape.batch for size in copied)
    result, choices = (2 * copies * size if shape.vocab else 0 for size in (shape.width, 4 * shape.givers))
    sizes = stream, 6 * shape.width * shape.batch, 2 * shape.width * shape.batch, stats, *others, result, choices
    return [torch.zeros(size, dtype=torch.int16, device=device) for size in sizes]


def arguments_for(gained, stats, work, table, tokens, length, position_offset, valid, embedding, positions,
                  first_gain, eps, scale, finished, logits, head, last_gain, head_constant, head_folded,
                  head_scales, head_zeros, head_eps, *choice, count):  # fmt: skip
    """`Arguments` with the addresses of the tensors that `decode_layers` takes."""
    tensors = (
        *(table, *work, tokens, length, position_offset, valid, embedding, positions, first_gain, gained, stats, eps),
        *(finished, logits, head, last_gain, head_constant, head_folded, head_scales, head_zeros, *choice),
    )
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    return Arguments(*addresses, scale, head_eps, count, tokens.stride(0), valid.stride(0))


@torch.library.custom_op(
    "whisper_static_cache::decode_layers",
    mutates_args=(
        *("gained", "stats", "work", "caches", "tokens", "length", "finished", "logits"),
        *("logprobs", "unfinished", "steps", "seen"),
    ),
    device_types="cuda",
)
def decode_layers(
    gained: torch.Tensor,
    stats: torch.Tensor,
    work: list[torch.Tensor],
    caches: list[torch.Tensor],
    table: torch.Tensor,
    tokens: torch.Tensor,
    length: torch.Tensor,
    position_offset: torch.Tensor,
    valid: torch.Tensor,
    embedding: torch.Tensor,
    positions: torch.Tensor,
    first_gain: torch.Tensor,
    eps: torch.Tensor,
    scale: float,
    ffn: int,
    bits: float,
    group_size: int,
    finished: torch.Tensor,
    logits: torch.Tensor | None,
    head: torch.Tensor | None,
    last_gain: torch.Tensor | None,
    head_constant: torch.Tensor | None,
    head_folded: torch.Tensor | None,
    head_scales: torch.Tensor | None,
    head_zeros: torch.Tensor | None,
    head_bits: int,
    head_group_size: int,
    head_eps: float,
    logprobs: torch.Tensor | None,
    unfinished: torch.Tensor | None,
    steps: torch.Tensor | None,
    seen: torch.Tensor | None,
    marks: torch.Tensor | None,
    rules: torch.Tensor | None,
    ends: torch.Tensor | None,
    count: int,
) -> None:
    """The decoder from the newest token's embedding to the last layer norm or, of one row, to the logits or tokens.

    Args:
        gained: float32 ``(rows, d_model)``, written if `head` is None: the last layer's result times the last layer
            norm's gain.
        stats: float32 ``(2, rows, programs)``, written if `head` is None: sums and sums of squares of the result, for
            `decode_linear`; `Shape.givers` is the number of programs.
        work: what `work_space` gives; written.
        caches: keys, values, cross keys and cross values of every layer, ``(rows, heads, slots, 64)``; with the latter
            two in int8, their scales ``(rows, heads, slots)`` behind them. The newest key and value are written into
            slot ``length - 1``.
        table: int64 ``(layers, 40)`` of device pointers, as `pointer_table` gives it.
        tokens: int64 ``(rows, tokens)``.
        length: int64 ``(1,)``; position_offset: int64 ``(rows, 1)``, subtracted from the slot to give the position.
        valid: bool ``(rows, slots)``, the slots that may be attended to.
        embedding, positions: ``(vocab_size, d_model)``, ``(max_target_positions, d_model)``, float16 or bfloat16.
        first_gain: ``(d_model,)``, the weight of the first layer norm.
        eps: float32 ``(layers, 3)``, of the layer norms.
        scale: factor of the queries.
        ffn: width of the feed-forward layer.
        bits, group_size: of the weights, 16 and 0 where they are not quantised.
        finished: uint8 ``(1,)``: where it is not 0, nothing is done, but that `seen` tells so if `count` is not 0.
        logits: ``(1, vocab_size or more)`` in the dtype of `embedding`, written if `head` is given.
        head: ``(vocab_size, d_model)`` in that dtype, or in 8 or 4 bits as packed by `ops.packing`, contiguous and
            aligned to 16 bytes, or None.
        last_gain, head_constant, head_folded, head_eps: the last layer norm's weight, what `decode_linear.fold_norms`
            makes of it for `head`, and its eps.
        head_scales, head_zeros: ``(vocab_size, d_model // head_group_size)`` in that dtype, contiguous and aligned to
            16 bytes, or None where `head` is not packed.
        head_bits, head_group_size: of `head`, 16 and 0 where it is not packed.
        logprobs, unfinished, steps, seen, marks, rules, ends: what `decode_tokens.choose_next` writes and chooses
            tokens by, with `marks` for its `table`; `tokens`, `length` and `finished` are written, too.
            Without them the kernel is another, which only gives logits.
        count: how many tokens are chosen, each but the last one fed to the next step, or fewer if one of them ends the
            row; 0 where only logits are wanted.

    Raises:
        ValueError: `count` is not 0, but what tokens are chosen by is not given.
    """
    if count and marks is None:
        raise ValueError(f"count={count}, but tokens cannot be chosen without rules: pass marks and what goes with it")
    properties = torch.cuda.get_device_properties(gained.device)
    cross_int8 = caches[2].dtype == torch.int8
    shape = Shape(
        gained.shape[1],
        ffn,
        len(caches) // (6 if cross_int8 else 4),
        caches[0].shape[2],
        caches[2].shape[2],
        embedding.dtype == torch.bfloat16,
        bits,
        group_size,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        len(gained),
        cross_int8,
        len(caches[0]) // len(caches[2]),
        0 if head is None else len(head),
        marks is not None,
        bandwidth_of(properties),
        head_bits,
        head_group_size,
    )
    arguments = arguments_for(
        gained,
        stats,
        work,
        table,
        tokens,
        length,
        position_offset,
        valid,
        embedding,
        positions,
        first_gain,
        eps,
        scale,
        finished,
        logits,
        head,
        last_gain,
        head_constant,
        head_folded,
        head_scales,
        head_zeros,
        head_eps,
        *(logprobs, unfinished, steps, seen, marks, rules, ends),
        count=count,
    )
    from .launch import compiling

    kernel = kernel_for(shape, gained.device.index)
    if not compiling():
        kernel.launch(arguments, torch.cuda.current_stream(gained.device).cuda_stream)


@decode_layers.register_fake
def _(*args, **kwargs):
    return None


def pointer_table(rows):
    """The kernel's table of device pointers.

    Args:
        rows: for each layer the 40 tensors in the order of the kernel's table: weights of query, key, value, output,
            cross query, cross output, fc1 and fc2, then their scales and zero points (None in 16 bits); constants and
            folded vectors (`decode_linear.fold_norms`) of the products behind a layer norm; biases of the three
            others, and the gains of the layer norms behind them; keys, values, cross keys and cross values, and the
            scales of these two where they are in 8 bits.

    Returns:
        int64 ``(layers, 40)``, or 42, on the tensors' device. It does not keep the tensors alive.

    Raises:
        ValueError: a tensor that is not contiguous, or not aligned to 16 bytes.
    """
    for tensors in rows:
        for tensor in tensors:
            if tensor is not None and (not tensor.is_contiguous() or tensor.data_ptr() % 16):
                raise ValueError("weights must be contiguous and aligned to 16 bytes: clone them into new parameters")
    addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in tensors] for tensors in rows]
    return torch.tensor(addresses, dtype=torch.int64).to(rows[0][0].device)


def reference_decode_layer(x, weights, vectors, norms, caches, slot, valid, scale):
    """One layer in the dtype of `x`, ``(rows, d_model)``, with the newest key and value in slot `slot` of the caches.

    Args:
        weights: eight matrices in the order of `pointer_table`.
        vectors: their biases, None where there is none.
        norms: three triples of weight, bias and eps.
        caches: keys, values, cross keys, cross values, ``(rows, heads, slots, 64)``; the newest entries are written.
        slot: where the token stands.
        valid: bool ``(rows, slots)``.
        scale: factor of the queries.
    """
    from .decode_attention import reference_decode_attention

    def linear(x, index):
        bias = vectors[index]
        return F.linear(x, weights[index].to(x.dtype), None if bias is None else bias.to(x.dtype))

    def normed(x, index):
        weight, bias, eps = norms[index]
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)

    keys, values, cross_keys, cross_values = caches
    hidden = normed(x, 0)
    keys[:, :, slot] = linear(hidden, 1).view(len(x), -1, HEAD_DIM).to(keys.dtype)
    values[:, :, slot] = linear(hidden, 2).view(len(x), -1, HEAD_DIM).to(values.dtype)
    length = torch.tensor([slot + 1], device=x.device)
    own = reference_decode_attention(linear(hidden, 0) * scale, keys, values, length, valid)
    x = x + linear(own, 3)
    cross = reference_decode_attention(linear(normed(x, 1), 4) * scale, cross_keys, cross_values)
    x = x + linear(cross, 5)
    return x + linear(F.gelu(linear(normed(x, 2), 6)), 7)
