"""Patches of modules that run again and again without gradients: prepared once, and each then one call of a loop of C++."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffpeft.sparse.exchange import NOTHING, NOWHERE, Exchange, Progress, addresses, can_exchange, loop_for, too_small

Diffs = Sequence[tuple[Tensor, Tensor, Tensor]]
"""(weight, values, positions) of each parameter of a module."""


class KeptPatch:
    """Within the block, each weight has its values added at its positions, as in [`diffpeft.sparse.functions.Patch`].

    Args:
        diffs: of parameters of one dtype, none twice.
        loop: for that dtype.
    """

    def __init__(self, diffs: Diffs, loop: Any) -> None:
        self._loop = loop
        self._shapes = [weight.shape for weight, _, _ in diffs]
        self._old = [weight.new_empty(at.numel()) for weight, _, at in diffs]
        rows = [(weight.data, at, values, old) for (weight, values, at), old in zip(diffs, self._old, strict=True)]
        # Addresses alone are kept: a model that moves elsewhere must not leave its weights here.
        self._in = addresses([Exchange(w, NOWHERE, old[:0], at, values, old) for w, at, values, old in rows])
        self._out = addresses([Exchange(w, at, old, NOWHERE, NOTHING, old[:0]) for w, at, _, old in rows])
        self._made = Progress()
        self._running = False

    def __enter__(self) -> None:
        if self._running:
            raise RuntimeError("a module with a diff runs within itself, where its parameters would be changed twice")
        if self._made.value:
            self._undo()  # what an interrupt left
        try:
            self._loop(self._in, len(self._old), ctypes.byref(self._made))
            if self._made.value < len(self._old):
                raise too_small(self._shapes[self._made.value])
            self._running = True
        except BaseException:
            self._undo()
            raise

    def __exit__(self, *error: object) -> None:
        self._undo()

    def _undo(self) -> None:
        self._running = False
        self._loop(self._out, self._made.value, ctypes.byref(Progress()))
        self._made.value = 0


class PatchSlot:
    """Room for the patch of a module that was used last."""

    def __init__(self) -> None:
        self._key: list[tuple[Any, ...]] = []
        self._patch: KeptPatch | None = None

    def patch(self, diffs: Diffs) -> KeptPatch | None:
        """The patch for these diffs, one at least, or None where the loop does not take them."""
        if not diffs[0][0].is_cpu:
            return None
        key = [_where(*diff) for diff in diffs]
        if self._key != key:
            self._key, self._patch = key, self._made(diffs)
        return self._patch

    def _made(self, diffs: Diffs) -> KeptPatch | None:
        dtypes = {weight.dtype for weight, _, _ in diffs}
        if len(dtypes) != 1 or not all(
            can_exchange(weight.data, NOWHERE, weight.data.new_empty(0), at, values.data)
            for weight, values, at in diffs
        ):
            return None
        loop = loop_for(dtypes.pop())
        return None if loop is None else KeptPatch(diffs, loop)

    def __reduce__(self) -> tuple[type[PatchSlot], tuple[()]]:
        """Copies are of other tensors."""
        return PatchSlot, ()


def _where(weight: Tensor, values: Tensor, at: Tensor) -> tuple[Any, ...]:
    """All that the loop goes by: while this stays, so may a patch."""
    return (
        *(weight.data_ptr(), weight.numel(), weight.dtype, weight.is_contiguous()),
        *(values.data_ptr(), values.numel(), values.dtype, values.is_contiguous()),
        *(at.data_ptr(), at.numel()),
    )
