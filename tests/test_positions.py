"""The codec of positions: what goes in comes out, in the size that was promised, and damage never passes for data."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffpeft import positions
from diffpeft.positions import low_bits, pack, packed_size, unpack

HUGE = 2**33
sizes = st.integers(1, 20_000) | st.integers(0, 14).map(lambda bits: 2**bits)
seeds = st.integers(0, 2**32 - 1)


def random_positions(count: int, numel: int, seed: int) -> Tensor:
    """`count` of them where they fit in memory as a permutation, a few less of larger ranges."""
    generator = np.random.default_rng(seed)
    if numel <= 1 << 20:
        chosen = np.sort(generator.permutation(numel)[:count])
    else:
        chosen = np.unique(generator.integers(0, numel, count))
    return torch.from_numpy(chosen.astype(np.int64))


@given(sizes, st.floats(1e-5, 1), seeds)
def test_round_trip_in_the_promised_size(device, numel, density, seed):
    expected = random_positions(math.ceil(density * numel), numel, seed).to(device)
    packed = pack(expected, numel)
    assert packed.dtype == torch.uint8
    assert packed.device == expected.device
    assert packed.shape == (packed_size(len(expected), numel),)
    actual = unpack(packed, len(expected), numel)
    assert actual.dtype == torch.int64
    assert actual.device == expected.device
    assert torch.equal(actual, expected)


@given(sizes, st.data())
def test_round_trip_of_none_one_and_all(numel, data):
    for chosen in ([], [0], [numel - 1], [data.draw(st.integers(0, numel - 1))], range(numel)):
        expected = torch.tensor(list(chosen), dtype=torch.int64)
        assert torch.equal(unpack(pack(expected, numel), len(expected), numel), expected)


@given(st.integers(2**31, HUGE), st.integers(0, 300), seeds)
def test_round_trip_beyond_32_bits(numel, count, seed):
    expected = torch.unique(torch.cat([random_positions(count, numel, seed), torch.tensor([numel - 1])]))
    packed = pack(expected, numel)
    assert len(packed) == packed_size(len(expected), numel) < 16 * len(expected)
    assert torch.equal(unpack(packed, len(expected), numel), expected)


def test_no_positions_take_no_bytes():
    assert packed_size(0, 10) == packed_size(0, 0) == len(pack(torch.empty(0, dtype=torch.int64), 10)) == 0


@given(st.integers(1000, 10**7), st.floats(2e-6, 0.04))
def test_size_is_within_0_6_bit_a_position_of_the_information_bound(count, density):
    numel = int(count / density)
    rest = numel - count
    bound = (math.lgamma(numel + 1) - math.lgamma(count + 1) - math.lgamma(rest + 1)) / math.log(2)
    bits = 8 * packed_size(count, numel)
    slack = 1e-12 * math.lgamma(numel + 1) + 16  # rounding of the bound, and both parts end at a byte
    assert bound - slack <= bits <= bound + 0.6 * count + slack


@given(st.integers(1, HUGE), st.integers(1, 10**6))
def test_size_is_below_3_bits_a_position_and_its_low_bits(numel, count):
    count = min(count, numel)
    assert 8 * packed_size(count, numel) < count * (3 + math.floor(math.log2(numel / count))) + 16
    assert count << low_bits(count, numel) <= numel


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([3, 2, 7], "not strictly increasing"),
        ([2, 2, 7], "not strictly increasing"),
        ([-1, 2, 7], r"from -1 to 7, outside \[0, 10\)"),
        ([2, 7, 10], r"from 2 to 10, outside \[0, 10\)"),
        ([2, 12, 7], "not strictly increasing"),
    ],
)
def test_pack_refuses_what_is_no_sorted_set(wrong, message):
    with pytest.raises(ValueError, match=message):
        pack(torch.tensor(wrong), 10)


def test_pack_refuses_positions_in_an_empty_tensor():
    with pytest.raises(ValueError, match="outside"):
        pack(torch.tensor([0]), 0)


@given(st.integers(2, 5000), seeds, st.integers(-3, 3).filter(bool))
def test_unpack_refuses_another_size(numel, seed, difference):
    expected = random_positions(max(1, numel // 20), numel, seed)
    packed = pack(expected, numel)
    resized = packed[:difference] if difference < 0 else torch.cat([packed, packed.new_zeros(difference)])
    with pytest.raises(ValueError, match=f"{len(resized)} bytes cannot hold {len(expected)} positions below {numel}"):
        unpack(resized, len(expected), numel)


def check_damage(packed: Tensor, count: int, numel: int) -> None:
    """Damage is found, or what comes out is some sorted set of the right size."""
    try:
        result = unpack(packed, count, numel)
    except ValueError:
        return
    assert result.shape == (count,)
    assert int(result[0]) >= 0
    assert int(result[-1]) < numel
    assert bool((result[1:] > result[:-1]).all())


@given(st.integers(1, 3000), st.floats(1e-3, 1), seeds, st.data())
def test_flipped_bits_are_found_or_leave_a_sorted_set(numel, density, seed, data):
    expected = random_positions(math.ceil(density * numel), numel, seed)
    packed = pack(expected, numel)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(packed) - 1), min_size=1, max_size=4)):
        packed[bit // 8] ^= 1 << bit % 8
    check_damage(packed, len(expected), numel)


@given(st.integers(1, 50), st.integers(1, 5), st.data())
def test_arbitrary_bytes_are_refused_or_read_as_a_sorted_set(numel, count, data):
    count = min(count, numel)
    size = packed_size(count, numel)
    check_damage(
        torch.tensor(list(data.draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8), count, numel
    )


@pytest.mark.parametrize("byte", [0, 255])
def test_erased_bytes_are_refused(byte):
    packed = pack(torch.arange(0, 1000, 10), 1000)
    with pytest.raises(ValueError, match="expected: the file is damaged"):
        unpack(torch.full_like(packed, byte), 100, 1000)


def test_a_position_out_of_range_is_refused():
    packed = pack(torch.tensor([0, 9]), 10)  # 2 low bits each: 00 and 01 in byte 0
    packed[0] |= 0b1000
    with pytest.raises(ValueError, match=r"from 0 to 11, outside \[0, 10\)"):
        unpack(packed, 2, 10)


def test_a_duplicate_is_refused():
    packed = pack(torch.tensor([4, 5]), 10)
    packed[0] ^= 0b0100
    with pytest.raises(ValueError, match="not strictly increasing"):
        unpack(packed, 2, 10)


def test_check_accepts_the_empty_set():
    positions.check(torch.empty(0, dtype=torch.int64), 0)
