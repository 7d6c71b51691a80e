"""How the gates move: one update of all locations from the gradients that the task loss left on them.

The gates have their own update instead of a place in the trainer's optimizer: they need 1e4 times the weights' learning
rate, no weight decay and no learning-rate schedule, and a penalty that gradient accumulation, label smoothing and several
processes cannot scale. Their moments are buffers of the adapter, so that a checkpoint holds them like any weight.

Two rules, both Adam (Kingma & Ba 2015) with moments m, v of the gradient g and a step of at most `pace`:

- fixed lambda, the paper's: g = task gradient + lambda * penalty gradient, log_alpha -= pace * m / (sqrt(v) + eps).
- automatic: g = task gradient alone, log_alpha -= pace * (m + lambda) / (sqrt(v) + lambda). The pull lambda stands for
  what a nonzero costs, in the units of the loss, and is solved for in every step, so that the expected density follows
  [`density_schedule`]. Where more gates would close by the task's gradient alone, those that close are slowed down. Penalising log_alpha itself, rather than P(z > 0), keeps the pull on a gate from fading as it
  closes (sigmoid' is 7e-3 at the initial log_alpha = 5 and again at -5), so gates end open or shut, not in between; and
  without an eps there is no scale of the loss or of lambda at which the method changes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft import kernels
from diffpeft.deferred import DeferredGates
from diffpeft.gates import Stretch, open_logit, open_probability, open_shift
from diffpeft.kernels import BETAS, direction
from diffpeft.lean import LeanGates
from diffpeft.together import SMALL

PAPER_PACE = 0.1
TRAVEL = 40.0
"""How far the automatic rule would let a gate travel over the whole of gating. Closing one takes about 13."""
HELD = 0.3
"""Share of gating in which gates do not move: first w learns the task, so that there is something to choose by."""
SETTLED = 0.9
"""Share of gating after which the schedule stays at its target."""
SAMPLE = 1 << 17
"""Gates on which lambda is solved for; the full count corrects what the sample gets wrong in the next step."""
LINE = 16
"""Of these, so many are neighbours: as many as memory gives at a time."""
COARSE = 16
"""One in so many of them tells where about lambda is, before all of them do."""


class Gates(NamedTuple):
    """Gates to update, all of one shape: locations, gradient of the task loss, moments."""

    log_alpha: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Group(NamedTuple):
    """The gates of one parameter tensor: of its elements, and of the whole or None."""

    elements: Gates | LeanGates | DeferredGates
    whole: Gates | None


def automatic_pace(step: int, gating_steps: int, pace: float | None = None) -> float:
    """How far a gate may move in step `step`, for runs of any length to close their gates in time; nothing at first.

    `pace` takes the place of what follows from the run's length.
    """
    if step + 1 <= HELD * gating_steps:
        return 0.0
    return TRAVEL / gating_steps if pace is None else pace


def density_schedule(step: int, gating_steps: int, start: float, target: float) -> float:
    """The expected density to have after step `step` (from 0): held at `start`, then to `target` in equal ratios, then
    constant."""
    progress = ((step + 1) / gating_steps - HELD) / (SETTLED - HELD)
    return float(start * (target / start) ** min(1.0, max(0.0, progress)))


@torch.no_grad()
def open_elements(groups: Sequence[Group], stretch: Stretch, fused: bool = False) -> Tensor:
    """Sum over the elements of P(element open) of each group, float64, shape (groups,), group gates left out."""
    large = {
        index: kernels.open_elements(group.elements.log_alpha, stretch, fused)
        for index, group in enumerate(groups)
        if not _is_small(group)
    }
    small = [groups[index].elements.log_alpha.reshape(-1) for index in _small(groups)]
    return _added_up(groups, large, torch.cat(small) if small else None, stretch)


def _added_up(groups: Sequence[Group], large: dict[int, Tensor], small: Tensor | None, stretch: Stretch) -> Tensor:
    """What [`open_elements`] returns, from the sums of large groups and the joined locations of small ones."""
    sums = torch.zeros(len(groups), dtype=torch.int64, device=groups[0].elements.log_alpha.device if groups else None)
    if large:
        sums[list(large)] = torch.stack(list(large.values()))
    if small is not None:
        which = _small(groups)
        lengths = torch.tensor([groups[index].elements.log_alpha.numel() for index in which], device=sums.device)
        owner = torch.tensor(which, device=sums.device).repeat_interleave(lengths)
        sums.index_add_(0, owner, kernels.open_units(small, open_shift(stretch)).to(torch.int64))
    return sums.double() / kernels.UNIT


def _small(groups: Sequence[Group]) -> list[int]:
    """Which groups are so small that launching kernels for each would cost most of the time."""
    return [index for index, group in enumerate(groups) if _is_small(group)]


def _is_small(group: Group) -> bool:
    return isinstance(group.elements, Gates) and group.elements.log_alpha.numel() <= SMALL


def _move_together(gates: Sequence[Gates], stretch: Stretch, rule: Tensor) -> Tensor:
    """Move gates of small tensors, all at once. Returns their locations, joined."""
    columns = [list(column) for column in zip(*gates, strict=True)]
    joined = [torch.cat([tensor.reshape(-1) for tensor in column]) for column in columns]
    kernels.automatic_(joined[0], joined[1], joined[2], joined[3], stretch, rule)
    for column, moved in zip(columns, joined, strict=True):
        if column is not columns[1]:  # the gradients
            parts = torch.split(moved, [tensor.numel() for tensor in column])
            torch._foreach_copy_(column, [part.view(tensor.shape) for part, tensor in zip(parts, column, strict=True)])
    return joined[0]


@torch.no_grad()
def expected_nonzeros(groups: Sequence[Group], stretch: Stretch, elements: Tensor | None = None) -> float:
    """Sum over the elements of P(element open) P(group open); `elements` are those of [`open_elements`], if known."""
    if not groups:
        return 0.0
    elements = open_elements(groups, stretch) if elements is None else elements
    # Gates that are shut far beyond what is counted still have a chance: nobody needs to divide by nought.
    return max(float((elements * _open_wholes(groups, stretch)).sum()), 1 / kernels.UNIT)


def _open_wholes(groups: Sequence[Group], stretch: Stretch) -> Tensor:
    """P(group open) of each group, fp32, shape (groups,); 1 without a group gate."""
    some = [index for index, group in enumerate(groups) if group.whole is not None]
    chances = torch.ones(len(groups), device=groups[0].elements.log_alpha.device)
    if some:
        locations = torch.cat([whole.log_alpha for index in some if (whole := groups[index].whole)])
        chances[some] = open_probability(locations, stretch)
    return chances


def penalty_gradient(group: Group, stretch: Stretch, form: str) -> tuple[Tensor, Tensor | None]:
    """Gradient of the expected number of nonzeros of one group, in closed form: by element and by group gate.

    Args:
        group: the gates.
        stretch: (l, r).
        form: "product" (the paper) or "additive" (the released code).
    """
    open_elements = open_probability(group.elements.log_alpha, stretch)
    by_element = open_elements * (1 - open_elements)
    if group.whole is None:
        return by_element, None
    open_whole = open_probability(group.whole.log_alpha, stretch)
    by_whole = open_whole * (1 - open_whole)
    if form == "product":
        return by_element * open_whole, by_whole * open_elements.sum()
    return by_element, by_whole


def fixed_lambda_step(
    groups: Sequence[Group],
    l0_lambda: float,
    step: int,
    pace: float,
    stretch: Stretch,
    form: str,
    max_norm: float = 1.0,
    elements: Tensor | None = None,
    fused: bool = False,
) -> None:
    """One update with the paper's fixed lambda: the gradient of loss + lambda * penalty, its norm clipped, then Adam.

    Args:
        groups: all gates; their `grad` holds the gradient of the task loss.
        l0_lambda: weight of the penalty.
        step: updates done so far, for Adam's bias correction.
        pace: Adam's learning rate.
        stretch: (l, r).
        form: of the group penalty.
        max_norm: largest norm of the gradient of all gates together; the reference clips gates and weights apart.
        elements: what [`open_elements`] gives, if known.
        fused: whether to compile.
    """
    elements = open_elements(groups, stretch, fused) if elements is None else elements
    product = form == "product"
    by_elements = l0_lambda * (_open_wholes(groups, stretch) if product else torch.ones_like(elements))
    by_wholes = l0_lambda * (elements if product else torch.ones_like(elements))
    weighted: list[tuple[Gates, Tensor]] = []
    for group, by_element, by_whole in zip(groups, by_elements.float(), by_wholes.float(), strict=True):
        assert isinstance(group.elements, Gates)  # the config allows lean ones with the automatic rule alone
        weighted.append((group.elements, by_element))
        if group.whole is not None:
            weighted.append((group.whole, by_whole))
    squares = [kernels.penalised_square(g.grad, g.log_alpha, stretch, weight, fused) for g, weight in weighted]
    scale = torch.clamp(max_norm / (torch.stack(squares).sum().sqrt() + 1e-6), max=1.0)
    correction = 1 - BETAS[0] ** (step + 1), 1 - BETAS[1] ** (step + 1)
    rule = torch.stack([scale, scale.new_tensor(pace / correction[0]), scale.new_tensor(1 / correction[1])])
    for (log_alpha, grad, exp_avg, exp_avg_sq), weight in weighted:
        kernels.adam_(log_alpha, grad, exp_avg, exp_avg_sq, stretch, weight, rule, fused)


def automatic_step(
    groups: Sequence[Group],
    step: int,
    pace: float,
    stretch: Stretch,
    expected: float,
    wanted: float,
    elements: Tensor | None = None,
    fused: bool = False,
    folded: bool = False,
) -> tuple[float, Tensor]:
    """One update that brings the expected number of nonzeros from `expected` to `wanted`, as far as `pace` allows.

    Args:
        groups: all gates; their `grad` holds the gradient of the task loss.
        step: updates done so far, for Adam's bias correction.
        pace: the farthest that a gate moves.
        stretch: (l, r).
        expected: expected number of nonzeros now.
        wanted: expected number of nonzeros to have after this step.
        elements: what [`open_elements`] gives, if known.
        fused: whether to compile.
        folded: whether the gradients are in the moments already (`diffpeft/lean.py`), and `grad` is what is not.

    Returns:
        The pull lambda, in units of the loss, and what [`open_elements`] gives after the step.
    """
    elements = open_elements(groups, stretch, fused) if elements is None else elements
    correction = 1 - BETAS[0] ** (step + 1), 1 - BETAS[1] ** (step + 1)
    if folded:  # what follows lets moments decay, after which they are beta times what they should be
        correction = correction[0] * BETAS[0], correction[1] * BETAS[1]
    pull, brake = _Sample(groups, correction, pace, stretch, wanted / expected, fused).solve()
    rule = torch.tensor(
        [pull, pace, pace * brake, 1 / correction[0], 1 / correction[1]], device=elements.device, dtype=torch.float32
    )
    _move_wholes(groups, stretch, rule, elements)
    small = [gates for group in groups if _is_small(group) and isinstance(gates := group.elements, Gates)]
    joined = _move_together(small, stretch, rule) if small else None
    large = {}
    for index, group in enumerate(groups):
        if isinstance(group.elements, LeanGates):
            group.elements.move(rule, fused)
            large[index] = kernels.open_elements(group.elements.log_alpha, stretch, fused)
        elif isinstance(group.elements, DeferredGates):
            large[index] = group.elements.move(rule, fused)
        elif not _is_small(group):
            large[index] = kernels.automatic_(*group.elements, stretch, rule, fused)
    return pull, _added_up(groups, large, joined, stretch)


def _move_wholes(groups: Sequence[Group], stretch: Stretch, rule: Tensor, elements: Tensor) -> None:
    """Move the group gates.

    The paper's product would pull on a group with the sum over its elements and shut whole tensors first. Its mean over the
    elements makes elements decide first; a group goes when nothing in it is worth a pull.
    """
    some = [index for index, group in enumerate(groups) if group.whole is not None and group.elements.log_alpha.numel()]
    if some:
        sizes = elements.new_tensor([groups[index].elements.log_alpha.numel() for index in some])
        pulls = (rule[0] * elements[some] / sizes).float().unsqueeze(0)
        _move_together(
            [whole for index in some if (whole := groups[index].whole)],
            stretch,
            torch.cat([pulls, rule[1:].unsqueeze(1).expand(-1, len(some))]),
        )


def _some(tensor: Tensor, stride: int) -> Tensor:
    """One in `stride` of the elements, from all over the tensor."""
    flat = tensor.reshape(-1)
    lines = flat.numel() // (LINE * stride) if stride > 1 else 0
    return flat[: lines * LINE * stride].view(lines, -1)[:, :LINE].reshape(-1) if lines else flat[::stride]


def _sampled(gates: Gates | LeanGates | DeferredGates, stride: int) -> tuple[Tensor, ...]:
    """One in `stride` of the gates: locations, gradients and moments. Deferred gradients are nought at first."""
    if isinstance(gates, Gates):
        return tuple(_some(tensor, stride) for tensor in gates)
    if isinstance(gates, DeferredGates):
        log_alpha, *moments = (_some(tensor, stride) for tensor in (gates.log_alpha, gates.exp_avg, gates.exp_avg_sq))
        return log_alpha, torch.zeros_like(log_alpha), *moments
    count, device = gates.log_alpha.numel(), gates.log_alpha.device
    lines = torch.arange(0, count - LINE, LINE * stride, device=device)
    log_alpha, exp_avg, exp_avg_sq = gates.at((lines.unsqueeze(1) + torch.arange(LINE, device=device)).view(-1))
    return log_alpha, torch.zeros_like(log_alpha), exp_avg, exp_avg_sq


@functools.lru_cache(maxsize=256)
def _places_of_some(numel: int, stride: int, device: torch.device) -> Tensor:
    """Where the elements that [`_some`] takes of a tensor are: int32."""
    lines = numel // (LINE * stride) if stride > 1 else 0
    if not lines:
        return torch.arange(0, numel, stride, dtype=torch.int32, device=device)
    starts = torch.arange(0, lines * LINE * stride, LINE * stride, dtype=torch.int32, device=device)
    return (starts.unsqueeze(1) + torch.arange(LINE, dtype=torch.int32, device=device)).view(-1)


def _make_deferred(
    groups: Sequence[Group], parts: Sequence[Sequence[Tensor]], stride: int, stretch: Stretch, fused: bool
) -> None:
    """Write the deferred gradients into what [`_sampled`] gave, with one launch for all."""
    pairs = [
        (gates, part)
        for group, part in zip(groups, parts, strict=True)
        if isinstance(gates := group.elements, DeferredGates)
    ]
    if not pairs:
        return
    columns = [
        (
            _some(gates.by_w, stride),
            _some(gates.w, stride),
            part[0],
            _places_of_some(gates.w.numel(), stride, gates.w.device),
        )
        for gates, part in pairs
    ]
    sizes = [len(column[0]) for column in columns]
    seeds = torch.stack([gates.seed for gates, _ in pairs], 1)
    seeds = seeds.repeat_interleave(torch.tensor(sizes, device=seeds.device), 1)
    made = kernels.deferred_gradient_at(
        *(torch.cat(column) for column in zip(*columns, strict=True)), seeds, stretch, fused
    )
    for (_, part), grad in zip(pairs, torch.split(made, sizes), strict=True):
        part[1].copy_(grad)


class _Sample:
    """Some of the gates, on which the step is found after which they have `ratio` times their expected number of nonzeros."""

    def __init__(
        self,
        groups: Sequence[Group],
        correction: tuple[float, float],
        pace: float,
        stretch: Stretch,
        ratio: float,
        fused: bool,
    ) -> None:
        stride = max(1, sum(group.elements.log_alpha.numel() for group in groups) // SAMPLE)
        parts = [_sampled(group.elements, stride) for group in groups]
        _make_deferred(groups, parts, stride, stretch, fused)
        log_alpha, grad, exp_avg, exp_avg_sq = (torch.cat(column) for column in zip(*parts, strict=True))
        counts = torch.tensor([part[0].numel() for part in parts], device=log_alpha.device)
        self.logit = open_logit(log_alpha, stretch)
        self.mean = torch.lerp(exp_avg, grad, 1 - BETAS[0]).div_(correction[0])
        self.square = (exp_avg_sq * BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1]).div_(correction[1])
        self.whole = _open_wholes(groups, stretch).repeat_interleave(counts)
        self.pace, self.ratio = pace, ratio
        self._before: dict[int, float] = {}

    def before(self, stride: int) -> float:
        """The nonzeros of one in `stride` before the step."""
        if stride not in self._before:
            self._before[stride] = float((torch.sigmoid(self.logit[::stride]) * self.whole[::stride]).sum())
        return self._before[stride]

    def expected(self, pull: float, brake: float, stride: int = 1) -> float:
        """The nonzeros of one in `stride` after a step, as a multiple of those wanted."""
        move = direction(self.mean[::stride], self.square[::stride], pull)
        move = move if brake == 1.0 else torch.where(move > 0, move * brake, move)
        after = (torch.sigmoid(self.logit[::stride] - self.pace * move) * self.whole[::stride]).sum()
        return float(after) / max(self.ratio * self.before(stride), 1e-30)

    def solve(self) -> tuple[float, float]:
        """The least pull, and the share of their way that gates which close are let go, that give what is wanted."""
        if self.expected(0.0, 1.0) <= 1.0:
            if self.expected(0.0, 0.0) <= 1.0:
                return 0.0, 0.0
            return 0.0, _bisect(lambda brake: self.expected(0.0, brake), 0.0, 1.0, 16)
        # Gradients of the locations are far below 1 in any network with a bounded loss; the bracket grows if not.
        low, high = -46.0, math.log(max(float(self.square.max()) ** 0.5, 1e-12)) + 7.0
        if self.expected(math.exp(high), 1.0) > 1.0:
            return math.exp(high), 1.0
        if len(self.logit) > COARSE**3:
            about = _bisect(lambda x: self.expected(math.exp(x), 1.0, COARSE), low, high, 20)
            width = 0.1
            while width < high - low:  # until the root lies between
                below, above = max(low, about - width), min(high, about + width)
                if self.expected(math.exp(below), 1.0) > 1.0 >= self.expected(math.exp(above), 1.0):
                    return math.exp(_bisect(lambda x: self.expected(math.exp(x), 1.0), below, above, 6)), 1.0
                width *= 8
        return math.exp(_bisect(lambda x: self.expected(math.exp(x), 1.0), low, high, 24)), 1.0


def _bisect(function: Callable[[float], float], low: float, high: float, steps: int) -> float:
    """The upper end of the interval, halved so often, at which a falling function goes below 1."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 1.0 else (low, middle)
    return high
