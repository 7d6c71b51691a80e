"""How magnitude pruning ranks the entries of a diff in gating, and the values that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.gates.compile import split_flat
from diffpeft.gates.hard_concrete import Stretch, delta_chunks, open_probability

SHUT_SCALE = 1e-12
"""Entries of shut gates are ranked by how nearly they are open, far below all others."""


class GatedDiff(NamedTuple):
    """One parameter's diff in gating, with its deterministic gates."""

    w: Tensor
    """The dense diff, fp32, any shape."""
    log_alpha: Tensor | None
    """Of the element gates, fp32 or fp16, shape of `w`; None for a diff without gates."""
    group_log_alpha: Tensor | None
    """Of the group gate, shape (1,)."""
    stretch: Stretch

    def scores(self) -> Iterator[Tensor]:
        """|z w|, or [`SHUT_SCALE`] P(z > 0) |w| where that is 0, as flat fp32 chunks in order."""
        if self.log_alpha is None:
            yield from (chunk.abs() for chunk in split_flat(self.w))
            return
        of_gates = zip(delta_chunks(*self), split_flat(self.w), split_flat(self.log_alpha), strict=True)
        for delta, w, log_alpha in of_gates:
            shut = open_probability(log_alpha, self.stretch).mul_(w.abs()).mul_(SHUT_SCALE)
            delta.abs_()
            yield torch.where(delta == 0, shut, delta)  # NaN stays, to be refused

    def values(self, positions: Tensor) -> Tensor:
        """z w at sorted flat positions (int64, shape (k,)), fp32, with the bits of the whole tensor's."""
        result, start, filled = self.w.new_empty(len(positions)), 0, 0
        for chunk in delta_chunks(*self):
            stop = start + chunk.numel()
            end = int(torch.searchsorted(positions, stop))
            result[filled:end] = chunk[positions[filled:end] - start]
            start, filled = stop, end
        return result
