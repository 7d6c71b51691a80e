"""The learning rate of an update: the scheduled one, times a factor of the phase."""

from collections.abc import Sequence

from torch.optim import Optimizer

USED_RATE_ATTRIBUTE = "diffpruning_learning_rate"
"""Attribute of the Trainer's state: the learning rate of the last update, which the scheduler does not know."""


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
        fixmask_factors: one factor per group, of a run that is resumed in fixmask.
    """

    def __init__(
        self,
        learning_rate: float,
        fixmask_rate: float,
        transition_step: int,
        max_steps: int,
        warmup: float = 0,
        fixmask_factors: Sequence[float] = (),
    ) -> None:
        self.fixmask_factors = list(fixmask_factors)  # empty before fixmask: all are 1
        self._ratio = fixmask_rate / learning_rate
        self._fixmask_rate = fixmask_rate
        self._transition_step, self._max_steps = transition_step, max_steps
        self._warmup = warmup if warmup >= 1 else warmup * (max_steps - transition_step)
        self._scheduled: list[float] = []  # while an update has other rates

    def gating_factor(self, progress: float) -> float:
        """The factor of all groups in gating, given how far the density has fallen, in [0, 1]."""
        return float(self._ratio**progress)

    def begin_fixmask(self, optimizer: Optimizer) -> None:
        """Note the factors of fixmask; call it after the last update of gating."""
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.fixmask_factors = [self._fixmask_rate / rate if rate > 0 else 1.0 for rate in rates]

    def apply(self, optimizer: Optimizer, step: int, progress: float | None) -> float:
        """Set the rates of an update; returns that of the first group.

        Args:
            optimizer: its groups have the scheduled rates.
            step: number of updates before this one.
            progress: how far the density has fallen in gating, in [0, 1]; None in fixmask.
        """
        self._scheduled = [group["lr"] for group in optimizer.param_groups]
        factors = [1.0] * len(self._scheduled)
        if step >= self._max_steps:  # the step that transformers takes when a run that has ended is resumed
            factors = [0.0 for _ in factors]
        elif progress is not None:
            factors = [self.gating_factor(progress) for _ in factors]
        else:
            risen = min(1.0, (step + 1 - self._transition_step) / max(1.0, self._warmup))
            factors = [risen * factor for factor in self.fixmask_factors or factors]
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = group["lr"] * factor
        return float(optimizer.param_groups[0]["lr"])

    def restore(self, optimizer: Optimizer) -> None:
        """Restore the groups' scheduled rates, if an update has changed them."""
        for group, rate in zip(optimizer.param_groups, self._scheduled, strict=False):
            group["lr"] = rate
        self._scheduled = []
