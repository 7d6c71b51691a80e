"""A checksum over a diff's values and positions, so that damage on the way is told.

The buffer of a parameter's positions is [seal][scale][code]. The seal is SEAL bytes: in a file the CRC-32 of the parameter's name,
the rest of the buffer and the values, little-endian; in memory, where values train, 255 each; 0 where nothing was loaded
yet. The scale is SCALE bytes, fp32, where values
have one (`diffpeft/files/values.py`), else none; it is read from a file alone. The code is that of `diffpeft/sparse/elias_fano.py`.
"""

import re
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from diffpeft.sparse import elias_fano as positions

SEAL = 4
SCALE = 4
LIVE = 255
"""Each byte of the seal in memory."""

PART = ".diffpruning_"
"""In every key of a diff-pruning tensor, and in no other."""


def size(count: int, numel: int, scales: int = 0) -> int:
    """Bytes of the buffer for `count` positions in [0, numel), and for the scales of their values, 0 or 1."""
    return SEAL + SCALE * scales + positions.packed_size(count, numel)


def pack(where: Tensor, numel: int, scale: Tensor | None = None) -> Tensor:
    """The buffer, without a seal, of strictly increasing positions (int64, shape (k,)) and the scale of their values (fp32,
    shape (0,) or (1,); None is none): uint8, shape (size(k, numel, scales),)."""
    code = positions.pack(where, numel)
    scale = torch.empty(0) if scale is None else scale
    return torch.cat([code.new_full((SEAL,), LIVE), scale.to(code.device).view(torch.uint8), code])


def unpack(buffer: Tensor, count: int, numel: int) -> Tensor:
    """The positions in a buffer, int64, shape (count,). Raises ValueError for what is no such buffer."""
    return positions.unpack(buffer[_code(buffer, count, numel) :], count, numel)


def scale(buffer: Tensor, count: int, numel: int) -> Tensor:
    """The scale in a buffer, fp32, shape (1,), or (0,) where it has none."""
    return buffer[SEAL : _code(buffer, count, numel)].clone().view(torch.float32)


def _code(buffer: Tensor, count: int, numel: int) -> int:
    """Where the code begins."""
    return SEAL + SCALE * (buffer.numel() == size(count, numel, scales=1))


def seal(buffer: Tensor, values: Tensor, name: str = "") -> Tensor:
    """A copy of the buffer, sealed together with the values (shape (k,)) that belong to its positions and with the name of
    the parameter in the base model."""
    checksum = torch.frombuffer(bytearray(_checksum(buffer, values, name)), dtype=torch.uint8)
    return torch.cat([checksum.to(buffer.device), buffer[SEAL:]])


def unseal(buffer: Tensor) -> Tensor:
    """A copy of the buffer without its seal, as it is in memory."""
    return torch.cat([buffer.new_full((SEAL,), LIVE), buffer[SEAL:]])


def is_sealed(buffer: Tensor) -> bool:
    """Whether the buffer comes from a file, unchanged."""
    return bool((buffer[:SEAL] != LIVE).any())


def check(buffer: Tensor, values: Tensor, name: str = "") -> None:
    """Raise ValueError if a buffer from a file and its values are not what was sealed."""
    if bytes(buffer[:SEAL].cpu().numpy()) != _checksum(buffer, values, name):
        raise ValueError("the checksum of its positions and values is wrong: the file is damaged")


def canonical(key: str) -> str:
    """A tensor's key by the names of the base model: without PEFT's prefix, and without `.base_layer`, which stands in
    it where a module inside of it is wrapped too."""
    return key.replace(".base_layer", "").removeprefix("base_model.model.")


def checksum_of_heads(tensors: Mapping[str, Tensor]) -> int | None:
    """Of the tensors beside the diff and their names in the base model; None where there are none."""
    heads = {re.sub(r"\.modules_to_save\.[^.]+", "", canonical(n)): t for n, t in tensors.items() if PART not in n}
    return (
        sum(zlib.crc32(_bytes(tensor), zlib.crc32(name.encode())) for name, tensor in heads.items()) if heads else None
    )


def checksum_of_diff(tensors: Mapping[str, Tensor]) -> int:
    """Of the seals of a file, each of which covers its parameter's diff."""
    buffers = (tensor for name, tensor in tensors.items() if f"{PART}positions" in name)
    return sum(int.from_bytes(bytes(buffer[:SEAL].cpu().numpy()), "little") for buffer in buffers)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _checksum(buffer: Tensor, values: Tensor, name: str) -> bytes:
    whole = zlib.crc32(_bytes(values), zlib.crc32(_bytes(buffer[SEAL:]), zlib.crc32(name.encode())))
    sealed = whole.to_bytes(SEAL, "little")
    return sealed if whole and sealed != bytes([LIVE] * SEAL) else (1).to_bytes(SEAL, "little")
