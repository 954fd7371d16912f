"""Packing: what goes in comes out, in the layout that the module states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_static_cache.ops.packing import LEVELS, PLANES, pack, packed_width, plane_width, unpack


BITS = tuple(LEVELS)


def random_integers(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, LEVELS[bits], (rows, columns), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 700), seed=st.integers(0, 2**31))
def test_unpack_gives_back_what_pack_was_given(bits, rows, columns, seed):
    values = random_integers(rows, columns, bits, seed)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(bits, columns))
    assert packed.shape[1] % 16 == 0
    torch.testing.assert_close(unpack(packed, bits, columns), values, rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_every_integer_at_every_digit(bits):
    columns = 16 * sum(plane.digits for plane in PLANES[bits])
    for value in range(LEVELS[bits]):
        values = torch.full((1, columns), value, dtype=torch.uint8)
        assert torch.equal(unpack(pack(values, bits), bits, columns), values)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [48, 384, 1280, 5120])
def test_bytes_hold_the_digits_that_the_module_documents(bits, columns):
    values = random_integers(2, columns, bits)
    packed = pack(values, bits)
    start = 0
    for plane in PLANES[bits]:
        width = plane_width(plane, columns)
        for byte in (0, 1, width // 2, width - 1):
            expected = 0
            for digit in range(plane.digits):
                element = byte + digit * width
                value = int(values[1, element]) if element < columns else 0
                expected += (value // plane.place % plane.base) * plane.base**digit
            assert int(packed[1, start + byte]) == expected
        start += width


@pytest.mark.parametrize(("bits", "width"), [(8, 1280), (4, 640), (3, 480), (2, 320), (1.58, 256)])
def test_rows_of_large_models_carry_no_padding(bits, width):
    assert packed_width(bits, 1280) == width


def test_every_ternary_byte_unpacks_by_division():
    bytes_ = torch.arange(243, dtype=torch.uint8).repeat_interleave(16).reshape(243, 16)
    expected = torch.cat([bytes_ // 3**digit % 3 for digit in range(5)], dim=1)
    assert torch.equal(unpack(bytes_, 1.58, 80), expected)


def test_unpack_traces_without_a_graph_break():
    for bits in BITS:
        packed = pack(random_integers(3, 96, bits), bits)
        compiled = torch.compile(unpack, fullgraph=True, backend="eager")
        assert torch.equal(compiled(packed, bits, 96), unpack(packed, bits, 96))


@pytest.mark.parametrize(
    ("values", "bits", "match"),
    [
        (torch.zeros(1, 16, dtype=torch.uint8), 5, "bits=5 cannot be packed"),
        (torch.zeros(1, 16, dtype=torch.int32), 4, "uint8 matrix"),
        (torch.zeros(16, dtype=torch.uint8), 4, "uint8 matrix"),
        (torch.full((1, 16), 16, dtype=torch.uint8), 4, "values hold 16"),
        (torch.full((1, 16), 3, dtype=torch.uint8), 1.58, "values hold 3"),
    ],
)
def test_what_cannot_be_packed_is_refused(values, bits, match):
    with pytest.raises(ValueError, match=match):
        pack(values, bits)
