"""Finding the wrapped modules of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()`, in their order, without the containers of adapters' tensors, which are most of them."""
    seen: set[nn.Module] = set()
    ahead: list[tuple[str, nn.Module | None]] = [("", model)]
    while ahead:
        name, module = ahead.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        yield name, module
        children = module._modules
        if children:
            prefix = f"{name}." if name else ""
            outer = [item for item in children.items() if not item[0].startswith("diffpruning_")]
            ahead.extend([(prefix + key, child) for key, child in reversed(outer)])


def layers_in(model: nn.Module, kind: type[Layer]) -> list[Layer]:
    """The wrapped modules of a model."""
    return [m for _, m in outer_modules(model) if m._modules and isinstance(m, kind)]
