"""Magnitude pruning over all tensors together: one global threshold, exactly k survivors (arXiv 2012.07463, section 3.1).

Nonnegative fp32 numbers sort like their bit patterns, so the k-th largest of any number of tensors follows from two
histograms of 16 bits each: exact, without sorting and without ever holding more than one tensor of scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNORDERED = (
    "scores are NaN, infinite or negative, so their order means nothing; "
    "check the loss and lower the learning rate before pruning"
)

Scores = Callable[[], Tensor]
"""Computes the fp32 nonnegative scores of one tensor anew, so that no more than one is alive at a time."""


@dataclass(frozen=True)
class Threshold:
    """The cut that keeps exactly k scores: all above `value`, and of those equal to it the first `ties`."""

    value: float
    bits: int
    ties: int


def check_count(k: int, total: int) -> None:
    """Raise ValueError where k of `total` scores cannot be kept."""
    if not 1 <= k <= total:
        raise ValueError(f"k={k} of {total} scores cannot be kept; use 1 <= k <= {total}")


def _bit_patterns(scores: Tensor) -> Tensor:
    if scores.dtype != torch.float32:
        raise TypeError(f"scores are {scores.dtype}; global top-k compares the bit patterns of torch.float32")
    bits = scores.reshape(-1).view(torch.int32)
    if bits.numel() and (int(bits.max()) >= 0x7F800000 or int(bits.min()) < 0):
        raise ValueError(UNORDERED)
    return bits


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th largest entry (from 1), and the rank within that bin."""
    from_top = histogram.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, rank))
    above = int(from_top[index - 1]) if index else 0
    return len(histogram) - 1 - index, rank - above


def global_threshold(scores: Sequence[Scores], k: int) -> Threshold:
    """The cut that keeps the k largest of all scores together.

    Raises:
        ValueError: k outside [1, number of scores]; NaN, infinite or negative scores.
    """
    total = 0
    high = torch.zeros(1 << 16, dtype=torch.int64)
    for compute in scores:
        bits = _bit_patterns(compute())
        total += bits.numel()
        high += torch.bincount(bits >> 16, minlength=1 << 16).cpu()
    check_count(k, total)
    high_bin, rank = _bin_of(high, k)
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for compute in scores:
        bits = _bit_patterns(compute())
        low += torch.bincount(bits[bits >> 16 == high_bin] & 0xFFFF, minlength=1 << 16).cpu()
    low_bin, ties = _bin_of(low, rank)
    cut = (high_bin << 16) | low_bin
    return Threshold(float(torch.tensor(cut, dtype=torch.int32).view(torch.float32)), cut, ties)


def global_top_k(scores: Sequence[Scores], k: int) -> tuple[list[Tensor], Threshold]:
    """Positions of the k largest scores of all tensors together, ties going to the first tensors and positions.

    Returns:
        One int64 tensor of sorted flat positions a tensor of scores, k in all; and the threshold.
    """
    threshold = global_threshold(scores, k)
    ties_left = threshold.ties
    kept = []
    for compute in scores:
        bits = _bit_patterns(compute())
        mask = bits > threshold.bits
        if ties_left:
            ties = torch.nonzero(bits == threshold.bits).squeeze(1)[:ties_left]
            mask[ties] = True
            ties_left -= ties.numel()
        kept.append(torch.nonzero(mask).squeeze(1))
    return kept, threshold
