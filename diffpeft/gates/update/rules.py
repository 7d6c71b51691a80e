"""How the gates move: one update of all of them from the gradients that the task loss left on log_alpha.

They stand outside the trainer's optimizer because they need 1e4 times the weights' learning rate, no weight decay and
no schedule, and a penalty that gradient accumulation, label smoothing and several processes cannot scale. Two rules,
both Adam (Kingma & Ba 2015) with moments m, v of the gradient g and a step of at most `max_step`:

- fixed lambda, the paper's: g = task gradient + lambda * penalty gradient, log_alpha -= max_step * m / (sqrt(v) + eps).
- automatic: g = task gradient alone, log_alpha -= max_step * (m + lambda) / (sqrt(v) + lambda). Lambda, what a nonzero
  costs in units of the loss, is solved for in every step, so that the expected density follows [`density_schedule`].
  Where more gates would close by the task's gradient alone, those that close are slowed down. Penalising log_alpha
  rather than P(z > 0) keeps the pull on a gate from fading as it closes, so gates end open or shut; and without an eps
  there is no scale of the loss or of lambda at which the method changes.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.gates.hard_concrete import Stretch, open_logit, open_shift
from diffpeft.gates.update import kernels
from diffpeft.gates.update.kernels import BETAS, MIN_DIVISOR, direction
from diffpeft.gates.update.state import GateSet, Group, StoredGates

PAPER_MAX_STEP = 0.1
MAX_TRAVEL = 40.0
"""How far the automatic rule would let a gate travel over the whole of gating. Closing one takes about 13."""
HOLD_SHARE = 0.3
"""Share of gating in which gates do not move: first w learns the task, so that there is something to choose by."""
SETTLE_SHARE = 0.9
"""Share of gating after which the schedule stays at its target."""
MAX_GRADIENT_NORM = 1.0
"""Norm to which the gradient of all gates together is clipped under a fixed lambda, as in the released code."""
SAMPLE_GATES = 1 << 17
"""Gates on which lambda is solved for; the full count corrects what the sample gets wrong in the next step."""
COARSE_STRIDE = 16
"""One in so many of them tells where about lambda is, before all of them do."""


class StepSettings(NamedTuple):
    """How far one update goes."""

    step: int
    """Updates done so far, for Adam's bias correction."""
    max_step: float
    """The farthest that a gate moves; Adam's learning rate under a fixed lambda."""
    stretch: Stretch
    fused: bool = False
    """Whether to compile."""
    accumulated: bool = False
    """Whether the gradients are in the moments already, as in the low-memory mode."""


def automatic_max_step(step: int, gating_steps: int, max_step: float | None = None) -> float:
    """The farthest that a gate may move in step `step`: 0 at first, then `max_step` or what closes it in any run."""
    if step + 1 <= HOLD_SHARE * gating_steps:
        return 0.0
    return MAX_TRAVEL / gating_steps if max_step is None else max_step


def density_schedule(step: int, gating_steps: int, start: float, target: float) -> float:
    """The expected density after a step (from 0): held at `start`, then to `target` in equal ratios, then constant."""
    progress = ((step + 1) / gating_steps - HOLD_SHARE) / (SETTLE_SHARE - HOLD_SHARE)
    return float(start * (target / start) ** min(1.0, max(0.0, progress)))


def fixed_lambda_step(groups: Sequence[Group], l0_lambda: float, form: str, settings: StepSettings) -> None:
    """Update gates by the gradient of loss + lambda * penalty ("product" or "additive" in form), clipped, then Adam."""
    gate_set, (stretch, fused) = GateSet(groups), settings[2:4]
    elements, product = gate_set.open_elements(stretch, fused), form == "product"
    by_elements = l0_lambda * (gate_set.open_groups(stretch) if product else torch.ones_like(elements))
    by_groups = l0_lambda * (elements if product else torch.ones_like(elements))
    weighted: list[tuple[list[Tensor], Tensor]] = []
    for (own, group_gate), by_element, by_group in zip(groups, by_elements.float(), by_groups.float(), strict=True):
        assert isinstance(own, StoredGates), "the config allows the low-memory mode with the automatic rule alone"
        weighted.append((own.columns(), by_element))
        if group_gate is not None:
            weighted.append((group_gate.columns(), by_group))
    shift = open_shift(stretch)
    squares = [
        kernels.penalised_square((grad, log_alpha), shift, weight, fused=fused)
        for (log_alpha, grad, *_), weight in weighted
    ]
    scale = torch.clamp(MAX_GRADIENT_NORM / (torch.stack(squares).sum().sqrt() + 1e-6), max=1.0)
    correction = 1 - BETAS[0] ** (settings.step + 1), 1 - BETAS[1] ** (settings.step + 1)
    rule = torch.stack([scale, *scale.new_tensor([settings.max_step / correction[0], 1 / correction[1]])])
    for columns, weight in weighted:
        kernels.adam(columns, shift, weight, rule, fused=fused)


