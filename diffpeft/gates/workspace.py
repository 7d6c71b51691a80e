"""Memory that is used again and again."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor


class Scratch:
    """Memory on a CPU for what lives as long as one module runs, used again for the next, or from forward to backward, used again
    by the next pass: fresh pages cost more than the arithmetic that fills them. A GPU's allocator keeps its own."""

    _buffers: dict[tuple[Hashable, torch.dtype], Tensor] | None = None
    _claims: dict[Hashable, object] | None = None

    def take(self, use: Hashable, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, valid until memory for the same use is taken again."""
        if self._claims is not None:
            self._claims.pop(use, None)
        if device.type != "cpu" or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)
        self._buffers = {} if self._buffers is None else self._buffers
        buffer = self._buffers.get((use, dtype))
        if buffer is None or buffer.numel() < shape.numel():
            buffer = self._buffers[use, dtype] = torch.empty(shape.numel(), dtype=dtype)
        return buffer[: shape.numel()].view(shape)

    def claim(self, use: Hashable) -> object:
        """By what [`claimed`] knows what was written into the memory just taken."""
        self._claims = {} if self._claims is None else self._claims
        claim = self._claims[use] = object()
        return claim

    def claimed(self, use: Hashable, claim: object, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """What was written, if it is still there: on a CPU, until memory for the same use is taken again."""
        buffer = (self._buffers or {}).get((use, dtype))
        if buffer is None or (self._claims or {}).get(use) is not claim:
            return None
        return buffer[: shape.numel()].view(shape)

    def clear(self) -> None:
        """Let go of the memory."""
        self._buffers = self._claims = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy begins with none
