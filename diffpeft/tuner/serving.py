"""The tuner's part in mixed batches: PEFT's `adapter_names=`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper

from diffpeft.layer.find import outer_modules
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.layer.root import RootParameters
from diffpeft.tuner.mixed_batch import BASE, MixedBatch
from diffpeft.tuner.state_dict import AdapterStateDict


class Serving(AdapterStateDict):
    """Forward and generation with an adapter for each row."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around forward and generate: takes `adapter_names`, an adapter's name or "__base__" for each row."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_mixed(names)
        with self._activated(BASE), MixedBatch(names, self._activated).running(self.model):
            yield

    @contextmanager
    def _activated(self, adapter_name: str) -> Iterator[None]:
        """Within the block one adapter is active, or none for [`BASE`], whatever trains."""
        kinds = DiffPruningLayer, AuxiliaryTrainingWrapper
        modules: list[Any] = [module for _, module in outer_modules(self.model) if isinstance(module, kinds)]
        before = [module._active_adapter for module in modules]
        root = getattr(self.model, RootParameters.NAME, None)
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

    def _check_mixed(self, names: Sequence[str]) -> None:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names) or not names:
            raise ValueError(f"adapter_names={names!r} must be a list with an adapter's name for each row")
        unknown = sorted(set(names) - self.peft_config.keys() - {BASE})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are {sorted(self.peft_config)} "
                f"and {BASE!r}"
            )
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first; one adapter trains "
                "at a time"
            )
        for layer in self.all_layers():
            if layer.merged:
                raise ValueError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first: "
                    f"{layer.merged_adapters} are in the base weights of all rows"
                )
            if layer.disable_adapters:
                raise ValueError("adapter_names was given while adapters are disabled; enable them, or leave it out")
