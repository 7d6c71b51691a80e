"""The gates of an adapter as an update sees them: tensor by tensor, however their gradient and moments are kept."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffpeft.gates.hard_concrete import Stretch, open_probability, open_shift
from diffpeft.gates.small_parameters import MAX_SMALL_ELEMENTS
from diffpeft.gates.update import kernels
from diffpeft.gates.update.kernels import PROBABILITY_UNIT
from diffpeft.sparse.sharded import Processes, add_up

LINE_ELEMENTS = 16
"""Neighbours in a sample: as many as memory gives at a time."""


class GateColumns(NamedTuple):
    """Some gates, flat: fp32 each, and the index of the tensor that each belongs to, int64."""

    log_alpha: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    owner: Tensor


class ElementGates(Protocol):
    """The gates of one tensor's elements, or of several tensors', however gradient and moments are kept."""

    @property
    def log_alpha(self) -> Tensor:
        """The parameters of all elements' gates, in one tensor."""

    def gradient_check(self) -> Tensor | None:
        """A number that is finite if and only if the gradient is, shape (); None: that is known already."""

    def sample(self, stride: int) -> GateColumns:
        """One in `stride` of the gates, from all over them; owners are the tensors' indices.

        Of sharded tensors, all columns but the owners' are zero at gates that other processes hold.
        """

    def step(self, rule: Tensor, stretch: Stretch, fused: bool = False) -> Tensor:
        """Move the gates by [`diffpeft.gates.update.kernels.automatic`], and count as [`count_open`] does."""

    def count_open(self, stretch: Stretch, fused: bool = False) -> Tensor:
        """Sum of P(z > 0) in units of 2^-30, int64, shape (tensors,)."""


