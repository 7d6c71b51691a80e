"""The k largest scores of all tensors together in one pass, without ever computing most of them.

A sample tells a bound that surely lies below the k-th largest score. One pass then collects the candidates, those that reach
the bound, and [`diffpeft.sparse.top_k.global_top_k`] cuts them. The result never hangs on the sample: too few candidates are
collected anew without a bound, and where there are too many, they are cut at once and the bound rises.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffpeft.sparse.top_k import Threshold, check_count, global_top_k

PIECE = 1 << 17
"""Entries looked at at a time on a CPU, so that they stay in its cache; on a GPU [`GPU_PIECE`], so that launches do not count."""
GPU_PIECE = 1 << 24
SAMPLES = 1 << 20
ROOM = 1 << 18
"""Candidates held beside 2 k before they are cut."""


class Scored(Protocol):
    """One tensor of nonnegative fp32 scores, by flat positions."""

    numel: int
    device: torch.device

    def scores(self, positions: Tensor) -> Tensor:
        """The scores at sorted positions, int64, shape (n,)."""

    def reaching(self, bound: float, start: int, stop: int) -> Tensor:
        """Sorted positions from `start` to before `stop`: all whose score is `bound` at least, and perhaps others. Raises
        ValueError where scores have no order."""


def where(mask: Tensor) -> Tensor:
    """Positions of what is set in a bool tensor, shape (n,): int64, sorted."""
    if mask.device.type == "cpu":  # torch.nonzero takes ten times as long
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return torch.nonzero(mask).squeeze(1)


def at_least(tensor: Tensor, bound: float) -> Tensor:
    """`tensor >= bound`, fp32 against the nearest fp32 number."""
    if tensor.device.type == "cpu":  # faster than torch's comparison
        return torch.from_numpy(np.greater_equal(tensor.numpy(), np.float32(bound)))
    return tensor >= bound


def top_k(tensors: Sequence[Scored], k: int) -> tuple[list[Tensor], Threshold]:
    """What [`diffpeft.sparse.top_k.global_top_k`] gives for all scores of these tensors.

    Returns:
        One int64 tensor of sorted flat positions a tensor of scores, k in all, on its device; and the threshold.

    Raises:
        ValueError: k outside [1, number of scores]; scores without an order.
    """
    total = sum(tensor.numel for tensor in tensors)
    check_count(k, total)
    candidates = _collect(tensors, k, _sampled_bound(tensors, k, total))
    if candidates.count < k:
        candidates = _collect(tensors, k, 0.0)
    threshold = candidates.cut()
    positions = candidates.positions()
    ends = torch.tensor([tensor.numel for tensor in tensors]).cumsum(0)
    parts = positions.tensor_split(torch.searchsorted(positions, ends)[:-1])
    starts = ends - torch.tensor([tensor.numel for tensor in tensors])
    kept = [(p - start).to(t.device) for p, start, t in zip(parts, starts, tensors, strict=True)]
    return kept, threshold


class _Candidates:
    """Entries, by their positions in all tensors one after the other, among which the k largest are.

    Args:
        k: how many are wanted.
        bound: what does not reach it is no candidate.
    """

    def __init__(self, k: int, bound: float) -> None:
        self.k, self.bound, self.count = k, bound, 0
        # Made once: many small tensors that stay would leave holes between them.
        self._positions = torch.empty(2 * k + ROOM, dtype=torch.int64)
        self._scores = torch.empty(2 * k + ROOM)

    def add(self, positions: Tensor, scores: Tensor) -> None:
        """More entries, which come after all before."""
        reach = where(at_least(scores, self.bound))
        for part in torch.split(reach, self.k + ROOM):
            if self.count + part.numel() > self._scores.numel():
                # What equals the k-th of them comes too late from here on.
                self.bound = float(np.nextafter(np.float32(self.cut().value), np.float32(np.inf)))
            self._write(slice(self.count, self.count + part.numel()), positions[part], scores[part])

    def cut(self) -> Threshold:
        """Drop all but the k largest, the first of equal ones."""
        (chosen,), threshold = global_top_k([lambda: self._scores[: self.count]], self.k)
        self._write(slice(0, self.k), self._positions[chosen], self._scores[chosen])
        return threshold

    def positions(self) -> Tensor:
        """All candidates' positions, sorted."""
        return self._positions[: self.count]

    def _write(self, span: slice, positions: Tensor, scores: Tensor) -> None:
        self._positions[span], self._scores[span], self.count = positions, scores, span.stop


def _collect(tensors: Sequence[Scored], k: int, bound: float) -> _Candidates:
    candidates, offset = _Candidates(k, bound), 0
    for tensor in tensors:
        size = PIECE if tensor.device.type == "cpu" else GPU_PIECE
        for start in range(0, tensor.numel, size):
            positions = tensor.reaching(candidates.bound, start, min(start + size, tensor.numel))
            if positions.numel():
                candidates.add((positions + offset).cpu(), tensor.scores(positions).cpu())
        offset += tensor.numel
    return candidates


def _sampled_bound(tensors: Sequence[Scored], k: int, total: int) -> float:
    """A bound below the k-th largest score, by far most likely."""
    step = total // SAMPLES | 1  # odd: no power of two that a row has
    sample, offset = [], 0
    for tensor in tensors:
        positions = torch.arange(-offset % step, tensor.numel, step, device=tensor.device)
        sample.append(tensor.scores(positions).cpu())
        offset += tensor.numel
    scores = torch.cat(sample).numpy()
    expected = k * len(scores) / total
    rank = math.ceil(expected + 4 * math.sqrt(expected)) + 8
    return 0.0 if rank >= len(scores) else float(np.partition(scores, -rank)[-rank])
