"""Products of many rows of activations with a decoder weight, on the tensor cores: the kernel behind `decode_linear`.

The same product as that of the kernel for few rows, with the same things in front and behind; here the rows, padded to
16 or 32, are one operand of a matrix product. The warps of a program share a row's elements among them, each
multiplying DEPTH of a tile's BATCH * DEPTH, and their sums are added in the end.

Activations in float32 are multiplied as the sum of two halves, ``x = high + low`` in the weight's dtype, so that
nothing is lost but what float32 itself would lose (bfloat16: 16 bits of the mantissa are kept). The row's inverse
deviation is applied before: a residual stream that would leave float16's range then does not. Low-bit weights enter as
integers, exact in either dtype, and scale and zero point are applied to each group's sum.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import digit, gelu, let_successor_start, wait_for_predecessor
from .packing import PLANES, plane_width


# Most rows that the kernel takes.
MAX_ROWS = 32


@triton.jit
def _merged_tile(x_ptr, lse_ptr, row, at, block, first, K: tl.constexpr, SPLITS: tl.constexpr, splits):
    """Attention's runs merged, at the elements `at` of `row`; `block` are those at the start of a warp's share."""
    heads: tl.constexpr = K // 64
    head = (first + block) // 64
    best = tl.load(lse_ptr + row * SPLITS * heads + head)
    for split in tl.static_range(1, SPLITS):
        lse = tl.load(lse_ptr + (row * SPLITS + split) * heads + head, mask=split < splits, other=-float("inf"))
        best = tl.maximum(best, lse)
    weight = tl.exp(tl.load(lse_ptr + row * SPLITS * heads + head) - best)
    total = weight
    value = tl.load(x_ptr + row * SPLITS * K + at) * weight
    for split in tl.static_range(1, SPLITS):
        lse = tl.load(lse_ptr + (row * SPLITS + split) * heads + head, mask=split < splits, other=-float("inf"))
        weight = tl.exp(lse - best)
        total += weight
        value += tl.load(x_ptr + (row * SPLITS + split) * K + at, mask=split < splits, other=0.0) * weight
    return value / total


@triton.jit
def decode_dot_kernel(
    out_ptr, x_ptr, lse_ptr, stats_ptr, folded_ptr, constant_ptr, keys_ptr, values_ptr, length_ptr,
    gained_ptr, next_gain_ptr, next_stats_ptr,
    w0_ptr, w1_ptr, w2_ptr, s0_ptr, s1_ptr, s2_ptr, z0_ptr, z1_ptr, z2_ptr,
    scale, eps,
    N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    PARTS: tl.constexpr, FEATURES: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr,
    BASE: tl.constexpr, DIGITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, HIGH: tl.constexpr,
    STRIDE: tl.constexpr, SOURCE: tl.constexpr, EPILOGUE: tl.constexpr, SPLITS: tl.constexpr,
    SPLIT_SIZE: tl.constexpr, SLOTS: tl.constexpr, STATS: tl.constexpr, STATS_BLOCK: tl.constexpr,
    HALVES: tl.constexpr, WIDEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_successor_start(OVERLAP)
    CHUNK: tl.constexpr = BATCH * DEPTH
    STEPS: tl.constexpr = WIDTH // CHUNK
    start = tl.program_id(0) * FEATURES
    part = start // N
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
    feature = start + tl.arange(0, FEATURES)
    in_part = feature - part * N
    n = tl.minimum(in_part, N - 1).to(tl.int64)[None, None, :]
    block = tl.arange(0, BATCH)[:, None, None] * DEPTH
    index = block + tl.arange(0, DEPTH)[None, :, None]
    slot = 0
    splits = SPLITS
    if EPILOGUE == 3:
        slot = (tl.load(length_ptr) - 1).to(tl.int32)
    if SOURCE == 2:
        if SPLIT_SIZE > 0:
            splits = ((tl.load(length_ptr) - 1) // SPLIT_SIZE + 1).to(tl.int32)

    # Everything that no kernel of this step writes.
    exists = in_part < N
    constant = tl.load(constant_ptr + feature, mask=exists, other=0.0).to(tl.float32)
    tiles = ()
    scales = ()
    zeros = ()
    for step in tl.static_range(STEPS):
        # Low-bit ones stay packed until they are multiplied: unpacked they would not fit the registers.
        raw = tl.load(w_ptr + n * STRIDE + step * CHUNK + index)
        tiles = tiles + (raw,)
        if BASE != 0:
            for place in tl.static_range(DIGITS):
                first = place * WIDTH + step * CHUNK
                meta = n * (K // GROUP) + (first + block) // GROUP
                scales = scales + (tl.load(s_ptr + meta, mask=first + block < K, other=0.0),)
                zeros = zeros + (tl.load(z_ptr + meta, mask=first + block < K, other=0.0),)

    wait_for_predecessor(OVERLAP)
    row = tl.arange(0, PADDED)
    # Rows that only pad the operand repeat the last one, and are not written.
    read = tl.minimum(row, ROWS - 1)
    if SOURCE == 0:
        entry = tl.arange(0, STATS_BLOCK)[None, :]
        sums = stats_ptr + read[:, None] * STATS + entry
        mean = tl.sum(tl.load(sums, mask=entry < STATS, other=0.0), axis=1) / K
        square = tl.sum(tl.load(sums + ROWS * STATS, mask=entry < STATS, other=0.0), axis=1) / K
        inverse = tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)
    across = tl.arange(0, BATCH)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    total = tl.zeros([BATCH, PADDED, FEATURES], tl.float32)
    for step in tl.static_range(STEPS):
        for place in tl.static_range(DIGITS):
            first = place * WIDTH + step * CHUNK
            tile = tiles[step]
            if BASE != 0:
                q = digit(tiles[step].to(tl.int32), place, BASE)
                if HIGH > 0:
                    # The plane of high bits is HIGH bytes wide: element e is bit e // HIGH of its byte e % HIGH.
                    bit = first + index
                    high = tl.load(w_ptr + n * STRIDE + WIDTH + bit % HIGH).to(tl.int32)
                    q = q | (((high >> (bit // HIGH)) & 1) << 2)
                # Added to 2**23 an integer is a float's mantissa: no conversion instruction.
                tile = ((q | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0).to(s_ptr.dtype.element_ty)
            element = first + across
            if SOURCE == 2:
                x = _merged_tile(x_ptr, lse_ptr, read[None, :, None], element, block, first, K, SPLITS, splits)
            elif DIGITS * WIDTH > K:
                x = tl.load(x_ptr + read[None, :, None] * K + element, mask=element < K, other=0.0)
            else:
                x = tl.load(x_ptr + read[None, :, None] * K + element)
            if SOURCE == 0:
                x = x * inverse[None, :, None]
            high_x = x.to(tile.dtype)
            low_x = (x.to(tl.float32) - high_x.to(tl.float32)).to(tile.dtype)
            if WIDEN:
                # The interpreter has no product of bfloat16 matrices.
                high_x = high_x.to(tl.float32)
                low_x = low_x.to(tl.float32)
                tile = tile.to(tl.float32)
            part_sum = tl.zeros([BATCH, PADDED, FEATURES], tl.float32)
            if BASE == 0:
                part_sum = total
            part_sum = tl.dot(high_x, tile, part_sum, input_precision="ieee")
            if HALVES:
                part_sum = tl.dot(low_x, tile, part_sum, input_precision="ieee")
            if BASE == 0:
                total = part_sum
            else:
                x_sum = tl.sum(x.to(tl.float32), axis=2, keep_dims=True)
                s = scales[step * DIGITS + place].to(tl.float32)
                total += s * (part_sum - zeros[step * DIGITS + place].to(tl.float32) * x_sum)
    y = tl.sum(total, axis=0)

    if SOURCE == 0:
        folded = tl.load(folded_ptr + feature, mask=exists, other=0.0)
        y -= (mean * inverse)[:, None] * folded[None, :]
    y += constant[None, :]
    stores = (row < ROWS)[:, None] & exists[None, :]
    wide = row[:, None] * WIDE
    if EPILOGUE == 3:
        if part == 0:
            tl.store(out_ptr + wide + in_part[None, :], (y * scale).to(out_ptr.dtype.element_ty), mask=stores)
        else:
            heads: tl.constexpr = N // 64
            head = (in_part // 64)[None, :]
            at = ((row[:, None] * heads + head) * SLOTS + slot) * 64 + (in_part % 64)[None, :]
            if part == 1:
                tl.store(keys_ptr + at, y.to(keys_ptr.dtype.element_ty), mask=stores)
            else:
                tl.store(values_ptr + at, y.to(values_ptr.dtype.element_ty), mask=stores)
    elif EPILOGUE == 2:
        y += tl.load(out_ptr + wide + feature[None, :], mask=stores, other=0.0)
        gain = tl.load(next_gain_ptr + feature, mask=exists, other=0.0).to(tl.float32)
        tl.store(out_ptr + wide + feature[None, :], y, mask=stores)
        tl.store(gained_ptr + wide + feature[None, :], y * gain[None, :], mask=stores)
        y = tl.where(stores, y, 0.0)
        programs = tl.num_programs(0)
        sums = next_stats_ptr + row * programs + tl.program_id(0)
        tl.store(sums, tl.sum(y, axis=1), mask=row < ROWS)
        tl.store(sums + ROWS * programs, tl.sum(y * y, axis=1), mask=row < ROWS)
    elif EPILOGUE == 1:
        tl.store(out_ptr + wide + feature[None, :], gelu(y).to(out_ptr.dtype.element_ty), mask=stores)
    else:
        tl.store(out_ptr + wide + feature[None, :], (y * scale).to(out_ptr.dtype.element_ty), mask=stores)


class DotPlan(NamedTuple):
    """How a product is cut up: `features` a program, tiles of `batch` times `depth` elements (or bytes)."""

    features: int
    batch: int
    depth: int
    num_warps: int

    def programs(self, weight, parts=1):
        return parts * triton.cdiv(weight.out_features, self.features)


def dot_plan_for(weight, parts=1):
    """The `DotPlan` of a product with `weight`, or with `parts` of its shape."""
    k, total = weight.in_features, parts * weight.out_features
    # A program's weights are in registers, or in shared memory, before it waits.
    single = weight.values.element_size() == 4 or (weight.scales is not None and weight.scales.element_size() == 4)
    if single:
        features, num_warps = (4 if k > 2048 else 16), 4
    elif k > 2048:
        features, num_warps = 8, 8
    elif total > 2048:
        features, num_warps = 32, 8
    else:
        features, num_warps = 16, 4
    width, group = k, 64
    if weight.scales is not None:
        width, group = plane_width(PLANES[weight.bits][0], k), min(64, weight.group_size & -weight.group_size)
    # A warp's share lies in one group of the quantisation and in one head.
    chunk = min(width & -width, 64 * num_warps)
    depth = min(group, max(16, chunk // num_warps))
    return DotPlan(features, chunk // depth, depth, num_warps)
