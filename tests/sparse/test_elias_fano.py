"""The codec of positions: what goes in comes out, in the size that was promised, and damage never passes for data."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffpeft.sparse import elias_fano as positions
from diffpeft.sparse.elias_fano import low_bits, pack, packed_size, unpack

HUGE = 2**40
densities = st.floats(1e-5, 1) | st.floats(0, 5).map(lambda digits: 1 - 10**-digits)
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


@given(sizes, densities, seeds)
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
    one = data.draw(st.integers(0, numel - 1))
    others = [position for position in range(numel) if position != one]
    for chosen in ([], [0], [numel - 1], [one], others, range(1, numel), range(numel - 1), range(numel)):
        expected = torch.tensor(list(chosen), dtype=torch.int64)
        assert torch.equal(unpack(pack(expected, numel), len(expected), numel), expected)


@given(st.integers(2**31, HUGE), st.integers(0, 300), seeds)
def test_round_trip_beyond_32_bits(numel, count, seed):
    expected = torch.unique(torch.cat([random_positions(count, numel, seed), torch.tensor([numel - 1])]))
    packed = pack(expected, numel)
    assert len(packed) == packed_size(len(expected), numel) < 16 * len(expected)
    assert torch.equal(unpack(packed, len(expected), numel), expected)


@given(st.integers(0, 64), st.integers(0, 64), seeds)
def test_round_trip_at_every_number_of_low_bits(bits, count, seed):
    """Groups of 8 remainders, full ones and others, over any number of planes."""
    count = max(1, count)
    numel = min(count << bits, 2**62)
    generator = np.random.default_rng(seed)
    expected = torch.from_numpy(np.unique(generator.integers(0, numel, count)))
    assert torch.equal(unpack(pack(expected, numel), len(expected), numel), expected)


@given(st.integers(1, 5000), densities, seeds)
def test_what_is_packed_may_have_strides_and_stays(numel, density, seed):
    expected = random_positions(math.ceil(density * numel), numel, seed)
    strided = torch.stack([expected, expected], 1)[:, 0]
    packed = pack(strided, numel)
    kept = packed.clone()
    assert torch.equal(packed, pack(expected, numel))
    assert torch.equal(unpack(torch.stack([packed, packed], 1)[:, 0], len(expected), numel), expected)
    unpack(packed, len(expected), numel)
    assert torch.equal(packed, kept)
    assert torch.equal(strided, expected)


def test_none_and_all_take_no_bytes():
    for count, numel in [(0, 0), (0, 10), (10, 10), (0, HUGE), (HUGE, HUGE)]:
        assert packed_size(count, numel) == 0
    assert pack(torch.arange(10), 10).shape == pack(torch.arange(0), 10).shape == (0,)


@pytest.mark.parametrize("count", [-1, 11])
def test_there_are_no_more_positions_than_elements(count):
    with pytest.raises(ValueError, match=f"there are no {count} positions below 10"):
        packed_size(count, 10)


def entropy_bits(count: int, numel: int) -> float:
    """log2 of the number of sets of `count` positions below `numel`."""
    logs = [math.lgamma(size + 1) for size in (numel, count, numel - count)]
    return (logs[0] - logs[1] - logs[2]) / math.log(2)


@pytest.mark.parametrize("numel", [1, 2, 7, 8, 100, 1000, 10**4, 10**5, 10**6, 12_345_678, 10**8, 10**10])
def test_size_is_at_most_1_03_times_the_entropy(numel):
    densities = [10 ** (-step / 400) for step in range(2001)]
    densities += [1 - density for density in densities] + [step / 1000 for step in range(1001)]
    for count in {round(density * numel) for density in densities} - {0}:
        for bits in (32, 16):
            if bits == 16 and 0.1 < count / numel <= 0.5:
                continue
            bound = 1.03 * (entropy_bits(count, numel) + bits * count)
            assert 8 * packed_size(count, numel) + bits * count <= bound + 8 * 16, (count, bits)


@given(st.integers(1000, 10**7), st.floats(2e-6, 0.04))
def test_size_is_within_0_6_bit_a_position_of_the_information_bound(count, density):
    numel = int(count / density)
    bits, bound = 8 * packed_size(count, numel), entropy_bits(count, numel)
    slack = 1e-12 * math.lgamma(numel + 1) + 24  # rounding of the bound, and parts end at a byte
    assert bound - slack <= bits <= bound + 0.6 * count + slack


@given(st.integers(1, HUGE), st.integers(1, 10**6))
def test_size_is_below_3_bits_a_position_and_its_low_bits(numel, count):
    count = min(count, numel)
    size = packed_size(count, numel)
    assert 8 * size < count * (3 + math.floor(math.log2(numel / count))) + 16
    assert count << low_bits(count, numel) <= numel
    assert size <= (numel + 7) // 8
    assert size == packed_size(numel - count, numel)


def test_the_layout_is_the_one_that_files_have():
    """Worked by hand from the module's docstring."""
    # b = 3, r = 3: low bits 001, 110, 111; bits 0 + 0, 1 + 1, 3 + 2 of 3 + 3
    assert pack(torch.tensor([1, 14, 31]), 32).tolist() == [0b11_110_001, 0b1, 0b10_0101]
    # b = 9, r = 1: a plane, then bit 8 of both, then bits 0 + 0 and 3 + 1 of 2 + 3
    assert pack(torch.tensor([0x103, 0x6FE]), 0x700).tolist() == [0x03, 0xFE, 0b01, 0b1_0001]
    # the 3 missing ones instead
    missing = [1, 14, 31]
    present = [position for position in range(32) if position not in missing]
    assert torch.equal(pack(torch.tensor(present), 32), pack(torch.tensor(missing), 32))
    # a bitmap, also of more than half
    assert pack(torch.tensor([0, 1, 3, 9]), 10).tolist() == [0b1011, 0b10]
    assert pack(torch.tensor([0, 1, 3, 4, 6, 9]), 10).tolist() == [0b0101_1011, 0b10]


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


