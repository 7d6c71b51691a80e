"""A checksum over a diff's values and positions, so that damage on the way is told.

A layer's buffer of positions begins with SEAL bytes: 0 in memory, where values train; in a file the CRC-32 of the code of
the positions and of the values, little-endian and never 0.
"""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from diffpeft import positions

SEAL = 4

PART = ".diffpruning_"
"""In every key of a diff-pruning tensor, and in no other."""


def size(count: int, numel: int) -> int:
    """Bytes of the buffer for `count` positions in [0, numel)."""
    return SEAL + positions.packed_size(count, numel)


def pack(where: Tensor, numel: int) -> Tensor:
    """The buffer, without a seal, of strictly increasing positions (int64, shape (k,)): uint8, shape (size(k, numel),)."""
    code = positions.pack(where, numel)
    return torch.cat([code.new_zeros(SEAL), code])


def unpack(buffer: Tensor, count: int, numel: int) -> Tensor:
    """The positions in a buffer, int64, shape (count,). Raises ValueError for what is no such buffer."""
    return positions.unpack(buffer[SEAL:], count, numel)


def seal(buffer: Tensor, values: Tensor) -> Tensor:
    """A copy of the buffer, sealed together with the values (shape (k,)) that belong to its positions."""
    checksum = torch.frombuffer(bytearray(_checksum(buffer, values)), dtype=torch.uint8)
    return torch.cat([checksum.to(buffer.device), buffer[SEAL:]])


def is_sealed(buffer: Tensor) -> bool:
    """Whether the buffer comes from a file, unchanged."""
    return bool(buffer[:SEAL].any())


def check(buffer: Tensor, values: Tensor) -> None:
    """Raise ValueError if a sealed buffer and its values are not what was sealed."""
    if is_sealed(buffer) and bytes(buffer[:SEAL].cpu().numpy()) != _checksum(buffer, values):
        raise ValueError("the checksum of its positions and values is wrong: the file is damaged")


def checksum_of_heads(tensors: Mapping[str, Tensor]) -> int | None:
    """Of the tensors beside the diff, whatever their names are just then; None where there are none."""
    heads = [tensor for name, tensor in tensors.items() if PART not in name]
    if not heads:
        return None
    return sum(zlib.crc32(_bytes(tensor), len(_bytes(tensor)) & 0xFFFFFFFF) for tensor in heads) % (1 << 53)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _checksum(buffer: Tensor, values: Tensor) -> bytes:
    whole = zlib.crc32(_bytes(values), zlib.crc32(_bytes(buffer[SEAL:])))
    return (whole or 1).to_bytes(SEAL, "little")
