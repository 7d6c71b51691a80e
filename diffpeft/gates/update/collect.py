"""The gates of an adapter from the tensors that a layer holds; which form they have is decided here alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from diffpeft.gates.update.low_memory import LowMemoryGates
from diffpeft.gates.update.names import GROUP_MOMENTS, LOG_ALPHAS, LOW_MEMORY_MOMENTS, MOMENTS
from diffpeft.gates.update.state import Group, StoredGates


@dataclass
class UpdateStatus:
    """The state of an adapter's next update on one layer, as backward passes leave it in the low-memory mode."""

    finite: bool = True
    """Whether all gradients were; what was not has changed nothing."""
    updated: set[str] = field(default_factory=set)
    """Labels of the parameters that stepped."""


class GatedLayer(Protocol):
    """A module with the gates of some adapters."""

    fused: bool
    """Whether chains of elementwise operations are compiled."""
    update_status: dict[str, UpdateStatus]
    """State of each adapter's next update."""
    generations: dict[str, int]
    """A number of its own each time that an adapter's gates are made."""

    def parameter_key(self, name: str) -> str:
        """Name of a parameter in the base model."""

    def held(self, attribute: str, adapter_name: str) -> Mapping[str, Any]:
        """The adapter's tensors of one kind, by parameter name."""


def groups_of(layer: GatedLayer, adapter_name: str) -> dict[str, Group]:
    """The gates of each parameter that has any, by its name in the layer."""
    kinds = (*LOG_ALPHAS, *MOMENTS, *GROUP_MOMENTS, *LOW_MEMORY_MOMENTS[1:])
    held = {kind: layer.held(kind, adapter_name) for kind in kinds}
    return {name: _group(held, name) for name in held[LOG_ALPHAS[0]]}


def _group(held: Mapping[str, Mapping[str, Tensor]], name: str) -> Group:
    log_alpha, group_log_alpha = (held[kind].get(name) for kind in LOG_ALPHAS)
    assert log_alpha is not None
    group_gate = None
    if group_log_alpha is not None:
        moments = (held[kind][name] for kind in GROUP_MOMENTS)
        group_gate = StoredGates(group_log_alpha, group_log_alpha.grad, *moments)
    if name in held[LOW_MEMORY_MOMENTS[1]]:
        return Group(LowMemoryGates(log_alpha, *(held[kind][name] for kind in LOW_MEMORY_MOMENTS)), group_gate)
    return Group(StoredGates(log_alpha, log_alpha.grad, *(held[kind][name] for kind in MOMENTS)), group_gate)


def low_memory_gates(layer: GatedLayer, adapter_name: str, name: str) -> LowMemoryGates | None:
    """The gates of a large parameter's elements in the low-memory mode; None where they are stored whole."""
    if name not in layer.held(LOW_MEMORY_MOMENTS[1], adapter_name):
        return None
    moments = (layer.held(kind, adapter_name)[name] for kind in LOW_MEMORY_MOMENTS)
    return LowMemoryGates(layer.held(LOG_ALPHAS[0], adapter_name)[name], *moments)


def collect(layers: Iterable[GatedLayer], adapter_name: str) -> list[Group]:
    """The gates of all parameters of an adapter."""
    return [group for layer in layers for group in groups_of(layer, adapter_name).values()]


def log_alphas(layers: Iterable[GatedLayer], adapter_name: str) -> list[Tensor]:
    """log_alpha of all gates of an adapter, the groups' included."""
    return [own for layer in layers for kind in LOG_ALPHAS for own in layer.held(kind, adapter_name).values()]
