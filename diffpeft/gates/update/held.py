"""Names of the tensors that a layer holds for its gates, and the interface by which gate updates read them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

LOG_ALPHAS = ("diffpruning_log_alpha", "diffpruning_group_log_alpha")
"""Parameters: log_alpha of the elements and of the groups."""
MOMENTS = ("diffpruning_exp_avg", "diffpruning_exp_avg_sq")
"""Buffers of the elements' gates, as `StoredGates` has them."""
GROUP_MOMENTS = ("diffpruning_group_exp_avg", "diffpruning_group_exp_avg_sq")
"""Buffers of the group gates."""
LOW_MEMORY_MOMENTS = (MOMENTS[0], f"{MOMENTS[0]}_scale", f"{MOMENTS[1]}_rows", f"{MOMENTS[1]}_columns")
"""Buffers of a large parameter's gates in the low-memory mode, as `LowMemoryGates` has them."""
DIFF_MOMENTS = ("diffpruning_w_sq_rows", "diffpruning_w_sq_columns", "diffpruning_w_sq_weight")
"""Buffers of its dense diff, as `DiffMoments` has them."""
LOW_MEMORY_BUFFERS = (*LOW_MEMORY_MOMENTS[1:], *DIFF_MOMENTS)
"""Buffers that the low-memory mode alone has."""
GATING_BUFFERS = (*MOMENTS, *GROUP_MOMENTS, *LOW_MEMORY_BUFFERS)


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


def status_of(layer: GatedLayer, adapter_name: str) -> UpdateStatus:
    """The state of the adapter's next update on a layer."""
    return layer.update_status.setdefault(adapter_name, UpdateStatus())


def log_alphas(layers: Iterable[GatedLayer], adapter_name: str) -> list[Tensor]:
    """log_alpha of all gates of an adapter, the groups' included."""
    return [own for layer in layers for kind in LOG_ALPHAS for own in layer.held(kind, adapter_name).values()]


def check_rule(config: Any) -> None:
    """Raise ValueError for gates that cannot be moved on shards."""
    if config.l0_lambda != "auto" or config.low_memory:
        raise ValueError(
            f"gating on shards works with l0_lambda='auto' and low_memory=False, and these are {config.l0_lambda!r} "
            f"and {config.low_memory}; change them, or gate in one process or under DistributedDataParallel"
        )
