"""Codec of sorted positions: Elias-Fano (Elias 1974, Fano 1971).

k sorted positions below n take at most k * (3 + floor(log2(n / k))) bits; at densities of a few percent and less that
is within 0.6 bits a position of the information bound. The size follows from (k, n) alone, so that a buffer can be made before a file is read.
Layout: the low `b` bits of every position, packed, little-endian within a position; then a bitmap in which the i-th
set bit stands at (position_i >> b) + i. Both parts start at a byte.
"""

import numpy as np
import torch
from torch import Tensor


def low_bits(count: int, numel: int) -> int:
    """Bits of a position stored verbatim: floor(log2(numel / count)), 0 for dense sets."""
    return max(0, (numel // count).bit_length() - 1) if count else 0


def packed_size(count: int, numel: int) -> int:
    """Bytes that [`pack`] takes for `count` positions in [0, numel)."""
    if count == 0:
        return 0
    bits = low_bits(count, numel)
    return (count * bits + 7) // 8 + (count + ((numel - 1) >> bits) + 1 + 7) // 8


def pack(positions: Tensor, numel: int) -> Tensor:
    """Encode strictly increasing positions.

    Args:
        positions: int64, shape (k,), strictly increasing, in [0, numel).
        numel: the number of elements that the positions index, at least 1 if k > 0.

    Returns:
        uint8, shape (packed_size(k, numel),), on the device of `positions`.

    Raises:
        ValueError: positions out of order or out of range.
    """
    check(positions, numel)
    count = positions.numel()
    if count == 0:
        return torch.empty(0, dtype=torch.uint8, device=positions.device)
    bits = low_bits(count, numel)
    array = positions.cpu().numpy()
    low = (array[:, None] >> np.arange(bits)) & 1
    high = np.zeros(count + ((numel - 1) >> bits) + 1, dtype=np.uint8)
    high[(array >> bits) + np.arange(count)] = 1
    packed = np.concatenate(
        [np.packbits(low.astype(np.uint8).reshape(-1), bitorder="little"), np.packbits(high, bitorder="little")]
    )
    return torch.from_numpy(packed).to(positions.device)


def unpack(packed: Tensor, count: int, numel: int) -> Tensor:
    """Decode what [`pack`] made: int64, shape (count,), strictly increasing, on the device of `packed`.

    Raises:
        ValueError: the size does not fit (count, numel), or the bytes are no set of `count` positions below `numel`.
    """
    if torch.compiler.is_compiling():  # numpy cannot be traced; the operator stands for it
        decoded: Tensor = _unpack_operator(packed, count, numel)
        return decoded
    return _unpack(packed, count, numel)


def _unpack(packed: Tensor, count: int, numel: int) -> Tensor:
    if packed.numel() != packed_size(count, numel):
        raise ValueError(
            f"{packed.numel()} bytes cannot hold {count} positions below {numel}, which take "
            f"{packed_size(count, numel)}: the file is damaged or belongs to another model"
        )
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=packed.device)
    bits = low_bits(count, numel)
    array = packed.cpu().numpy()
    split = (count * bits + 7) // 8
    set_bits = np.flatnonzero(np.unpackbits(array[split:], bitorder="little"))
    if len(set_bits) != count:
        raise ValueError(f"{len(set_bits)} positions found where {count} were expected: the file is damaged")
    result = (set_bits - np.arange(count)).astype(np.int64) << bits
    low = np.unpackbits(array[:split], count=count * bits, bitorder="little").reshape(count, bits)
    for bit in range(bits):
        result |= low[:, bit].astype(np.int64) << bit
    positions = torch.from_numpy(result).to(packed.device)
    check(positions, numel)
    return positions


@torch.library.custom_op("diffpeft::unpack", mutates_args=())
def _unpack_operator(packed: Tensor, count: int, numel: int) -> Tensor:
    return _unpack(packed, count, numel)


@_unpack_operator.register_fake
def _(packed: Tensor, count: int, numel: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=packed.device)


def check(positions: Tensor, numel: int) -> None:
    """Raise ValueError unless `positions` is strictly increasing within [0, numel)."""
    if positions.numel() == 0:
        return
    if int(positions[0]) < 0 or int(positions[-1]) >= numel:
        raise ValueError(f"positions reach from {int(positions[0])} to {int(positions[-1])}, outside [0, {numel})")
    if not bool((positions[1:] > positions[:-1]).all()):
        raise ValueError("positions are not strictly increasing: the file is damaged")
