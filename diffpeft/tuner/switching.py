"""Activating and merging adapters, and unwrapping the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, _set_adapter
from torch import nn
from tqdm.auto import tqdm

from diffpeft.layer.find import outer_modules
from diffpeft.layer.layer import DiffPruningLayer, RootParameters
from diffpeft.layer.wrapped import is_offloaded
from diffpeft.tuner.mixed_batch import BASE, MixedBatch, check_names


def onloaded(layer: DiffPruningLayer) -> AbstractContextManager[Any]:
    """A context in which the layer's parameters are on a device."""
    return onload_layer(layer) if is_offloaded(layer.base_layer) else nullcontext()


def activate(model: nn.Module, adapter_names: str | list[str], inference_mode: bool) -> list[DiffPruningLayer]:
    """Make adapters the active ones in the heads, which may refuse, and return the layers, where the caller does.

    Heads come first, so that nothing changes where they refuse. PEFT's own loops look into the containers of adapters'
    tensors too, which are most of a model's modules.
    """
    modules = [module for _, module in outer_modules(model)]
    for module in modules:
        if isinstance(module, AuxiliaryTrainingWrapper):
            _set_adapter(module, adapter_names, inference_mode=inference_mode)
    return [module for module in modules if isinstance(module, DiffPruningLayer)]


@contextmanager
def only_active(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Within the block one adapter is active, or none for `BASE`; what trains stays as it is."""
    kinds = DiffPruningLayer, AuxiliaryTrainingWrapper
    modules: list[Any] = [module for _, module in outer_modules(model) if isinstance(module, kinds)]
    before = [module._active_adapter for module in modules]
    root = getattr(model, RootParameters.NAME, None)
    for module in modules:
        module._active_adapter = [] if adapter_name == BASE else [adapter_name]
    try:
        if isinstance(root, RootParameters):
            root.put()
        yield
    finally:
        if isinstance(root, RootParameters):
            root.put_back()
        for module, active in zip(modules, before, strict=True):
            module._active_adapter = active


@contextmanager
def mixed(tuner: BaseTuner, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within the block the tuner's model takes a batch whose rows belong to the named adapters."""
    check_names(adapter_names, tuner.peft_config.keys(), tuner.training, tuner.all_layers())
    activate = partial(only_active, tuner.model)
    with activate(BASE), MixedBatch(adapter_names, activate).running(tuner.model):
        yield


def merge(layers: Sequence[DiffPruningLayer], adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Merge adapters in all layers or in none."""
    before = [(layer, len(layer.merged_adapters)) for layer in layers]
    try:
        for layer in layers:
            with onloaded(layer):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    except BaseException:
        for layer, merged in before:
            layer.unmerge(keep=merged)
        raise


def unwrap(model: nn.Module, progressbar: bool) -> None:
    """Put the wrapped modules in the place of their layers."""
    wrapped = [(parent, n, m) for _, parent in outer_modules(model) for n, m in parent._modules.items()]
    for parent, name, layer in tqdm(wrapped, disable=not progressbar, desc="Unloading"):
        if isinstance(layer, DiffPruningLayer):
            layer.noise.unwatch(model)
            if isinstance(layer, RootParameters):
                layer.unwatch()
                delattr(parent, name)
            else:
                setattr(parent, name, layer.base_layer)


def choose_heads(model: nn.Module, adapter_names: list[str]) -> None:
    """Keep the heads of the adapters that are merged, not those of the active one."""
    wrappers = [(parent, n, m) for parent in model.modules() for n, m in parent._modules.items()]
    for parent, name, head in wrappers:
        if isinstance(head, ModulesToSaveWrapper):
            mine = [adapter for adapter in adapter_names if adapter in head.modules_to_save]
            if len(mine) > 1:
                raise ValueError(f"{mine} have a head {name!r} each, and one can stay; merge one of them")
            setattr(parent, name, head.modules_to_save[mine[0]] if mine else head.original_module)
