"""Memory that is used again and again."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor


class Workspace:
    """Memory on a CPU that one module after the other uses, or that a tensor keeps from forward to backward.

    Fresh pages cost more than the arithmetic that fills them. A GPU's allocator keeps its own.
    """

    _buffers: dict[tuple[Hashable, torch.dtype], Tensor] | None = None
    _reservations: dict[Hashable, object] | None = None

    def take(self, use: Hashable, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, valid until memory for the same use is taken again."""
        if self._reservations is not None:
            self._reservations.pop(use, None)
        if device.type != "cpu" or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)
        self._buffers = {} if self._buffers is None else self._buffers
        buffer = self._buffers.get((use, dtype))
        if buffer is None or buffer.numel() < shape.numel():
            buffer = self._buffers[use, dtype] = torch.empty(shape.numel(), dtype=dtype)
        return buffer[: shape.numel()].view(shape)

    def reserve(self, use: Hashable) -> object:
        """A token by which [`reserved`] knows what was written into the memory just taken."""
        self._reservations = {} if self._reservations is None else self._reservations
        token = self._reservations[use] = object()
        return token

    def reserved(self, use: Hashable, token: object, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """The tensor that was written, if it is still there: on a CPU, until memory for the same use is taken again."""
        buffer = (self._buffers or {}).get((use, dtype))
        if buffer is None or (self._reservations or {}).get(use) is not token:
            return None
        return buffer[: shape.numel()].view(shape)

    def uses(self) -> set[Hashable]:
        """The uses that memory is reserved for now."""
        return set(self._reservations or {})

    def clear(self) -> None:
        """Let go of the memory."""
        self._buffers = self._reservations = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy begins with none
