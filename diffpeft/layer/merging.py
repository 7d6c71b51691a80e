"""The adapters that are merged into one layer's parameters, and taking them out again to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from diffpeft.sparse.inplace import Entry, InplaceUpdate, read_at


class _Merged(NamedTuple):
    """One adapter that is in the base parameters."""

    adapter_name: str
    parameters: list[str]
    update: InplaceUpdate


class MergeStack:
    """The adapters that are merged into a layer's parameters, the last one on top."""

    def __init__(self) -> None:
        self._merged: list[_Merged] = []

    def __len__(self) -> int:
        return len(self._merged)

    @property
    def names(self) -> list[str]:
        """The merged adapters, the first one first."""
        return [merged.adapter_name for merged in self._merged]

    def push(self, adapter_name: str, entries: Mapping[str, Entry], check_finite: bool = False) -> None:
        """Add an adapter's diff to the parameters; an error leaves them as they were.

        Args:
            adapter_name: the adapter.
            entries: what to add, by the parameter's name in the base model.
            check_finite: whether to raise ValueError where the result would not be finite.
        """
        merged = _Merged(adapter_name, list(entries), InplaceUpdate(entries.values()))
        self._merged.append(merged)  # first: an interrupt leaves something to revert
        try:
            merged.update.apply()
            finite = (read_at(entry.tensor.data, entry.positions).isfinite().all() for entry in entries.values())
            if check_finite and not all(map(bool, finite)):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
        except BaseException:
            self.pop({name: entry.tensor for name, entry in entries.items()})
            raise

    def pop(self, parameters: Mapping[str, Tensor]) -> None:
        """Restore the parameters, to the bit, to what they were before the last adapter was merged.

        Args:
            parameters: the layer's own, as it holds them now, by the names of `push`.
        """
        merged = self._merged[-1]
        merged.update.revert([parameters[name] for name in merged.parameters])
        self._merged.pop()


def check_mergeable(layer: Any, adapter_name: str) -> None:
    """Raise ValueError where merging an adapter into a `DiffPruningLayer` would change more than the adapter covers."""
    for name in layer.shapes if layer.shared_with or layer.tied_layers else ():
        others = [*layer.shared_with.get(name, [])]
        others += [tied.key for tied in layer.tied_layers.get(name, []) if adapter_name not in tied.configs]
        if others and layer.changes(adapter_name, name):
            raise ValueError(f"{name} of {layer.key} is also in {others}, which the adapter leaves alone; adapt both")
    if layer.quantized and "weight" in (layer.nnz(adapter_name) or {}):
        raise ValueError(f"{layer.key} is quantised: merging rounds it again; use it unmerged, or load it unquantised")
