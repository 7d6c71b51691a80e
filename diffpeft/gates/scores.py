"""The diff of one parameter in gating under deterministic gates, entry by entry, and how magnitude pruning ranks its entries."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from diffpeft.gates import hard_concrete as gates
from diffpeft.gates.hard_concrete import Stretch
from diffpeft.sparse.scan import at_least, where
from diffpeft.sparse.top_k import UNORDERED

SHUT = 1e-12
"""Entries of shut gates are ranked by how nearly they are open, far below all others."""
LANES = 64
"""A CPU's vector unit computes a sigmoid otherwise than its scalar one does, to the last bit, and takes what is left after as many
elements as it holds, which divide these, to the scalar one."""
BLOCK = 1 << 14
"""Few enough elements that one thread takes them all."""
SLACK = 1e-5
"""More than roundings can add up to, relatively."""
TINY = 1e-35
"""Below, roundings are no longer relative."""


class GatedDiff:
    """z w with deterministic gates, the group's included, and its scores: |z w|, and [`SHUT`] P(z > 0) |w| where that is 0.

    Args:
        w: the dense diff, fp32, any shape.
        log_alpha: locations of the element gates, fp32 or fp16, shape of `w`, or None for a diff without gates.
        group_log_alpha: location of the group gate, shape (1,), or None.
        stretch: (l, r) with l < 0 and 1 < r.
    """

    def __init__(self, w: Tensor, log_alpha: Tensor | None, group_log_alpha: Tensor | None, stretch: Stretch) -> None:
        self.numel, self.device = w.numel(), w.device
        self._w, self._log_alpha, self._stretch = w, log_alpha, stretch
        self._none = torch.empty(0, dtype=torch.int64, device=w.device)
        self._group = None if group_log_alpha is None else gates.gate(group_log_alpha, None, stretch).reshape(())
        low, high = stretch
        share = -low / (high - low) * (1 - SLACK)
        self._shut = math.log(share / (1 - share))
        """Where log_alpha is no larger, z is 0, whatever the roundings."""

    def values(self, positions: Tensor) -> Tensor:
        """z w at sorted flat positions (int64, shape (n,)), fp32, to the bit what the whole tensor would have there."""
        return self._gather(self._delta, positions)

    def scores(self, positions: Tensor) -> Tensor:
        """The scores at sorted flat positions, int64, shape (n,)."""
        return self._gather(self._scores, positions)

    def reaching(self, bound: float, start: int, stop: int) -> Tensor:
        """Sorted positions from `start` to before `stop`: all whose score is `bound` at least, and perhaps others. Raises
        ValueError for scores that are NaN or infinite."""
        w = self._w.reshape(-1)[start:stop]
        magnitudes = w.abs()
        log_alpha = None if self._log_alpha is None else self._log_alpha.reshape(-1)[start:stop]
        group = 1.0 if self._group is None else float(self._group)
        largest, most_open = float(magnitudes.max()), math.inf if log_alpha is None else float(log_alpha.max())
        if not math.isfinite(largest) or math.isnan(most_open) or math.isnan(group):
            raise ValueError(UNORDERED)
        bound = bound * (1 - SLACK) if bound > TINY else 0.0
        limit = bound / group if group else math.inf
        masks = []
        if largest >= limit and most_open > self._shut:
            masks.append(at_least(magnitudes, limit))
            if log_alpha is not None:
                masks[0] &= at_least(log_alpha, self._shut)
        if log_alpha is not None and largest * SHUT >= bound:
            masks.append(at_least(self._nearly(magnitudes, log_alpha), bound))
        return where(functools.reduce(Tensor.logical_or_, masks)) + start if masks else self._none

    def _delta(self, w: Tensor, log_alpha: Tensor | None) -> Tensor:
        if log_alpha is None:
            return w
        delta = gates.gate(log_alpha, None, self._stretch).mul_(w)
        return delta if self._group is None else delta.mul_(self._group)

    def _nearly(self, magnitudes: Tensor, log_alpha: Tensor) -> Tensor:
        return gates.open_probability(log_alpha, self._stretch).mul_(magnitudes).mul_(SHUT)

    def _scores(self, w: Tensor, log_alpha: Tensor | None) -> Tensor:
        delta = self._delta(w, log_alpha).abs()
        return delta if log_alpha is None else torch.where(delta > 0, delta, self._nearly(w.abs(), log_alpha))

    def _gather(self, compute: Callable[[Tensor, Tensor | None], Tensor], positions: Tensor) -> Tensor:
        w, log_alpha = self._w.reshape(-1), None if self._log_alpha is None else self._log_alpha.reshape(-1)

        def at(index: Tensor | slice) -> Tensor:
            return compute(w[index], None if log_alpha is None else log_alpha[index])

        body = self.numel - self.numel % LANES
        inside = int(torch.searchsorted(positions, body))
        result = []
        for part in torch.split(positions[:inside], BLOCK):
            result.append(at(functional.pad(part, (0, -part.numel() % LANES)))[: part.numel()])
        if inside < positions.numel():
            result.append(at(slice(body, None))[positions[inside:] - body])
        return torch.cat(result)
