"""Compare two sparse diffs: shared positions, signs, direction."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.sparse.diff import Diff


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
