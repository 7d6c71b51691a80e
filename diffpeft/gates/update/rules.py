"""How the gates move: one update of all of them from the gradients that the task loss left on log_alpha.

The gates have their own update instead of a place in the trainer's optimizer: they need 1e4 times the weights' learning
rate, no weight decay and no learning-rate schedule, and a penalty that gradient accumulation, label smoothing and
several processes cannot scale. Their moments are buffers of the adapter, so that a checkpoint holds them like any
weight.

Two rules, both Adam (Kingma & Ba 2015) with moments m, v of the gradient g and a step of at most `max_step`:

- fixed lambda, the paper's: g = task gradient + lambda * penalty gradient, log_alpha -= max_step * m / (sqrt(v) + eps).
- automatic: g = task gradient alone, log_alpha -= max_step * (m + lambda) / (sqrt(v) + lambda). Lambda stands for what
  a nonzero costs, in the units of the loss, and is solved for in every step, so that the expected density follows
  [`density_schedule`]. Where more gates would close by the task's gradient alone, those that close are slowed down.
  Penalising log_alpha itself, rather than P(z > 0), keeps the pull on a gate from fading as it closes (sigmoid' is 7e-3
  at the initial log_alpha = 5 and again at -5), so gates end open or shut, not in between; and without an eps there is
  no scale of the loss or of lambda at which the method changes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.gates.hard_concrete import Stretch, open_shift
from diffpeft.gates.update import kernels
from diffpeft.gates.update.kernels import BETAS
from diffpeft.gates.update.solver import PenaltySolver
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

StoredGroup = tuple[StoredGates, StoredGates | None]
"""The gates of one parameter's elements, and its group gate."""


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
    """The farthest that a gate may move in step `step`: nothing at first, then enough to close in runs of any length.

    `max_step` takes the place of what follows from the run's length.
    """
    if step + 1 <= HOLD_SHARE * gating_steps:
        return 0.0
    return MAX_TRAVEL / gating_steps if max_step is None else max_step


def density_schedule(step: int, gating_steps: int, start: float, target: float) -> float:
    """The expected density after a step (from 0): held at `start`, then to `target` in equal ratios, then constant."""
    progress = ((step + 1) / gating_steps - HOLD_SHARE) / (SETTLE_SHARE - HOLD_SHARE)
    return float(start * (target / start) ** min(1.0, max(0.0, progress)))


def fixed_lambda_step(groups: Sequence[StoredGroup], l0_lambda: float, form: str, settings: StepSettings) -> None:
    """Update gates with the paper's fixed lambda: the gradient of loss + lambda * penalty, clipped, then Adam.

    Args:
        groups: all gates, with the gradient of the task loss.
        l0_lambda: weight of the penalty.
        form: of the group penalty, "product" or "additive".
        settings: how far to go.
    """
    gate_set, (stretch, fused) = GateSet([Group(*group) for group in groups]), settings[2:4]
    elements, product = gate_set.open_elements(stretch, fused), form == "product"
    by_elements = l0_lambda * (gate_set.open_groups(stretch) if product else torch.ones_like(elements))
    by_groups = l0_lambda * (elements if product else torch.ones_like(elements))
    weighted: list[tuple[list[Tensor], Tensor]] = []
    for (own, group_gate), by_element, by_group in zip(groups, by_elements.float(), by_groups.float(), strict=True):
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
    rule = torch.stack(
        [scale, scale.new_tensor(settings.max_step / correction[0]), scale.new_tensor(1 / correction[1])]
    )
    for columns, weight in weighted:
        kernels.adam(columns, shift, weight, rule, fused=fused)


def automatic_step(gates: GateSet, ratio: float, elements: Tensor, settings: StepSettings) -> tuple[float, Tensor]:
    """Update gates so that the expected number of nonzeros becomes `ratio` times what it is, as far as they may move.

    Args:
        gates: all gates, with the gradient of the task loss.
        ratio: expected number of nonzeros after the step, as a multiple of those before.
        elements: what [`GateSet.open_elements`] gives before.
        settings: how far to go.

    Returns:
        Lambda, in units of the loss, and what [`GateSet.open_elements`] gives after the step.
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
