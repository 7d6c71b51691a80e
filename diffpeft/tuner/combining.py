"""Pruned adapters made of others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper

from diffpeft.config import GATING, DiffPruningConfig, check_density
from diffpeft.sparse.combine import combine


@torch.no_grad()
def add_weighted_adapter(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    *,
    target_density: float | None,
    heads_from: str | None,
    **how: Any,
) -> None:
    """Add an adapter that combines others; see `DiffPruningModel.add_weighted_adapter`. `how` goes to `combine`."""
    source, total = _source(tuner, adapters, adapter_name, heads_from), tuner.num_base_parameters()
    if target_density is not None:
        check_density(target_density)
    budget = None if target_density is None else max(1, round(target_density * total))
    diff = combine([tuner.get_diff(name) for name in adapters], weights, max_nonzeros=budget, **how)
    nnz = {key: positions.numel() for key, (positions, _) in diff.items()}
    modules = [layer.module_key for name in adapters for layer in tuner.layers_of(name)]
    tuner.peft_config[adapter_name] = replace(
        tuner.peft_config[source],
        **common_targets([tuner.peft_config[name] for name in adapters], modules),
        nnz_pattern=nnz,
        value_dtype="float32",
        target_density=max(sum(nnz.values()), 1) / total,
        inference_mode=True,
    )
    tuner.inject_adapter(tuner.model, adapter_name)
    for layer in tuner.layers_of(adapter_name):
        keys = {layer.parameter_key(name): name for name in layer.shapes}
        layer.set_diff(adapter_name, {name: diff[key] for key, name in keys.items() if key in diff})
    for head in tuner.model.modules():
        if isinstance(head, ModulesToSaveWrapper) and source in head.modules_to_save:
            head.modules_to_save[adapter_name].load_state_dict(head.modules_to_save[source].state_dict())
    tuner.set_requires_grad(adapter_name, requires_grad=False)


def _source(tuner: BaseTuner, adapters: Sequence[str], adapter_name: str, heads_from: str | None) -> str:
    """The adapter whose config and heads a combination takes over. Raises ValueError for what cannot be combined."""
    if adapter_name in tuner.peft_config:
        raise ValueError(f"there is an adapter {adapter_name!r} already; choose another name or delete it first")
    for name in adapters:
        if tuner.phase(name) == GATING:
            raise ValueError(f"adapter {name!r} is in gating; call magnitude_prune(adapter_name={name!r}) first")
    heads = [module for module in tuner.model.modules() if isinstance(module, ModulesToSaveWrapper)]
    owners = [name for name in dict.fromkeys(adapters) if any(name in head.modules_to_save for head in heads)]
    if heads_from is None and len(owners) > 1:
        raise ValueError(f"{owners} have a head each, which cannot be summed; say whose to take with heads_from=")
    if heads_from is not None and heads_from not in owners:
        raise ValueError(f"heads_from={heads_from!r} has no head; use one of {owners}, or None")
    return heads_from or (owners[0] if owners else adapters[0])


def common_targets(configs: Sequence[DiffPruningConfig], modules: Iterable[str]) -> dict[str, Any]:
    """Fields of a config that covers the diffs of several adapters together, by name.

    Args:
        configs: the adapters' own.
        modules: names of the modules that their diffs change.

    Returns:
        The adapters' own targets where these are equal; else no limit where one of them has none; else the modules.
    """
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    targets = [{field: getattr(config, field) for field in fields} for config in configs]
    if all(target == targets[0] for target in targets):
        return targets[0]
    anywhere = any(target["target_modules"] is None for target in targets)
    return {**dict.fromkeys(fields), "target_modules": None if anywhere else sorted(set(modules))}
