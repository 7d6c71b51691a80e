"""Magnitude pruning of an adapter (arXiv 2012.07463, section 3.1), and rounding the values that it kept."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from diffpeft.config import GATING, DiffPruningConfig, check_density
from diffpeft.files.encoding import rounded
from diffpeft.files.keys import VALUES
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.sparse.sharded import Processes, gather, offset, processes_of
from diffpeft.sparse.top_k import Scores, global_top_k
from diffpeft.tuner.fsdp import ShardGroups, fill_state

Values: TypeAlias = Callable[[Tensor], Tensor]
"""Gives the values of a parameter's diff at flat positions, both of shape (k,)."""


@dataclass(frozen=True)
class PruningSummary:
    """The outcome of magnitude pruning."""

    kept: int
    """Nonzeros of the diff."""
    total: int
    """Parameters of the base model."""
    threshold: float
    """The smallest magnitude that was kept."""
    per_parameter: dict[str, tuple[int, int]]
    """(kept, elements) of each adapted parameter, by its name in the base model."""

    @property
    def density(self) -> float:
        """Nonzeros as a share of the base model's parameters."""
        return self.kept / self.total

    def __str__(self) -> str:
        untouched = sum(1 for kept, _ in self.per_parameter.values() if not kept)
        return (
            f"magnitude pruning kept {self.kept} of {self.total} parameters (density {self.density:.4%}, |diff| >= "
            f"{self.threshold:.3e}); {untouched} of {len(self.per_parameter)} tensors left as pretrained"
        )


def release_memory() -> None:
    """Give memory that was freed back to the system, which allocators keep for later: half of what gating took."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc has it
    if trim is not None:
        trim(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def magnitude_prune(
    tuner: BaseTuner, adapter_name: str, density: float | None, optimizer: torch.optim.Optimizer | None
) -> PruningSummary:
    """Keep the largest |delta| of an adapter over all tensors together; see `DiffPruningModel.magnitude_prune`."""
    config: DiffPruningConfig = tuner.peft_config[adapter_name]
    if not config.chosen_in_training:
        raise ValueError(f"selection={config.selection!r} chooses positions before training; call select_positions")

    def by_magnitude(layer: DiffPruningLayer, name: str) -> tuple[Scores, Values]:
        diff = layer.piece(adapter_name, name)
        return diff.scores, diff.values

    summary = keep_largest(tuner, adapter_name, density, by_magnitude, optimizer)
    release_memory()
    return summary


@torch.no_grad()
def keep_largest(
    tuner: BaseTuner,
    adapter_name: str,
    density: float | None,
    choice: Callable[[DiffPruningLayer, str], tuple[Scores, Values]],
    optimizer: torch.optim.Optimizer | None,
) -> PruningSummary:
    """Bring an adapter from gating to fixmask, at the positions of the largest scores over all tensors together.

    `choice` gives the scores of a layer's parameter, by its name there, and the values at chosen positions.
    """
    layers: list[DiffPruningLayer] = tuner.layers_of(adapter_name)
    density = tuner.peft_config[adapter_name].target_density if density is None else density
    k = check(tuner, adapter_name, density)
    old = {layer: layer.adapter_parameters(adapter_name) for layer in layers}
    processes = processes_of(p for parameters in old.values() for p in parameters)
    groups = ShardGroups(p for parameters in old.values() for p in parameters) if processes else None
    if optimizer is not None:
        check_replaceable(optimizer, {p for p in tuner.diff_parameters(adapter_name) if p.requires_grad})
    owners = [(layer, name) for layer in layers for name in layer.shapes]
    scores, values = zip(*(choice(layer, name) for layer, name in owners), strict=True)
    kept, threshold = global_top_k(scores, k, processes)
    chosen = {owner: (p, at(p)) for owner, at, p in zip(owners, values, kept, strict=True)}
    if processes:
        chosen = {owner: _gathered(tensors, *owner, adapter_name, processes) for owner, tensors in chosen.items()}
    replacement = dict[nn.Parameter, nn.Parameter | None]()
    for layer in layers:
        w = dict(layer.diffpruning_w[adapter_name])
        layer.set_diff(adapter_name, {name: chosen[layer, name] for name in layer.shapes})
        kept_values = getattr(layer, VALUES)[adapter_name]
        if groups is not None:
            for name in kept_values:
                groups.replace(w[name], kept_values, name)
        replacement.update(dict.fromkeys(old[layer]))
        replacement.update({w[name]: kept_values[name] for name in kept_values})
    # A copy: the caller's config stays what it was, to begin another adapter with.
    config = tuner.peft_config[adapter_name] = copy.copy(tuner.peft_config[adapter_name])
    counts = {
        layer.parameter_key(name): (positions.numel(), layer.shapes[name].numel())
        for (layer, name), (positions, _) in chosen.items()
    }
    config.target_density = density
    config.nnz_pattern = {key: count for key, (count, _) in counts.items() if count}
    for layer in layers:
        layer.configs[adapter_name] = config
        layer.noise.workspace.clear()
    if groups:
        groups.finish()
    if optimizer is not None:
        replace_parameters(optimizer, replacement)
        if groups:
            fill_state(optimizer, [parameter for parameter in replacement.values() if parameter is not None])
    return PruningSummary(k, tuner.num_base_parameters(), threshold.value, counts)


def _gathered(
    chosen: tuple[Tensor, Tensor], layer: DiffPruningLayer, name: str, adapter_name: str, processes: Processes
) -> tuple[Tensor, Tensor]:
    """Positions and values in the whole parameter, of all processes, from those in this one's piece."""
    positions, values = chosen
    start = offset(layer.gates_of_parameter(adapter_name, name)[0])
    return torch.cat(gather(positions + start, processes)), torch.cat(gather(values, processes))


