"""What two finished diffs have in common."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Overlap(NamedTuple):
    """Counts over all parameters, or one."""

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
        """Shared positions as a share of those that either has."""
        return self.shared / max(1, self.nonzeros_a + self.nonzeros_b - self.shared)

    @property
    def cosine(self) -> float:
        """Of the two diffs as vectors."""
        return self.dot / (self.norm_a * self.norm_b) if self.norm_a and self.norm_b else 0.0


Diff = Mapping[str, tuple[Tensor, Tensor]]


def overlap(a: Diff, b: Diff) -> tuple[Overlap, dict[str, Overlap]]:
    """Compare two diffs of one base: in all, and for each parameter that one of them changes.

    Each is (positions, values) by parameter: flat, int64, sorted; shape (k,) both.
    """
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0)
    per_parameter = {name: _overlap(*a.get(name, nothing), *b.get(name, nothing)) for name in dict.fromkeys([*a, *b])}
    parts = list(per_parameter.values())
    squares = [sum(getattr(part, norm) ** 2 for part in parts) for norm in ("norm_a", "norm_b")]
    whole = Overlap(
        sum(part.nonzeros_a for part in parts),
        sum(part.nonzeros_b for part in parts),
        sum(part.shared for part in parts),
        sum(part.same_sign for part in parts),
        sum(part.dot for part in parts),
        squares[0] ** 0.5,
        squares[1] ** 0.5,
    )
    return whole, per_parameter


def _overlap(where_a: Tensor, values_a: Tensor, where_b: Tensor, values_b: Tensor) -> Overlap:
    values_a, values_b = values_a.double(), values_b.double()
    norms = float(values_a.norm()), float(values_b.norm())
    if not where_a.numel() or not where_b.numel():
        return Overlap(where_a.numel(), where_b.numel(), 0, 0, 0.0, *norms)
    place = torch.searchsorted(where_b, where_a).clamp(max=where_b.numel() - 1)
    both = where_b[place] == where_a
    first, second = values_a[both], values_b[place[both]]
    same = int((first.sign() == second.sign()).sum())
    return Overlap(where_a.numel(), where_b.numel(), int(both.sum()), same, float(first @ second), *norms)
