"""One update of an adapter's gates, and how many of them are open."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpeft.gates import hard_concrete
from diffpeft.gates.hard_concrete import Stretch, open_logit
from diffpeft.gates.update import rules
from diffpeft.gates.update.collect import collect
from diffpeft.gates.update.held import GatedLayer, check_rule, log_alphas
from diffpeft.gates.update.in_backward import finish_update
from diffpeft.gates.update.rules import StepSettings
from diffpeft.gates.update.state import GateSet
from diffpeft.sparse.sharded import add_up, local, processes_of


class OpenCount(NamedTuple):
    """How many gates of an adapter are open."""

    version: Any
    """Equal for as long as no gate moves."""
    elements: Tensor
    """Sum of P(element open) of each group, float64, shape (groups,)."""
    expected: float  # nonzeros


class Progress(NamedTuple):
    """How far gating has come: updates done so far, of how many."""

    step: int
    gating_steps: int
    total: int
    """Parameters of the base model, which the target density is a share of."""


def gates_version(layers: Sequence[GatedLayer], adapter_name: str) -> Any:
    """A value that differs once any gate of the adapter has moved."""
    generations = [layer.generations.get(adapter_name) for layer in layers]
    own = map(local, log_alphas(layers, adapter_name))
    return adapter_name, generations, [(tensor._version, tensor.data_ptr()) for tensor in own]


def expected_l0(layers: Sequence[GatedLayer], adapter_name: str, config: Any) -> Tensor | None:
    """The expected number of nonzeros of an adapter, a differentiable scalar; None where it has no gates."""
    terms, how = [], (config.stretch, config.group_penalty)
    for elements, gate in collect(layers, adapter_name):
        terms.append(hard_concrete.expected_l0(elements.log_alpha, None if gate is None else gate.log_alpha, *how))
    return torch.stack(terms).sum() if terms else None


@torch.no_grad()
def count_open(
    layers: Sequence[GatedLayer], adapter_name: str, stretch: Stretch, known: OpenCount | None = None
) -> OpenCount:
    """How many gates of an adapter are open; what is `known`, if no gate has moved since."""
    version = gates_version(layers, adapter_name)
    if known is not None and known.version == version:
        return known
    gates = GateSet(collect(layers, adapter_name), processes_of(log_alphas(layers, adapter_name)))
    elements = gates.open_elements(stretch, any(layer.fused for layer in layers))
    return OpenCount(version, elements, gates.expected_nonzeros(stretch, elements))


@torch.no_grad()
def gate_step(
    layers: Sequence[GatedLayer],
    adapter_name: str,
    config: Any,
    progress: Progress,
    known: OpenCount | None = None,
) -> tuple[float, OpenCount | None]:
    """Move an adapter's gates once, from the gradients of the task loss on them, and clear these gradients.

    Returns:
        The lambda that was used, NaN if gradients were not finite; and how many gates are open, if that is known.
    """
    finished = [finish_update(layer, adapter_name) for layer in layers] if config.low_memory else []
    groups, fused = collect(layers, adapter_name), any(layer.fused for layer in layers)
    gates = GateSet(groups, processes_of(log_alphas(layers, adapter_name)))
    checks = [check for group in groups if (check := group.elements.gradient_check()) is not None]
    l0_lambda = math.nan
    if all(finished) and (not checks or bool(add_up(torch.stack(checks).sum(), gates.processes).isfinite())):
        if config.l0_lambda == "auto":
            before = count_open(layers, adapter_name, config.stretch, known)
            initial = torch.tensor(config.init_log_alpha)
            start = sum(gates.sizes) * float(torch.sigmoid(open_logit(initial, config.stretch)))
            target = min(start, config.target_density * progress.total)
            wanted = rules.density_schedule(progress.step, progress.gating_steps, start, target)
            max_step = rules.automatic_max_step(progress.step, progress.gating_steps, config.gate_learning_rate)
            settings = StepSettings(progress.step, max_step, config.stretch, fused, config.low_memory)
            l0_lambda, elements = rules.automatic_step(gates, wanted / before.expected, before.elements, settings)
            expected = gates.expected_nonzeros(config.stretch, elements)
            known = OpenCount(gates_version(layers, adapter_name), elements, expected)
        else:
            if gates.processes is not None:
                check_rule(config)
            max_step, l0_lambda = config.gate_learning_rate or rules.PAPER_MAX_STEP, float(config.l0_lambda)
            settings = StepSettings(progress.step, max_step, config.stretch, fused)
            rules.fixed_lambda_step(groups, l0_lambda, config.group_penalty, settings)
    for log_alpha in log_alphas(layers, adapter_name):
        log_alpha.grad = None
    return l0_lambda, known
