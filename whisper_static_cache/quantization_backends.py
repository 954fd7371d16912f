"""Kernels that multiply by a quantised weight, as rows of a registry.

Each row says what it can serve, or why not. The integers, scales and zero points that a `QuantizedLinear` stores are
the same whatever runs on them; a row may keep a second copy in the layout of its kernel, which is rebuilt when the
module moves and never saved.
"""

import importlib.util
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .ops.packing import LEVELS, segments


# Above this many rows a packed kernel, made for the decode step, is slower than one dequantisation and a dense
# product.
MAX_KERNEL_ROWS = 64

# The width in which gemlite holds each of ours.
GEMLITE_BITS = {8: 8, 4: 4, 3: 4, 2: 2, 1.58: 2}


class LinearSpec(NamedTuple):
    """What a kernel has to know of a quantised linear before it can promise to serve it.

    `dtype` is the one the product is computed in, `device` a torch.device.
    """

    in_features: int
    out_features: int
    bits: float
    group_size: int
    dtype: torch.dtype
    device: torch.device


def _pad_rows(tensor, multiple):
    """`tensor` with zero rows appended until their number is a multiple of `multiple`."""
    return F.pad(tensor, (0, 0, 0, -tensor.shape[0] % multiple))


class TorchBackend:
    """Dequantise and multiply, in plain PyTorch: every device, dtype, width and group size.

    Inside `torch.compile` a few rows of activations are multiplied by the digits as they are unpacked, a form that the
    compiler turns into one pass over the packed bytes, with no dequantised matrix in memory.
    """

    name = "torch"
    # Each row of activations repeats the unpacking, so that the dense product wins beyond a few.
    max_fused_rows = 8

    def why_not(self, spec):
        return None

    def is_fast(self, spec):
        return True

    def layout(self, linear):
        return {}

    def product(self, linear, x):
        rows = x.numel() // x.shape[-1]
        if torch.compiler.is_compiling() and rows <= self.max_fused_rows:
            return self._fused(linear, x)
        return F.linear(x, linear.dequantize())

    def _fused(self, linear, x):
        runs = segments(linear.packed, linear.bits, linear.in_features)
        # Where a run holds whole groups the compiler vectorises over its elements. Where groups straddle runs, as with
        # 3 bits and 384 inputs, it does so only over chunks that lie in one group: without them, 3 times the time.
        chunk = math.gcd(linear.group_size, *(values.shape[1] for _, values in runs))
        if chunk == linear.group_size:
            chunk = 1
        flat = x.reshape(-1, 1, linear.in_features // chunk, chunk).float()
        expanded = (*linear.scales.shape, linear.group_size // chunk)
        scales = linear.scales[..., None].expand(expanded).reshape(linear.out_features, -1, 1)
        zeros = linear.zeros[..., None].expand(expanded).reshape(linear.out_features, -1, 1)
        products = {}
        for first, values in runs:
            span = slice(first // chunk, (first + values.shape[1]) // chunk)
            weight = values.reshape(linear.out_features, -1, chunk).to(scales.dtype)
            weight = (weight - zeros[:, span]) * scales[:, span]
            products.setdefault(values.shape[1], []).append(flat[..., span, :] * weight.float())
        # Runs of one length are added up before the sum over elements, so that each byte is read once.
        total = sum(sum(same).sum((-2, -1)) for same in products.values())
        return total.to(x.dtype).reshape(*x.shape[:-1], linear.out_features)


class Int4Backend:
    """PyTorch's own int4 kernels, the ones that torchao's tinygemm layouts use: CUDA in bfloat16, and the CPU.

    Both compute ``w = (q - 8) * scale + offset``, so that ``offset = (8 - zero) * scale``. Widths below 4 bits run in
    the same kernel, their integers moved to the middle of its range, where offsets are small and lose least to
    rounding.
    """

    name = "torchao"
    group_sizes = (32, 64, 128, 256)

    def why_not(self, spec):
        if spec.bits > 4:
            return f"the int4 kernels hold no {spec.bits}-bit integers; use backend='torch'"
        if spec.group_size not in self.group_sizes:
            return f"the int4 kernels take group sizes 32, 64, 128 and 256, not {spec.group_size}"
        if spec.device.type == "cpu":
            if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
                return "this torch has no int4 kernel for the CPU; upgrade torch to 2.6 or later"
            if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                return f"the CPU int4 kernel computes in float32, bfloat16 or float16, not {spec.dtype}"
            return None
        if spec.device.type == "cuda":
            if torch.version.hip is not None or torch.cuda.get_device_capability(spec.device) < (8, 0):
                return "the CUDA int4 kernel needs an NVIDIA GPU of compute capability 8.0 or later"
            if spec.dtype != torch.bfloat16:
                return f"the CUDA int4 kernel computes in bfloat16, not {spec.dtype}; set compute_dtype=torch.bfloat16"
            return None
        return f"the int4 kernels run on cpu and cuda, not {spec.device.type}"

    def is_fast(self, spec):
        # On the CPU only bfloat16 is vectorised: float32 and float16 go through a scalar loop, measured at some 15
        # times the time of the dense float32 product.
        if spec.device.type == "cpu":
            return spec.dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        return True

    def layout(self, linear):
        half = LEVELS[linear.bits] // 2
        values = linear.integers() + (8 - half)
        scales = linear.scales.float()
        offsets = (half - linear.zeros.float()) * scales
        table = torch.stack((scales, offsets), dim=-1).to(linear.scales.dtype)
        table = F.pad(table, (0, 0, 0, 0, 0, -len(table) % 16)).transpose(0, 1).contiguous()
        values = _pad_rows(values, 16)
        if values.device.type == "cpu":
            weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.to(torch.int32), 1)
        else:
            # The kernel wants the even element of a pair in the high half of the byte.
            pairs = (values[:, ::2] << 4) | values[:, 1::2]
            tiles = next(tiles for tiles in (8, 4, 2) if linear.in_features % (16 * tiles) == 0)
            weight = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
        return {"kernel_weight": weight, "kernel_table": table}

    def product(self, linear, x):
        flat = x.reshape(-1, linear.in_features)
        if flat.shape[0] > MAX_KERNEL_ROWS:
            return F.linear(x, linear.dequantize())
        on_cpu = x.device.type == "cpu"
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu if on_cpu else torch.ops.aten._weight_int4pack_mm
        out = kernel(flat.contiguous(), linear.kernel_weight, linear.group_size, linear.kernel_table)
        return out[:, : linear.out_features].reshape(*x.shape[:-1], linear.out_features)


class GemliteBackend:
    """Triton kernels of the gemlite package (0.6): CUDA, 8, 4 and 2 bits; 3 bits run as 4, and ternary digits as 2.

    Only on request: gemlite tunes itself for every shape and number of rows, which took half a minute a linear on an
    H100. Its accuracy is that of 16-bit scales and offsets and of partial sums added up in 16 bits.
    """

    name = "gemlite"

    def why_not(self, spec):
        if spec.device.type != "cuda":
            return f"gemlite's kernels run on cuda, not {spec.device.type}; move the model or use backend='torch'"
        if importlib.util.find_spec("gemlite") is None:
            return "the gemlite package is not installed; pip install 'gemlite>=0.6'"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"gemlite computes in float16 or bfloat16, not {spec.dtype}; set compute_dtype=torch.float16"
        if spec.in_features % 32:
            return f"gemlite needs in_features divisible by 32, not {spec.in_features}"
        if spec.group_size < 32:
            # They read one scale for 32 inputs, whatever the group size, and answer wrongly without a word.
            return f"gemlite's matrix kernels need groups of 32 inputs or more, not {spec.group_size}"
        return None

    def is_fast(self, spec):
        # `auto` does not take half a minute of tuning for every shape, for a gain that is not measured.
        return False

    def layout(self, linear):
        from gemlite.helper import A16Wn

        # Its matrix-vector kernels read the scales of a whole tile without a mask, so that the output head of 51,865
        # rows is rounded up to whole tiles.
        packed = A16Wn(device=linear.packed.device, dtype=linear.scales.dtype).from_weights(
            _pad_rows(linear.integers(), 128),
            _pad_rows(linear.scales, 128),
            _pad_rows(linear.zeros, 128),
            GEMLITE_BITS[linear.bits],
            linear.group_size,
        )
        weight, scales, zeros, meta_scale = packed.get_tensor_args()
        linear.kernel_arguments = packed.get_meta_args()
        # Where the inputs are no multiple of what its split-K programs take in a round, up to 16 groups, they read the
        # scales of groups that are not there, without a mask: a NaN in the memory behind the table times a masked zero
        # is a NaN in the product. Groups of zeros are there for them to read, and one more for tiles wider than a row.
        spare = -scales.shape[0] % 16 + 1
        return {
            "kernel_weight": weight.detach(),
            "kernel_table": F.pad(scales.detach(), (0, 0, 0, spare)),
            "kernel_zeros": F.pad(zeros.detach(), (0, 0, 0, spare)),
            "kernel_scale": meta_scale.detach(),
        }

    def product(self, linear, x):
        if x.numel() // x.shape[-1] > MAX_KERNEL_ROWS:
            return F.linear(x, linear.dequantize())
        tensors = [linear.kernel_weight, linear.kernel_table, linear.kernel_zeros, linear.kernel_scale]
        out = torch.ops.gemlite.forward_functional(x.contiguous(), None, tensors, linear.kernel_arguments, -1)
        return out[..., : linear.out_features]


# In the order in which `auto` asks them: the first that can serve a linear, and is fast at it, gets it.
BACKENDS = {backend.name: backend for backend in (GemliteBackend(), Int4Backend(), TorchBackend())}


def select_backend(requested, spec):
    """The name of the backend that serves `spec`, and the reason if the one asked for cannot.

    Args:
        requested: "auto" or a name of `BACKENDS`.
        spec: `LinearSpec`.

    Returns:
        ``(name, None)``, or ``(None, reason)``.
    """
    if requested != "auto":
        reason = BACKENDS[requested].why_not(spec)
        return (requested, None) if reason is None else (None, reason)
    # torch ends the list and serves everything.
    return next(b.name for b in BACKENDS.values() if b.why_not(spec) is None and b.is_fast(spec)), None
