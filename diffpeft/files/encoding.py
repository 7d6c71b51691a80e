"""The diff of one parameter as bytes: values in fewer bits, packed positions, and a checksum over both.

Values are one tensor, shape (k,). Floating dtypes hold each by itself. "int8" holds integers q, -127 to 127, and one
scale a parameter, fp32: the largest magnitude / 127. The values are q scale, rounded to fp32, and those have this scale
too, so that what was read is written as it was.

Positions are the other, uint8: [checksum][scale][code]. The checksum is 4 bytes: in a file the CRC-32 of the
parameter's name, the rest of the buffer and the values, little-endian; in memory, where values train, 255 each; 0 where
nothing was loaded yet. The scale is 4 bytes or none, and the code that of `diffpeft/sparse/elias_fano.py`.
"""

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.files.keys import POSITIONS, heads_of
from diffpeft.sparse import elias_fano

VALUE_DTYPES = ("float32", "bfloat16", "float16", "int8")
CHECKSUM_BYTES = 4
SCALE_BYTES = 4
IN_MEMORY = 255
"""Each byte in place of the checksum while the values may train."""


class Checksums(NamedTuple):
    """The two checksums of a file: of its heads, None where it has none, and of its diff."""

    heads: int | None
    diff: int


def check_dtype(dtype: str) -> None:
    """Raise ValueError for a dtype that values cannot have in a file."""
    if dtype not in VALUE_DTYPES:
        raise ValueError(f"value_dtype={dtype!r} is not known; use one of {VALUE_DTYPES}")


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as configs name it, e.g. "float32"."""
    return str(dtype).removeprefix("torch.")


def buffer_size(count: int, numel: int, dtype: str) -> int:
    """Bytes of the buffer of positions of `count` values of a dtype, in a parameter of `numel` elements."""
    return CHECKSUM_BYTES + SCALE_BYTES * (dtype == "int8") + elias_fano.packed_size(count, numel)


def stored_size(count: int, numel: int, dtype: str) -> int:
    """Bytes of what [`encode`] gives: values and their buffer of positions."""
    return count * int(getattr(torch, dtype).itemsize) + buffer_size(count, numel, dtype)


def encode(positions: Tensor, values: Tensor, numel: int, dtype: str, name: str = "") -> tuple[Tensor, Tensor]:
    """A parameter's diff as it stands in a file.

    Args:
        positions: int64, shape (k,), strictly increasing, in [0, numel), else ValueError; k > 0.
        values: floating, shape (k,).
        numel: elements of the parameter.
        dtype: one of VALUE_DTYPES.
        name: of the parameter in the base model.

    Returns:
        The values in that dtype, shape (k,), and the buffer, uint8, shape (buffer_size(k, numel, dtype),).
    """
    stored, scale = _quantize(values, dtype)
    return stored, add_checksum(pack(positions, numel, scale), stored, name)


def decode(stored: Tensor, buffer: Tensor, numel: int, name: str = "") -> tuple[Tensor, Tensor]:
    """Positions (int64) and values (fp32), both of shape (k,), from what [`encode`] gave for a parameter.

    Raises:
        ValueError: no code of k positions below `numel`; and what [`decode_values`] refuses.
    """
    positions = unpack(buffer, stored.numel(), numel)
    return positions, decode_values(stored, buffer, numel, name)


def decode_values(stored: Tensor, buffer: Tensor, numel: int, name: str = "") -> Tensor:
    """The values alone of what [`decode`] gives, fp32, shape (k,).

    Raises:
        ValueError: a wrong checksum; another dtype than VALUE_DTYPES; a scale too many or too few, or that is not
            positive and finite; values that are NaN or infinite.
    """
    check_checksum(buffer, stored, name)
    scale = scale_of(buffer, stored.numel(), numel)
    if dtype_name(stored.dtype) not in VALUE_DTYPES or scale.numel() != (stored.dtype == torch.int8):
        raise ValueError(f"its values are {stored.dtype} with {scale.numel()} scales: the file is damaged")
    if scale.numel() and not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"its scale is {scale.item()}, not positive and finite: the file is damaged")
    values = _dequantize(stored, scale)
    if not bool(values.isfinite().all()):
        reasons = "the file is damaged, its training has diverged, or the dtype is too narrow"
        raise ValueError(f"its values are NaN or infinite in {dtype_name(stored.dtype)}: {reasons}")
    return values


def rounded(values: Tensor, dtype: str) -> Tensor:
    """Values (floating, shape (k,), k > 0) after they were stored in a dtype of VALUE_DTYPES and read, in fp32."""
    return _dequantize(*_quantize(values, dtype))


def fits(values: Tensor, dtype: str) -> bool:
    """Whether a dtype of VALUE_DTYPES holds values (floating, shape (k,), k > 0) exactly."""
    return torch.equal(rounded(values, dtype).nan_to_num(), values.detach().float().nan_to_num())


def _quantize(values: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Values in a dtype, shape (k,), and their scale, fp32, shape (1,) for "int8" and (0,) otherwise."""
    values = values.detach()
    if dtype != "int8":
        return values.to(getattr(torch, dtype)), values.new_empty(0, dtype=torch.float32)
    values = values.float()
    # Divided by a tensor: by a number, GPUs multiply with its rounded reciprocal. Below `tiny` a scale loses bits.
    scale = values.abs().amax(0, keepdim=True) / values.new_full((1,), 127)
    scale.clamp_(min=torch.finfo(torch.float32).tiny)
    return (values / scale).round().to(torch.int8), scale


