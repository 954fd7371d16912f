"""Attention of one new token over the cache, split over the keys: Triton kernel and reference.

Each program takes a run of `split_size` keys of one head and leaves the softmax-weighted sum of its values, with the
logarithm of its softmax denominator. The product that follows merges the runs while it reads them
(`decode_linear` with `lse`), so that no kernel of its own does. What earlier steps have written is fetched before the
wait for the predecessor: all of cross-attention, and all of self-attention but the newest entry.

Many rows fill the chip without a split. With one run, a program streams all the keys of its row and head through a
pipeline of tiles, and as many programs as fit keep the memory busy. In half precision that leaves little time for
arithmetic, which takes place on the tensor cores: a query fills one row of 16 there. Each warp of a program has its
own keys of a tile, as the batch of a batched product, and its own softmax; nothing is exchanged but in the end.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .decode_linear import FEW_ROWS, HEAD_DIM
from .launch import fetch_line, interpreted, let_successor_start, options, start, wait_for_predecessor


# Stages of the pipeline in which a single run streams its keys, and keys in a tile of it.
STREAM_STAGES, STREAM_TILE = 3, 64
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


class StreamPlan(NamedTuple):
    """How a single run is streamed over the tensor cores.

    `keys` a warp in a tile; `warps` a program; `stages` of the pipeline; rows of the product to which the query is
    `padded`; whether the softmax enters as two `halves`, all of its float32, or rounded to the dtype of the values;
    and how many `lines` of 128 bytes of the keys, and of the values, are fetched ahead of the query.
    """

    keys: int
    warps: int
    stages: int
    padded: int
    halves: bool
    lines: int


# Of self-attention, of cross-attention, and of that in 8 bits. They hold so little shared memory that three programs
# to a multiprocessor are resident: then all of 16 rows with 20 heads are. One row is given to the product and padded
# by the compiler: on an H100 34, 6 and 9 % faster than 16 rows, for the same values.
SELF_PLAN = StreamPlan(16, 4, 3, 1, True, 128)
CROSS_PLAN = StreamPlan(32, 4, 3, 1, True, 256)
INT8_PLAN = StreamPlan(32, 4, 4, 1, True, 256)


@triton.jit
def _float(x):
    """`x` in float32, int8 without a conversion instruction: those go at a quarter of the rate of a product."""
    if x.dtype == tl.int8:
        # q + 128 in the trailing mantissa bits of 2**23.
        mantissa = (x.to(tl.int32) & 0xFF) ^ 0x4B000080
        return mantissa.to(tl.float32, bitcast=True) - 8388736.0
    else:
        return x.to(tl.float32)


@triton.jit
def _decode_attention_kernel(
    out_ptr, lse_ptr, query_ptr, keys_ptr, values_ptr, length_ptr, valid_ptr, source_length,
    key_scales_ptr, value_scales_ptr,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, SCALED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_successor_start(OVERLAP)
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    split = tl.program_id(1)
    start = split * (TILES * TILE)
    # A tile has as many keys as leave every thread one vector of one key; a thread keeps its own softmax over the
    # tiles, and only those of the threads are merged in the end.
    lane = tl.arange(0, TILE)[:, None]
    dim = tl.broadcast_to(tl.arange(0, 64)[None, :], [TILE, 64])
    base = tl.program_id(0).to(tl.int64) * SLOTS * 64
    slot = source_length
    if CAUSAL:
        slot = tl.load(length_ptr).to(tl.int32) - 1
    if start <= slot:
        keys = ()
        values = ()
        key_scales = ()
        value_scales = ()
        allowed = ()
        for tile in tl.static_range(TILES):
            key = start + tile * TILE + lane
            at = base + key * 64 + dim
            keys = keys + (tl.load(keys_ptr + at, mask=key < slot, other=0),)
            values = values + (tl.load(values_ptr + at, mask=key < slot, other=0),)
            if SCALED:
                at_scale = tl.program_id(0).to(tl.int64) * SLOTS + key
                key_scales = key_scales + (tl.load(key_scales_ptr + at_scale, mask=key < slot, other=0.0),)
                value_scales = value_scales + (tl.load(value_scales_ptr + at_scale, mask=key < slot, other=0.0),)
            if CAUSAL:
                valid = tl.load(valid_ptr + row * SLOTS + key, mask=key <= slot, other=0)
                allowed = allowed + (valid != 0,)
            else:
                allowed = allowed + (key < slot,)
        wait_for_predecessor(OVERLAP)
        q = tl.load(query_ptr + (row * HEADS + head) * 64 + dim).to(tl.float32)
        if CAUSAL:
            # The newest entry comes from the kernel before this one.
            newest_key = tl.load(keys_ptr + base + slot * 64 + dim)
            newest_value = tl.load(values_ptr + base + slot * 64 + dim)
        scores = ()
        best = tl.full([TILE, 1], -1e30, tl.float32)
        for tile in tl.static_range(TILES):
            k = keys[tile]
            if CAUSAL:
                k = tl.where(start + tile * TILE + lane == slot, newest_key, k)
            score = tl.sum(_float(k) * q, axis=1, keep_dims=True)
            if SCALED:
                score = score * key_scales[tile].to(tl.float32)
            score = tl.where(allowed[tile], score, -float("inf"))
            best = tl.maximum(best, score)
            scores = scores + (score,)
        total = tl.zeros([TILE, 1], tl.float32)
        value = tl.zeros([TILE, 64], tl.float32)
        for tile in tl.static_range(TILES):
            v = values[tile]
            if CAUSAL:
                v = tl.where(start + tile * TILE + lane == slot, newest_value, v)
            weight = tl.exp(scores[tile] - best)
            total += weight
            if SCALED:
                weight = weight * value_scales[tile].to(tl.float32)
            value += weight * _float(v)
        # A run of nothing but padding has no maximum: -1e30 keeps the exponentials at 0 rather than NaN.
        top = tl.max(best, axis=0, keep_dims=True)
        weight = tl.exp(best - top)
        total = tl.sum(total * weight, axis=0, keep_dims=True)
        value = tl.sum(value * weight, axis=0, keep_dims=True) / tl.maximum(total, 1e-30)
        place = (row * SPLITS + split) * HEADS + head
        tl.store(out_ptr + place * 64 + tl.arange(0, 64)[None, :], value)
        log = tl.where(total > 0, top + tl.log(total), -1e30)
        tl.store(lse_ptr + place + tl.zeros([1, 1], tl.int32), log)


@triton.jit
def _stream_attention_kernel(
    out_ptr, lse_ptr, query_ptr, keys_ptr, values_ptr, length_ptr, valid_ptr, source_length,
    key_scales_ptr, value_scales_ptr,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr,
    CAUSAL: tl.constexpr, SCALED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_successor_start(OVERLAP)
    row = tl.program_id(0) // HEADS
    lane = tl.arange(0, TILE)[:, None]
    dim = tl.arange(0, 64)[None, :]
    base = tl.program_id(0).to(tl.int64) * SLOTS * 64
    end = source_length
    if CAUSAL:
        end = tl.load(length_ptr).to(tl.int32)
    if OVERLAP:
        # The first keys and values come into the L2 cache while the query is still being made.
        line_bytes: tl.constexpr = 64 * keys_ptr.dtype.element_ty.primitive_bitwidth // 8
        last = (end * line_bytes - 1) // 128
        line = tl.minimum(tl.arange(0, LINES), last)
        fetch_line(keys_ptr + base, line)
        fetch_line(values_ptr + base, line)
    wait_for_predecessor(OVERLAP)
    q = tl.load(query_ptr + tl.program_id(0) * 64 + dim).to(tl.float32)
    # Each lane keeps a softmax of its own over the tiles; only the lanes' are merged in the end.
    best = tl.full([TILE, 1], -1e30, tl.float32)
    total = tl.zeros([TILE, 1], tl.float32)
    value = tl.zeros([TILE, 64], tl.float32)
    # Over all slots: what lies behind the end is masked, costs no bytes, and the loop has a length that is known.
    for first in tl.range(0, SLOTS, TILE, num_stages=STAGES):
        key = first + lane
        allowed = key < end
        k = _float(tl.load(keys_ptr + base + key * 64 + dim, mask=allowed, other=0))
        v = _float(tl.load(values_ptr + base + key * 64 + dim, mask=allowed, other=0))
        if CAUSAL:
            allowed = allowed & (tl.load(valid_ptr + row * SLOTS + key, mask=allowed, other=0) != 0)
        score = tl.sum(k * q, axis=1, keep_dims=True)
        if SCALED:
            at = tl.program_id(0).to(tl.int64) * SLOTS + key
            score *= tl.load(key_scales_ptr + at, mask=allowed, other=0.0).to(tl.float32)
        score = tl.where(allowed, score, -float("inf"))
        higher = tl.maximum(best, score)
        shrink = tl.exp(best - higher)
        weight = tl.exp(score - higher)
        total = total * shrink + weight
        if SCALED:
            weight *= tl.load(value_scales_ptr + at, mask=allowed, other=0.0).to(tl.float32)
        value = value * shrink + weight * v
        best = higher
    # Of a row of nothing but padding there is no maximum: -1e30 keeps the exponentials at 0 rather than NaN.
    top = tl.max(best, axis=0, keep_dims=True)
    weight = tl.exp(best - top)
    total = tl.sum(total * weight, axis=0, keep_dims=True)
    value = tl.sum(value * weight, axis=0, keep_dims=True) / tl.maximum(total, 1e-30)
    tl.store(out_ptr + tl.program_id(0) * 64 + dim, value)
    log = tl.where(total > 0, top + tl.log(total), -1e30)
    tl.store(lse_ptr + tl.program_id(0) + tl.zeros([1, 1], tl.int32), log)


@triton.jit
def _two_of_int8(pairs, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """The lower and the upper int8 of each 16 bits, in the float `dtype`: a few instructions for two pairs."""
    if WIDEN:
        pairs = pairs.to(tl.int16, bitcast=True)
        return ((pairs << 8) >> 8).to(tl.float32), (pairs >> 8).to(tl.float32)
    elif dtype == tl.float16:
        # q + 128 in the trailing mantissa bits of 1024.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 upper, less;
            mov.b32 less, 0x64806480;
            shr.b32 upper, $2, 8;
            lop3.b32 $0, $2, 0x00FF00FF, less, 0x6A;
            lop3.b32 upper, upper, 0x00FF00FF, less, 0x6A;
            sub.rn.f16x2 $0, $0, less;
            sub.rn.f16x2 $1, upper, less;
            }""",
            "=&r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        # The seven low bits in the mantissa of 128, less 128, or 256 of a negative number.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 upper, less, minus;
            mov.b32 minus, 0xBF80BF80;
            shr.b32 upper, $2, 8;
            lop3.b32 less, $2, 0x00800080, 0x43004300, 0xEA;
            lop3.b32 $0, $2, 0x007F007F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, less, minus, $0;
            lop3.b32 less, upper, 0x00800080, 0x43004300, 0xEA;
            lop3.b32 upper, upper, 0x007F007F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $1, less, minus, upper;
            }""",
            "=&r,=r,r",
            [pairs],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def _weighted(high, low, values, total, HALVES: tl.constexpr):
    total = tl.dot(high, values, total, input_precision="ieee")
    if HALVES:
        total = tl.dot(low, values, total, input_precision="ieee")
    return total


@triton.jit
def _stream_dot_kernel(
    out_ptr, lse_ptr, query_ptr, keys_ptr, values_ptr, length_ptr, valid_ptr, source_length,
    key_scales_ptr, value_scales_ptr,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, WARPS: tl.constexpr, KEYS: tl.constexpr, PADDED: tl.constexpr,
    STAGES: tl.constexpr, LINES: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr, HALVES: tl.constexpr,
    WIDEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_successor_start(OVERLAP)
    TILE: tl.constexpr = WARPS * KEYS
    # Elements to a key: int8 comes as pairs in 16 bits, which the tensor cores' loads can transpose.
    WIDTH: tl.constexpr = 32 if SCALED else 64
    row = tl.program_id(0) // HEADS
    lane = tl.arange(0, WARPS)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    index = tl.arange(0, WIDTH)[None, None, :]
    base = tl.program_id(0).to(tl.int64) * (SLOTS * WIDTH)
    at = tl.program_id(0).to(tl.int64) * SLOTS + lane
    end = source_length
    if CAUSAL:
        end = tl.load(length_ptr).to(tl.int32)
    if OVERLAP:
        # The first keys and values come into the L2 cache while the query is still being made.
        line_bytes: tl.constexpr = WIDTH * keys_ptr.dtype.element_ty.primitive_bitwidth // 8
        line = tl.minimum(tl.arange(0, LINES), (end * line_bytes - 1) // 128)
        fetch_line(keys_ptr + base, line)
        fetch_line(values_ptr + base, line)
    # What is too narrow for the pipeline is read a tile ahead.
    if CAUSAL:
        seen = tl.load(valid_ptr + row * SLOTS + lane, mask=lane < end, other=0)
    if SCALED:
        key_scale = tl.load(key_scales_ptr + at, mask=lane < end, other=0.0)
        value_scale = tl.load(value_scales_ptr + at, mask=lane < end, other=0.0)
    wait_for_predecessor(OVERLAP)
    padding = tl.arange(0, PADDED)
    # Every row of the product is the same query, and of the result one is written.
    every = (tl.arange(0, WARPS)[:, None, None] + padding[None, :, None]) * 0
    q = tl.load(query_ptr + tl.program_id(0) * 64 + every + tl.arange(0, 64)[None, None, :])
    if SCALED:
        q, q_upper = tl.split(tl.reshape(q, (WARPS, PADDED, 32, 2)))
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    if WIDEN:
        # The interpreter has no product of bfloat16 matrices.
        q = q.to(tl.float32)
        if SCALED:
            q_upper = q_upper.to(tl.float32)
    best = tl.full([WARPS, PADDED], -1e30, tl.float32)
    total = tl.zeros([WARPS, PADDED], tl.float32)
    value = tl.zeros([WARPS, PADDED, WIDTH], tl.float32)
    if SCALED:
        value_upper = tl.zeros([WARPS, PADDED, WIDTH], tl.float32)
        # Values are accumulated in units of the largest scale so far: no weight then leaves float16's range.
        largest = tl.full([WARPS], 1e-30, tl.float32)
    # The interpreter's loops want a length that is known.
    for first in tl.range(0, SLOTS if WIDEN else end, TILE, num_stages=STAGES):
        key = first + lane
        inside = (key < end)[:, :, None]
        k = tl.load(keys_ptr + base + key[:, :, None] * WIDTH + index, mask=inside, other=0)
        v = tl.load(values_ptr + base + key[:, :, None] * WIDTH + index, mask=inside, other=0)
        allowed = key < end
        following = key + TILE < end
        if SCALED:
            k, k_upper = _two_of_int8(k, dtype, WIDEN)
            v, v_upper = _two_of_int8(v, dtype, WIDEN)
            factor = key_scale.to(tl.float32) * _LOG2_E
            key_scale = tl.load(key_scales_ptr + at + first + TILE, mask=following, other=0.0)
            score = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision="ieee")
            score = tl.dot(q_upper, tl.permute(k_upper, (0, 2, 1)), score, input_precision="ieee")
            score *= factor[:, None, :]
        else:
            if WIDEN:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            score = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision="ieee") * _LOG2_E
        if CAUSAL:
            allowed = allowed & (seen != 0)
            seen = tl.load(valid_ptr + row * SLOTS + key + TILE, mask=following, other=0)
        score = tl.where(allowed[:, None, :], score, -float("inf"))
        higher = tl.maximum(best, tl.max(score, axis=2))
        shrink = tl.exp2(best - higher)
        best = higher
        weight = tl.exp2(score - higher[:, :, None])
        total = total * shrink + tl.sum(weight, axis=2)
        if SCALED:
            scale = value_scale.to(tl.float32)
            value_scale = tl.load(value_scales_ptr + at + first + TILE, mask=following, other=0.0)
            larger = tl.maximum(largest, tl.max(scale, axis=1))
            weight *= (scale / larger[:, None])[:, None, :]
            shrink *= (largest / larger)[:, None]
            largest = larger
        high = weight.to(dtype)
        low = high
        if HALVES:
            low = (weight - high.to(tl.float32)).to(dtype)
        if WIDEN:
            high = high.to(tl.float32)
            low = low.to(tl.float32)
        value = _weighted(high, low, v, value * shrink[:, :, None], HALVES)
        if SCALED:
            value_upper = _weighted(high, low, v_upper, value_upper * shrink[:, :, None], HALVES)
    # Of a row of nothing but padding there is no maximum: -1e30 keeps the exponentials at 0 rather than NaN.
    top = tl.max(best, axis=0)
    weight = tl.exp2(best - top[None, :])
    total = tl.sum(total * weight, axis=0)
    if SCALED:
        weight *= largest[:, None]
    inverse = 1.0 / tl.maximum(total, 1e-30)
    value = tl.sum(value * weight[:, :, None], axis=0) * inverse[:, None]
    place = out_ptr + tl.program_id(0) * 64 + padding[:, None] * 0
    stores = (padding == 0)[:, None]
    index = tl.arange(0, WIDTH)[None, :]
    if SCALED:
        value_upper = tl.sum(value_upper * weight[:, :, None], axis=0) * inverse[:, None]
        tl.store(place + 2 * index, value, mask=stores)
        tl.store(place + 2 * index + 1, value_upper, mask=stores)
    else:
        tl.store(place + index, value, mask=stores)
    log = tl.where(total > 0, (top + tl.log2(total)) * _LN_2, -1e30)
    tl.store(lse_ptr + tl.program_id(0) + padding * 0, log, mask=padding == 0)


@torch.library.custom_op(
    "whisper_static_cache::decode_attention", mutates_args=("out", "lse"), device_types=("cpu", "cuda")
)
def decode_attention(
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    split_size: int,
    length: torch.Tensor | None,
    valid: torch.Tensor | None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Attention of one query a row over the cache, in runs of `split_size` keys.

    Args:
        out: float32 ``(rows, splits, heads * 64)``, written: the softmax-weighted mean of each run's values.
        lse: float32 ``(rows, splits, heads)``, written: the logarithm of each run's sum of exponentials.
        query: ``(rows, heads * 64)`` in the dtype of `keys`, or of their scales, scaled.
        keys, values: ``(rows, heads, slots, 64)``, floating, or int8 with scales.
        split_size: a power of two, with ``splits * split_size >= slots``; not looked at with a single run of more than
            FEW_ROWS rows, which takes every key.
        length: int64 ``(1,)``, on the device: the query stands in slot ``length - 1`` and sees the slots up to its
            own, those of them that `valid` allows; runs behind it are not written. None: it sees every slot.
        valid: bool ``(rows, slots)``, given with `length`.
        key_scales, value_scales: ``(rows, heads, slots)``, what each int8 vector is to be multiplied by; without
            `length` only.
    """
    rows, heads, slots, _ = keys.shape
    splits = out.shape[1]
    causal = length is not None
    scaled = key_scales is not None
    dot = splits == 1 and rows > FEW_ROWS and query.dtype != torch.float32
    if dot and scaled:
        # Pairs in 16 bits, which is what the tensor cores' loads can transpose.
        keys, values = keys.view(torch.float16), values.view(torch.float16)
    operands = (
        out,
        lse,
        query,
        keys,
        values,
        length if causal else out,
        valid.view(torch.uint8) if causal else out,
        slots,
        *(out if tensor is None else tensor for tensor in (key_scales, value_scales)),
    )
    sizes = {"HEADS": heads, "SLOTS": slots, "CAUSAL": causal, "SCALED": scaled}
    if dot:
        plan = SELF_PLAN if causal else INT8_PLAN if scaled else CROSS_PLAN
        start(
            _stream_dot_kernel,
            (rows * heads,),
            *operands,
            **sizes,
            WARPS=plan.warps,
            KEYS=plan.keys,
            PADDED=plan.padded,
            STAGES=plan.stages,
            LINES=plan.lines,
            HALVES=plan.halves,
            WIDEN=interpreted(),
            **options(out.device, plan.warps),
        )
        return
    if splits == 1 and rows > FEW_ROWS:
        start(
            _stream_attention_kernel,
            (rows * heads,),
            *operands,
            **sizes,
            TILE=STREAM_TILE,
            STAGES=STREAM_STAGES,
            LINES=128 if causal else 256,
            **options(out.device, 4),
        )
        return
    num_warps = 16 if split_size > 256 else 8
    # Threads to a key, each with a vector of 16 bytes.
    tile = min(split_size, 32 * num_warps * 16 // (64 * keys.element_size()))
    start(
        _decode_attention_kernel,
        (rows * heads, splits),
        *operands,
        **sizes,
        SPLITS=splits,
        TILES=split_size // tile,
        TILE=tile,
        **options(out.device, num_warps),
    )


@decode_attention.register_fake
def _(*args, **kwargs):
    return None


def reference_decode_attention(query, keys, values, length=None, valid=None, key_scales=None, value_scales=None):
    """What the merged runs of `decode_attention` amount to, ``(rows, heads * 64)`` in the dtype of `query`."""
    rows, heads, slots, _ = keys.shape
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    if key_scales is not None:
        keys, values = keys * key_scales[..., None], values * value_scales[..., None]
    scores = torch.einsum("rhd,rhsd->rhs", query.view(rows, heads, HEAD_DIM), keys)
    if length is not None:
        seen = valid & (torch.arange(slots, device=keys.device) < length)
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("rhs,rhsd->rhd", scores.softmax(-1), values).reshape(rows, -1)
