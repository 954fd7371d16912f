"""Products of some rows of activations with a decoder weight, for the one-token step: Triton kernel and reference.

The kernel here takes up to FEW_ROWS of float32, FEW_NARROW_ROWS of narrower weights, row by row; for up to 32 rows
`decode_dot` has one on the tensor cores.

A step at a small batch reads every weight once and computes little, so that the time is that of the bytes as long as
nothing stands in front of them. Weights are therefore fetched, and unpacked if they are low-bit, before the kernel
waits for its predecessor; only the activations are read afterwards. What usually is a kernel of its own is part of
the product:

- Layer norm in front. With gain ``g``, offset ``b`` and the mean ``m`` and inverse deviation ``r`` of ``x``::

      W (g (x - m) r + b) + bias = r (W (g x) - m (W g)) + (W b + bias)

  `fold_norms` computes ``W g`` and ``W b + bias`` once a window. The kernel that writes ``x`` writes ``g x`` beside it
  and, from each of its programs, the sum and the sum of squares of the elements it wrote.
- The merge of attention's partial results in front (`decode_attention`).
- Bias, GELU, the residual sum, the query's scale, and the write of keys and values into the cache behind.

Low-bit integers become floats without a conversion instruction: ``q`` in the leading mantissa bits of 1.0 is the
float ``1 + q / 2**b``, and with ``F`` that float ``sum((q - z) s x) = s 2**b sum(F x) - s (2**b + z) sum(x)``.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .decode_dot import (
    MAX_ROWS,
    DirectPlan,
    DotPlan,
    TilesPlan,
    decode_direct_kernel,
    decode_dot_kernel,
    decode_tiles_kernel,
    direct_plan_for,
    dot_plan_for,
    tiles_plan_for,
)
from .launch import digit, gelu, interpreted, let_successor_start, options, start, wait_for_predecessor
from .packing import PLANES, plane_width, unpack


HEAD_DIM = 64
# Rows up to which products are made row by row, in float32 and with narrower weights. For each row packed ones are
# unpacked again and half-precision ones widened, and all of it is code, which takes seconds to compile.
FEW_ROWS = 8
FEW_NARROW_ROWS = 2
_ONE: tl.constexpr = tl.constexpr(0x3F800000)  # the bits of float32 1.0

# What the activations are ...
NORM, PLAIN, PARTIALS = 0, 1, 2
# ... and what becomes of the product.
STORE, GELU, RESIDUAL, HEADS = 0, 1, 2, 3


class Weight(NamedTuple):
    """A linear's weight as the kernel reads it.

    `values` is ``(out_features, in_features)`` in a float dtype with `bits` 16 (or 32), or uint8 as packed by
    `ops.packing`; `scales` and `zeros` are then ``(out_features, in_features // group_size)`` and else None.
    """

    values: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    bits: float
    group_size: int
    in_features: int

    @property
    def out_features(self):
        return self.values.shape[0]

    def dense(self):
        """The weight as a float matrix."""
        if self.scales is None:
            return self.values
        groups = self.scales.shape[1]
        values = unpack(self.values, self.bits, self.in_features).to(self.scales.dtype)
        values = values.view(self.out_features, groups, self.group_size)
        return ((values - self.zeros[..., None]) * self.scales[..., None]).view(self.out_features, self.in_features)


def weight_of(linear):
    """`Weight` of an `nn.Linear` or a `QuantizedLinear`."""
    if hasattr(linear, "packed"):
        return Weight(linear.packed, linear.scales, linear.zeros, linear.bits, linear.group_size, linear.in_features)
    return Weight(linear.weight, None, None, 8 * linear.weight.element_size(), 0, linear.in_features)


@triton.jit
def _merged(x_ptr, lse_ptr, row, first, index, lane, K: tl.constexpr, SPLITS: tl.constexpr, splits):
    """Attention's runs of one row merged, at the elements `first + index`; `lane` are those at the start of a run."""
    heads: tl.constexpr = K // 64
    head = (first + lane) // 64
    best = tl.load(lse_ptr + row * SPLITS * heads + head)
    logarithms = (best,)
    for split in tl.static_range(1, SPLITS):
        lse = tl.load(lse_ptr + (row * SPLITS + split) * heads + head, mask=split < splits, other=-float("inf"))
        logarithms = logarithms + (lse,)
        best = tl.maximum(best, lse)
    weights = ()
    total = tl.zeros_like(best)
    for split in tl.static_range(SPLITS):
        weights = weights + (tl.exp(logarithms[split] - best),)
        total += weights[split]
    # One division for all elements of a head that a thread has.
    inverse = 1.0 / total
    value = tl.load(x_ptr + row * SPLITS * K + first + index) * (weights[0] * inverse)
    for split in tl.static_range(1, SPLITS):
        at = x_ptr + (row * SPLITS + split) * K + first + index
        value += tl.load(at, mask=split < splits, other=0.0) * (weights[split] * inverse)
    return value


@triton.jit
def _decode_linear_kernel(
    out_ptr, x_ptr, lse_ptr, stats_ptr, folded_ptr, constant_ptr, keys_ptr, values_ptr, length_ptr,
    gained_ptr, next_gain_ptr, next_stats_ptr,
    w0_ptr, w1_ptr, w2_ptr, s0_ptr, s1_ptr, s2_ptr, z0_ptr, z1_ptr, z2_ptr,
    scale, eps,
    N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    GROUP_ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    BASE: tl.constexpr, DIGITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, HIGH: tl.constexpr,
    LEVEL_BITS: tl.constexpr, STRIDE: tl.constexpr, SOURCE: tl.constexpr, EPILOGUE: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_SIZE: tl.constexpr, SLOTS: tl.constexpr, STATS: tl.constexpr,
    STATS_BLOCKS: tl.constexpr, UNROLL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_successor_start(OVERLAP)
    # A tile is LANES * VECTOR elements, VECTOR to a thread, of GROUP_ROWS output features. Whatever is combined with a
    # tile, activations, scales, zero points, is loaded in the tile's own shape, so that every value lands in
    # the thread that needs it and nothing is exchanged but the sums at the end. Lanes come first: of dimensions that
    # are equally contiguous, the compiler gives the first one to the threads of a warp.
    CHUNK: tl.constexpr = LANES * VECTOR
    first_row = tl.program_id(0) * (GROUP_ROWS * GROUPS)
    part = first_row // N
    w_ptr = w0_ptr
    s_ptr = s0_ptr
    z_ptr = z0_ptr
    if PARTS == 3:
        if part == 1:
            w_ptr = w1_ptr
            s_ptr = s1_ptr
            z_ptr = z1_ptr
        if part == 2:
            w_ptr = w2_ptr
            s_ptr = s2_ptr
            z_ptr = z2_ptr
    lane = tl.arange(0, LANES)[:, None, None] * VECTOR
    lane = tl.broadcast_to(lane, [LANES, GROUP_ROWS, 1])
    # Features out of order, or the compiler would load and store their vectors in a layout along the features, and
    # exchange them through shared memory to get there.
    feature = (tl.arange(0, GROUP_ROWS) ^ (GROUP_ROWS > 1))[None, :, None] * GROUPS
    feature = tl.broadcast_to(feature, [LANES, GROUP_ROWS, 1])
    index = tl.broadcast_to(lane + tl.arange(0, VECTOR)[None, None, :], [LANES, GROUP_ROWS, VECTOR])

    # Everything that no kernel of this step writes.
    slot = 0
    splits = SPLITS
    if EPILOGUE == 3:
        slot = (tl.load(length_ptr) - 1).to(tl.int32)
    if SOURCE == 2:
        if SPLIT_SIZE > 0:
            splits = ((tl.load(length_ptr) - 1) // SPLIT_SIZE + 1).to(tl.int32)
    STEPS: tl.constexpr = WIDTH // CHUNK
    tiles = ()
    factors = ()
    offsets = ()
    # Vectors over the features, too, in the shape of a tile: what the first lane stores is there in every lane.
    constants = ()
    folds = ()
    next_gains = ()
    for group in tl.static_range(GROUPS):
        n = first_row + group + feature
        in_range = n - part * N < N
        constants = constants + (tl.load(constant_ptr + n, mask=in_range, other=0.0).to(tl.float32),)
        if SOURCE == 0:
            folds = folds + (tl.load(folded_ptr + n, mask=in_range, other=0.0),)
        if EPILOGUE == 2:
            next_gains = next_gains + (tl.load(next_gain_ptr + n, mask=in_range, other=0.0).to(tl.float32),)
        n = tl.minimum(n - part * N, N - 1).to(tl.int64)
        for step in tl.static_range(STEPS):
            if BASE == 0:
                tiles = tiles + (tl.load(w_ptr + n * STRIDE + step * CHUNK + index),)
            else:
                packed = tl.load(w_ptr + n * STRIDE + step * CHUNK + index).to(tl.int32)
                for place in tl.static_range(DIGITS):
                    first = place * WIDTH + step * CHUNK
                    q = digit(packed, place, BASE)
                    if HIGH > 0:
                        # The plane of high bits is HIGH bytes wide: element e is bit e // HIGH of its byte e % HIGH.
                        element = first + index
                        high = tl.load(w_ptr + n * STRIDE + WIDTH + element % HIGH).to(tl.int32)
                        q = q | (((high >> (element // HIGH)) & 1) << 2)
                    tiles = tiles + (((q << (23 - LEVEL_BITS)) | _ONE).to(tl.float32, bitcast=True),)
                    # A thread's elements lie in one group of the quantisation.
                    meta = n * (K // GROUP) + (first + lane) // GROUP
                    if DIGITS * WIDTH > K:
                        s = tl.load(s_ptr + meta, mask=first + lane < K, other=0.0).to(tl.float32)
                        z = tl.load(z_ptr + meta, mask=first + lane < K, other=0.0).to(tl.float32)
                    else:
                        s = tl.load(s_ptr + meta).to(tl.float32)
                        z = tl.load(z_ptr + meta).to(tl.float32)
                    factors = factors + (s * (1 << LEVEL_BITS),)
                    offsets = offsets + (s * (z + (1 << LEVEL_BITS)),)

    wait_for_predecessor(OVERLAP)
    for above in tl.range(0, ROWS, UNROLL):
        for below in tl.static_range(UNROLL):
            row = above + below
            old = ()
            if EPILOGUE == 2:
                for group in tl.static_range(GROUPS):
                    to = first_row + group + feature
                    old = old + (tl.load(out_ptr + row * WIDE + to, mask=to < N, other=0.0),)
            totals = ()
            for _group in tl.static_range(GROUPS):
                if BASE == 0:
                    totals = totals + (tl.zeros([LANES, GROUP_ROWS, VECTOR], tl.float32),)
                else:
                    totals = totals + (tl.zeros([LANES, GROUP_ROWS, 1], tl.float32),)
            for step in tl.static_range(STEPS):
                for place in tl.static_range(DIGITS):
                    begin = place * WIDTH + step * CHUNK
                    if SOURCE == 2:
                        x = _merged(x_ptr, lse_ptr, row, begin, index, lane, K, SPLITS, splits)
                    elif DIGITS * WIDTH > K:
                        x = tl.load(x_ptr + row * K + begin + index, mask=begin + index < K, other=0.0).to(tl.float32)
                    else:
                        x = tl.load(x_ptr + row * K + begin + index).to(tl.float32)
                    if BASE != 0:
                        x_sum = tl.sum(x, axis=2, keep_dims=True)
                    grown = ()
                    for group in tl.static_range(GROUPS):
                        tile = tiles[(group * STEPS + step) * DIGITS + place]
                        if BASE == 0:
                            grown = grown + (totals[group] + tile.to(tl.float32) * x,)
                        else:
                            dot = tl.sum(tile * x, axis=2, keep_dims=True)
                            factor = factors[(group * STEPS + step) * DIGITS + place]
                            offset = offsets[(group * STEPS + step) * DIGITS + place]
                            grown = grown + (totals[group] + (factor * dot - offset * x_sum),)
                    totals = grown
            if SOURCE == 0:
                sums = tl.zeros([LANES, GROUP_ROWS, 1], tl.float32)
                squares = sums
                for block in tl.static_range(STATS_BLOCKS):
                    entry = block * LANES + lane // VECTOR
                    sums += tl.load(stats_ptr + row * STATS + entry, mask=entry < STATS, other=0.0)
                    squares += tl.load(stats_ptr + (ROWS + row) * STATS + entry, mask=entry < STATS, other=0.0)
                mean = tl.sum(sums, axis=0, keep_dims=True) / K
                variance = tl.sum(squares, axis=0, keep_dims=True) / K - mean * mean
                inverse = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
            written = tl.zeros([LANES, GROUP_ROWS, 1], tl.float32)
            written_squares = written
            for group in tl.static_range(GROUPS):
                to = first_row + group + feature
                to_in_part = to - part * N
                stores = (to_in_part < N) & (lane == 0)
                y = tl.sum(tl.sum(totals[group], axis=2, keep_dims=True), axis=0, keep_dims=True)
                if SOURCE == 0:
                    y = (y - mean * folds[group]) * inverse
                y += constants[group]
                if EPILOGUE == 3:
                    if part == 0:
                        tl.store(out_ptr + row * WIDE + to_in_part, y * scale, mask=stores)
                    else:
                        heads: tl.constexpr = N // 64
                        at = ((row * heads + to_in_part // 64) * SLOTS + slot) * 64 + to_in_part % 64
                        if part == 1:
                            tl.store(keys_ptr + at, y.to(keys_ptr.dtype.element_ty), mask=stores)
                        else:
                            tl.store(values_ptr + at, y.to(values_ptr.dtype.element_ty), mask=stores)
                elif EPILOGUE == 2:
                    y += old[group]
                    tl.store(out_ptr + row * WIDE + to, y, mask=stores)
                    tl.store(gained_ptr + row * WIDE + to, y * next_gains[group], mask=stores)
                    y = tl.where(stores, y, 0.0)
                    written += y
                    written_squares += y * y
                elif EPILOGUE == 1:
                    tl.store(out_ptr + row * WIDE + to, gelu(y).to(out_ptr.dtype.element_ty), mask=stores)
                else:
                    tl.store(out_ptr + row * WIDE + to, (y * scale).to(out_ptr.dtype.element_ty), mask=stores)
            if EPILOGUE == 2:
                programs = tl.num_programs(0)
                tl.store(next_stats_ptr + row * programs + tl.program_id(0), tl.sum(written))
                tl.store(next_stats_ptr + (ROWS + row) * programs + tl.program_id(0), tl.sum(written_squares))


class Plan(NamedTuple):
    """How a product is cut up: a tile is `group_rows` features by `lanes` times `vector` elements (or bytes)."""

    group_rows: int
    groups: int
    lanes: int
    vector: int
    num_warps: int

    def programs(self, weight, parts=1):
        return parts * triton.cdiv(weight.out_features, self.group_rows * self.groups)


def plan_for(weight, parts=1, splits=0, rows=1, normed=False):
    """The plan of a product of `rows` with `weight`, or with `parts` of its shape: it says which kernel makes it.

    `splits`: runs of attention that it merges, if it does; `normed`: whether a layer norm stands in front. Up to
    FEW_ROWS (or FEW_NARROW_ROWS) are multiplied one by one, more on the tensor cores.
    """
    merges = splits > 0
    if rows > (FEW_ROWS if weight.bits == 32 else FEW_NARROW_ROWS):
        plan = None
        if rows <= 16:
            if normed:
                plan = tiles_plan_for(weight, parts)
            plan = plan or direct_plan_for(weight, parts, splits, normed)
        return plan or dot_plan_for(weight, parts)
    k = weight.in_features
    num_warps = 8 if k > 2048 else 4
    # A thread that merges runs has several values to fetch for each activation, and one that unpacks integers works
    # long on each: where there are many they get fewer of them, though a row's sum then crosses warps.
    across = 2 if merges or (num_warps == 8 and weight.scales is not None) else 1
    width = k if weight.scales is None else plane_width(PLANES[weight.bits][0], k)
    chunk = min(width & -width, 4 * 32 * across)
    vector = min(4, chunk)
    lanes = chunk // vector
    group_rows = 32 * num_warps // lanes
    # Weights a thread holds: enough of them in flight, and few enough that many programs are resident. Where there are
    # programs to spare, more features to a warp: it reads all activations, whatever it does with them.
    held = 160 if weight.out_features >= 4 * k else 96
    groups = max(1, min(4, held * 32 * num_warps // (group_rows * k)))
    groups = 1 << (groups.bit_length() - 1)
    while parts > 1 and weight.out_features % (group_rows * groups):
        if groups > 1:
            groups //= 2
        else:
            group_rows //= 2
    return Plan(group_rows, groups, lanes, vector, num_warps)


def decode_linear(
    out,
    x,
    weights,
    scales,
    zeros,
    bits,
    group_size,
    constant,
    epilogue,
    scale=1.0,
    folded=None,
    stats=None,
    eps=0.0,
    lse=None,
    split_size=0,
    keys=None,
    values=None,
    length=None,
    gained=None,
    next_gain=None,
    next_stats=None,
):
    """Product of a few rows with one weight, or with three of the same shape, and what goes with it.

    Args:
        out: ``(rows, out_features)`` of up to 32 rows, written; with three weights and no keys, theirs side by side.
            With the epilogue RESIDUAL float32 and added to.
        x: ``(rows, in_features)``; where a layer norm is folded, float32 and multiplied by its gain; with `lse` the
            runs of `decode_attention`, float32 ``(rows, splits, in_features)``.
        weights, scales, zeros, bits, group_size: what `arguments` gives.
        constant: ``(total out_features,)``, added: with a layer norm what `fold_norms` gives, else the bias.
        epilogue: STORE, GELU, RESIDUAL or HEADS.
        scale: factor of the (first) product, after the constant, with STORE and HEADS.
        folded, stats, eps: the layer norm in front: what `fold_norms` gives, and the float32 ``(2, rows, programs)``
            sums and sums of squares that the kernel which wrote `x` left.
        lse, split_size: the runs' logarithms, float32 ``(rows, splits, in_features // 64)``; the keys of a run, of
            which those up to slot ``length - 1`` count, or 0 where all runs do.
        keys, values: ``(rows, heads, slots, 64)``: with HEADS, the second and third product go there, into slot
            ``length - 1``.
        length: int64 ``(1,)`` where `keys` or a `split_size` is given.
        gained, next_gain, next_stats: with RESIDUAL, the layer norm that comes next: `out` times its gain, and the
            sums for it, both written.

    Raises:
        ValueError: more rows than the kernels take.
    """
    if out.shape[0] > MAX_ROWS:
        raise ValueError(f"out has {out.shape[0]} rows: split the product into ones of at most {MAX_ROWS}")
    # The op itself has no defaults: torch 2.11 fails on one whose written arguments are left out.
    torch.ops.whisper_static_cache.decode_linear(
        out,
        x,
        weights,
        scales,
        zeros,
        bits,
        group_size,
        constant,
        epilogue,
        scale,
        folded,
        stats,
        eps,
        lse,
        split_size,
        keys,
        values,
        length,
        gained,
        next_gain,
        next_stats,
    )


@torch.library.custom_op(
    "whisper_static_cache::decode_linear",
    mutates_args=("out", "keys", "values", "gained", "next_stats"),
    device_types=("cpu", "cuda"),
)
def _launch_decode_linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    zeros: list[torch.Tensor],
    bits: float,
    group_size: int,
    constant: torch.Tensor,
    epilogue: int,
    scale: float,
    folded: torch.Tensor | None,
    stats: torch.Tensor | None,
    eps: float,
    lse: torch.Tensor | None,
    split_size: int,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    length: torch.Tensor | None,
    gained: torch.Tensor | None,
    next_gain: torch.Tensor | None,
    next_stats: torch.Tensor | None,
) -> None:
    weight = Weight(
        weights[0], scales[0] if scales else None, zeros[0] if zeros else None, bits, group_size, x.shape[-1]
    )
    parts, rows = len(weights), out.shape[0]
    n, k = weight.out_features, weight.in_features
    plan = plan_for(weight, parts, 0 if lse is None else x.shape[1], rows, normed=folded is not None)
    unroll = rows
    if scales and isinstance(plan, Plan) and epilogue == STORE and folded is None:
        # Compiling takes time with the square of the loads, and packed weights have scales and zero points to load for
        # every few of them: what is made once a window, by `fold_norms`, is made row by row in small programs.
        plan, unroll = plan._replace(groups=1), 1
    programs = plan.programs(weight, parts)
    if scales:
        plane = PLANES[bits][0]
        packing = {
            "BASE": plane.base,
            "DIGITS": plane.digits,
            "WIDTH": plane_width(plane, k),
            "GROUP": group_size,
            "HIGH": plane_width(PLANES[bits][1], k) if len(PLANES[bits]) == 2 else 0,
        }
    else:
        packing = {"BASE": 0, "DIGITS": 1, "WIDTH": k, "GROUP": 1, "HIGH": 0}
    stats_count = 1 if stats is None else stats.shape[2]

    def three(tensors):
        tensors = tensors or weights
        return [tensors[min(index, len(tensors) - 1)] for index in range(3)]

    def given(tensor):
        return out if tensor is None else tensor

    read = (out, x, *map(given, (lse, stats, folded)), constant)
    written = map(given, (keys, values, length, gained, next_gain, next_stats))
    matrices = (*three(weights), *three(scales), *three(zeros), scale, eps)
    sizes = {
        "N": n,
        "K": k,
        "WIDE": out.shape[1],
        "ROWS": rows,
        "PARTS": parts,
        "STRIDE": weight.values.shape[1],
        "SOURCE": PARTIALS if lse is not None else PLAIN if folded is None else NORM,
        "EPILOGUE": epilogue,
        "SPLITS": 1 if lse is None else x.shape[1],
        "SPLIT_SIZE": split_size,
        "SLOTS": 1 if keys is None else keys.shape[2],
        "STATS": stats_count,
        **packing,
        **options(x.device, plan.num_warps),
    }
    if isinstance(plan, (DirectPlan, TilesPlan)):
        for unused in (*packing, "STRIDE", "SPLITS", "SPLIT_SIZE"):
            del sizes[unused]
        sizes |= {
            "WARPS": plan.num_warps,
            "STATS_BLOCK": triton.next_power_of_2(stats_count),
            "WIDEN": interpreted(),
        }
        if plan.registers and not interpreted():
            sizes["maxnreg"] = plan.registers
    if isinstance(plan, TilesPlan):
        del sizes["SOURCE"]
        start(
            decode_tiles_kernel,
            (programs,),
            *read,
            *written,
            *matrices,
            FEATURES=plan.features,
            SPAN=plan.span,
            STAGES=plan.buffers + 1,
            **sizes,
        )
        return
    if isinstance(plan, DirectPlan):
        start(
            decode_direct_kernel,
            (programs,),
            *read,
            *written,
            *matrices,
            GROUPS=plan.groups,
            AHEAD=plan.ahead,
            EARLY=plan.early,
            HALVES=x.dtype != weights[0].dtype,
            **sizes,
        )
        return
    if isinstance(plan, DotPlan):
        # Two programs of eight warps to a multiprocessor, one of them reading while the other multiplies.
        limit = {"maxnreg": 128} if plan.features == 32 and rows <= 16 and not scales and not interpreted() else {}
        start(
            decode_dot_kernel,
            (programs,),
            *read,
            *written,
            *matrices,
            PADDED=max(16, triton.next_power_of_2(rows)),
            FEATURES=plan.features,
            BATCH=plan.batch,
            DEPTH=plan.depth,
            STATS_BLOCK=triton.next_power_of_2(stats_count),
            HALVES=x.dtype != (scales[0] if scales else weights[0]).dtype,
            WIDEN=interpreted(),
            **sizes,
            **limit,
        )
        return
    start(
        _decode_linear_kernel,
        (programs,),
        *read,
        *written,
        *matrices,
        GROUP_ROWS=plan.group_rows,
        GROUPS=plan.groups,
        LANES=plan.lanes,
        VECTOR=plan.vector,
        LEVEL_BITS=math.ceil(bits) if scales else 0,
        STATS_BLOCKS=triton.cdiv(stats_count, plan.lanes),
        UNROLL=unroll,
        **sizes,
    )


@_launch_decode_linear.register_fake
def _(*args, **kwargs):
    return None


def folded_pair(weights):
    """Where `fold_norms` writes ``W b + bias`` and ``W g`` of `weights`: float32 ``(2, total out_features or more)``.

    Rows are a multiple of 16 elements apart, for wide loads.
    """
    total = sum(weight.out_features for weight in weights)
    return torch.zeros(2, -(-total // 16) * 16, dtype=torch.float32, device=weights[0].values.device)


@torch.no_grad()
def fold_norms(folds):
    """Write what `decode_linear` needs of layer norms in front of weights: ``W b + bias`` and ``W g``.

    All of a model's at once: a kernel for each product, and a few for all that goes around them.

    Args:
        folds: list of `(pair, weights, biases, norm)`, at least one, of one width: what `folded_pair` gives, written;
            a list of `Weight`, one or three of one shape; their biases, or None each; the `nn.LayerNorm`.
    """
    pair, _, _, norm = folds[0]
    # First: a product may read its constant before the kernel ahead of it has ended.
    nothing = torch.zeros(max(pair.shape[1] for pair, *_ in folds), dtype=torch.float32, device=pair.device)
    both = torch.empty(len(folds), 2, *norm.weight.shape, dtype=torch.float32, device=pair.device)
    added = [
        (part, bias, torch.empty_like(part))
        for pair, weights, biases, _ in folds
        for part, bias in zip(pair[0].split(weights[0].out_features), biases)
        if bias is not None
    ]
    parts, biases, wide = map(list, zip(*added)) if added else ([], [], [])
    vectors = [vector for _, _, _, norm in folds for vector in (norm.bias, norm.weight)]
    torch._foreach_copy_([*both.flatten(0, 1).unbind(), *wide], [*vectors, *biases])
    for x, (pair, weights, _, _) in zip(both, folds):
        total = sum(weight.out_features for weight in weights)
        decode_linear(pair, x, *arguments(weights), nothing[:total], STORE)
    if parts:
        torch._foreach_add_(parts, wide)


def arguments(weights):
    """The arguments `weights` to `group_size` of `decode_linear` for one or three `Weight`s of one shape."""
    packed = [] if weights[0].scales is None else weights
    return (
        [weight.values for weight in weights],
        [weight.scales for weight in packed],
        [weight.zeros for weight in packed],
        float(weights[0].bits),
        weights[0].group_size,
    )


def reference_decode_linear(x, weight, bias=None, norm=None, scale=1.0):
    """The plain product, ``scale * (W norm(x) + bias)``, in the dtype of `x`."""
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    return scale * F.linear(x, weight.dense().to(x.dtype), None if bias is None else bias.to(x.dtype))
