"""The sparse diff of one parameter as a layer holds it: decoded and checked when it is first used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.files import encoding
from diffpeft.files.encoding import CHECKSUM_BYTES, IN_MEMORY
from diffpeft.files.keys import POSITIONS, VALUES
from diffpeft.sparse.functions import RowPattern
from diffpeft.sparse.sharded import check_whole, is_sharded


def _version(tensor: Tensor) -> int:
    if torch.compiler.is_compiling():
        return -1  # matches no tensor: what ran compiled is still to be checked
    return 0 if tensor.is_inference() else tensor._version


class StoredDiff:
    """The sparse diff of one parameter: a value parameter and a packed buffer, which a loader may have filled.

    A loader writes both in place, cast to the dtypes that they have here, and tells nobody. So a buffer with a checksum
    means that its values are the numbers of a file, those of "int8" without their scale. The first use checks them,
    turns them into the values that are added, and strips the checksum. Nobody reads the parameter in another way.

    Args:
        layer: the layer that holds the tensors, a `DiffPruningLayer`.
        adapter_name: the adapter.
        name: the parameter's name in the wrapped module.
    """

    def __init__(self, layer: Any, adapter_name: str, name: str) -> None:
        self._layer, self._adapter_name, self._name = layer, adapter_name, name
        self.key, self.shape = layer.parameter_key(name), layer.shapes[name]
        self._parameters, self._buffers = (getattr(layer, kind)[adapter_name] for kind in (VALUES, POSITIONS))
        self._label = f"{self.key}, adapter {adapter_name!r}"
        self._decoded: tuple[Tensor, int, Tensor] | None = None  # packed positions, their version, and positions
        self._pattern: tuple[Tensor, RowPattern] | None = None  # and the positions that it was made from

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that trains, as it is: its values may still be a file's."""
        return self._parameters._parameters[self._name]  # type: ignore[no-any-return]

    @property
    def packed(self) -> Tensor:
        """The packed positions, uint8."""
        return self._buffers._buffers[self._name]  # type: ignore[no-any-return]

    @property
    def count(self) -> int:
        """The number of nonzeros."""
        return self.parameter.numel()

    @property
    def positions(self) -> Tensor:
        """Sorted flat positions of the nonzeros, int64, shape (k,). ValueError if never loaded or damaged."""
        packed, version, positions = self._decoded or (None, 0, None)
        # A compiler cannot trace versions; a layer forgets diffs whose tensors it replaces, so that none is stale.
        compiling = torch.compiler.is_compiling()
        if positions is None or packed is not self.packed or not (compiling or version == _version(self.packed)):
            return self._unpack() if compiling else self._decode()
        return positions

    @property
    def values(self) -> Tensor:
        """The values by position, fp32, shape (k,): the parameter that trains. ValueError as in [`positions`]."""
        self.positions  # noqa: B018 - decodes and checks both
        values: Tensor = self.parameter
        if torch.compiler.is_compiling():  # what runs compiled before anything decoded it cannot be changed in place
            scale = encoding.scale_of(self.packed, values.numel(), self.shape.numel())
            if scale.numel():
                undecoded = (self.packed[:CHECKSUM_BYTES] != IN_MEMORY).any()
                if values.requires_grad:
                    torch._assert_async(~undecoded, "int8 values are to train: run the model once uncompiled first")
                return values * torch.where(undecoded, scale, 1)
        return values

    @property
    def pattern(self) -> RowPattern:
        """The positions in a matrix as compressed sparse rows."""
        positions = self.positions
        if self._pattern is None or self._pattern[0] is not positions:
            self._pattern = positions, RowPattern.of(positions, self.shape)
        return self._pattern[1]

    @property
    def _dtype(self) -> str:
        return self._layer.configs[self._adapter_name].value_dtype  # type: ignore[no-any-return]

    @property
    def is_filled(self) -> bool:
        """Whether anything was ever loaded into the buffer or set there."""
        return not self.packed.is_meta and bool(self.packed.any())

    def encoded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The given values, shape (k,), and the positions as they go into a file, with a checksum."""
        return encoding.encode(self.positions, values, self.shape.numel(), self._dtype, self.key)

    def note(self, positions: Tensor) -> Tensor:
        """Note, and return, the positions that `packed` decodes to."""
        self._decoded = self.packed, _version(self.packed), positions
        return positions

    def _unpack(self) -> Tensor:
        return self.note(encoding.unpack(self.packed, self.count, self.shape.numel()))

    def _decode(self) -> Tensor:
        self._find_original()
        packed, parameter = self.packed, self.parameter
        check_whole([parameter], f"{self._label}: the first use of a file's values")
        if packed.numel() > CHECKSUM_BYTES and not bool(packed.any()):
            raise ValueError(
                f"{self._label}: its positions were never loaded; load the adapter again. If this is a trainer's copy "
                "of the model, made as its reference, copies have no positions: pass the trainer ref_model="
            )
        if bool(parameter.isnan().any()):
            raise ValueError(f"{self._label}: its values were never loaded or are damaged; load the adapter again")
        try:
            # Tensors that are made in inference_mode could neither train later nor be loaded over.
            with torch.inference_mode(False), torch.no_grad():
                if encoding.has_checksum(packed):
                    self._decode_values(parameter, packed)
                    self._buffers._buffers[self._name] = encoding.strip_checksum(packed)
                return self._unpack()
        except ValueError as error:
            raise ValueError(f"{self._label}: {error}") from None

    def _find_original(self) -> None:
        """Take over the positions of the adapter whose values were copied here without them, as TRL copies parameters.

        Values that are equal to the bit tell which one it was.
        """
        if self.packed.is_meta or self.is_filled or is_sharded(self.parameter):
            return
        held = self._layer.diffpruning_values.items()
        others = [name for name, own in held if name != self._adapter_name and self._name in own]
        for other in (self._layer.sparse(name, self._name) for name in others):
            same = other.count == self.count and other.is_filled and not is_sharded(other.parameter)
            if same and torch.equal(other.values, self.parameter):
                self._buffers._buffers[self._name] = other.packed.clone()
                return

    def _decode_values(self, parameter: nn.Parameter, packed: Tensor) -> None:
        """Check the numbers of a file, and turn them into the values that they stand for."""
        dtype = self._dtype
        stored = parameter.detach().to(getattr(torch, dtype))
        if not torch.equal(stored.to(parameter.dtype), parameter):
            raise ValueError(f"its values are not those of a file in {dtype}: it is damaged, or they were changed")
        decoded = encoding.decode_values(stored, packed, self.shape.numel(), self.key)
        if stored.dtype == torch.int8:
            hook: Any = getattr(self._parameters, "_hf_hook", None)
            if getattr(hook, "offload", False):  # the next forward would bring the file's numbers again
                raise ValueError("its int8 values were offloaded before their first use; run the model once before")
            parameter.data = decoded
