"""Updates of dense diffs within the backward pass, each as soon as its gradient is complete, which is then let go of.

The rule is Adafactor's (Shazeer and Stern 2018, arXiv 1804.04235) without a first moment: the gradient over the root of its
factored second moment (`diffpeft/gates/update/factored.py`), scaled down to a root mean square of 1 where it has more, times the learning
rate. The second moment has Adam's beta and correction of its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffpeft.gates.kernels import BETAS
from diffpeft.gates.update import factored


@dataclass
class Pending:
    """What backward passes have done for the next update of the gates of one module."""

    finite: bool = True
    """Whether all gradients were; what was not has changed nothing."""
    updated: set[str] = field(default_factory=set)
    """Parameters whose diff was updated."""


class DiffMoments(NamedTuple):
    """The second moment of the gradient of one dense diff."""

    rows: Tensor
    """Means over each row of the diff as a matrix, fp32."""
    columns: Tensor
    """Means over each column."""
    weight: Tensor
    """Sum of the weights that gradients have in these, shape (): 1 - beta^t after t updates."""

    @torch.no_grad()
    def step(self, w: Tensor, grad: Tensor, rate: float, decay: float) -> bool:
        """Update a diff. Returns False, and leaves all as it was, where the gradient is not finite.

        Args:
            w: the diff, fp32, any shape of at least two dimensions.
            grad: its gradient, which is overwritten.
            rate: learning rate.
            decay: weight decay, as a share of `rate`.
        """
        matrix = grad.contiguous().view(len(self.rows), len(self.columns))
        by_row, by_column = factored.mean_squares(matrix)
        if not bool(by_row.sum().isfinite()):
            return False
        for moment, square in (
            (self.rows, by_row),
            (self.columns, by_column),
            (self.weight, torch.ones_like(self.weight)),
        ):
            moment.lerp_(square, 1 - BETAS[1])
        rows, columns = factored.factors(self.rows / self.weight, self.columns / self.weight)
        matrix.mul_(rows.clamp_min(factored.SMALLEST).rsqrt().unsqueeze(1))
        matrix.mul_(columns.clamp_min(factored.SMALLEST).rsqrt())
        size = torch.linalg.vector_norm(matrix) / max(1, matrix.numel()) ** 0.5
        if decay:
            w.mul_(1 - rate * decay)
        w.sub_(matrix.mul_(rate / size.clamp_min(1.0)).view(w.shape))
        return True


class Watched(NamedTuple):
    """A parameter whose gradient is used up within the backward pass."""

    label: str
    """What it is called in errors."""
    parameter: nn.Parameter
    take: Callable[[Tensor, float, float], bool]
    """Uses a gradient up, given learning rate and weight decay; returns whether it was finite."""
    in_optimizer: bool
    """Whether learning rate and weight decay matter, so that the optimizer must hold it."""
    pending: Callable[[], Pending]
    """What is noted of the update."""


class InBackward:
    """Uses up gradients in the backward pass, with learning rate and weight decay of the parameter's group of an optimizer,
    which then finds no gradient and makes no state.

    With gradient accumulation, as Accelerate and the Trainer do it, gradients add up, and the last backward pass of an update
    uses them up. What watched the parameters before no longer does.

    Args:
        optimizer: of Adam's family, since the learning rates are to be such as that wants.
        watched: the parameters.

    Raises:
        ValueError: the optimizer is of another family, or does not hold a parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, watched: Iterable[Watched]) -> None:
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        groups = optimizer.param_groups
        foreign = [index for index, group in enumerate(groups) if "betas" not in group]
        if foreign:
            raise ValueError(
                f"low_memory=True updates large diffs as Adafactor does, at the learning rates of the optimizer, which are not "
                f"Adam's in {type(optimizer).__name__}; use an optimizer with betas, e.g. optim='adamw_torch', or "
                "low_memory=False"
            )
        self.rate_factor = 1.0
        """What the groups' learning rates are multiplied by."""
        self._optimizer = optimizer
        self._handles: list[RemovableHandle] = []
        index_of = {parameter: index for index, group in enumerate(groups) for parameter in group["params"]}
        watched = list(watched)
        lost = [one.label for one in watched if one.in_optimizer and one.parameter not in index_of]
        if lost:
            raise ValueError(
                f"the optimizer ({type(optimizer).__name__}) does not hold {len(lost)} diffs, {lost[:3]}, so they have no "
                "learning rate; build it from model.parameters()"
            )
        for one in watched:
            _release(one)
            rule = _Rule(one.label, one.take, one.pending, index_of.get(one.parameter))
            hook = partial(self._use_up, rule)
            handle: RemovableHandle = one.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._handles.append(handle)

    def remove(self) -> None:
        """Leave gradients to the optimizer again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _use_up(self, rule: _Rule, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None or not GradientState().sync_gradients:
            return
        parameter.grad = None
        pending = rule.pending()
        if rule.label in pending.updated:
            raise RuntimeError(
                f"{rule.label} got a gradient twice for one update, and with low_memory=True the first is used up by then: "
                "checkpoint gradients with use_reentrant=False, accumulate them within accelerator.accumulate(model), and call "
                "gate_step after every update"
            )
        pending.updated.add(rule.label)
        group = {} if rule.group is None else self._optimizer.param_groups[rule.group]
        rate, decay = float(group.get("lr", 0.0)) * self.rate_factor, float(group.get("weight_decay", 0.0))
        pending.finite &= rule.take(grad, rate, decay)


def _release(one: Watched) -> None:
    """Begin anew with a parameter: a run that broke off leaves its hook behind, which would go on with that run's optimizer."""
    hooks = getattr(one.parameter, "_post_accumulate_grad_hooks", None) or {}
    for key, hook in list(hooks.items()):
        if isinstance(hook, partial) and getattr(hook.func, "__func__", None) is InBackward._use_up:
            del hooks[key]
    pending = one.pending()
    pending.finite = True
    pending.updated.clear()


class _Rule(NamedTuple):
    """Of a [`Watched`] parameter, which it must not refer to, or it would live as long as its hook."""

    label: str
    take: Callable[[Tensor, float, float], bool]
    pending: Callable[[], Pending]
    group: int | None


def check_low_memory() -> None:
    """Raise ValueError where gradients that are used within the backward pass would not be the update's.

    Raises:
        ValueError: several processes, which average gradients after it; fp16, whose scaler unscales them after it.
    """
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes > 1:
        raise ValueError(
            f"low_memory=True uses gradients up before {processes} processes could average them; launch one process, or use "
            "low_memory=False"
        )
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision == "fp16":
        raise ValueError(
            "low_memory=True uses gradients up before fp16's scaler could unscale them; use bf16, or low_memory=False"
        )
