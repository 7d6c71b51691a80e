"""One parameter's diff as bytes: rounding, which happens once, sizes, checksums, and what is refused."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffpeft.files import encoding
from diffpeft.files.encoding import VALUE_DTYPES, buffer_size, decode, decode_values, encode, rounded, stored_size

NUMEL = 1000
TINY = torch.finfo(torch.float32).tiny
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)
diffs = st.lists(numbers, min_size=1, max_size=40).map(torch.tensor)


def scale_of(values):
    return max(float(values.abs().max()) / 127, TINY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@given(values=diffs)
def test_what_comes_back_is_stored_as_it_was(dtype, values):
    where = torch.arange(len(values)) * 3
    stored, buffer = encode(where, values, NUMEL, dtype)
    assert (stored.dtype, stored.shape) == (getattr(torch, dtype), values.shape)
    assert buffer.numel() == buffer_size(len(values), NUMEL, dtype)
    assert buffer.numel() + stored.numel() * stored.element_size() == stored_size(len(values), NUMEL, dtype)
    assert torch.equal(encoding.unpack(buffer, len(values), NUMEL), where)
    positions, back = decode(stored, buffer, NUMEL)
    assert torch.equal(positions, where)
    assert torch.equal(back, decode_values(stored, buffer, NUMEL))
    assert back.dtype == torch.float32
    assert torch.equal(back, rounded(values, dtype))
    assert torch.equal(rounded(back, dtype), back)
    again = encode(where, back, NUMEL, dtype)
    assert all(torch.equal(a, b) for a, b in zip(again, (stored, buffer), strict=True))


@given(values=diffs)
def test_int8_is_half_a_scale_away_at_most(values):
    scale = scale_of(values)
    error = (rounded(values, "int8").double() - values.double()).abs()
    assert float(error.max()) <= scale / 2 * (1 + 1e-4)


def test_the_largest_of_every_mantissa_gives_its_scale_again():
    """So an adapter that was read and is saved again has the same bytes. Octaves differ by exact factors."""
    largest = (torch.arange(1 << 23, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    divisor = torch.tensor(127.0)
    scale = largest / divisor
    assert bool(((largest / scale).round() == 127).all())
    assert torch.equal(scale * 127 / divisor, scale)
    for one in largest[:: (1 << 23) // 50]:
        assert float(encoding.scale_of(encode(torch.tensor([0]), one[None], 9, "int8")[1], 1, 9)) == float(
            one / divisor
        )


@pytest.mark.parametrize("values", [[0.0, 0.0], [-0.0], [1e-45, 0.0], [-1e-40, 1e-40]], ids=str)
def test_zeros_and_what_is_next_to_them(values):
    values = torch.tensor(values)
    stored, buffer = encode(torch.arange(len(values)), values, NUMEL, "int8")
    back = decode_values(stored, buffer, NUMEL)
    assert float((back - values).abs().max()) <= TINY / 2
    assert float(encoding.scale_of(buffer, len(values), NUMEL)) > 0
    assert torch.equal(rounded(back, "int8"), back)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_does_not_become_a_number(value):
    assert not bool(rounded(torch.tensor([1.0, value]), "int8").isfinite().all())


@given(values=diffs, data=st.data())
def test_any_flipped_bit_is_told(values, data):
    stored, buffer = encode(torch.arange(len(values)) * 7, values, NUMEL, "int8")
    target = data.draw(
        st.sampled_from(
            [
                buffer,
                buffer[encoding.CHECKSUM_BYTES : encoding.CHECKSUM_BYTES + encoding.SCALE_BYTES],
                stored.view(torch.uint8),
            ]
        )
    )
    target[data.draw(st.integers(0, target.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if encoding.has_checksum(buffer):  # else all four bytes of the checksum would be 255
        with pytest.raises(ValueError, match="damaged"):
            decode_values(stored, buffer, NUMEL)


def with_scale(buffer, number):
    return torch.cat([buffer[:4], torch.tensor(list(struct.pack("<f", number)), dtype=torch.uint8), buffer[8:]])


@pytest.mark.parametrize("number", [0.0, -0.5, torch.nan, torch.inf, -torch.inf])
def test_a_scale_that_is_none_is_refused_whatever_the_checksum_says(number):
    stored, buffer = encode(torch.arange(3), torch.randn(3), NUMEL, "int8")
    assert float(encoding.scale_of(with_scale(buffer, 0.25), 3, NUMEL)) == 0.25
    with pytest.raises(ValueError, match=r"its scale is .*, not positive and finite"):
        decode_values(stored, encoding.add_checksum(with_scale(buffer, number), stored), NUMEL)


def test_a_scale_that_makes_values_infinite_is_refused():
    stored, buffer = encode(torch.arange(3), torch.randn(3), NUMEL, "int8")
    with pytest.raises(ValueError, match="NaN or infinite"):
        decode_values(stored, encoding.add_checksum(with_scale(buffer, 3e38), stored), NUMEL)


@pytest.mark.parametrize(("dtype", "scales"), [("int8", 0), ("float32", 1), ("int16", 0), ("float64", 0), ("uint8", 1)])
def test_a_dtype_and_scales_that_do_not_go_together_are_refused(dtype, scales):
    stored = torch.tensor([1.0, 2.0, 3.0]).to(getattr(torch, dtype))
    buffer = encoding.add_checksum(encoding.pack(torch.arange(3), NUMEL, torch.ones(scales)), stored)
    with pytest.raises(ValueError, match=rf"its values are torch\.{dtype} with {scales} scales"):
        decode_values(stored, buffer, NUMEL)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("count", [1, NUMEL // 3, NUMEL])
def test_sizes_follow_from_counts_alone(dtype, count, device):
    where, values = torch.arange(count, device=device), torch.randn(count, device=device)
    stored, buffer = encode(where, values, NUMEL, dtype)
    assert buffer.numel() == encoding.buffer_size(count, NUMEL, "float32") + 4 * (dtype == "int8")
    assert torch.equal(decode_values(stored, buffer, NUMEL), rounded(values, dtype))
    assert stored.device == buffer.device == where.device


@given(st.lists(st.integers(0, 999), unique=True, max_size=50), st.data())
def test_any_flipped_bit_breaks_a_checksum(places, data):
    values = torch.randn(len(places))
    buffer = encoding.add_checksum(encoding.pack(torch.tensor(sorted(places), dtype=torch.int64), 1000), values)
    encoding.check_checksum(buffer, values)
    assert encoding.has_checksum(buffer)
    damaged, damaged_values = buffer.clone(), values.clone()
    target = data.draw(st.sampled_from([t for t in (damaged, damaged_values.view(torch.uint8)) if t.numel()]))
    target[data.draw(st.integers(0, target.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if not encoding.has_checksum(damaged):
        return  # all four bytes of the checksum would have to be 255
    with pytest.raises(ValueError, match="checksum"):
        encoding.check_checksum(damaged, damaged_values)


def test_a_buffer_in_memory_has_no_checksum():
    buffer = encoding.pack(torch.tensor([1, 5]), 9)
    assert not encoding.has_checksum(buffer)
    with pytest.raises(ValueError, match="checksum"):  # a file must have one
        encoding.check_checksum(buffer, torch.randn(2))
    assert torch.equal(encoding.unpack(buffer, 2, 9), torch.tensor([1, 5]))
    assert buffer.numel() == encoding.buffer_size(2, 9, "float32")
