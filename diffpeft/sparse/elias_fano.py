"""Codec of sorted positions: Elias-Fano (Elias 1974, Fano 1971) or a bitmap, whichever is smaller.

The layout and the size follow from k, the number of positions, and n, the number of elements, alone, so that a buffer
can be made before a file is read. With 32 bits a value, positions and values take at most 1.03 times their entropy.

Let m = min(k, n - k) and b = floor(log2(n / m)). There are three cases:

- m = 0: no bytes.
- A bitmap of ceil(n / 8) bytes, unless the code below is smaller: bit i is set if i is one of the k positions.
- The Elias-Fano code of m positions p_0 < p_1 < ...: the k positions or, if k > n / 2, the n - k missing ones.
    1. floor(b / 8) planes of m bytes: plane j holds bits 8 j to 8 j + 7 of each p_i.
    2. The remaining r = b mod 8 of the low b bits of each p_i, one after the other: ceil(m r / 8) bytes.
    3. A bitmap of m + ((n - 1) >> b) bits, from a byte on, in which the bits (p_i >> b) + i are set.

Bits count from the least significant of the first byte; those left of a last byte are 0. So a set has one code only,
and no code is all zeros, except that of no bytes.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def low_bits(count: int, numel: int) -> int:
    """Bits of a position stored verbatim in an Elias-Fano code: floor(log2(numel / count)), 0 for dense sets."""
    return max(0, (numel // count).bit_length() - 1) if count else 0


def _layout(count: int, numel: int) -> tuple[int, int, int]:
    """Number of coded positions, low bits of each, and bytes of the code; without low bits it is a bitmap."""
    if not 0 <= count <= numel:
        raise ValueError(f"there are no {count} positions below {numel}")
    coded = min(count, numel - count)
    if coded == 0:
        return 0, 0, 0
    bits = low_bits(coded, numel)
    size = (coded * bits + 7) // 8 + (coded + ((numel - 1) >> bits) + 7) // 8
    return (coded, bits, size) if size < (numel + 7) // 8 else (count, 0, (numel + 7) // 8)


def packed_size(count: int, numel: int) -> int:
    """Bytes that [`pack`] takes for `count` positions in [0, numel). Raises ValueError for more than `numel`."""
    return _layout(count, numel)[2]


def pack(positions: Tensor, numel: int) -> Tensor:
    """Encode strictly increasing positions in [0, numel), int64, shape (k,), as uint8, shape (packed_size(k, numel),).

    The code is on the device of `positions`.

    Raises:
        ValueError: positions out of order or out of range.
    """
    on_cpu = positions.cpu()
    check(on_cpu, numel)
    array = on_cpu.numpy().astype(np.int64, order="C", casting="safe", copy=False)
    coded, bits, size = _layout(len(array), numel)
    if size == 0:
        return torch.empty(0, dtype=torch.uint8, device=positions.device)
    if coded != len(array):
        array = _complement(array, numel)
    planes, rest = divmod(bits, 8)
    octets = array.astype("<i8", copy=False).view(np.uint8).reshape(-1, 8)
    low = [octets[:, plane] for plane in range(planes)]
    low += [_squeeze(octets[:, planes] & ((1 << rest) - 1), rest)] if rest else []
    high = np.zeros(coded + ((numel - 1) >> bits) if bits else numel, dtype=np.bool_)
    high[(array >> bits) + np.arange(coded) if bits else array] = True
    return torch.from_numpy(np.concatenate([*low, np.packbits(high, bitorder="little")])).to(positions.device)


def unpack(packed: Tensor, count: int, numel: int) -> Tensor:
    """Decode what [`pack`] made: int64, shape (count,), strictly increasing, on the device of `packed`.

    Raises:
        ValueError: the size does not fit (count, numel), or the bytes are no code of `count` positions below `numel`.
    """
    decode: Any = _unpack_operator if torch.compiler.is_compiling() else _unpack  # numpy cannot be traced
    return decode(packed, count, numel)  # type: ignore[no-any-return]


def _unpack(packed: Tensor, count: int, numel: int) -> Tensor:
    coded, bits, size = _layout(count, numel)
    if packed.numel() != size:
        raise ValueError(
            f"{packed.numel()} bytes cannot hold {count} positions below {numel}, which take {size}: "
            "the file is damaged or belongs to another model"
        )
    if size == 0:
        return torch.arange(count, device=packed.device)
    low, high = np.split(packed.cpu().numpy(), [(coded * bits + 7) // 8])
    result = np.flatnonzero(np.unpackbits(high, bitorder="little").view(np.bool_)).astype("<i8", copy=False)
    if len(result) != coded:
        raise ValueError(f"{len(result)} positions found where {coded} were expected: the file is damaged")
    if bits:
        result -= np.arange(coded)
        result <<= bits
    planes, rest = divmod(bits, 8)
    octets = result.view(np.uint8).reshape(-1, 8)
    for plane in range(planes):
        octets[:, plane] = low[plane * coded : (plane + 1) * coded]
    if rest:
        octets[:, planes] |= _spread(low[planes * coded :], coded, rest)
    positions = torch.from_numpy(result.astype(np.int64, copy=False))
    check(positions, numel)
    if coded != count:
        positions = torch.from_numpy(_complement(result, numel))
    return positions.to(packed.device)


_unpack_operator = torch.library.custom_op("diffpeft::unpack", _unpack, mutates_args=())


@_unpack_operator.register_fake
def _(packed: Tensor, count: int, numel: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=packed.device)


def check(positions: Tensor, numel: int) -> None:
    """Raise ValueError unless `positions` is strictly increasing within [0, numel)."""
    if positions.numel() and (int(positions[0]) < 0 or int(positions[-1]) >= numel):
        raise ValueError(f"positions reach from {int(positions[0])} to {int(positions[-1])}, outside [0, {numel})")
    if not bool((positions[1:] > positions[:-1]).all()):
        raise ValueError("positions are not strictly increasing: the file is damaged")


def _complement(array: NDArray[np.int64], numel: int) -> NDArray[np.int64]:
    """Positions below `numel` that are not in `array`."""
    mask = np.ones(numel, dtype=np.bool_)
    mask[array] = False
    return np.flatnonzero(mask)


def _steps(rest: int) -> list[tuple[int, int, int]]:
    """Steps to push 8 values of `rest` bits together in 64: a mask of every other value, its width, the gap behind."""
    widths = {lane: rest * lane // 8 for lane in (8, 16, 32)}
    return [(sum((1 << w) - 1 << bit for bit in range(0, 64, 2 * lane)), w, lane - w) for lane, w in widths.items()]


def _squeeze(values: NDArray[Any], rest: int) -> NDArray[Any]:
    """Join bytes below 2^rest to a stream of `rest` bits each."""
    words: NDArray[Any] = np.pad(values, (0, -len(values) % 8)).view("<u8")
    for mask, width, gap in _steps(rest):
        words = (words & mask) | (words >> gap & mask << width)
    return words.view(np.uint8).reshape(-1, 8)[:, :rest].reshape(-1)[: (len(values) * rest + 7) // 8]


def _spread(stream: NDArray[Any], count: int, rest: int) -> NDArray[Any]:
    """The inverse of [`_squeeze`]. Raises ValueError for bits set behind the last of `count` values."""
    groups = (count + 7) // 8
    padded = np.pad(stream, (0, groups * rest - len(stream))).reshape(groups, rest)
    words: NDArray[Any] = np.pad(padded, ((0, 0), (0, 8 - rest))).view("<u8")
    for mask, width, gap in reversed(_steps(rest)):
        words = (words & mask) | (words & mask << width) << gap
    values = words.view(np.uint8).reshape(-1)
    if values[count:].any():
        raise ValueError("bits are set behind the last position: the file is damaged")
    return values[:count]
