"""A diff's values in a file: fp32 rounded to fewer bits, and back.

Floating dtypes hold each value by itself. "int8" holds integers q, -127 to 127, and one scale a parameter, fp32: the largest
magnitude / 127. The values are q scale, rounded to fp32, and those have the same scale again (`tests/test_values.py` tries all
mantissas), so that what was read is written as it was.
"""

import torch
from torch import Tensor

from diffpeft.files import seal

VALUE_DTYPES = ("float32", "bfloat16", "float16", "int8")


def check_dtype(dtype: str) -> None:
    """Raise ValueError for a dtype that files have no values in."""
    if dtype not in VALUE_DTYPES:
        raise ValueError(f"value_dtype={dtype!r} is not known; use one of {VALUE_DTYPES}")


def dtype_name(dtype: torch.dtype) -> str:
    """As configs say it, e.g. "float32"."""
    return str(dtype).removeprefix("torch.")


def buffer_size(count: int, numel: int, dtype: str) -> int:
    """Bytes of the buffer of positions, below numel, that belongs to `count` values of a dtype."""
    return seal.size(count, numel, scales=int(dtype == "int8"))


def stored_size(count: int, numel: int, dtype: str) -> int:
    """Bytes of what [`to_file`] gives: values and their buffer."""
    width: int = getattr(torch, dtype).itemsize
    return count * width + buffer_size(count, numel, dtype)


def to_file(where: Tensor, values: Tensor, numel: int, dtype: str, name: str = "") -> tuple[Tensor, Tensor]:
    """A parameter's diff as it stands in a file.

    Args:
        where: sorted flat positions below `numel`, int64, shape (k,), k > 0.
        values: floating, shape (k,).
        numel: elements of the parameter.
        dtype: one of VALUE_DTYPES.
        name: of the parameter in the base model.

    Returns:
        The values in that dtype, shape (k,), and the sealed buffer, uint8, shape (buffer_size(k, numel, dtype),).

    Raises:
        ValueError: positions out of order or out of range.
    """
    stored, scale = _quantize(values, dtype)
    return stored, seal.seal(seal.pack(where, numel, scale), stored, name)


def from_file(stored: Tensor, buffer: Tensor, numel: int, name: str = "") -> Tensor:
    """The values, fp32, shape (k,), of what [`to_file`] gave for the parameter of this name and of `numel` elements.

    Raises:
        ValueError: what is read is not what was sealed, or is none of the kind: another dtype, a scale too many or too few
            or that is not positive and finite, values that are NaN or infinite.
    """
    seal.check(buffer, stored, name)
    scale = seal.scale(buffer, stored.numel(), numel)
    if dtype_name(stored.dtype) not in VALUE_DTYPES or scale.numel() != (stored.dtype == torch.int8):
        raise ValueError(f"its values are {stored.dtype} with {scale.numel()} scales: the file is damaged")
    if scale.numel() and not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"its scale is {scale.item()}, not positive and finite: the file is damaged")
    values = _dequantize(stored, scale)
    if not bool(values.isfinite().all()):
        raise ValueError("its values are NaN or infinite: the file is damaged, or its training has diverged")
    return values


def rounded(values: Tensor, dtype: str) -> Tensor:
    """What comes back, fp32, of values (floating, shape (k,), k > 0) that were stored in a dtype of VALUE_DTYPES."""
    return _dequantize(*_quantize(values, dtype))


def fit(values: Tensor, dtype: str) -> bool:
    """Whether a dtype of VALUE_DTYPES holds values (floating, shape (k,), k > 0) as they are."""
    return torch.equal(rounded(values, dtype).nan_to_num(), values.detach().float().nan_to_num())


def _quantize(values: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Values in a dtype, shape (k,), and their scale, fp32, shape (1,) for "int8" and (0,) otherwise."""
    values = values.detach()
    if dtype != "int8":
        return values.to(getattr(torch, dtype)), values.new_empty(0, dtype=torch.float32)
    values = values.float()
    # Divided by a tensor: by a number, GPUs multiply with its rounded reciprocal. Below `tiny` the scale would lose bits.
    scale = values.abs().amax(0, keepdim=True) / values.new_full((1,), 127)
    scale.clamp_(min=torch.finfo(torch.float32).tiny)
    return (values / scale).round().to(torch.int8), scale


def _dequantize(stored: Tensor, scale: Tensor) -> Tensor:
    return stored.float() * scale if scale.numel() else stored.float()
