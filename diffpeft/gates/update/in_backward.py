"""Steps within the backward pass: gradients are used where they arise and let go of, in the low-memory mode."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from diffpeft.gates.update.collect import groups_of
from diffpeft.gates.update.factored import DiffMoments
from diffpeft.gates.update.held import DIFF_MOMENTS, GatedLayer, UpdateStatus, status_of
from diffpeft.gates.update.state import StoredGates

StepFunction = Callable[[Tensor, float, float], bool]
"""Uses a gradient, given learning rate and weight decay; returns whether it was finite."""


class BackwardStep(NamedTuple):
    """A parameter that steps within the backward pass."""

    label: str
    """Its name in errors."""
    parameter: Tensor
    step: StepFunction
    in_optimizer: bool
    """Whether learning rate and weight decay matter, so that the optimizer must hold it."""
    status: Callable[[], UpdateStatus]
    """Gives the state of the next update."""


class InBackward:
    """Steps parameters in the backward pass, with learning rate and weight decay of their group of an optimizer.

    The optimizer then finds no gradient and makes no state. With gradient accumulation, as Accelerate and the Trainer
    do it, gradients add up, and the last backward pass of an update steps. Hooks of an earlier run are taken off.

    Raises:
        ValueError: the optimizer is not of Adam's family, or does not hold a parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: Iterable[BackwardStep]) -> None:
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        groups = optimizer.param_groups
        foreign = [index for index, group in enumerate(groups) if "betas" not in group]
        if foreign:
            raise ValueError(
                f"low_memory=True uses the optimizer's rates, not Adam's in {type(optimizer).__name__}; use an "
                "optimizer with betas, e.g. optim='adamw_torch', or low_memory=False"
            )
        self.rate_factor = 1.0
        """Factor of the groups' learning rates."""
        self._optimizer = optimizer
        self._handles: list[RemovableHandle] = []
        index_of = {parameter: index for index, group in enumerate(groups) for parameter in group["params"]}
        steps = list(steps)
        lost = [one.label for one in steps if one.in_optimizer and one.parameter not in index_of]
        if lost:
            raise ValueError(f"the optimizer lacks {len(lost)} diffs, {lost[:3]}; build it from model.parameters()")
        for one in steps:
            _release(one)
            # The parameter itself is no part of the hook: it would live as long as that.
            hook = partial(self._step, one.label, one.step, one.status, index_of.get(one.parameter))
            register: Any = one.parameter.register_post_accumulate_grad_hook
            self._handles.append(register(hook))

    def remove(self) -> None:
        """Leave gradients to the optimizer again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _step(self, label: str, step: StepFunction, status: Any, index: int | None, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None or not GradientState().sync_gradients:
            return
        parameter.grad = None
        update = status()
        if label in update.updated:
            raise RuntimeError(
                f"{label} got a gradient twice for one update; for low_memory=True use use_reentrant=False, "
                "accumulate within accelerator.accumulate(model), and call gate_step after every update"
            )
        update.updated.add(label)
        group = {} if index is None else self._optimizer.param_groups[index]
        rate, decay = float(group.get("lr", 0.0)) * self.rate_factor, float(group.get("weight_decay", 0.0))
        update.finite &= step(grad, rate, decay)


def _release(one: BackwardStep) -> None:
    """Take off the hook that a run which broke off left on a parameter, and begin its update again."""
    hooks = getattr(one.parameter, "_post_accumulate_grad_hooks", None) or {}
    for key, hook in list(hooks.items()):
        if isinstance(hook, partial) and getattr(hook.func, "__func__", None) is InBackward._step:
            del hooks[key]
    status = one.status()
    status.finite = True
    status.updated.clear()


def backward_steps(layer: GatedLayer, adapter_name: str) -> list[BackwardStep]:
    """The parameters of a layer that step within the backward pass.

    The log_alpha of low-memory gates is none of them: autograd never sees its gradient, see [`accumulator`].
    """
    status, steps = partial(status_of, layer, adapter_name), []
    for name, (elements, group_gate) in groups_of(layer, adapter_name).items():
        key = layer.parameter_key(name)
        if isinstance(elements, StoredGates):
            step = partial(_step_gates, layer, adapter_name, (name, False))
            steps.append(BackwardStep(f"the gates of {key}", elements.log_alpha, step, False, status))
        else:
            step, w = partial(_step_diff, layer, adapter_name, name), layer.held("diffpruning_w", adapter_name)[name]
            steps.append(BackwardStep(f"the diff of {key}", w, step, True, status))
        if group_gate is not None:
            step = partial(_step_gates, layer, adapter_name, (name, True))
            steps.append(BackwardStep(f"the group gate of {key}", group_gate.log_alpha, step, False, status))
    return steps


def _step_diff(layer: GatedLayer, adapter_name: str, name: str, grad: Tensor, rate: float, decay: float) -> bool:
    moments = DiffMoments(*(layer.held(kind, adapter_name)[name] for kind in DIFF_MOMENTS))
    return moments.step(layer.held("diffpruning_w", adapter_name)[name], grad, rate, decay)


def _step_gates(
    layer: GatedLayer, adapter_name: str, which: tuple[str, bool], grad: Tensor, rate: float, decay: float
) -> bool:
    """Accumulate the gradient of the elements' gates or of the group's; rate and decay are the optimizer's alone."""
    name, of_group = which
    gates = groups_of(layer, adapter_name)[name][int(of_group)]
    assert isinstance(gates, StoredGates)
    return gates.accumulate(grad)


def finish_update(layer: GatedLayer, adapter_name: str) -> bool:
    """Accumulate what autograd left on gates, and begin the next update. Returns whether all gradients were finite.

    Raises:
        ValueError: gradients that should have been used in the backward pass, or that passed around it.
    """
    status = status_of(layer, adapter_name)
    for one in backward_steps(layer, adapter_name):
        if one.parameter.grad is not None:
            if one.in_optimizer:
                raise ValueError(f"{one.label} has a gradient; call update_in_backward(optimizer) before training")
            status.finite &= one.step(one.parameter.grad, 0.0, 0.0)
            one.parameter.grad = None
    for name, (elements, _) in groups_of(layer, adapter_name).items():
        if elements.log_alpha.grad is not None:
            raise ValueError(
                f"the gates of {layer.parameter_key(name)} have a gradient that low_memory=True cannot use, of gates "
                "that were not sampled or of your own penalty; train in model.train(), with l0_lambda='auto'"
            )
    del layer.update_status[adapter_name]
    return status.finite


def check_low_memory() -> None:
    """Check that gradients within the backward pass are those of the update.

    Raises:
        ValueError: several processes, which average gradients after it; fp16, whose scaler unscales them after it.
    """
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes > 1:
        raise ValueError(f"low_memory=True uses gradients up in one process; launch one, not {processes}")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision == "fp16":
        raise ValueError(
            "low_memory=True uses gradients up before fp16's scaler could unscale them; use bf16, or low_memory=False"
        )
