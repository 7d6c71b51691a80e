"""The tuner's part in which adapters are active and which are merged, and in unwrapping the model."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft.tuners.tuners_utils import onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, _set_adapter
from torch import nn
from tqdm.auto import tqdm

from diffpeft.layer.find import outer_modules
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.layer.root import RootParameters
from diffpeft.tuner.injection import Injection


class Switching(Injection):
    """Activating, merging and unmerging adapters."""

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter or several the active ones, whose diffs add (PEFT's hook). Raises ValueError for others."""
        self._check_names([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        if any(layer.merged_adapters for layer in self.all_layers()):
            super().set_adapter(adapter_name, inference_mode)  # warns and unmerges
            return
        for layer in self._set_heads(adapter_name, inference_mode):
            layer.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def _set_heads(self, adapter_name: str | list[str], inference_mode: bool) -> list[DiffPruningLayer]:
        """Make adapters the active ones in heads, and return the layers, where the caller does."""
        # As PEFT's own loops, which look into the containers of adapters' tensors too.
        modules = [module for _, module in outer_modules(self.model)]
        for module in modules:
            if isinstance(module, AuxiliaryTrainingWrapper):
                _set_adapter(module, adapter_name, inference_mode=inference_mode)
        return [module for module in modules if isinstance(module, DiffPruningLayer)]

    def switch_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Have other adapters active and merged in place of those that are, as
        `unmerge_adapter(); set_adapter(adapter_name); merge_adapter()` has, in less time: the tuner goes through the model once.

        Args:
            adapter_name: the adapter or adapters, finished or in gating.
            inference_mode: as of `set_adapter`, whether they are frozen.

        Raises:
            ValueError: for names that do not exist, or heads that cannot be active together: nothing changes then. And for what
                merging refuses: nothing is merged then, and the adapters are the active ones, as after an IndexError for a
                parameter that has become smaller.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self._check_names(names)
        layers = self._set_heads(adapter_name, inference_mode)
        self.active_adapter = adapter_name
        try:
            for layer in layers:
                layer.set_adapter(adapter_name, inference_mode=inference_mode)
                with _onloaded(layer):
                    layer.unmerge()
                    layer.merge()
        except BaseException:
            self.unmerge_adapter()
            self.set_adapter(adapter_name, inference_mode)
            raise

    def _check_names(self, names: Iterable[str]) -> None:
        unknown = sorted(set(names) - self.peft_config.keys())
        if unknown:
            raise ValueError(f"there is no adapter {unknown}; there are {sorted(self.peft_config)}")

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write diffs into the base parameters, k writes a parameter, in all layers or in none.

        Args:
            adapter_names: the adapters, by default the active ones.
            safe_merge: raise ValueError where the result would not be finite.
        """
        self._check_names(adapter_names or [])
        before = [(layer, len(layer.merged_adapters)) for layer in self.all_layers()]
        try:
            for layer, _ in before:
                with _onloaded(layer):
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        except BaseException:
            for layer, merged in before:
                layer.unmerge(keep=merged)
            raise

    def unmerge_adapter(self) -> None:
        """Restore the base parameters, to the bit, of all merged adapters."""
        for layer in self.all_layers():
            with _onloaded(layer):
                layer.unmerge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """PEFT's hook behind `unload` and `merge_and_unload`, which by itself leaves wrapped modules inside others."""
        if merge:
            self.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        else:
            self.unmerge_adapter()
        if merge and adapter_names is not None:
            self._choose_heads(adapter_names)
        wrapped = [(parent, n, m) for _, parent in outer_modules(self.model) for n, m in parent._modules.items()]
        for parent, name, layer in tqdm(wrapped, disable=not progressbar, desc="Unloading"):
            if isinstance(layer, DiffPruningLayer):
                layer.noise.unwatch(self.model)
                if isinstance(layer, RootParameters):
                    layer.unwatch()
                    delattr(parent, name)
                else:
                    setattr(parent, name, layer.base_layer)
        model: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return model

    def _check_merge_allowed(self) -> None:
        """PEFT's hook, which warns of tied weights: here they have one diff. Layers refuse what cannot be merged."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's hook, which expects a weight: heads that are unwrapped may be modules of any kind."""
        setattr(parent, child_name, new_module)

    def _choose_heads(self, adapter_names: list[str]) -> None:
        """Have the heads of the adapters that are merged stay, not those of the active one."""
        wrappers = [(parent, n, m) for parent in self.model.modules() for n, m in parent._modules.items()]
        for parent, name, head in wrappers:
            if isinstance(head, ModulesToSaveWrapper):
                mine = [adapter for adapter in adapter_names if adapter in head.modules_to_save]
                if len(mine) > 1:
                    raise ValueError(f"{mine} have a head {name!r} each, and one can stay; merge one of them")
                setattr(parent, name, head.modules_to_save[mine[0]] if mine else head.original_module)


def _onloaded(layer: DiffPruningLayer) -> AbstractContextManager[Any]:
    """Within, the layer's parameters are on a device."""
    hooked = "_hf_hook" in layer.base_layer.__dict__  # at no cost where nothing is hooked
    return onload_layer(layer) if hooked and layer.is_offloaded() else nullcontext()
