"""The gates of an adapter from the tensors that a layer holds; which form they have is decided here alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from diffpeft.gates.update.held import GROUP_MOMENTS, LOG_ALPHAS, LOW_MEMORY_MOMENTS, MOMENTS, GatedLayer
from diffpeft.gates.update.low_memory import LowMemoryGates
from diffpeft.gates.update.state import Group, StoredGates


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


def collect(layers: Iterable[GatedLayer], adapter_name: str) -> list[Group]:
    """The gates of all parameters of an adapter."""
    return [group for layer in layers for group in groups_of(layer, adapter_name).values()]


def log_alphas(layers: Iterable[GatedLayer], adapter_name: str) -> list[Tensor]:
    """log_alpha of all gates of an adapter, the groups' included."""
    return [own for layer in layers for kind in LOG_ALPHAS for own in layer.held(kind, adapter_name).values()]
