"""Products of many rows of activations with a decoder weight, on the tensor cores: the kernel behind `decode_linear`.

The same product as that of the kernel for few rows, with the same things in front and behind; here the rows, padded to
16 or 32, are one operand of a matrix product. The warps of a program share a row's elements among them, each
multiplying DEPTH of a tile's BATCH * DEPTH, and their sums are added in the end.

Activations in float32 are multiplied as the sum of two halves, ``x = high + low`` in the weight's dtype, so that
nothing is lost but what float32 itself would lose (bfloat16: 16 bits of the mantissa are kept). The row's inverse
deviation is applied before: a residual stream that would leave float16's range then does not. Low-bit weights enter as
integers, exact in either dtype, and scale and zero point are applied to each group's sum.

Weights in half precision, with up to 16 rows, have a kernel of their own, in which nothing passes through shared
memory but the sums of the warps. A sum does not mind the order of its terms: each thread of an operand is given those
elements, of both factors, that it can load as one vector. Where many features follow a layer norm, a program goes
through several tiles of them with the same activations, read once and all on their way together, while its weights
come through shared memory: so it leaves room for its predecessor, beside which it fetches them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import digit, gelu, let_successor_start, room, wait_for_predecessor
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
def _of_part(first_ptr, second_ptr, third_ptr, part, PARTS: tl.constexpr):
    """Of one pointer, or of three for as many parts of a product, that of `part`."""
    pointer = first_ptr
    if PARTS == 3:
        if part == 1:
            pointer = second_ptr
        if part == 2:
            pointer = third_ptr
    return pointer


@triton.jit
def _store(
    y, out_ptr, keys_ptr, values_ptr, row, wide, feature, in_part, part, slot, stores, scale,
    N: tl.constexpr, SLOTS: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """The end of a product that is added to nothing."""
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
    elif EPILOGUE == 1:
        tl.store(out_ptr + wide + feature[None, :], gelu(y).to(out_ptr.dtype.element_ty), mask=stores)
    else:
        tl.store(out_ptr + wide + feature[None, :], (y * scale).to(out_ptr.dtype.element_ty), mask=stores)


@triton.jit
def _store_stream(
    y, gain, out_ptr, gained_ptr, next_stats_ptr, row, wide, feature, stores, ROWS: tl.constexpr
):  # fmt: skip
    """The end of a product that was added to the residual stream: it, it with the gain, and this program's sums."""
    tl.store(out_ptr + wide + feature[None, :], y, mask=stores)
    tl.store(gained_ptr + wide + feature[None, :], y * gain[None, :], mask=stores)
    y = tl.where(stores, y, 0.0)
    programs = tl.num_programs(0)
    sums_ptr = next_stats_ptr + row * programs + tl.program_id(0)
    tl.store(sums_ptr, tl.sum(y, axis=1), mask=row < ROWS)
    tl.store(sums_ptr + ROWS * programs, tl.sum(y * y, axis=1), mask=row < ROWS)


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
    w_ptr = _of_part(w0_ptr, w1_ptr, w2_ptr, part, PARTS)
    s_ptr = _of_part(s0_ptr, s1_ptr, s2_ptr, part, PARTS)
    z_ptr = _of_part(z0_ptr, z1_ptr, z2_ptr, part, PARTS)
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
    if EPILOGUE == 2:
        y += tl.load(out_ptr + wide + feature[None, :], mask=stores, other=0.0)
        gain = tl.load(next_gain_ptr + feature, mask=exists, other=0.0).to(tl.float32)
        _store_stream(y, gain, out_ptr, gained_ptr, next_stats_ptr, row, wide, feature, stores, ROWS)
    else:
        _store(
            y, out_ptr, keys_ptr, values_ptr, row, wide, feature, in_part, part, slot, stores, scale,
            N, SLOTS, EPILOGUE,
        )  # fmt: skip


@triton.jit
def _operand_rows(x, WARPS: tl.constexpr):
    """`x`, as the threads have loaded it, as the left operand of a product over 32 elements a warp."""
    # The lane in a quad, row, warp, half of the rows, half of the lane's eight, half of the four, element.
    x = tl.reshape(x, (4, 8, WARPS, 2, 2, 2, 2))
    return tl.reshape(tl.permute(x, (2, 3, 1, 4, 5, 0, 6)), (WARPS, 16, 32))


