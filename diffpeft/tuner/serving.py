"""The tuner's part in mixed batches: PEFT's `adapter_names=`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.layer.root import RootParameters
from diffpeft.tuner.mixed_batch import BASE, MixedBatch, Part
from diffpeft.tuner.row_layout import Layouts
from diffpeft.tuner.state_dict import AdapterStateDict


class Serving(AdapterStateDict):
    """Forward and generation with an adapter for each row."""

    _row_layouts: dict[Any, Layouts]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around forward and generate: takes `adapter_names`, an adapter's name or "__base__" a row."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_mixed(names)
        layers, root = list(self.all_layers()), getattr(self.model, RootParameters.NAME, None)
        batch = MixedBatch(
            self.model,
            names,
            self._parts(layers),
            self.__dict__.setdefault("_row_layouts", {}),
            root.run if isinstance(root, RootParameters) else None,
            _beams(**{"generation_config": getattr(self.model, "generation_config", None), **kwargs}),
        )
        for layer in layers:
            layer.mixed = batch
        try:
            with batch.running():
                yield
        finally:
            for layer in layers:
                layer.mixed = None

    def _check_mixed(self, names: Sequence[str]) -> None:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names) or not names:
            raise ValueError(f"adapter_names={names!r} must be a list with an adapter's name for each row")
        unknown = sorted(set(names) - self.peft_config.keys() - {BASE})
        if unknown:
            raise ValueError(f"adapter_names has {unknown}, but there are {sorted(self.peft_config)} and {BASE!r}")
        if self.training:
            raise ValueError("adapter_names mixes adapters for inference; call model.eval() first, train one at a time")
        for layer in self.all_layers():
            if layer.merged:
                raise ValueError(
                    f"adapter_names cannot take {layer.merged_adapters} back out of the base weights of some rows; call "
                    "unmerge_adapter() first"
                )
            if layer.disable_adapters:
                raise ValueError("adapter_names was given while adapters are disabled; enable them, or leave it out")

    def _parts(self, layers: Sequence[DiffPruningLayer]) -> list[Part]:
        parts = []
        for layer in layers:
            if not isinstance(layer, RootParameters):
                shared = isinstance(layer.base_layer, nn.Embedding)
                parts.append(Part(layer, layer.key, layer.changes_any, partial(_run_layer, layer.forward), shared))
        for name, module in self.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                heads = module.modules_to_save
                parts.append(Part(module, name, heads.__contains__, partial(_run_head, module), False))
        return parts


def _run_layer(forward: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _run_head(wrapper: ModulesToSaveWrapper, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    head = wrapper.original_module if adapter_name == BASE else wrapper.modules_to_save[adapter_name]
    return head(*args, **kwargs)


def _beams(num_beams: Any = None, num_return_sequences: Any = None, generation_config: Any = None, **_: Any) -> int:
    """Rows that generation makes of each of its input's."""
    told = [getattr(generation_config, name, None) for name in ("num_beams", "num_return_sequences")]
    return max(int(count or 1) for count in (num_beams, num_return_sequences, *told))
