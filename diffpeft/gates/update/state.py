"""The gates of a model, tensor by tensor, and how many of them are open."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.gates import kernels
from diffpeft.gates.hard_concrete import Stretch, open_probability, open_shift
from diffpeft.gates.small_parameters import SMALL
from diffpeft.gates.update.low_memory import LeanGates


class Gates(NamedTuple):
    """Gates to update, all of one shape: locations, gradient of the task loss, moments."""

    log_alpha: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Group(NamedTuple):
    """The gates of one parameter tensor: of its elements, and of the whole or None."""

    elements: Gates | LeanGates
    whole: Gates | None


@functools.lru_cache(maxsize=64)
def owners(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Whose each element is where tensors of these sizes are joined: int64."""
    return torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))


def is_small(group: Group) -> bool:
    """Whether launching loops for the group would cost most of the time: such are joined."""
    return isinstance(group.elements, Gates) and group.elements.log_alpha.numel() <= SMALL


@torch.no_grad()
def open_elements(groups: Sequence[Group], stretch: Stretch, fused: bool = False) -> Tensor:
    """Sum over the elements of P(element open) of each group, float64, shape (groups,), group gates left out."""
    large = {
        index: kernels.open_elements(group.elements.log_alpha, stretch, fused)
        for index, group in enumerate(groups)
        if not is_small(group)
    }
    small = [group.elements.log_alpha.reshape(-1) for group in groups if is_small(group)]
    return added_up(groups, large, torch.cat(small) if small else None, stretch)


def added_up(groups: Sequence[Group], large: dict[int, Tensor], small: Tensor | None, stretch: Stretch) -> Tensor:
    """What [`open_elements`] returns, from the sums of large groups and the joined locations of small ones."""
    sums = torch.zeros(len(groups), dtype=torch.int64, device=groups[0].elements.log_alpha.device if groups else None)
    if large:
        sums[list(large)] = torch.stack(list(large.values()))
    if small is not None:
        which = [index for index, group in enumerate(groups) if is_small(group)]
        owner = owners(tuple(groups[index].elements.log_alpha.numel() for index in which), small.device)
        units = kernels.open_units(small, open_shift(stretch)).to(torch.int64)
        sums[which] = sums.new_zeros(len(which)).index_add_(0, owner, units)
    return sums.double() / kernels.UNIT


@torch.no_grad()
def expected_nonzeros(groups: Sequence[Group], stretch: Stretch, elements: Tensor | None = None) -> float:
    """Sum over the elements of P(element open) P(group open); `elements` are those of [`open_elements`], if known."""
    if not groups:
        return 0.0
    elements = open_elements(groups, stretch) if elements is None else elements
    # Gates that are shut far beyond what is counted still have a chance: nobody needs to divide by nought.
    return max(float((elements * open_wholes(groups, stretch)).sum()), 1 / kernels.UNIT)


def open_wholes(groups: Sequence[Group], stretch: Stretch) -> Tensor:
    """P(group open) of each group, fp32, shape (groups,); 1 without a group gate."""
    some = [index for index, group in enumerate(groups) if group.whole is not None]
    chances = torch.ones(len(groups), device=groups[0].elements.log_alpha.device)
    if some:
        locations = torch.cat([whole.log_alpha for index in some if (whole := groups[index].whole)])
        chances[some] = open_probability(locations, stretch)
    return chances
