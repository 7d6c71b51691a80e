"""How the gates move: one update of all locations from the gradients that the task loss left on them.

The gates have their own update instead of a place in the trainer's optimizer: they need 1e4 times the weights' learning
rate, no weight decay and no learning-rate schedule, and a penalty that gradient accumulation, label smoothing and several
processes cannot scale. Their moments are buffers of the adapter, so that a checkpoint holds them like any weight.

Two rules, both Adam (Kingma & Ba 2015) with moments m, v of the gradient g and a step of at most `pace`:

- fixed lambda, the paper's: g = task gradient + lambda * penalty gradient, log_alpha -= pace * m / (sqrt(v) + eps).
- automatic: g = task gradient alone, log_alpha -= pace * (m + lambda) / (sqrt(v) + lambda). The pull lambda stands for
  what a nonzero costs, in the units of the loss, and is solved for in every step, so that the expected density follows
  [`density_schedule`]. Penalising log_alpha itself, rather than P(z > 0), keeps the pull on a gate from fading as it
  closes (sigmoid' is 7e-3 at the initial log_alpha = 5 and again at -5), so gates end open or shut, not in between; and
  without an eps there is no scale of the loss or of lambda at which the method changes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.gates import Stretch, open_logit, open_probability, pieces

BETAS = (0.9, 0.999)
EPS = 1e-8
PAPER_PACE = 0.1
TRAVEL = 40.0
"""How far the automatic rule would let a gate travel over the whole of gating. Closing one takes about 13."""
HELD = 0.3
"""Share of gating in which gates do not move: first w learns the task, so that there is something to choose by."""
SETTLED = 0.9
"""Share of gating after which the schedule stays at its target."""
SAMPLE = 1 << 18
"""Gates on which lambda is solved for; the full count corrects what the sample gets wrong in the next step."""
_SMALLEST = 1e-30


class Gates(NamedTuple):
    """Gates to update, all of one shape: locations, gradient of the task loss, moments."""

    log_alpha: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Group(NamedTuple):
    """The gates of one parameter tensor: of its elements, and of the whole or None."""

    elements: Gates
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
def expected_nonzeros(groups: Sequence[Group], stretch: Stretch) -> float:
    """Sum over the elements of P(element open) P(group open)."""
    total = 0.0
    for group in groups:
        elements = sum(float(open_probability(piece, stretch).sum()) for (piece,) in pieces(group.elements.log_alpha))
        total += elements if group.whole is None else elements * float(open_probability(group.whole.log_alpha, stretch))
    return total


def _moments(gates: Gates, grad: Tensor) -> None:
    gates.exp_avg.lerp_(grad, 1 - BETAS[0])
    gates.exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])


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
    """
    gradients = []
    for group in groups:
        by_element, by_whole = penalty_gradient(group, stretch, form)
        gradients.append((group.elements, group.elements.grad + l0_lambda * by_element))
        if group.whole is not None and by_whole is not None:
            gradients.append((group.whole, group.whole.grad + l0_lambda * by_whole))
    norm = torch.stack([grad.norm() for _, grad in gradients]).norm()
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    correction = 1 - BETAS[0] ** (step + 1), math.sqrt(1 - BETAS[1] ** (step + 1))
    for gates, grad in gradients:
        _moments(gates, grad.mul_(scale))
        denominator = gates.exp_avg_sq.sqrt().div_(correction[1]).add_(EPS)
        gates.log_alpha.addcdiv_(gates.exp_avg, denominator, value=-pace / correction[0])


def _direction(mean: Tensor, root: Tensor, pull: Tensor | float) -> Tensor:
    """(m + lambda) / (sqrt(v) + lambda), in [-1, 1] up to bias correction; gates without any gradient just close."""
    return (mean + pull).div_(root + (pull + _SMALLEST)).clamp_(-1, 1)


def automatic_step(
    groups: Sequence[Group], step: int, pace: float, stretch: Stretch, expected: float, wanted: float
) -> float:
    """One update that brings the expected number of nonzeros from `expected` to `wanted`, as far as `pace` allows.

    Args:
        groups: all gates; their `grad` holds the gradient of the task loss.
        step: updates done so far, for Adam's bias correction.
        pace: the farthest that a gate moves.
        stretch: (l, r).
        expected: expected number of nonzeros now.
        wanted: expected number of nonzeros to have after this step.

    Returns:
        The pull lambda, in units of the loss.
    """
    correction = 1 - BETAS[0] ** (step + 1), 1 - BETAS[1] ** (step + 1)
    pull = _solve(groups, correction, pace, stretch, wanted / expected)
    for group in groups:
        if group.whole is not None and group.elements.log_alpha.numel():
            # The paper's product would pull on a group with the sum over its elements and shut whole tensors first.
            # Its mean over the elements makes elements decide first; a group goes when nothing in it is worth a pull.
            share = pull * open_probability(group.elements.log_alpha, stretch).mean()
            _moments(group.whole, group.whole.grad)
            mean, root = group.whole.exp_avg / correction[0], (group.whole.exp_avg_sq / correction[1]).sqrt_()
            group.whole.log_alpha.sub_(_direction(mean, root, share), alpha=pace)
        for gates in map(Gates._make, pieces(*group.elements)):
            _moments(gates, gates.grad)
            mean, root = gates.exp_avg / correction[0], (gates.exp_avg_sq / correction[1]).sqrt_()
            gates.log_alpha.sub_(_direction(mean, root, pull), alpha=pace)
    return pull


def _solve(
    groups: Sequence[Group], correction: tuple[float, float], pace: float, stretch: Stretch, ratio: float
) -> float:
    """The least pull after which a sample of the gates has `ratio` times its expected number of nonzeros."""
    stride = max(1, sum(group.elements.log_alpha.numel() for group in groups) // SAMPLE)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for group in groups:
        log_alpha, grad, exp_avg, exp_avg_sq = (tensor.reshape(-1)[::stride] for tensor in group.elements)
        mean = torch.lerp(exp_avg, grad, 1 - BETAS[0]).div_(correction[0])
        square = (exp_avg_sq * BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1]).div_(correction[1])
        whole = torch.ones_like(log_alpha)
        if group.whole is not None:
            whole *= open_probability(group.whole.log_alpha, stretch)
        parts.append((open_logit(log_alpha, stretch), mean, square.sqrt_(), whole))
    logit, mean, root, whole = (torch.cat(column) for column in zip(*parts, strict=True))
    wanted = ratio * float((torch.sigmoid(logit) * whole).sum())

    def expected(pull: float) -> float:
        return float((torch.sigmoid(logit - pace * _direction(mean, root, pull)) * whole).sum())

    if expected(0.0) <= wanted:
        return 0.0
    # Gradients of the locations are far below 1 in any network with a bounded loss; the bracket grows if not.
    low, high = -46.0, math.log(max(float(root.max()), 1e-12)) + 7.0
    if expected(math.exp(high)) > wanted:
        return math.exp(high)
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(math.exp(middle)) > wanted else (low, middle)
    return math.exp(high)