def check(tuner: BaseTuner, adapter_name: str, density: float) -> int:
    """The number of entries to keep. Raises ValueError where that many cannot be kept."""
    layers: list[DiffPruningLayer] = tuner.layers_of(adapter_name)
    if tuner.phase(adapter_name) != GATING:
        count = sum(sum((layer.nnz(adapter_name) or {}).values()) for layer in layers)
        raise ValueError(f"adapter {adapter_name!r} is pruned already, to {count} nonzeros; it cannot be pruned twice")
    check_density(density)
    total: int = tuner.num_base_parameters()
    adapted = sum(s.numel() for layer in layers for s in layer.shapes.values())
    k = round(density * total)
    if not 1 <= k <= adapted:
        raise ValueError(
            f"density={density} of {total} base parameters is {k} nonzeros, but the adapted modules offer 1 to "
            f"{adapted}; change target_density or target_modules"
        )
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(
            f"adapter {adapter_name!r} is merged into the base model; call unmerge_adapter() before pruning"
        )
    return k


@torch.no_grad()
def cast_values(tuner: BaseTuner, adapter_name: str, dtype: str) -> None:
    """Round a pruned adapter's values to a dtype of files; see `DiffPruningModel.cast_values`."""
    if tuner.phase(adapter_name) == GATING:
        raise ValueError(f"adapter {adapter_name!r} is in gating, its values are not final; call magnitude_prune first")
    config = copy.copy(tuner.peft_config[adapter_name])
    config.value_dtype = dtype
    config.__post_init__()
    layers = tuner.layers_of(adapter_name)
    diffs = [diff for layer in layers for diff in layer.sparse_diffs(adapter_name).values()]
    result = [rounded(diff.values, dtype) for diff in diffs]
    for diff, values in zip(diffs, result, strict=True):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{diff.key} has values beyond {dtype}; use 'bfloat16'")
    for diff, values in zip(diffs, result, strict=True):
        diff.parameter.data = values
    for layer in layers:
        layer.configs[adapter_name] = config
    tuner.peft_config[adapter_name] = config


# The optimizer


def check_replaceable(optimizer: torch.optim.Optimizer, old: set[nn.Parameter]) -> None:
    """Raise ValueError unless the optimizer's groups hold every parameter in `old`, so that they can be replaced."""
    missing = len(old - {parameter for group in optimizer.param_groups for parameter in group["params"]})
    if missing:
        raise ValueError(f"the optimizer does not hold {missing} parameters; build it from model.parameters()")


def replace_parameters(
    optimizer: torch.optim.Optimizer, replacement: Mapping[nn.Parameter, nn.Parameter | None]
) -> None:
    """Put new parameters, or none, where old ones stood in the optimizer's groups, with fresh state.

    Groups and order equal those of an optimizer made for the changed model, so that a checkpoint's optimizer state fits
    when training resumes from it.
    """
    for group in optimizer.param_groups:
        new: list[Any] = [replacement.get(parameter, parameter) for parameter in group["params"]]
        group["params"] = [parameter for parameter in new if parameter is not None]
    for old in replacement:
        optimizer.state.pop(old, None)