def automatic_step(gates: GateSet, ratio: float, elements: Tensor, settings: StepSettings) -> tuple[float, Tensor]:
    """Update gates so that the expected number of nonzeros becomes `ratio` times what it is, as far as they may move.

    Returns:
        Lambda, in units of the loss; and what [`GateSet.open_elements`] gives then, as `elements` is it before.
    """
    step, max_step, stretch, fused, accumulated = settings
    correction = 1 - BETAS[0] ** (step + 1), 1 - BETAS[1] ** (step + 1)
    if accumulated:  # the step lets moments decay, after which they are beta times what they should be
        correction = correction[0] * BETAS[0], correction[1] * BETAS[1]
    l0_lambda, closing_scale = PenaltySolver(gates, correction, max_step, stretch, ratio).solve()
    numbers = [l0_lambda, max_step, max_step * closing_scale, 1 / correction[0], 1 / correction[1]]
    rule = torch.tensor(numbers, device=elements.device, dtype=torch.float32)
    gates.step_groups(rule, elements, stretch)
    return l0_lambda, gates.step(rule, stretch, fused)


class PenaltySolver:
    """Finds the step of at most `max_step` after which a sample of gates has `ratio` times its expected nonzeros."""

    def __init__(
        self, gates: GateSet, correction: tuple[float, float], max_step: float, stretch: Stretch, ratio: float
    ) -> None:
        some = gates.sample(max(1, sum(gates.sizes) // SAMPLE_GATES))
        self.logit = open_logit(some.log_alpha, stretch)
        self.mean = torch.lerp(some.exp_avg, some.grad, 1 - BETAS[0]).div_(correction[0])
        square = (some.exp_avg_sq * BETAS[1]).addcmul_(some.grad, some.grad, value=1 - BETAS[1])
        self.square = square.div_(correction[1])
        self.group_open = gates.open_groups(stretch).index_select(0, some.owner)
        self.max_step, self.ratio = max_step, ratio
        self._before = {
            stride: float((torch.sigmoid(self.logit[::stride]) * self.group_open[::stride]).sum())
            for stride in (1, COARSE_STRIDE)
        }

    def expected(self, l0_lambda: float, closing_scale: float, stride: int = 1) -> float:
        """The nonzeros of one in `stride` after a step, as a multiple of those wanted."""
        move = direction(self.mean[::stride], self.square[::stride], l0_lambda)
        move = move if closing_scale == 1.0 else torch.where(move > 0, move * closing_scale, move)
        after = (torch.sigmoid(self.logit[::stride] - self.max_step * move) * self.group_open[::stride]).sum()
        return float(after) / max(self.ratio * self._before[stride], MIN_DIVISOR)

    def solve(self) -> tuple[float, float]:
        """The least lambda, and the share of their way that closing gates are let go, that give what is wanted."""
        if self.expected(0.0, 1.0) <= 1.0:
            if self.expected(0.0, 0.0) <= 1.0:
                return 0.0, 0.0
            return 0.0, _bisect(lambda scale: self.expected(0.0, scale), 0.0, 1.0, 16)
        # Gradients of log_alpha are far below 1 in any network with a bounded loss; the bracket grows if not.
        low, high = -46.0, math.log(max(float(self.square.max()) ** 0.5, 1e-12)) + 7.0
        if self.expected(math.exp(high), 1.0) > 1.0:
            return math.exp(high), 1.0
        if len(self.logit) > COARSE_STRIDE**3:
            about = _bisect(lambda x: self.expected(math.exp(x), 1.0, COARSE_STRIDE), low, high, 20)
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