def test_pack_refuses_numbers_that_are_no_integers():
    with pytest.raises(TypeError, match="float32"):
        pack(torch.tensor([0.5, 2.0]), 10)


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


def is_refused(packed: Tensor, count: int, numel: int) -> bool:
    """Whether damage is found; otherwise it has to be the code of another set of positions."""
    try:
        result = unpack(packed, count, numel)
    except ValueError:
        return True
    assert result.shape == (count,)
    positions.check(result, numel)
    assert torch.equal(pack(result, numel), packed)
    return False


@pytest.mark.parametrize(("count", "numel"), [(1, 300), (3, 32), (20, 3000), (5, 9), (25, 100), (55, 64), (290, 300)])
def test_every_flipped_bit_is_found_or_leaves_a_sorted_set(count, numel):
    packed = pack(random_positions(count, numel, seed=count), numel)
    for bit in range(8 * len(packed)):
        packed[bit // 8] ^= 1 << bit % 8
        is_refused(packed, count, numel)
        packed[bit // 8] ^= 1 << bit % 8


@given(st.integers(1, 3000), densities, seeds, st.data())
def test_flipped_bits_are_found_or_leave_a_sorted_set(numel, density, seed, data):
    expected = random_positions(math.ceil(density * numel), numel, seed)
    packed = pack(expected, numel)
    if len(packed):
        for bit in data.draw(st.lists(st.integers(0, 8 * len(packed) - 1), min_size=1, max_size=4)):
            packed[bit // 8] ^= 1 << bit % 8
        is_refused(packed, len(expected), numel)


@given(st.integers(1, 50), st.integers(1, 50), st.data())
def test_arbitrary_bytes_are_refused_or_read_as_a_sorted_set(numel, count, data):
    count = min(count, numel)
    size = packed_size(count, numel)
    is_refused(torch.tensor(list(data.draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8), count, numel)


@given(sizes | st.integers(2**31, HUGE), densities)
def test_zeros_are_no_code(numel, density):
    """Layers take a buffer of zeros for positions that were never loaded."""
    count = max(1, round(density * min(numel, 20_000)))
    size = packed_size(count, numel)
    assert size == 0 or is_refused(torch.zeros(size, dtype=torch.uint8), count, numel)
    assert (size == 0) == (count == numel)


@pytest.mark.parametrize("byte", [0, 255])
@pytest.mark.parametrize("count", [1, 10, 30, 70, 99])
def test_erased_bytes_are_refused(byte, count):
    packed = pack(torch.arange(count), 100)
    with pytest.raises(ValueError, match=r"the file is damaged|outside"):
        unpack(torch.full_like(packed, byte), count, 100)


def test_a_position_out_of_range_is_refused():
    packed = pack(torch.tensor([0, 49]), 50)  # 4 low bits each: 0000 and 0001 in byte 0
    packed[0] |= 0b0010_0000
    with pytest.raises(ValueError, match=r"from 0 to 51, outside \[0, 50\)"):
        unpack(packed, 2, 50)


def test_a_duplicate_is_refused():
    packed = pack(torch.tensor([4, 5]), 50)
    packed[0] ^= 0b0001_0000
    with pytest.raises(ValueError, match="not strictly increasing"):
        unpack(packed, 2, 50)


def test_a_bit_behind_the_last_position_is_refused():
    packed = pack(torch.tensor([4, 14, 31]), 32)  # 3 low bits each, in bytes 0 and 1
    packed[1] |= 0b10
    with pytest.raises(ValueError, match="behind the last position"):
        unpack(packed, 3, 32)


def test_check_accepts_the_empty_set():
    positions.check(torch.empty(0, dtype=torch.int64), 0)
