"""The gates of an adapter from the tensors that a layer holds; which form they have is decided here alone."""

from collections.abc import Iterable

from torch import Tensor

from diffpeft.gates.update.held import GROUP_MOMENTS, LOG_ALPHAS, MOMENTS, GatedLayer
from diffpeft.gates.update.low_memory import low_memory_gates
from diffpeft.gates.update.state import ElementGates, Group, StoredGates
from diffpeft.sparse.sharded import is_sharded, local, offset


def groups_of(layer: GatedLayer, adapter_name: str) -> dict[str, Group]:
    """The gates of each parameter that has any, by its name in the layer."""

    def stored(log_alpha: Tensor, moments: Iterable[str], name: str) -> StoredGates:
        grad = None if log_alpha.grad is None else local(log_alpha.grad)
        exp_avg, exp_avg_sq = (local(layer.held(kind, adapter_name)[name]) for kind in moments)
        if not is_sharded(log_alpha):
            return StoredGates(log_alpha, grad, exp_avg, exp_avg_sq)
        return StoredGates(local(log_alpha), grad, exp_avg, exp_avg_sq, offset(log_alpha), log_alpha.numel())

    groups, group_log_alphas = {}, layer.held(LOG_ALPHAS[1], adapter_name)
    for name, log_alpha in layer.held(LOG_ALPHAS[0], adapter_name).items():
        elements: ElementGates = low_memory_gates(layer, adapter_name, name) or stored(log_alpha, MOMENTS, name)
        group = group_log_alphas.get(name)
        groups[name] = Group(elements, None if group is None else stored(group, GROUP_MOMENTS, name))
    return groups


def collect(layers: Iterable[GatedLayer], adapter_name: str) -> list[Group]:
    """The gates of all parameters of an adapter."""
    return [group for layer in layers for group in groups_of(layer, adapter_name).values()]
