"""The tensors of finished adapters on one wrapped module: decoded and checked when first used, and as they go into a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffpeft.config import DiffPruningConfig
from diffpeft.files import seal, values
from diffpeft.sparse.functions import Pattern
from diffpeft.trainer.launch import check_whole


class _Unpacked(NamedTuple):
    """Decoded positions and the packed tensor and version that they were decoded from."""

    packed: Tensor
    version: int
    positions: Tensor


def _version(tensor: Tensor) -> int:
    if torch.compiler.is_compiling():
        return -1  # of no tensor: what ran compiled is still to be opened
    return 0 if tensor.is_inference() else tensor._version


class FixmaskTensors(nn.Module):
    """The finished adapters' part of [`AdapterTensors`].

    A loader may fill values and the packed buffer in place, cast to the dtypes that they have here, and tell nobody. So a
    buffer with a seal means that its values, fp32 or not, are the numbers that stand in a file, "int8" ones without their
    scale. The first use checks them, makes of them the values that are added, and takes the seal away. Therefore nobody
    reads values but through [`kept_values`].
    """

    diffpruning_values: Any
    diffpruning_positions: Any
    key: str
    shapes: dict[str, torch.Size]
    configs: dict[str, DiffPruningConfig]

    def __init__(self) -> None:
        super().__init__()
        self._unpacked: dict[tuple[str, str], _Unpacked] = {}
        self._patterns: dict[tuple[str, str], tuple[Tensor, Pattern]] = {}  # and the positions that they were made from

    def parameter_key(self, name: str) -> str:
        """The name in the base model of the wrapped module's parameter `name`."""
        return f"{self.key}.{name}" if self.key else name

    def positions(self, adapter_name: str, name: str) -> Tensor:
        """Sorted flat positions, int64, of the adapter's nonzeros in parameter `name`.

        Raises ValueError for what was never loaded or is damaged.
        """
        packed = self.diffpruning_positions[adapter_name][name]
        cached = self._unpacked.get((adapter_name, name))
        # A compiler cannot trace versions; `forget_positions` sees to it that a compiled step has nothing stale.
        compiling = torch.compiler.is_compiling()
        if cached is None or cached.packed is not packed or not (compiling or cached.version == _version(packed)):
            if compiling:
                count, numel = self.diffpruning_values[adapter_name][name].numel(), self.shapes[name].numel()
                self._remember(adapter_name, name, packed, seal.unpack(packed, count, numel))
            else:
                self._open(adapter_name, name)
        return self._unpacked[adapter_name, name].positions

    def pattern(self, adapter_name: str, name: str) -> Pattern:
        """The adapter's positions in a matrix, by its rows."""
        where = self.positions(adapter_name, name)
        cached = self._patterns.get((adapter_name, name))
        if cached is None or cached[0] is not where:
            cached = self._patterns[adapter_name, name] = where, Pattern.of(where, self.shapes[name])
        return cached[1]

    def fixed(self, adapter_name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, [`kept_values`] and [`positions`] of each parameter in which the adapter has nonzeros; not for compilers."""
        packed = self.diffpruning_positions[adapter_name]._buffers
        for name, kept in self.diffpruning_values[adapter_name]._parameters.items():
            cached = self._unpacked.get((adapter_name, name))
            if cached is None or cached.packed is not packed[name] or cached.version != _version(packed[name]):
                self._open(adapter_name, name)
                cached = self._unpacked[adapter_name, name]
            yield name, kept, cached.positions

    def was_loaded(self, adapter_name: str) -> bool:
        """Whether any of the adapter's positions here were ever filled in."""
        if adapter_name not in self.diffpruning_positions:
            return False
        packed = self.diffpruning_positions[adapter_name].items()
        return any(not buffer.is_meta and bool(buffer.any()) for _, buffer in packed)

    def _remember(self, adapter_name: str, name: str, packed: Tensor, positions: Tensor) -> None:
        """Note what a packed tensor decodes to."""
        self._unpacked[adapter_name, name] = _Unpacked(packed, _version(packed), positions)

    def kept_values(self, adapter_name: str, name: str) -> Tensor:
        """The adapter's values in parameter `name`, by position: fp32, shape (k,); the parameter that trains.

        Raises ValueError for what was never loaded or is damaged.
        """
        self.positions(adapter_name, name)
        kept: Tensor = self.diffpruning_values[adapter_name][name]
        if torch.compiler.is_compiling():  # what runs compiled before anything opened it cannot be changed in place
            packed = self.diffpruning_positions[adapter_name][name]
            scale = seal.scale(packed, kept.numel(), self.shapes[name].numel())
            if scale.numel():
                sealed = (packed[: seal.SEAL] != seal.LIVE).any()
                if kept.requires_grad:
                    torch._assert_async(~sealed, "int8 values are to train: run the model once uncompiled first")
                return kept * torch.where(sealed, scale, 1)
        return kept

    def _open(self, adapter_name: str, name: str) -> None:
        """Decode the positions; what is sealed is checked, and its values and buffer become those in memory."""
        packed = self.diffpruning_positions[adapter_name][name]
        kept, numel = self.diffpruning_values[adapter_name][name], self.shapes[name].numel()
        what = f"{self.parameter_key(name)}, adapter {adapter_name!r}"
        check_whole([kept], f"{what}: the first use of a file's values")
        if packed.numel() > seal.SEAL and not bool(packed.any()):
            raise ValueError(f"{what}: its positions were never loaded; load the adapter anew")
        if bool(kept.isnan().any()):
            raise ValueError(f"{what}: its values were never loaded or are damaged; load the adapter anew")
        try:
            # Tensors that are made in inference_mode could neither train later nor be loaded over.
            with torch.inference_mode(False), torch.no_grad():
                if seal.is_sealed(packed):
                    self._unseal_values(adapter_name, name, kept, packed)
                    packed = self.diffpruning_positions[adapter_name][name] = seal.unseal(packed)
                self._remember(adapter_name, name, packed, seal.unpack(packed, kept.numel(), numel))
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None

    def _unseal_values(self, adapter_name: str, name: str, kept: Tensor, packed: Tensor) -> None:
        """Check what stands in a file, and change `kept` to the values that it means."""
        dtype = self.configs[adapter_name].value_dtype
        stored = kept.detach().to(getattr(torch, dtype))
        if not torch.equal(stored.to(kept.dtype), kept):
            raise ValueError(f"its values are not those of a file in {dtype}: it is damaged, or they were changed")
        opened = values.from_file(stored, packed, self.shapes[name].numel(), self.parameter_key(name))
        if stored.dtype == torch.int8:
            hook = getattr(self.diffpruning_values[adapter_name], "_hf_hook", None)
            if getattr(hook, "offload", False):  # the next forward would bring what stands in the file again
                raise ValueError(
                    "its values, which are int8 in the file, were offloaded before they were used; run the model once before "
                    "it is offloaded, or load the adapter with PeftModel.from_pretrained"
                )
            kept.data = opened

    def stored(self, adapter_name: str, name: str, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The values `kept` and their positions as they go into a file: in the config's dtype, and sealed together."""
        dtype = self.configs[adapter_name].value_dtype
        where, numel = self.positions(adapter_name, name), self.shapes[name].numel()
        return values.to_file(where, kept, numel, dtype, self.parameter_key(name))

    def forget_positions(self, adapter_name: str) -> None:
        """Decode the adapter's positions anew when they are next needed."""
        for key in [key for key in self._unpacked if key[0] == adapter_name]:
            del self._unpacked[key]
            self._patterns.pop(key, None)
