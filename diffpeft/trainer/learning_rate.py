"""The learning rate of an update: the scheduled one, times a factor of the phase."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.optim import Optimizer

USED_RATE_ATTRIBUTE = "diffpruning_learning_rate"
"""Attribute of the Trainer's state: the learning rate of the last update, which the scheduler does not know."""


@dataclass
class RateSchedule:
    """Multiplies the learning rates of an optimizer's groups for one update, and restores them after it.

    In gating the factor goes from 1 to `fixmask_rate / learning_rate` as the density falls: the fewer parameters carry
    the task, the farther each has to move. In fixmask each group has a factor of its own, such that the first update is
    at `fixmask_rate`; the rate then follows what is left of the schedule.

    Args:
        learning_rate: the run's, above 0.
        fixmask_rate: the rate that fixmask starts with.
        transition_step: number of updates in gating.
        max_steps: number of updates of the run.
        warmup: updates over which fixmask's rate rises, in equal parts; below 1 a share of fixmask.
        fixmask_factors: one factor per group, of a run that is resumed in fixmask; before it none, and all are 1.
    """

    learning_rate: float
    fixmask_rate: float
    transition_step: int
    max_steps: int
    warmup: float = 0
    fixmask_factors: Sequence[float] = ()
    _scheduled: list[float] = field(default_factory=list, init=False)  # while an update has other rates

    def gating_factor(self, progress: float) -> float:
        """The factor of all groups in gating, given how far the density has fallen, in [0, 1]."""
        return float((self.fixmask_rate / self.learning_rate) ** progress)

    def begin_fixmask(self, optimizer: Optimizer) -> None:
        """Note the factors of fixmask; call it after the last update of gating."""
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.fixmask_factors = [self.fixmask_rate / rate if rate > 0 else 1.0 for rate in rates]

    def apply(self, optimizer: Optimizer, step: int, progress: float | None) -> float:
        """Change the scheduled rates to those of the update after `step` others; returns that of the first group.

        `progress` says how far the density has fallen in gating, in [0, 1]; it is None in fixmask.
        """
        self._scheduled = [group["lr"] for group in optimizer.param_groups]
        factors = [1.0] * len(self._scheduled)
        if step >= self.max_steps:  # the step that transformers takes when a run that has ended is resumed
            factors = [0.0 for _ in factors]
        elif progress is not None:
            factors = [self.gating_factor(progress) for _ in factors]
        else:
            warmup = self.warmup if self.warmup >= 1 else self.warmup * (self.max_steps - self.transition_step)
            risen = min(1.0, (step + 1 - self.transition_step) / max(1.0, warmup))
            factors = [risen * factor for factor in self.fixmask_factors or factors]
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = group["lr"] * factor
        return float(optimizer.param_groups[0]["lr"])

    def restore(self, optimizer: Optimizer) -> None:
        """Restore the groups' scheduled rates, if an update has changed them."""
        for group, rate in zip(optimizer.param_groups, self._scheduled, strict=False):
            group["lr"] = rate
        self._scheduled = []
