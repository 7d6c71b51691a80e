"""The learning rate of an update: the scheduled one, times a factor of the phase."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

USED_RATE_ATTRIBUTE = "diffpruning_learning_rate"
"""Attribute of the Trainer's state: the learning rate of the last update, which the scheduler does not know."""


@dataclass
class RateSchedule:
    """Multiplies the learning rates of an optimizer's groups for one update, and restores them after it.

    All groups have the same factor. In gating it goes from 1 to `fixmask_rate` / `learning_rate` as the density falls:
    the fewer parameters carry the task, the farther each has to move. In fixmask it makes `fixmask_rate` the highest
    rate that a group with parts of the diff has in what is left of the schedule. Schedules other than a LambdaLR are
    capped: at `fixmask_rate` in fixmask, in gating at the higher of the two rates.

    Args:
        learning_rate: the highest rate of a group with parts of the diff before it is changed, above 0.
        fixmask_rate: the highest rate in fixmask.
        transition_step: number of updates in gating.
        max_steps: number of updates of the run.
        warmup: updates over which fixmask's rate rises, in equal parts; below 1 a share of fixmask.
        diff_groups: indices of the groups that hold parts of the diff; none stands for all groups.
        fixmask_factor: that of a run that is resumed in fixmask; None leaves the scheduled rates as they are.
    """

    learning_rate: float
    fixmask_rate: float
    transition_step: int
    max_steps: int
    warmup: float = 0
    diff_groups: Sequence[int] = ()
    fixmask_factor: float | None = None
    _scheduled: list[float] = field(default_factory=list, init=False)  # while an update has other rates

    def gating_factor(self, progress: float) -> float:
        """The factor in gating, given how far the density has fallen, in [0, 1]."""
        return float((self.fixmask_rate / self.learning_rate) ** progress)

    def begin_fixmask(self, optimizer: Optimizer, scheduler: Any) -> None:
        """Note the factor of fixmask; call it after the last update of gating."""
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        lambdas, left = getattr(scheduler, "lr_lambdas", None), range(self.transition_step, self.max_steps)
        if lambdas is not None:  # others are held down as they rise
            rates = [
                max((base * share(step) for step in left), default=rate)
                for rate, base, share in zip(rates, scheduler.base_lrs, lambdas, strict=True)
            ]
        highest = self._highest(rates)
        self.fixmask_factor = self.fixmask_rate / highest if highest > 0 else 1.0

    def apply(self, optimizer: Optimizer, step: int, progress: float | None) -> float:
        """Change the scheduled rates to those of the update after `step` others; returns that of the first group.

        `progress` says how far the density has fallen in gating, in [0, 1]; it is None in fixmask.
        """
        self._scheduled = [group["lr"] for group in optimizer.param_groups]
        factor = 1.0
        if step >= self.max_steps:  # the step that transformers takes when a run that has ended is resumed
            factor = 0.0
        elif progress is not None:
            factor = self.gating_factor(progress)
        elif self.fixmask_factor is not None:
            factor = self.fixmask_factor
        highest = self._highest(self._scheduled) * factor
        bound = self.fixmask_rate if progress is None else max(self.learning_rate, self.fixmask_rate)
        if highest > bound and (progress is not None or self.fixmask_factor is not None):
            factor *= bound / highest
        if progress is None:
            warmup = self.warmup if self.warmup >= 1 else self.warmup * (self.max_steps - self.transition_step)
            factor *= min(1.0, (step + 1 - self.transition_step) / max(1.0, warmup))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        return float(optimizer.param_groups[0]["lr"])

    def _highest(self, rates: Sequence[float]) -> float:
        """The highest of the groups' rates, of groups that hold parts of the diff."""
        return max(float(rate) for index, rate in enumerate(rates) if not self.diff_groups or index in self.diff_groups)

    def restore(self, optimizer: Optimizer) -> None:
        """Restore the groups' scheduled rates, if an update has changed them."""
        for group, rate in zip(optimizer.param_groups, self._scheduled, strict=False):
            group["lr"] = rate
        self._scheduled = []


def rates_of_diff(optimizer: Optimizer, diff: set[Any], otherwise: float) -> tuple[float, list[int]]:
    """The highest rate, before any schedule, of the groups that hold parts of the diff, and the groups' indices.

    `diff` are the parameters that hold it. Where an optimizer holds others in their place, that is `otherwise` and [].
    """
    groups = optimizer.param_groups
    held = [index for index, group in enumerate(groups) if any(parameter in diff for parameter in group["params"])]
    rates = [float(groups[index].get("initial_lr", groups[index]["lr"])) for index in held]
    return (max(rates), held) if rates and max(rates) > 0 else (otherwise, [])