def every(tensor: Tensor, stride: int) -> Tensor:
    """One in `stride` of a tensor's elements, from all over it: lines of neighbours if it is long."""
    flat = tensor.detach() if tensor.is_contiguous() else tensor.detach().reshape(-1)
    lines = flat.numel() // (LINE_ELEMENTS * stride) if stride > 1 else 0
    if lines:
        return flat.as_strided((lines, LINE_ELEMENTS), (LINE_ELEMENTS * stride, 1)).reshape(-1)
    return flat.as_strided((-(-flat.numel() // stride),), (stride,)).clone()


def sampled_positions(numel: int, stride: int, device: torch.device) -> Tensor:
    """The flat positions that [`every`] takes of a tensor with so many elements, int64."""
    lines = numel // (LINE_ELEMENTS * stride) if stride > 1 else 0
    if lines:
        starts = torch.arange(lines, device=device) * (LINE_ELEMENTS * stride)
        return (starts.unsqueeze(1) + torch.arange(LINE_ELEMENTS, device=device)).reshape(-1)
    return torch.arange(0, numel, stride, device=device)


class StoredGates(NamedTuple):
    """Gates with gradient and moments of full size, or of the piece of a sharded tensor that this process holds."""

    log_alpha: Tensor
    """fp32, any shape."""
    grad: Tensor | None
    """Gradient of the task loss by log_alpha, shape of `log_alpha`; None where it is zero."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    start: int = 0
    """Flat position of the piece in the whole tensor."""
    whole: int | None = None
    """Elements of the whole tensor, where this is a piece."""

    def columns(self) -> list[Tensor]:
        """log_alpha, gradient and the two moments."""
        grad = torch.zeros_like(self.log_alpha) if self.grad is None else self.grad
        return [self.log_alpha.detach(), grad, self.exp_avg, self.exp_avg_sq]

    def gradient_check(self) -> Tensor | None:
        """The gradient's sum."""
        return None if self.grad is None else self.grad.sum()

    def sample(self, stride: int) -> GateColumns:
        """One in `stride` of the gates."""
        columns = self.columns()
        if self.whole is None:
            columns = [every(column, stride) for column in columns]
        else:
            positions = sampled_positions(self.whole, stride, self.log_alpha.device) - self.start
            mine = (positions >= 0) & (positions < self.log_alpha.numel())
            zeros = torch.zeros(len(positions), device=positions.device)
            columns = [zeros.masked_scatter(mine, column.reshape(-1)[positions[mine]]) for column in columns]
        return GateColumns._make([*columns, torch.zeros_like(columns[0], dtype=torch.int64)])

    def step(self, rule: Tensor, stretch: Stretch, fused: bool = False) -> Tensor:
        """Move the gates, and count them while they are in a cache."""
        kernels.automatic(self.columns(), rule, fused=fused)
        return self.count_open(stretch, fused)

    def count_open(self, stretch: Stretch, fused: bool = False) -> Tensor:
        """Sum of P(z > 0) in units of 2^-30, int64, shape (1,)."""
        count: Tensor = kernels.open_elements([self.log_alpha], open_shift(stretch), fused=fused)
        return count.reshape(1)

    def accumulate(self, grad: Tensor) -> bool:
        """Add a gradient to the moments. Returns False, and leaves them as they are, where it is not finite."""
        if not bool(grad.sum().isfinite()):
            return False
        self.exp_avg.add_(grad, alpha=1 - kernels.BETAS[0])
        self.exp_avg_sq.addcmul_(grad, grad, value=1 - kernels.BETAS[1])
        return True


class JoinedGates:
    """Gates of small tensors, in one: launching loops for each would cost most of the time."""

    def __init__(self, members: Sequence[StoredGates]) -> None:
        self._members = members
        self._sizes = [member.log_alpha.numel() for member in members]
        self._owner = _owners(tuple(self._sizes), members[0].log_alpha.device)

    @functools.cached_property
    def log_alpha(self) -> Tensor:
        """The parameters of all members' gates, flat in one tensor."""
        return torch.cat([member.log_alpha.detach().reshape(-1) for member in self._members])

    @functools.cached_property
    def _columns(self) -> list[Tensor]:
        others = list(zip(*(member.columns() for member in self._members), strict=True))[1:]
        return [self.log_alpha, *(torch.cat([tensor.reshape(-1) for tensor in column]) for column in others)]

    def gradient_check(self) -> Tensor | None:
        """The gradients' sum."""
        return self._columns[1].sum()

    def sample(self, stride: int) -> GateColumns:
        """One in `stride` of the gates; owners are the members' indices."""
        if all(member.whole is None for member in self._members):
            return GateColumns._make(every(column, stride) for column in (*self._columns, self._owner))
        sizes = tuple(map(_numel, self._members))
        columns = [torch.zeros(sum(sizes), device=self._owner.device) for _ in range(4)]
        for end, member in zip(itertools.accumulate(sizes), self._members, strict=True):
            start = end - _numel(member) + member.start
            for column, own in zip(columns, member.columns(), strict=True):
                column[start : start + own.numel()] = own.reshape(-1)
        owner = _owners(sizes, self._owner.device)
        return GateColumns._make(every(column, stride) for column in (*columns, owner))

    def step(self, rule: Tensor, stretch: Stretch, fused: bool = False) -> Tensor:
        """Move the gates, here and in the members; `rule` may have a column for each gate."""
        kernels.automatic(self._columns, rule)
        log_alpha, _, exp_avg, exp_avg_sq = self._columns
        held = zip(*((m.log_alpha.detach(), m.exp_avg, m.exp_avg_sq) for m in self._members), strict=True)
        for column, targets in zip((log_alpha, exp_avg, exp_avg_sq), held, strict=True):
            moved = torch.split(column, self._sizes)
            torch._foreach_copy_(targets, [part.view(own.shape) for part, own in zip(moved, targets, strict=True)])
        return self.count_open(stretch)

    def count_open(self, stretch: Stretch, fused: bool = False) -> Tensor:
        """Sum of P(z > 0) of each member in units of 2^-30, int64, shape (members,)."""
        units = kernels.open_units(self.log_alpha, open_shift(stretch)).to(torch.int64)
        return units.new_zeros(len(self._sizes)).index_add_(0, self._owner, units)


@functools.lru_cache(maxsize=64)
def _owners(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Index of each element's tensor where tensors of these sizes are joined: int64."""
    return torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))


class Group(NamedTuple):
    """The gates of one parameter: of its elements, and of the whole or None."""

    elements: ElementGates
    group_gate: StoredGates | None


def _numel(gates: ElementGates) -> int:
    """Elements of the whole tensor, which may be more than this process holds."""
    whole: int | None = getattr(gates, "whole", None)
    return gates.log_alpha.numel() if whole is None else whole


class GateSet:
    """All gates of an adapter, the small tensors' joined; sums and samples are those of all `processes`."""

    def __init__(self, groups: Sequence[Group], processes: Processes = None) -> None:
        self.processes = processes
        self.sizes = [_numel(group.elements) for group in groups]
        """Number of elements of each group."""
        small: dict[int, StoredGates] = {}
        self._units: list[tuple[ElementGates, list[int]]] = []
        for index, (elements, _) in enumerate(groups):
            if isinstance(elements, StoredGates) and self.sizes[index] <= MAX_SMALL_ELEMENTS:
                small[index] = elements
            else:
                self._units.append((elements, [index]))
        if small:
            self._units.append((JoinedGates(list(small.values())), list(small)))
        self._group_gates = {index: gate for index, (_, gate) in enumerate(groups) if gate is not None}
        self._device = groups[0].elements.log_alpha.device if groups else None

    def open_elements(self, stretch: Stretch, fused: bool = False) -> Tensor:
        """Sum over the elements of P(element open) of each group, float64, shape (groups,), group gates left out."""
        return self._by_group([gates.count_open(stretch, fused) for gates, _ in self._units])

    def open_groups(self, stretch: Stretch) -> Tensor:
        """P(group open) of each group, fp32, shape (groups,); 1 without a group gate."""
        chances = torch.ones(len(self.sizes), device=self._device)
        if self._group_gates:
            log_alphas = chances.new_zeros(len(self._group_gates))
            for index, gate in enumerate(self._group_gates.values()):  # one process holds it
                log_alphas[index : index + gate.log_alpha.numel()] = gate.log_alpha.detach()
            chances[list(self._group_gates)] = open_probability(add_up(log_alphas, self.processes), stretch)
        return chances

    def expected_nonzeros(self, stretch: Stretch, elements: Tensor) -> float:
        """Sum over the elements of P(element open) P(group open), from what [`open_elements`] gives."""
        if not self.sizes:
            return 0.0
        # Gates that are shut far beyond what is counted still have a chance: nobody needs to divide by zero.
        return max(float((elements * self.open_groups(stretch)).sum()), 1 / PROBABILITY_UNIT)

    def sample(self, stride: int) -> GateColumns:
        """One in `stride` of the gates; owners are the groups' indices."""
        parts = []
        for gates, members in self._units:
            part = gates.sample(stride)
            index = torch.tensor(members, device=part.owner.device)
            parts.append(part._replace(owner=index.index_select(0, part.owner)))
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        return GateColumns._make([*add_up(torch.stack(columns[:4]), self.processes), columns[4]])

    def step(self, rule: Tensor, stretch: Stretch, fused: bool = False) -> Tensor:
        """Move the elements' gates; returns what [`open_elements`] gives then."""
        return self._by_group([gates.step(rule, stretch, fused) for gates, _ in self._units])

    def step_groups(self, rule: Tensor, elements: Tensor, stretch: Stretch) -> None:
        """Move the group gates, by `rule` of shape (5,) and what [`open_elements`] gave before the step.

        The paper's product would pull on a group with the sum over its elements and shut whole tensors first. Its mean
        over the elements makes elements decide first; a group goes when nothing in it is worth lambda.
        """
        some = [index for index, gate in self._group_gates.items() if self.sizes[index] and gate.log_alpha.numel()]
        if some:
            sizes = elements.new_tensor([self.sizes[index] for index in some])
            lambdas = (rule[0] * elements[some] / sizes).float().unsqueeze(0)
            own_rules = torch.cat([lambdas, rule[1:].unsqueeze(1).expand(-1, len(some))])
            JoinedGates([self._group_gates[index] for index in some]).step(own_rules, stretch)

    def _by_group(self, counts: Sequence[Tensor]) -> Tensor:
        sums = torch.zeros(len(self.sizes), dtype=torch.int64, device=self._device)
        if counts:
            sums[[index for _, members in self._units for index in members]] = torch.cat(list(counts))
        return add_up(sums, self.processes).double() / PROBABILITY_UNIT
