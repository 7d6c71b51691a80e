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

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpeft.gates import kernels
from diffpeft.gates.hard_concrete import Stretch, open_probability
from diffpeft.gates.kernels import BETAS
from diffpeft.gates.update.low_memory import LeanGates
from diffpeft.gates.update.solver import Sample
from diffpeft.gates.update.state import Gates, Group, added_up, is_small, open_elements, open_wholes

PAPER_PACE = 0.1
TRAVEL = 40.0
"""How far the automatic rule would let a gate travel over the whole of gating. Closing one takes about 13."""
HELD = 0.3
"""Share of gating in which gates do not move: first w learns the task, so that there is something to choose by."""
SETTLED = 0.9
"""Share of gating after which the schedule stays at its target."""


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
    by_elements = l0_lambda * (open_wholes(groups, stretch) if product else torch.ones_like(elements))
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
        folded: whether the gradients are in the moments already (`diffpeft/gates/update/low_memory.py`), and `grad` is what is not.

    Returns:
        The pull lambda, in units of the loss, and what [`open_elements`] gives after the step.
    """
    elements = open_elements(groups, stretch, fused) if elements is None else elements
    correction = 1 - BETAS[0] ** (step + 1), 1 - BETAS[1] ** (step + 1)
    if folded:  # what follows lets moments decay, after which they are beta times what they should be
        correction = correction[0] * BETAS[0], correction[1] * BETAS[1]
    small = [gates for group in groups if is_small(group) and isinstance(gates := group.elements, Gates)]
    columns = _joined(small) if small else None
    pull, brake = Sample(groups, columns, correction, pace, stretch, wanted / expected).solve()
    rule = torch.tensor(
        [pull, pace, pace * brake, 1 / correction[0], 1 / correction[1]], device=elements.device, dtype=torch.float32
    )
    _move_wholes(groups, stretch, rule, elements)
    if columns is not None:
        _move_joined(small, columns, stretch, rule)
    large = {}
    for index, group in enumerate(groups):
        if isinstance(group.elements, LeanGates):
            group.elements.move(rule, fused)
            large[index] = kernels.open_elements(group.elements.log_alpha, stretch, fused)
        elif not is_small(group):
            large[index] = kernels.automatic_(*group.elements, stretch, rule, fused)
    return pull, added_up(groups, large, None if columns is None else columns[0], stretch)


def _move_wholes(groups: Sequence[Group], stretch: Stretch, rule: Tensor, elements: Tensor) -> None:
    """Move the group gates.

    The paper's product would pull on a group with the sum over its elements and shut whole tensors first. Its mean over the
    elements makes elements decide first; a group goes when nothing in it is worth a pull.
    """
    some = [index for index, group in enumerate(groups) if group.whole is not None and group.elements.log_alpha.numel()]
    if some:
        sizes = elements.new_tensor([groups[index].elements.log_alpha.numel() for index in some])
        pulls = (rule[0] * elements[some] / sizes).float().unsqueeze(0)
        wholes = [whole for index in some if (whole := groups[index].whole)]
        _move_joined(wholes, _joined(wholes), stretch, torch.cat([pulls, rule[1:].unsqueeze(1).expand(-1, len(some))]))


def _joined(gates: Sequence[Gates]) -> list[Tensor]:
    """Small tensors of gates as one: locations, gradients, moments."""
    return [torch.cat([tensor.reshape(-1) for tensor in column]) for column in zip(*gates, strict=True)]


def _move_joined(gates: Sequence[Gates], columns: list[Tensor], stretch: Stretch, rule: Tensor) -> None:
    """Move gates by what [`_joined`] made of them, which moves too."""
    log_alpha, grad, *moments = columns
    kernels.automatic_(log_alpha, grad, moments[0], moments[1], stretch, rule)
    sizes = [one.log_alpha.numel() for one in gates]
    for moved, own in ((log_alpha, 0), (moments[0], 2), (moments[1], 3)):
        targets = [one[own] for one in gates]
        parts = [part.view(tensor.shape) for part, tensor in zip(torch.split(moved, sizes), targets, strict=True)]
        torch._foreach_copy_(targets, parts)
