"""The k largest scores of any number of tensors together: one global threshold, exactly k survivors.

Nonnegative fp32 numbers sort like their bit patterns, so the k-th largest follows from two histograms of 16 bits each:
exact, without sorting, and without ever holding more than one chunk of scores (arXiv 2012.07463, section 3.1).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from diffpeft.sparse.sharded import Processes, add_up, gather_equal

INFINITY_BITS = 0x7F800000
HALF_BITS = 16

Scores = Callable[[], Iterable[Tensor]]
"""Computes the scores of one tensor again, as chunks in order: fp32, nonnegative, flat in sum."""


class Threshold(NamedTuple):
    """The cut that keeps exactly k scores: all above `value`, and of those equal to it the first `ties`."""

    value: float
    bits: int
    ties: int


def select(scores: Tensor, threshold: Threshold, ties: int) -> tuple[Tensor, int]:
    """Positions of the scores that a threshold keeps, int64 and sorted, and how many ties may follow.

    `scores` is one chunk, fp32 and nonnegative, flat; `ties` of those equal to the cut may be kept from here on.
    """
    bits = scores.view(torch.int32)
    kept = bits >= threshold.bits
    # On a CPU, torch.nonzero takes ten times as long as numpy.
    positions = torch.from_numpy(np.flatnonzero(kept.numpy())) if kept.is_cpu else kept.nonzero().squeeze(1)
    tied = bits[positions] == threshold.bits
    found = int(tied.count_nonzero())
    if found > ties:
        positions = positions[~tied | (tied.cumsum(0) <= ties)]
    return positions, max(0, ties - found)


def global_threshold(scores: Sequence[Scores], k: int, processes: Processes = None) -> Threshold:
    """The cut that keeps the k largest of all scores together, of all processes.

    Raises:
        ValueError: k outside [1, number of scores]; NaN, infinite or negative scores.
    """
    high = _histogram((bits >> HALF_BITS for bits in _bit_patterns(scores)), processes)
    total = int(high.sum())
    if not 1 <= k <= total:
        raise ValueError(f"k={k} of {total} scores cannot be kept; use 1 <= k <= {total}")
    high_bin, rank = _bin_of(high, k)
    in_bin = (bits[bits >> HALF_BITS == high_bin] for bits in _bit_patterns(scores))
    low_bin, ties = _bin_of(_histogram((bits & 0xFFFF for bits in in_bin), processes), rank)
    cut = (high_bin << HALF_BITS) | low_bin
    return Threshold(float(torch.tensor(cut, dtype=torch.int32).view(torch.float32)), cut, ties)


def global_top_k(scores: Sequence[Scores], k: int, processes: Processes = None) -> tuple[list[Tensor], Threshold]:
    """Positions of the k largest scores of all tensors together, ties going to the first tensors and positions.

    With `processes` each has a piece of every tensor, in their order, and gets the positions in its own pieces.

    Returns one int64 tensor of sorted flat positions a tensor of scores, k in all; and the threshold.
    """
    threshold = global_threshold(scores, k, processes)
    ties, kept = threshold.ties, []
    allowed = None if processes is None else _ties(scores, threshold, processes)
    for index, compute in enumerate(scores):
        ties = ties if allowed is None else allowed[index]
        parts, start = [], 0
        for chunk in compute():
            positions, ties = select(chunk.reshape(-1), threshold, ties)
            parts.append(positions + start)
            start += chunk.numel()
        kept.append(torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64))
    return kept, threshold


def _bit_patterns(scores: Sequence[Scores]) -> Iterator[Tensor]:
    """The bit patterns of all chunks of all tensors, int32, flat; raises where they have no order."""
    for compute in scores:
        for chunk in compute():
            if chunk.dtype != torch.float32:
                raise TypeError(f"scores are {chunk.dtype}; global top-k compares the bit patterns of torch.float32")
            bits = chunk.reshape(-1).view(torch.int32)
            if bits.numel():
                lowest, highest = torch.aminmax(bits)
                if int(lowest) < 0 or int(highest) >= INFINITY_BITS:
                    raise ValueError("scores are NaN, infinite or negative; check the loss, lower the learning rate")
            yield bits


def _histogram(chunks: Iterable[Tensor], processes: Processes) -> Tensor:
    """The number of times that each number of 16 bits occurs in all processes, int64, on the CPU."""
    counts = torch.zeros(1 << HALF_BITS, dtype=torch.int64)
    for chunk in chunks:
        counts += torch.bincount(chunk, minlength=len(counts)).cpu()
    return add_up(counts, processes)


def _ties(scores: Sequence[Scores], threshold: Threshold, processes: Processes) -> list[int]:
    """How many scores equal to the cut this process may keep of each tensor: those that others before it leave."""
    own = torch.zeros(len(scores), dtype=torch.int64)
    for index, compute in enumerate(scores):
        for chunk in compute():
            own[index] += (chunk.reshape(-1).view(torch.int32) == threshold.bits).count_nonzero().cpu()
    counts = torch.stack(gather_equal(own, processes), 1)  # of tensors, then of processes
    before = (counts.flatten().cumsum(0) - counts.flatten()).view(counts.shape)
    return [max(0, threshold.ties - int(taken)) for taken in before[:, distributed.get_rank(processes)]]


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th largest entry (from 1), and the rank within that bin."""
    from_top = histogram.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, rank))
    above = int(from_top[index - 1]) if index else 0
    return len(histogram) - 1 - index, rank - above
