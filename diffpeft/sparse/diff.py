"""A sparse diff of a model: the entries by which some of its parameters differ from the base's."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from diffpeft.sparse import elias_fano

Diff: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""Parameter name -> positions (flat, int64, strictly increasing) and values (floating), both of shape (k,)."""


def check_diff(diff: Diff, shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError unless the diff is finite and fits parameters of these shapes."""
    for name, (positions, values) in diff.items():
        if name not in shapes:
            raise ValueError(
                f"the diff has {name}, which is none of the {len(shapes)} parameters in shapes; use its own base model"
            )
        if positions.dim() != 1 or positions.shape != values.shape:
            raise ValueError(
                f"{name}: positions are {tuple(positions.shape)}, values {tuple(values.shape)}; use (k,) for both"
            )
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinite values; its training has diverged, train it again")
        try:
            elias_fano.check(positions, shapes[name].numel())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def count_nonzeros(diff: Diff) -> dict[str, int]:
    """The number of entries of each parameter of a diff."""
    return {name: positions.numel() for name, (positions, _) in diff.items()}


def flatten_indices(name: str, indices: Tensor, shape: torch.Size) -> Tensor:
    """Flat positions of entries that are given by an index in each dimension.

    Args:
        name: of the parameter, for messages.
        indices: integers, shape (ndim, k).
        shape: of the parameter.

    Returns:
        int64, shape (k,), in the order of the entries.

    Raises:
        ValueError: indices of another number of dimensions, or outside of the shape.
    """
    positions = torch.zeros(indices.shape[-1], dtype=torch.int64)
    if len(indices) != len(shape):
        raise ValueError(f"{name}: {len(indices)} indices an entry do not fit {tuple(shape)}; use its own base model")
    for index, size in zip(indices.long(), shape, strict=True):
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(
                f"{name}: an index is {int(index.max())}, outside of {tuple(shape)}; it is damaged or of another model"
            )
        positions = positions * size + index
    return positions
