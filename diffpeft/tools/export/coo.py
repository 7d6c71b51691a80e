"""A finished diff as plain COO tensors, and what the other exports check."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpeft.sparse.combine import Diff
from diffpeft.sparse.elias_fano import check

INT32_ELEMENTS = 2**31
"""A tensor of more elements has flat positions that int32 cannot hold."""


def check_diff(diff: Diff, shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError unless the diff is finite and fits parameters of these shapes."""
    for name, (where, values) in diff.items():
        if name not in shapes:
            raise ValueError(
                f"the diff has {name}, which is none of the {len(shapes)} parameters; use its own base model"
            )
        if where.dim() != 1 or where.shape != values.shape:
            raise ValueError(
                f"{name}: positions are {tuple(where.shape)}, values {tuple(values.shape)}; use (k,) for both"
            )
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinite values; its training has diverged, train it anew")
        try:
            check(where, shapes[name].numel())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def check_int32(name: str, numel: int) -> None:
    """Raise ValueError for a tensor of so many elements that int32 cannot hold its flat positions."""
    if numel > INT32_ELEMENTS:
        raise ValueError(f"{name} has {numel} elements, and int32 positions reach {INT32_ELEMENTS}; use to_coo")


def flat(name: str, indices: Tensor, shape: torch.Size) -> Tensor:
    """Flat positions from indices of shape (ndim, k). Raises ValueError where these do not fit the shape."""
    result = torch.zeros(indices.shape[-1], dtype=torch.int64)
    if len(indices) != len(shape):
        raise ValueError(f"{name}: {len(indices)} indices an entry do not fit {tuple(shape)}; use its own base model")
    for index, size in zip(indices.long(), shape, strict=True):
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(
                f"{name}: an index is {int(index.max())}, outside of {tuple(shape)}; it is damaged or of another model"
            )
        result = result * size + index
    return result


def to_coo(diff: Diff, shapes: Mapping[str, torch.Size], path: str | os.PathLike[str]) -> None:
    """Write safetensors with `<name>.indices`, (ndim, k) in int32 or, where a size needs it, int64, and `<name>.values`,
    (k,), as `torch.sparse_coo_tensor` takes them. The shapes are in the metadata, as JSON under "shapes".

    Raises:
        ValueError: a diff that does not fit `shapes`.
    """
    check_diff(diff, shapes)
    tensors = {}
    for name, (where, values) in diff.items():
        fits = max(shapes[name], default=1) <= INT32_ELEMENTS
        rest, indices = where.cpu(), list[Tensor]()
        for size in reversed(shapes[name]):
            indices.insert(0, rest % size)
            rest = rest // size
        stacked = torch.stack(indices) if indices else torch.empty(0, where.numel())
        tensors[f"{name}.indices"] = stacked.to(torch.int32 if fits else torch.int64)
        tensors[f"{name}.values"] = values.detach().cpu().contiguous()
    save_file(tensors, path, metadata={"shapes": json.dumps({name: list(shapes[name]) for name in diff})})


def from_coo(path: str | os.PathLike[str]) -> tuple[Diff, dict[str, torch.Size]]:
    """Read what [`to_coo`] wrote: the diff, and the shapes of its parameters.

    Raises:
        ValueError: no shapes, or indices outside of them, out of order or of another number than the values.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "shapes" not in metadata:
        raise ValueError(f"{path} has no shapes in its metadata; use a file of to_coo")
    shapes = {name: torch.Size(shape) for name, shape in json.loads(metadata["shapes"]).items()}
    tensors = load_file(path)
    diff = {n: (flat(n, tensors[f"{n}.indices"], shape), tensors[f"{n}.values"]) for n, shape in shapes.items()}
    check_diff(diff, shapes)
    return diff, shapes