def _dequantize(stored: Tensor, scale: Tensor) -> Tensor:
    return stored.float() * scale if scale.numel() else stored.float()


def pack(positions: Tensor, numel: int, scale: Tensor | None = None) -> Tensor:
    """The buffer of positions (those of [`encode`]) as it is in memory, uint8: without a checksum.

    `scale` is that of the values, fp32, shape (1,), or (0,) or None where they have none.
    """
    code = elias_fano.pack(positions, numel)
    scale = torch.empty(0) if scale is None else scale
    return torch.cat([code.new_full((CHECKSUM_BYTES,), IN_MEMORY), scale.to(code.device).view(torch.uint8), code])


def unpack(buffer: Tensor, count: int, numel: int) -> Tensor:
    """The positions in a buffer, int64, shape (count,). Raises ValueError where it does not hold `count` of them."""
    return elias_fano.unpack(buffer[_code_start(buffer, count, numel) :], count, numel)


def scale_of(buffer: Tensor, count: int, numel: int) -> Tensor:
    """The scale in a buffer, fp32, shape (1,), or (0,) where it has none."""
    return buffer[CHECKSUM_BYTES : _code_start(buffer, count, numel)].clone().view(torch.float32)


def _code_start(buffer: Tensor, count: int, numel: int) -> int:
    return CHECKSUM_BYTES + SCALE_BYTES * (buffer.numel() == buffer_size(count, numel, "int8"))


def add_checksum(buffer: Tensor, values: Tensor, name: str = "") -> Tensor:
    """A copy of a buffer with the checksum of itself, the stored values (shape (k,)) and the parameter's name."""
    checksum = torch.frombuffer(bytearray(_checksum(buffer, values, name)), dtype=torch.uint8)
    return torch.cat([checksum.to(buffer.device), buffer[CHECKSUM_BYTES:]])


def strip_checksum(buffer: Tensor) -> Tensor:
    """A copy of a buffer without its checksum, as it is in memory."""
    return torch.cat([buffer.new_full((CHECKSUM_BYTES,), IN_MEMORY), buffer[CHECKSUM_BYTES:]])


def has_checksum(buffer: Tensor) -> bool:
    """Whether a buffer is as a file had it."""
    return bool((buffer[:CHECKSUM_BYTES] != IN_MEMORY).any())


def check_checksum(buffer: Tensor, values: Tensor, name: str = "") -> None:
    """Raise ValueError unless a buffer has the checksum of itself, the stored values and the parameter's name."""
    if bytes(buffer[:CHECKSUM_BYTES].cpu().numpy()) != _checksum(buffer, values, name):
        raise ValueError("the checksum of its positions and values is wrong: the file is damaged")


def checksums_of(tensors: Mapping[str, Tensor]) -> Checksums:
    """The checksums of a file's tensors by key: of the heads with their names, and of the parameters' checksums."""
    heads = heads_of(tensors)
    crcs = [zlib.crc32(_bytes(head), zlib.crc32(name.encode())) for name, head in heads.items()]
    buffers = (tensor for key, tensor in tensors.items() if f".{POSITIONS}." in key)
    diff = sum(int.from_bytes(bytes(buffer[:CHECKSUM_BYTES].cpu().numpy()), "little") for buffer in buffers)
    return Checksums(sum(crcs) if heads else None, diff)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _checksum(buffer: Tensor, values: Tensor, name: str) -> bytes:
    crc = zlib.crc32(_bytes(values), zlib.crc32(_bytes(buffer[CHECKSUM_BYTES:]), zlib.crc32(name.encode())))
    checksum = crc.to_bytes(CHECKSUM_BYTES, "little")
    reserved = crc == 0 or checksum == bytes([IN_MEMORY] * CHECKSUM_BYTES)
    return (1).to_bytes(CHECKSUM_BYTES, "little") if reserved else checksum