@triton.jit
def _operand_tile(w, FEATURES: tl.constexpr, WARPS: tl.constexpr):
    """The same for the right operand: FEATURES, a power of two of them, by 32 elements a warp."""
    w = tl.reshape(w, (FEATURES, WARPS, 4, 2, 2, 2))
    return tl.reshape(tl.permute(w, (1, 3, 4, 2, 5, 0)), (WARPS, 32, FEATURES))


@triton.jit
def _row_elements(K: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Where a thread's eight elements of a row begin, in the order that `_operand_rows` takes.

    Rows that only pad the operand repeat the last one, and are not written.
    """
    quad = tl.arange(0, 4)[:, None, None, None, None] * 8
    warp = tl.arange(0, WARPS)[None, None, :, None, None] * 32
    read = tl.arange(0, 8)[None, :, None, None, None] + tl.arange(0, 2)[None, None, None, :, None] * 8
    return tl.minimum(read, ROWS - 1) * K + quad + warp


@triton.jit
def decode_direct_kernel(
    out_ptr, x_ptr, lse_ptr, stats_ptr, folded_ptr, constant_ptr, keys_ptr, values_ptr, length_ptr,
    gained_ptr, next_gain_ptr, next_stats_ptr,
    w0_ptr, w1_ptr, w2_ptr, s0_ptr, s1_ptr, s2_ptr, z0_ptr, z1_ptr, z2_ptr,
    scale, eps,
    N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    WARPS: tl.constexpr, GROUPS: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
    SOURCE: tl.constexpr, EPILOGUE: tl.constexpr, SLOTS: tl.constexpr, STATS: tl.constexpr,
    STATS_BLOCK: tl.constexpr, HALVES: tl.constexpr, WIDEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_successor_start(OVERLAP)
    FEATURES: tl.constexpr = 8 * GROUPS
    STEPS: tl.constexpr = K // (32 * WARPS)
    start = tl.program_id(0) * FEATURES
    part = start // N
    w_ptr = _of_part(w0_ptr, w1_ptr, w2_ptr, part, PARTS)
    feature = start + tl.arange(0, FEATURES)
    in_part = feature - part * N
    exists = in_part < N
    slot = 0
    if EPILOGUE == 3:
        slot = (tl.load(length_ptr) - 1).to(tl.int32)

    # Everything that no kernel of this step writes. Of a tile, the compiler gives a warp's lanes to the elements first
    # and then to the features, as the product will have it, and the warps to the middle.
    lane = tl.arange(0, WARPS)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    tiles = ()
    for step in tl.static_range(AHEAD):
        for group in tl.static_range(GROUPS):
            n = tl.minimum(start - part * N + group + tl.arange(0, 8) * GROUPS, N - 1).to(tl.int64)
            tiles = tiles + (tl.load(w_ptr + n[:, None, None] * K + step * (32 * WARPS) + lane),)
    constant = tl.load(constant_ptr + feature, mask=exists, other=0.0).to(tl.float32)
    if SOURCE == 0:
        folded = tl.load(folded_ptr + feature, mask=exists, other=0.0)
    if EPILOGUE == 2:
        gain = tl.load(next_gain_ptr + feature, mask=exists, other=0.0).to(tl.float32)

    wait_for_predecessor(OVERLAP)
    row = tl.arange(0, 16)
    if SOURCE == 0:
        entry = tl.arange(0, STATS_BLOCK)[None, :]
        sums_ptr = stats_ptr + tl.minimum(row, ROWS - 1)[:, None] * STATS + entry
        sums = tl.load(sums_ptr, mask=entry < STATS, other=0.0)
        squares = tl.load(sums_ptr + ROWS * STATS, mask=entry < STATS, other=0.0)
    # In vectors of 16 bytes.
    at = _row_elements(K, ROWS, WARPS)
    if x_ptr.dtype.element_ty == tl.float32:
        at = at[:, :, :, :, :, None] + tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :]
    else:
        at = at + tl.arange(0, 8)
    activations = ()
    for step in tl.static_range(EARLY):
        activations = activations + (tl.load(x_ptr + at + step * (32 * WARPS)),)
    stores = (row < ROWS)[:, None] & exists[None, :]
    wide = row[:, None] * WIDE
    if EPILOGUE == 2:
        old = tl.load(out_ptr + wide + feature[None, :], mask=stores, other=0.0)
    if SOURCE == 0:
        mean = tl.sum(sums, axis=1) / K
        inverse = tl.rsqrt(tl.maximum(tl.sum(squares, axis=1) / K - mean * mean, 0.0) + eps)
    totals = ()
    for _group in tl.static_range(GROUPS):
        totals = totals + (tl.zeros([WARPS, 16, 8], tl.float32),)
    for step in tl.static_range(STEPS):
        if step < EARLY:
            x = activations[step]
        else:
            x = tl.load(x_ptr + at + step * (32 * WARPS))
        x = _operand_rows(x, WARPS)
        if SOURCE == 0:
            x = x * inverse[None, :, None]
        high_x = x.to(w0_ptr.dtype.element_ty)
        low_x = high_x
        if HALVES:
            low_x = (x.to(tl.float32) - high_x.to(tl.float32)).to(high_x.dtype)
        if WIDEN:
            # The interpreter has no product of bfloat16 matrices.
            high_x = high_x.to(tl.float32)
            low_x = low_x.to(tl.float32)
        grown = ()
        for group in tl.static_range(GROUPS):
            if step < AHEAD:
                tile = tiles[step * GROUPS + group]
            else:
                n = tl.minimum(start - part * N + group + tl.arange(0, 8) * GROUPS, N - 1).to(tl.int64)
                tile = tl.load(w_ptr + n[:, None, None] * K + step * (32 * WARPS) + lane)
            if WIDEN:
                tile = tile.to(tl.float32)
            tile = _operand_tile(tile, 8, WARPS)
            total = tl.dot(high_x, tile, totals[group], input_precision="ieee")
            if HALVES:
                total = tl.dot(low_x, tile, total, input_precision="ieee")
            grown = grown + (total,)
        totals = grown
    total = totals[0]
    if GROUPS == 2:
        total = tl.reshape(tl.join(totals[0], totals[1]), (WARPS, 16, FEATURES))
    if GROUPS == 4:
        total = tl.join(tl.join(totals[0], totals[2]), tl.join(totals[1], totals[3]))
        total = tl.reshape(total, (WARPS, 16, FEATURES))
    y = tl.sum(total, axis=0)

    if SOURCE == 0:
        y -= (mean * inverse)[:, None] * folded[None, :]
    y += constant[None, :]
    if EPILOGUE == 2:
        y += old
        _store_stream(y, gain, out_ptr, gained_ptr, next_stats_ptr, row, wide, feature, stores, ROWS)
    else:
        _store(
            y, out_ptr, keys_ptr, values_ptr, row, wide, feature, in_part, part, slot, stores, scale,
            N, SLOTS, EPILOGUE,
        )  # fmt: skip


@triton.jit
def decode_tiles_kernel(
    out_ptr, x_ptr, lse_ptr, stats_ptr, folded_ptr, constant_ptr, keys_ptr, values_ptr, length_ptr,
    gained_ptr, next_gain_ptr, next_stats_ptr,
    w0_ptr, w1_ptr, w2_ptr, s0_ptr, s1_ptr, s2_ptr, z0_ptr, z1_ptr, z2_ptr,
    scale, eps,
    N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    WARPS: tl.constexpr, FEATURES: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, EPILOGUE: tl.constexpr,
    SLOTS: tl.constexpr, STATS: tl.constexpr, STATS_BLOCK: tl.constexpr, WIDEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_successor_start(OVERLAP)
    STEPS: tl.constexpr = K // (32 * WARPS)
    dtype: tl.constexpr = w0_ptr.dtype.element_ty
    TILES: tl.constexpr = (SPAN + FEATURES - 1) // FEATURES
    start = tl.program_id(0) * SPAN
    part = start // N
    w_ptr = _of_part(w0_ptr, w1_ptr, w2_ptr, part, PARTS)
    slot = 0
    if EPILOGUE == 3:
        slot = (tl.load(length_ptr) - 1).to(tl.int32)
    lane = tl.arange(0, WARPS)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    row = tl.arange(0, 16)
    at = _row_elements(K, ROWS, WARPS)
    at = at[:, :, :, :, :, None] + tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :]
    highs = ()
    lows = ()
    for _step in tl.static_range(STEPS):
        highs = highs + (tl.zeros([WARPS, 16, 32], dtype),)
        lows = lows + (tl.zeros([WARPS, 16, 32], dtype),)
    shift = tl.zeros([16], tl.float32)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        place = tile * FEATURES + tl.arange(0, FEATURES)
        feature = start + place
        in_part = feature - part * N
        exists = in_part < N
        if SPAN % FEATURES != 0:
            exists = exists & (place < SPAN)
        n = tl.minimum(in_part, N - 1).to(tl.int64)[:, None, None]
        weights = ()
        for step in tl.static_range(STEPS):
            if SPAN % FEATURES == 0:
                weights = weights + (tl.load(w_ptr + n * K + step * (32 * WARPS) + lane),)
            else:
                # The last tile is not full: what lies behind it costs no bytes.
                inside = exists[:, None, None]
                weights = weights + (tl.load(w_ptr + n * K + step * (32 * WARPS) + lane, mask=inside, other=0.0),)
        constant = tl.load(constant_ptr + feature, mask=exists, other=0.0)
        folded = tl.load(folded_ptr + feature, mask=exists, other=0.0)
        if tile == 0:
            # Inside the loop, so that its first weights, which the compiler has fetched in front of it, are on their
            # way before the wait. The activations then stay in the registers.
            wait_for_predecessor(OVERLAP)
            index = tl.arange(0, STATS_BLOCK)[None, :]
            sums_ptr = stats_ptr + tl.minimum(row, ROWS - 1)[:, None] * STATS + index
            sums = tl.load(sums_ptr, mask=index < STATS, other=0.0)
            squares = tl.load(sums_ptr + ROWS * STATS, mask=index < STATS, other=0.0)
            raw = ()
            for step in tl.static_range(STEPS):
                raw = raw + (tl.load(x_ptr + at + step * (32 * WARPS)),)
            mean = tl.sum(sums, axis=1) / K
            inverse = tl.rsqrt(tl.maximum(tl.sum(squares, axis=1) / K - mean * mean, 0.0) + eps)
            shift = mean * inverse
            highs = ()
            lows = ()
            for step in tl.static_range(STEPS):
                x = _operand_rows(raw[step], WARPS) * inverse[None, :, None]
                high = x.to(dtype)
                highs = highs + (high,)
                lows = lows + ((x - high.to(tl.float32)).to(dtype),)
        # Two sums, as each product waits for the one before it.
        total = tl.zeros([WARPS, 16, FEATURES], tl.float32)
        rest = tl.zeros([WARPS, 16, FEATURES], tl.float32)
        for step in tl.static_range(STEPS):
            w = weights[step]
            high = highs[step]
            low = lows[step]
            if WIDEN:
                # The interpreter has no product of bfloat16 matrices.
                w = w.to(tl.float32)
                high = high.to(tl.float32)
                low = low.to(tl.float32)
            w = _operand_tile(w, FEATURES, WARPS)
            total = tl.dot(high, w, total, input_precision="ieee")
            rest = tl.dot(low, w, rest, input_precision="ieee")
        y = tl.sum(total + rest, axis=0)
        y += constant.to(tl.float32)[None, :] - shift[:, None] * folded[None, :]
        stores = (row < ROWS)[:, None] & exists[None, :]
        wide = row[:, None] * WIDE
        _store(
            y, out_ptr, keys_ptr, values_ptr, row, wide, feature, in_part, part, slot, stores, scale,
            N, SLOTS, EPILOGUE,
        )  # fmt: skip


class TilesPlan(NamedTuple):
    """How a product behind a layer norm is cut up: `span` features a program, in tiles of `features`, one by one.

    Of the tiles, `buffers` are in shared memory or on their way. A thread has up to `registers`, or what the compiler
    thinks best if that is 0.
    """

    features: int
    span: int
    buffers: int
    num_warps: int
    registers: int

    def programs(self, weight, parts=1):
        return parts * triton.cdiv(weight.out_features, self.span)


class DirectPlan(NamedTuple):
    """How a product without shared memory is cut up: 8 * `groups` features a program, elements shared by `warps`.

    Of the steps in which a warp goes through its elements, the weights of `ahead` are read before the wait for the
    predecessor, the activations of `early` before the layer norm's sums are added up. A thread has up to `registers`,
    or what the compiler thinks best if that is 0.
    """

    groups: int
    num_warps: int
    ahead: int
    early: int
    registers: int

    def programs(self, weight, parts=1):
        return parts * triton.cdiv(weight.out_features, 8 * self.groups)


def direct_plan_for(weight, parts=1, splits=0, normed=False):
    """The `DirectPlan` of a product of up to 16 rows with a `weight` in half precision, or None.

    `splits`: runs of attention that it merges; of several only `decode_dot_kernel` can. `normed`: a layer norm stands
    in front.
    """
    k, n = weight.in_features, weight.out_features
    if weight.scales is not None or weight.values.element_size() != 2 or k % 32 or splits > 1:
        return None
    warps = 8
    while k % (32 * warps):
        warps //= 2
    steps = k // (32 * warps)
    # Measured in steps of large-v2 on an H100, each kind with five plans. With eight features a program the product
    # behind attention took 4.8 us wherever it stood, and the second one of the feed-forward 6.5, where sixteen took
    # 4.7 to 10.9 and 6.8 to 17.8; behind a layer norm, whose sums every program adds up, sixteen took 5.3 us with all
    # activations on their way at once and 5.5 to 8.0 without.
    if normed and parts * n > 16 * room(weight.values.device)[0]:
        return None
    groups = 2 if normed else 1
    while parts > 1 and n % (8 * groups):
        groups //= 2
    if steps * groups > 40:
        return None
    if normed:
        return DirectPlan(groups, warps, steps, min(steps, 5), 0)
    # With half the registers of a multiprocessor, the next product's program fetches its weights beside this one.
    return DirectPlan(groups, warps, min(steps, 24), min(steps, 5 if k <= 2048 else 4), 128)


def tiles_plan_for(weight, parts=1):
    """The `TilesPlan` of a product of up to 16 rows, layer norm in front, with a `weight` in half precision, or None.

    For those with more than 16 features to a multiprocessor: three weights at once, or a long one. Measured in steps
    of large-v2 on an H100, the former took 8.9 to 9.6 us, 10.1 with `decode_dot_kernel`, and the head 65 where that
    took 97. For the first product of the feed-forward, which is between the two, it took 12.3 and tiles 11.6 to 21.8.
    """
    k, n = weight.in_features, weight.out_features
    count, shared = room(weight.values.device)
    if weight.scales is not None or weight.values.element_size() != 2 or k % 32 or parts * n <= 16 * count:
        return None
    long = parts * n >= 128 * count
    if parts == 1 and not long:
        return None
    warps = 8
    while k % (32 * warps):
        warps //= 2
    # A thread keeps its activations, 16 registers a step.
    if k // (32 * warps) > 5:
        return None
    # Of a long row of tiles a multiprocessor needs some 64 KB on their way. A short one is on its way as a whole, in
    # half of the shared memory, so that it is beside the predecessor.
    features = 16 if long else 8
    tiles = triton.cdiv(parts * n, features * count)
    if parts > 1:
        # A program's features are of one weight.
        if n % features:
            return None
        tiles = min(tiles, n // features)
        while n % (features * tiles):
            tiles += 1
    free = shared - 24 * 1024 if long else shared // 2 - 4 * 1024
    buffers = max(1, min(tiles, 3 if long else 8, free // (features * k * 2)))
    return TilesPlan(features, features * tiles, buffers, warps, 0)


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
