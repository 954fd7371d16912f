"""All decoder layers of a one-token step at batch 1 as one persistent CUDA kernel: launcher and reference.

Between two kernels of a step the machine drains and fills, and a step of eight kernels a layer does so hundreds of
times. `decode_layers.cu` keeps one program on every multiprocessor for the whole step instead; it says how the
programs exchange their results. It is CUDA C++ because it rests on what Triton has no words for: bulk copies into
shared memory that run ahead of the arithmetic, and words that carry a value together with the number of its exchange.
NVRTC, which comes with torch, compiles it in about two seconds; the result is kept in Triton's cache.
"""

import ctypes
import functools
import glob
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F


HEAD_DIM = 64
THREADS = 512
# Shared memory beside the ring, at most.
_BESIDE_RING = 28 * 1024
MAX_SPLITS = 16
# Device pointers of a layer, in the order of the kernel's `Pointer`.
POINTERS = 24
_SOURCE = Path(__file__).with_suffix(".cu")
_COOPERATIVE_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Shape(NamedTuple):
    """What the kernel is compiled for."""

    width: int
    ffn: int
    heads: int
    layers: int
    slots: int
    source: int
    bfloat16: bool
    programs: int
    memory: int

    @property
    def splits(self):
        """Programs that share a head's keys."""
        return min(self.programs // self.heads, MAX_SPLITS)

    def rows(self, features):
        """Output features of a program, even."""
        return -(-features // self.programs) + -(-features // self.programs) % 2

    @property
    def stats_count(self):
        """Programs that leave sums for the layer norm of the head."""
        return -(-self.width // self.rows(self.width))


def shape_for(config, cache_layer, dtype, device):
    """The `Shape` of a model's step on `device`; `cache_layer` are the four buffers of a layer of the cache."""
    properties = torch.cuda.get_device_properties(device)
    return Shape(
        config.d_model,
        config.decoder_ffn_dim,
        config.decoder_attention_heads,
        config.decoder_layers,
        cache_layer[0].shape[2],
        cache_layer[2].shape[2],
        dtype == torch.bfloat16,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def why_not(shape, dtype, device):
    """Why the kernel cannot run a step of this shape, or None."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "bulk copies need compute capability 9.0 or later"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the tensor cores are fed float16 and bfloat16, not {dtype}"
    if shape.width != HEAD_DIM * shape.heads or shape.ffn % HEAD_DIM:
        return "heads are of 64 dimensions, and decoder_ffn_dim is a multiple of 64"
    if shape.splits < 1:
        return f"{shape.heads} heads exceed the {shape.programs} multiprocessors"
    if shape.width > 1920:
        return f"d_model {shape.width} exceeds 1920"
    chunks = [(max(shape.source, shape.slots) // shape.splits + 1) * 256]
    for features, depth in ((3 * shape.width, shape.width), (shape.ffn, shape.width), (shape.width, shape.ffn)):
        rows = shape.rows(features)
        most = 48 if depth == shape.width else 16
        if rows > most:
            return f"{rows} features to a multiprocessor exceed the {most} that its registers hold"
        chunks.append(rows * 2 * depth + 2 * shape.width + 1024)
    if max(chunks) > shape.memory - _BESIDE_RING:
        return "a product's weights exceed the shared memory of this GPU's multiprocessors"
    return None


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


def compile_options(shape, capability):
    """NVRTC's options for `shape` on a GPU of this compute capability."""
    defines = {
        "WIDTH": shape.width,
        "FFN": shape.ffn,
        "HEADS": shape.heads,
        "LAYERS": shape.layers,
        "SLOTS": shape.slots,
        "SOURCE": shape.source,
        "BF16": int(shape.bfloat16),
        "PROGRAMS": shape.programs,
        "SPLITS": shape.splits,
        "MEMORY": shape.memory,
    }
    return [
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}",
        "--std=c++17",
        "-default-device",
        *(f"-D{name}={value}" for name, value in defines.items()),
    ]


def _code(shape, capability):
    """The kernel's machine code, from Triton's cache where it was compiled before."""
    import hashlib

    from triton.runtime.cache import get_cache_manager

    source, options = _SOURCE.read_text(), compile_options(shape, capability)
    version = torch.version.cuda
    key = hashlib.sha256("\n".join([source, version, *options]).encode()).hexdigest()
    cache = get_cache_manager(key)
    kept = cache.get_file("decode_layers.cubin")
    if kept is not None:
        return Path(kept).read_bytes()
    code = compile_source(source, options)
    cache.put(code, "decode_layers.cubin", binary=True)
    return code


class _Arguments(ctypes.Structure):
    """The kernel's `Arguments`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("table", "stream", "heads", "partial", "mixed", "hidden")),
        *((name, ctypes.c_void_p) for name in ("exchange", "tokens", "length", "offset", "valid")),
        *((name, ctypes.c_void_p) for name in ("embedding", "positions", "last_gain", "gained", "stats", "eps")),
        ("scale", ctypes.c_float),
    ]


def _check(driver, status, what):
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: {(text.value or b'unknown error').decode()}")


class _Kernel:
    """The kernel for one `Shape`, loaded into the current context of one device."""

    def __init__(self, shape, capability):
        self._driver = driver = ctypes.CDLL("libcuda.so.1")
        code = _code(shape, capability)
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver, driver.cuModuleLoadData(ctypes.byref(module), code), "loading decode_layers")
        _check(
            driver,
            driver.cuModuleGetFunction(ctypes.byref(self._function), module, b"decode_layers"),
            "finding decode_layers",
        )
        _check(
            driver,
            driver.cuFuncSetAttribute(self._function, _COOPERATIVE_SHARED_MEMORY, shape.memory),
            "asking for shared memory",
        )
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
        return _Kernel(shape, torch.cuda.get_device_capability(device_index))


# -- The op -----------------------------------------------------------------------------------------------------------


def work_space(shape, device):
    """What the programs exchange their results through: int64 tensors, and the number of the next exchange.

    A session has its own; two launches with one of them must not overlap.
    """
    sizes = (
        shape.width,
        3 * shape.width,
        shape.heads * shape.splits * (HEAD_DIM + 2),
        shape.width // 2,
        shape.ffn // 2,
    )
    words = [torch.zeros(size, dtype=torch.int64, device=device) for size in sizes]
    return [*words, torch.ones(1, dtype=torch.int32, device=device)]


@torch.library.custom_op(
    "whisper_static_cache::decode_layers",
    mutates_args=("gained", "stats", "work", "caches"),
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
    last_gain: torch.Tensor,
    eps: torch.Tensor,
    scale: float,
    ffn: int,
) -> None:
    """The decoder from the newest token's embedding to the last layer norm, for one row.

    Args:
        gained: float32 ``(1, d_model)``, written: the last layer's result times the last layer norm's gain.
        stats: float32 ``(2, 1, programs)``, written: sums and sums of squares of the result, for `decode_linear`.
        work: what `work_space` gives; written.
        caches: keys, values, cross keys and cross values of every layer, ``(1, heads, slots, 64)``; the newest key and
            value are written into slot ``length - 1``.
        table: int64 ``(layers, 24)`` of device pointers, as `pointer_table` gives it.
        tokens: int64, the row's tokens.
        length: int64 ``(1,)``; position_offset: int64, subtracted from the slot to give the position.
        valid: bool, the row's slots that may be attended to.
        embedding, positions: ``(vocab_size, d_model)``, ``(max_target_positions, d_model)``, float16 or bfloat16.
        last_gain: ``(d_model,)``, the last layer norm's weight.
        eps: float32 ``(layers, 3)``, of the layer norms.
        scale: factor of the queries.
        ffn: width of the feed-forward layer.
    """
    shape = _shape_of(gained, caches, embedding, ffn)
    arguments = _Arguments(
        table.data_ptr(),
        *(words.data_ptr() for words in work),
        tokens.data_ptr(),
        length.data_ptr(),
        position_offset.data_ptr(),
        valid.data_ptr(),
        embedding.data_ptr(),
        positions.data_ptr(),
        last_gain.data_ptr(),
        gained.data_ptr(),
        stats.data_ptr(),
        eps.data_ptr(),
        scale,
    )
    kernel_for(shape, gained.device.index).launch(arguments, torch.cuda.current_stream(gained.device).cuda_stream)


@decode_layers.register_fake
def _(*args, **kwargs):
    return None


def _shape_of(gained, caches, embedding, ffn):
    properties = torch.cuda.get_device_properties(gained.device)
    width = gained.shape[1]
    return Shape(
        width,
        ffn,
        width // HEAD_DIM,
        len(caches) // 4,
        caches[0].shape[2],
        caches[2].shape[2],
        embedding.dtype == torch.bfloat16,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def pointer_table(rows):
    """The kernel's table of device pointers.

    Args:
        rows: for each layer the 24 tensors in the order of the kernel's `Pointer`; None for a bias that is not there.

    Returns:
        int64 ``(layers, 24)`` on the tensors' device. It does not keep the tensors alive.

    Raises:
        ValueError: a tensor that is not contiguous, or not aligned to 16 bytes.
    """
    for tensors in rows:
        for tensor in tensors:
            if tensor is not None and (not tensor.is_contiguous() or tensor.data_ptr() % 16):
                raise ValueError("weights must be contiguous and aligned to 16 bytes: clone them into new parameters")
    addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in tensors] for tensors in rows]
    return torch.tensor(addresses, dtype=torch.int64, device=rows[0][0].device)


def reference_decode_layer(x, layer, caches, slot, valid):
    """One layer in the dtype of `x`, ``(1, d_model)``, with the newest key and value in slot `slot` of the caches."""
    from .decode_attention import reference_decode_attention

    def linear(x, module):
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return F.linear(x, module.weight.to(x.dtype), bias)

    def normed(x, norm):
        return F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)

    keys, values, cross_keys, cross_values = caches
    own, cross = layer.self_attn, layer.encoder_attn
    hidden = normed(x, layer.self_attn_layer_norm)
    keys[0, :, slot] = linear(hidden, own.k_proj).view(-1, HEAD_DIM)
    values[0, :, slot] = linear(hidden, own.v_proj).view(-1, HEAD_DIM)
    length = torch.tensor([slot + 1], device=x.device)
    query = linear(hidden, own.q_proj) * own.scaling
    x = x + linear(reference_decode_attention(query, keys, values, length, valid), own.out_proj)
    query = linear(normed(x, layer.encoder_attn_layer_norm), cross.q_proj) * cross.scaling
    x = x + linear(reference_decode_attention(query, cross_keys, cross_values), cross.out_proj)
    return x + linear(F.gelu(linear(normed(x, layer.final_layer_norm), layer.fc1)), layer.fc2)
