"""Keys and values of attention in 8 bits: an int8 an element, and one scale for each vector of a head.

Symmetric: `states = integers * scales`, with `scales` the largest magnitude of the vector over 127.
"""

import torch


# Up to here the integers go, on both sides of zero.
_LARGEST = 127


def check_cross_dtype(cross_dtype):
    """Return `cross_dtype` if cross-attention's keys and values can be held in it, else raise.

    Raises:
        TypeError: it is neither None nor a `torch.dtype`.
        ValueError: it is another dtype than `torch.int8`.
    """
    if cross_dtype is not None and not isinstance(cross_dtype, torch.dtype):
        raise TypeError(f"`cross_dtype` must be a torch.dtype or None, not {cross_dtype!r}; pass torch.int8.")
    if cross_dtype not in (None, torch.int8):
        raise ValueError(
            f"`cross_dtype` is {cross_dtype}: pass torch.int8 for 8 bits, or None for what the decoder computes in."
        )
    return cross_dtype


def quantize(states, integers, scales):
    """Write `states` to `integers` and `scales`.

    No element is off by more than half its vector's scale, or by the subnormals of the scales' dtype where those are
    larger.

    Args:
        states: floating `(rows, heads, length, head_dim)`.
        integers: int8, of the same shape, written.
        scales: `(rows, heads, length)` in the dtype of `states`, written.
    """
    # In float32: a quotient in bfloat16 would itself be rounded, by up to a quarter of a step.
    largest = torch.linalg.vector_norm(states, torch.inf, dim=-1, dtype=torch.float32)
    # Of a vector of zeros too the quotient is finite.
    scales.copy_((largest / _LARGEST).clamp_(min=torch.finfo(scales.dtype).tiny))
    # By the scale as it is stored: however coarsely that is rounded, the integers make up for it.
    integers.copy_((states / scales.float()[..., None]).round_())


def dequantize(integers, scales):
    """`(rows, heads, length, head_dim)` in the dtype of `scales`, `(rows, heads, length)`."""
    return integers * scales[..., None]


def in_full(keys, values, key_scales=None, value_scales=None):
    """Keys and values to compute with: as they are, or what they stand for where they have scales."""
    if key_scales is None:
        return keys, values
    return dequantize(keys, key_scales), dequantize(values, value_scales)


def store(states, buffer, scales=None):
    """Write `states` to a buffer of their own dtype, or in 8 bits where there are scales."""
    if scales is None:
        buffer.copy_(states)
    else:
        quantize(states, buffer, scales)
