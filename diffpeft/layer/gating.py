"""The gates of all adapters on one wrapped module, in the plain form and in that of the low-memory mode."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffpeft.gates.update import factored
from diffpeft.gates.update.in_backward import DiffMoments, Pending, Watched
from diffpeft.gates.update.low_memory import LeanGates, fold_plain

LOCATIONS = ("diffpruning_log_alpha", "diffpruning_group_log_alpha")
"""Of the gates of parameters and of groups."""
MOMENTS = ("diffpruning_exp_avg", "diffpruning_exp_avg_sq")
"""Of the gates of a parameter, as [`GateTensors`] has them."""
GROUP_MOMENTS = ("diffpruning_group_exp_avg", "diffpruning_group_exp_avg_sq")
"""Of its group gate."""
LEAN_MOMENTS = (
    "diffpruning_exp_avg",
    "diffpruning_exp_avg_scale",
    "diffpruning_exp_avg_sq_rows",
    "diffpruning_exp_avg_sq_columns",
)
"""Of the gates of a large parameter in the low-memory mode, as [`LeanGates`] has them."""
DIFF_MOMENTS = ("diffpruning_w_sq_rows", "diffpruning_w_sq_columns", "diffpruning_w_sq_weight")
"""Of its dense diff, as [`DiffMoments`] has them."""
LEAN_BUFFERS = (*LEAN_MOMENTS[1:], *DIFF_MOMENTS)
"""Those that the low-memory mode alone has."""
GATING_BUFFERS = (*MOMENTS, *GROUP_MOMENTS, *LEAN_BUFFERS)


Fold = Callable[[Tensor, Tensor | None], None]
"""Takes a gradient of locations, and of which rows it is; None: of all."""


class GateTensors(NamedTuple):
    """The gates of one parameter: locations and the two moments of their gradients."""

    log_alpha: nn.Parameter
    exp_avg: Tensor
    exp_avg_sq: Tensor


def new_moments(w: Tensor) -> dict[str, Tensor]:
    """The buffers of a large parameter, before any gradient, by their names."""
    rows, columns = factored.matrix_shape(w.shape)
    made = [torch.zeros_like(w, dtype=torch.int8)]
    made += [w.new_zeros(size) for size in ((rows,), (rows,), (columns,), (rows,), (columns,), ())]
    return dict(zip((*LEAN_MOMENTS, *DIFF_MOMENTS), made, strict=True))


class Gating:
    """The gates' part of [`AdapterTensors`].

    In the low-memory mode the gradients of gates are folded into their moments within the backward pass, and the diffs of large
    parameters are updated there; other diffs are the optimizer's.
    """

    # ModuleDicts: adapter name -> ParameterDict or BufferDict: parameter name -> tensor.
    diffpruning_w: Any
    diffpruning_log_alpha: Any
    diffpruning_group_log_alpha: Any
    diffpruning_exp_avg: Any
    diffpruning_exp_avg_sq: Any
    diffpruning_group_exp_avg: Any
    diffpruning_group_exp_avg_sq: Any
    diffpruning_exp_avg_scale: Any

    fused: bool
    pending: dict[str, Pending]
    """What backward passes have done for an adapter's next update, in the low-memory mode."""

    @abstractmethod
    def parameter_key(self, name: str) -> str:
        """Name of a parameter in the base model."""

    def gates(self, adapter_name: str) -> dict[str, tuple[GateTensors | LeanGates, GateTensors | None]]:
        """Element gates and group gate of each parameter."""
        if adapter_name not in self.diffpruning_log_alpha:
            return {}
        if adapter_name in self.diffpruning_exp_avg_scale:
            return {name: self.gates_of(adapter_name, name) for name in self.diffpruning_log_alpha[adapter_name]}
        # As dicts: this is asked for several times an update, and the containers' own ways would take most of the time.
        parameters = [getattr(self, attribute)[adapter_name]._parameters for attribute in LOCATIONS]
        averages, squares, *of_groups = (
            getattr(self, attribute)[adapter_name]._buffers for attribute in (*MOMENTS, *GROUP_MOMENTS)
        )
        return {
            name: (
                GateTensors(log_alpha, averages[name], squares[name]),
                GateTensors(whole, *(moment[name] for moment in of_groups))
                if (whole := parameters[1].get(name)) is not None
                else None,
            )
            for name, log_alpha in parameters[0].items()
        }

    def gates_of(self, adapter_name: str, name: str) -> tuple[GateTensors | LeanGates, GateTensors | None]:
        """Element gates and group gate of one parameter."""
        element: GateTensors | LeanGates | None = self.lean_gates(adapter_name, name)
        if element is None:
            log_alpha = self.diffpruning_log_alpha[adapter_name][name]
            element = GateTensors(log_alpha, *self._buffers_of(MOMENTS, adapter_name, name))
        groups = self.diffpruning_group_log_alpha[adapter_name]
        if name not in groups:
            return element, None
        return element, GateTensors(groups[name], *self._buffers_of(GROUP_MOMENTS, adapter_name, name))

    def lean_gates(self, adapter_name: str, name: str) -> LeanGates | None:
        """The element gates of a large parameter in the low-memory mode; None where they have the plain form."""
        scales = self.diffpruning_exp_avg_scale
        if adapter_name not in scales or name not in scales[adapter_name]:
            return None
        moments = self._buffers_of(LEAN_MOMENTS, adapter_name, name)
        return LeanGates(self.diffpruning_log_alpha[adapter_name][name], *moments)

    def folding(self, adapter_name: str, name: str) -> Fold | None:
        """What takes the gradient of lean gates in the backward pass; None for other gates, and for those that do not train."""
        lean = self.lean_gates(adapter_name, name)
        if lean is None or not lean.log_alpha.requires_grad:
            return None
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "low_memory=True updates tensors within the backward pass, which torch.compile cannot follow; leave the "
                "model uncompiled, or use low_memory=False"
            )

        def fold(grad: Tensor, rows: Tensor | None) -> None:
            if not lean.fold(grad, rows, self.fused):
                self.pending_update(adapter_name).finite = False

        return fold

    def _buffers_of(self, attributes: Sequence[str], adapter_name: str, name: str) -> list[Tensor]:
        return [getattr(self, attribute)[adapter_name][name] for attribute in attributes]

    def pending_update(self, adapter_name: str) -> Pending:
        """What backward passes have done for the adapter's next update."""
        return self.pending.setdefault(adapter_name, Pending())

    def watched(self, adapter_name: str) -> list[Watched]:
        """What is used up within the backward pass in the low-memory mode, but for the gradients of lean gates, which autograd
        never sees."""
        pending, found = partial(self.pending_update, adapter_name), []
        for name, (element, whole) in self.gates(adapter_name).items():
            key = self.parameter_key(name)
            if isinstance(element, LeanGates):
                take = partial(self._update_diff, adapter_name, name)
                found.append(Watched(f"the diff of {key}", self.diffpruning_w[adapter_name][name], take, True, pending))
            else:
                take = partial(self._fold, adapter_name, name, 0)
                found.append(Watched(f"the gates of {key}", element.log_alpha, take, False, pending))
            if whole is not None:
                take = partial(self._fold, adapter_name, name, 1)
                found.append(Watched(f"the group gate of {key}", whole.log_alpha, take, False, pending))
        return found

    def _update_diff(self, adapter_name: str, name: str, grad: Tensor, rate: float, decay: float) -> bool:
        moments = DiffMoments(*self._buffers_of(DIFF_MOMENTS, adapter_name, name))
        return moments.step(self.diffpruning_w[adapter_name][name], grad, rate, decay)

    def _fold(self, adapter_name: str, name: str, which: int, grad: Tensor, rate: float, decay: float) -> bool:
        """Fold the gradient of the elements' gates (0) or of the group's (1); rate and decay are the optimizer's alone."""
        gates = self.gates_of(adapter_name, name)[which]
        assert isinstance(gates, GateTensors)
        return fold_plain(gates.exp_avg, gates.exp_avg_sq, grad)

    def finish_update(self, adapter_name: str) -> bool:
        """Fold what autograd left on gates, and begin the next update. Returns whether all gradients of this one were finite.

        Raises:
            ValueError: gradients that should have been used up in the backward pass, or that passed around it.
        """
        pending = self.pending_update(adapter_name)
        for one in self.watched(adapter_name):
            if one.parameter.grad is not None:
                if one.in_optimizer:
                    raise ValueError(
                        f"{one.label} has a gradient, which low_memory=True uses up within the backward pass; call "
                        "update_in_backward(optimizer) before training"
                    )
                pending.finite &= one.take(one.parameter.grad, 0.0, 0.0)
                one.parameter.grad = None
        for name, (element, _) in self.gates(adapter_name).items():
            if element.log_alpha.grad is not None:
                raise ValueError(
                    f"the gates of {self.parameter_key(name)} have a gradient that low_memory=True cannot use, of gates that were "
                    "not sampled or of a penalty of one's own; train in model.train(), and let l0_lambda='auto' do the rest"
                )
        del self.pending[adapter_name]
        return pending.finite
