"""Low-bit integers packed into bytes, and the PyTorch reference that packs and reads them.

One rule covers every width. A row of ``K`` integers becomes one or two *planes* of bytes, and a plane with ``d``
digits a byte in base ``r`` is ``P`` bytes long, ``P = ceil(K / d)`` rounded up to a multiple of 16. Its byte ``j``
holds the digits of elements ``j, j + P, j + 2P, ...``, least significant first::

    byte[j] = sum over i of digit(element j + i * P) * r ** i

| bits | planes | bytes for a row of K = 1280 |
|---|---|---|
| 8 | base 256, one a byte | 1280 |
| 4 | base 16, two a byte | 640 |
| 3 | base 4, four a byte, with the low two bits; then base 2, eight a byte, with the high bit | 320 + 160 |
| 2 | base 4, four a byte | 320 |
| 1.58 | base 3, five a byte | 256 |

Elements past ``K`` are zero digits. Neighbouring bytes hold neighbouring elements for every digit, so that a kernel
which reads a run of bytes needs ``d`` contiguous runs of activations and no shuffle; the 16 bytes keep rows aligned
for vector loads. Splitting 3 bits into two planes spends exactly 3 bits a weight where ten in a 32-bit word spend 3.2.
"""

import itertools
from typing import NamedTuple

import torch


ROW_ALIGNMENT = 16


class Plane(NamedTuple):
    """Digits of one base in a row's bytes: ``digits`` of them a byte, each worth ``place`` in the integer."""

    base: int
    digits: int
    place: int


PLANES = {
    8: (Plane(256, 1, 1),),
    4: (Plane(16, 2, 1),),
    3: (Plane(4, 4, 1), Plane(2, 8, 4)),
    2: (Plane(4, 4, 1),),
    1.58: (Plane(3, 5, 1),),
}

# Integers that a width stores: 0 to LEVELS[bits] - 1.
LEVELS = {8: 256, 4: 16, 3: 8, 2: 4, 1.58: 3}


def plane_width(plane, in_features):
    """Bytes that `plane` takes of a row of `in_features` integers."""
    return -(-in_features // (plane.digits * ROW_ALIGNMENT)) * ROW_ALIGNMENT


def packed_width(bits, in_features):
    """Bytes of a packed row of `in_features` integers of `bits` bits."""
    return sum(plane_width(plane, in_features) for plane in PLANES[bits])


def pack(values, bits):
    """Pack integers row by row.

    Args:
        values: uint8 tensor ``(rows, in_features)`` of integers below ``LEVELS[bits]``.
        bits: 8, 4, 3, 2 or 1.58.

    Returns:
        uint8 tensor ``(rows, packed_width(bits, in_features))``, on the device of `values`.

    Raises:
        ValueError: an unknown width, another dtype or shape, or an integer out of range.
    """
    if bits not in PLANES:
        raise ValueError(f"bits={bits} cannot be packed: use one of {', '.join(map(str, PLANES))}")
    if values.dtype != torch.uint8 or values.dim() != 2:
        raise ValueError(f"values must be a uint8 matrix, not {values.dtype} of shape {tuple(values.shape)}")
    if values.numel() and int(values.max()) >= LEVELS[bits]:
        raise ValueError(f"values hold {int(values.max())}, but bits={bits} stores integers below {LEVELS[bits]}")
    rows, in_features = values.shape
    parts = []
    for plane in PLANES[bits]:
        width = plane_width(plane, in_features)
        digits = (values // plane.place) % plane.base if plane.base < 256 else values
        digits = torch.nn.functional.pad(digits, (0, width * plane.digits - in_features))
        part = torch.zeros(rows, width, dtype=torch.uint8, device=values.device)
        for index, digit in enumerate(digits.split(width, dim=1)):
            part += digit * plane.base**index
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def plane_digits(part, plane):
    """Digits of one plane of bytes: a list of ``plane.digits`` uint8 tensors of the shape of `part`."""
    if plane.digits == 1:
        return [part]
    if plane.base != 3:
        shift = plane.base.bit_length() - 1
        return [(part >> (index * shift)) & (plane.base - 1) for index in range(plane.digits)]
    # Quotients by 3, 9, 27 and 81 by multiplication: exact below 256, and free of the integer division that compilers
    # do not vectorise.
    wide = part.to(torch.int32)
    quotients = [wide] + [(wide * (65536 // 3**index + 1)) >> 16 for index in range(1, plane.digits)]
    quotients.append(None)
    return [
        (quotient if higher is None else quotient - 3 * higher).to(torch.uint8)
        for quotient, higher in itertools.pairwise(quotients)
    ]


def segments(packed, bits, in_features):
    """The integers of packed rows as runs of neighbouring elements, each run read from neighbouring bytes.

    Args:
        packed: uint8 tensor ``(rows, packed_width(bits, in_features))``.
        bits: the width it was packed with.
        in_features: integers in a row.

    Returns:
        List of ``(first_element, integers)`` in order, integers uint8 ``(rows, n)``. All runs have one length where
        `in_features` is a multiple of it, as for every size of Whisper but in the ternary format.
    """
    widths = [plane_width(plane, in_features) for plane in PLANES[bits]]
    run = min(widths)
    if any(width % run for width in widths):
        # Rows too short for the planes' padding to be in proportion: one run, of all the elements.
        return [(0, _unpack_whole(packed, bits, in_features, widths))]
    columns = {}
    start = 0
    for plane, width in zip(PLANES[bits], widths):
        part = packed[:, start : start + width]
        start += width
        halves = [plane_digits(part[:, at : at + run], plane) for at in range(0, width, run)]
        for digit in range(plane.digits):
            for half, digits in enumerate(halves):
                first = digit * width + half * run
                if first < in_features:
                    value = digits[digit] if plane.place == 1 else digits[digit] * plane.place
                    columns[first] = columns[first] + value if first in columns else value
    return [(first, columns[first][:, : in_features - first]) for first in sorted(columns)]


def _unpack_whole(packed, bits, in_features, widths):
    values = 0
    for plane, part in zip(PLANES[bits], packed.split(widths, dim=1)):
        values = values + torch.cat(plane_digits(part, plane), dim=1)[:, :in_features] * plane.place
    return values


def unpack(packed, bits, in_features):
    """The integers that `pack` was given, uint8 ``(rows, in_features)``; arguments as for `segments`."""
    runs = [values for _, values in segments(packed, bits, in_features)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)
