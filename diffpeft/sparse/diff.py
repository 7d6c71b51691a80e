"""A sparse diff of a model: the entries by which some of its parameters differ from the base's; checks, comparison."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

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
    """Flat positions, int64, shape (k,), of entries that are given by an index in each dimension, shape (ndim, k).

    Raises:
        ValueError: indices of another number of dimensions than the parameter's `shape`, or outside of it.
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


class Overlap(NamedTuple):
    """A comparison of two diffs, of all parameters or of one."""

    nonzeros_a: int
    nonzeros_b: int
    shared: int
    """Positions that both have."""
    same_sign: int
    """Shared positions with values of the same sign."""
    dot: float
    norm_a: float
    norm_b: float

    @property
    def jaccard(self) -> float:
        """Shared positions as a share of all positions that one of them has."""
        return self.shared / max(1, self.nonzeros_a + self.nonzeros_b - self.shared)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two diffs as vectors; 0 where one is zero."""
        return self.dot / (self.norm_a * self.norm_b) if self.norm_a and self.norm_b else 0.0


def overlap(a: Diff, b: Diff) -> tuple[Overlap, dict[str, Overlap]]:
    """Compare two diffs of one base model: as a whole, and for each parameter that one of them changes."""
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0)
    per_parameter = {name: _overlap(*a.get(name, nothing), *b.get(name, nothing)) for name in dict.fromkeys([*a, *b])}
    parts = list(per_parameter.values())
    sums = [sum(getattr(part, field) for part in parts) for field in Overlap._fields[:-2]]
    norms = [sum(getattr(part, field) ** 2 for part in parts) ** 0.5 for field in Overlap._fields[-2:]]
    return Overlap(*sums, *norms), per_parameter


def _overlap(positions_a: Tensor, values_a: Tensor, positions_b: Tensor, values_b: Tensor) -> Overlap:
    values_a, values_b = values_a.double(), values_b.double()
    norms = float(values_a.norm()), float(values_b.norm())
    if not positions_a.numel() or not positions_b.numel():
        return Overlap(positions_a.numel(), positions_b.numel(), 0, 0, 0.0, *norms)
    index = torch.searchsorted(positions_b, positions_a).clamp(max=positions_b.numel() - 1)
    both = positions_b[index] == positions_a
    first, second = values_a[both], values_b[index[both]]
    same = int((first.sign() == second.sign()).sum())
    return Overlap(positions_a.numel(), positions_b.numel(), int(both.sum()), same, float(first @ second), *norms)
