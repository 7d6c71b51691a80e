"""Writing the diffs of a wrapped module into its parameters, and taking them out to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from diffpeft.layer.tensors import AdapterTensors
from diffpeft.sparse.diff import put_, take
from diffpeft.sparse.exchange import NOTHING, NOWHERE, Exchange, Progress, can_exchange, exchange_all
from diffpeft.trainer.launch import check_whole


class _Merge(NamedTuple):
    """What a merge overwrote: `positions` None means the whole parameter."""

    adapter_name: str
    parameter_name: str
    positions: Tensor | None
    old: Tensor
    number: int = 0
    progress: Progress | None = None
    """Where it is one of many that are made together: whether it has got so far."""

    def is_made(self) -> bool:
        """Whether there is something to undo."""
        return self.progress is None or self.number < self.progress.value


class _Row(NamedTuple):
    """An exchange that is to be made in a layer's parameter."""

    layer: Mergeable
    parameter_name: str
    tensor: Tensor
    back_at: Tensor | None
    back: Tensor
    at: Tensor
    values: Tensor


class Mergeable(AdapterTensors):
    """The part of [`DiffPruningLayer`] that merges. `base_layer`, `key` and `ties` as there."""

    def __init__(self, base_layer: nn.Module, key: str, ties: dict[str, tuple[Any, str]]) -> None:
        super().__init__(base_layer, key, ties)
        self.shared_with: dict[str, list[str]] = {}
        """Modules that have a parameter of this layer too and are not adapted, by the parameter's name."""
        self.tied_layers: dict[str, list[Mergeable]] = {}
        """Layers that have a parameter of this layer as a tie, by its name."""
        self._merges: list[_Merge] = []

    def changes(self, adapter_name: str, name: str) -> bool:
        """Whether the adapter has a diff for parameter `name`, tied or not."""
        if name in self.ties:
            owner: Mergeable = self.ties[name][0]
            return adapter_name in self.configs and owner.changes(adapter_name, self.ties[name][1])
        if self.is_gating(adapter_name):
            return name in self.diffpruning_w[adapter_name]
        return adapter_name in self.diffpruning_values and name in self.diffpruning_values[adapter_name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the diffs of the adapters (default: the active ones) into the base parameters.

        What they overwrite is kept, so that [`unmerge`] restores the base to the bit.

        Raises:
            ValueError: with `safe_merge`, where the result would not be finite; nothing is written then.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.configs:
                continue
            self._check_mergeable(adapter_name)
            self.merged_adapters.append(adapter_name)
            try:
                for merge in self._merge_one(adapter_name):
                    if safe_merge and not self._is_finite(merge):
                        raise ValueError(
                            f"merging adapter {adapter_name!r} would make {self.parameter_key(merge.parameter_name)} NaN "
                            "or infinite; the adapter seems to be broken"
                        )
            except BaseException:
                self.unmerge(keep=len(self.merged_adapters) - 1)
                raise

    def _check_mergeable(self, adapter_name: str) -> None:
        for name in self.shapes if self.shared_with or self.tied_layers else ():
            others = [*self.shared_with.get(name, [])]
            others += [layer.key for layer in self.tied_layers.get(name, []) if adapter_name not in layer.configs]
            if others and self.changes(adapter_name, name):
                raise ValueError(
                    f"{self.parameter_key(name)} is also a parameter of {others}, which the adapter leaves alone: "
                    f"merging adapter {adapter_name!r} would change them too; adapt or exclude all of them, or untie "
                    "them"
                )
        if self.quantized and "weight" in (self.nnz(adapter_name) or {}):
            raise ValueError(
                f"{self.key} is quantised: merging adapter {adapter_name!r} into it would round it anew and lose both; "
                "use it unmerged, or merge into the model loaded unquantised"
            )
        check_whole(self._own().values(), "merging")

    def _own(self) -> dict[str, nn.Parameter]:
        """All parameters of the wrapped module, as it holds them."""
        return cast(dict[str, nn.Parameter], self.base_layer._parameters)

    def _merge_one(self, adapter_name: str) -> Iterator[_Merge]:
        """Write an adapter's diffs; what each overwrites is noted first, so that an interrupt in between loses nothing."""
        # `.data` keeps autograd out, and the parameter's version as it is.
        own = self._own()
        if self.is_gating(adapter_name):
            for name in self.shapes:
                data = own[name].data
                self._merges.append(merge := _Merge(adapter_name, name, None, data.clone()))
                data.copy_(data + self.dense_delta(adapter_name, name))
                yield merge
        else:
            for name, values, where in self.fixed(adapter_name):
                data = own[name].data
                old = take(data, where)
                self._merges.append(merge := _Merge(adapter_name, name, where, old))
                put_(data, old + values.data, where)
                yield merge

    def _is_finite(self, merge: _Merge) -> bool:
        merged = self.own_parameters()[merge.parameter_name].data
        written = merged if merge.positions is None else torch.take(merged, merge.positions)
        return bool(torch.isfinite(written).all())

    def unmerge(self, keep: int = 0) -> None:
        """Restore the base parameters to the bit, of all merged adapters but the first `keep`."""
        kept, own = self.merged_adapters[:keep], self._own()
        while self._merges and self._merges[-1].adapter_name not in kept:
            merge = self._merges[-1]
            target = own[merge.parameter_name].data
            if not merge.is_made():
                pass
            elif merge.positions is None:
                target.copy_(merge.old)
            else:
                put_(target, merge.old.to(target.device), merge.positions.to(target.device))
            self._merges.pop()
        self.merged_adapters[keep:] = []


class Switch:
    """Having another finished adapter merged, in many layers at once.

    Args:
        adapter_name: the adapter.
    """

    def __init__(self, adapter_name: str) -> None:
        self._adapter_name = adapter_name
        self._rows: dict[torch.dtype, list[_Row]] = {}
        self._undone: list[tuple[Mergeable, int]] = []

    def add(self, layer: Mergeable) -> bool:
        """Have the layer switched by [`run`], or leave it as it is and return False, where it takes [`Mergeable.unmerge`] and
        [`Mergeable.merge`]."""
        adapter_name, merges = self._adapter_name, layer._merges
        undone = {merge.parameter_name: merge for merge in merges if merge.is_made()}
        if len(undone) < len(merges) or layer.is_gating(adapter_name) or layer.is_offloaded():
            return False
        rows, own = [], layer._own()
        if adapter_name in layer.configs:
            layer._check_mergeable(adapter_name)
            for name, values, at in layer.fixed(adapter_name):
                data, merge = own[name].data, undone.pop(name, None)
                back_at, back = (NOWHERE, data.new_empty(0)) if merge is None else (merge.positions, merge.old)
                rows.append(_Row(layer, name, data, back_at, back, at, values.data))
        for name, merge in undone.items():
            rows.append(_Row(layer, name, own[name].data, merge.positions, merge.old, NOWHERE, NOTHING))
        for row in rows:
            if row.back_at is None or not can_exchange(row.tensor, row.back_at, row.back, row.at, row.values):
                return False
        for row in rows:
            self._rows.setdefault(row.tensor.dtype, []).append(row)
        self._undone.append((layer, len(merges)))
        return True

    def run(self) -> None:
        """Switch. What is interrupted can be undone: a merge is noted before it is made, and forgotten after it is undone."""
        for layer, _ in self._undone:
            layer.merged_adapters[:] = [self._adapter_name] if self._adapter_name in layer.configs else []
        for dtype, rows in self._rows.items():
            counts = [row.at.numel() for row in rows]
            olds = torch.split(torch.empty(sum(counts), dtype=dtype), counts)
            progress = Progress()
            for number, (row, old) in enumerate(zip(rows, olds, strict=True)):
                if row.at is not NOWHERE:
                    merge = _Merge(self._adapter_name, row.parameter_name, row.at, old, number, progress)
                    row.layer._merges.append(merge)
            exchange_all([Exchange(*row[2:], old) for row, old in zip(rows, olds, strict=True)], progress)  # type: ignore[arg-type]
        for layer, count in self._undone:
            del layer._merges[:count]
