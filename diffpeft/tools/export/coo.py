"""A sparse diff as plain COO tensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffpeft.files.atomic import save_tensors
from diffpeft.sparse.diff import Diff, check_diff, flatten_indices

MAX_INT32_ELEMENTS = 2**31
"""Most elements of a tensor whose flat positions int32 can hold."""


def check_int32(name: str, numel: int) -> None:
    """Raise ValueError for a tensor of so many elements that int32 cannot hold its flat positions."""
    if numel > MAX_INT32_ELEMENTS:
        raise ValueError(f"{name} has {numel} elements, and int32 positions reach {MAX_INT32_ELEMENTS}; use to_coo")


def to_coo(diff: Diff, shapes: Mapping[str, torch.Size], path: str | os.PathLike[str]) -> None:
    """Write a diff as safetensors that `torch.sparse_coo_tensor` takes.

    `<name>.indices` has shape (ndim, k), in int32 or, where a size needs it, int64; `<name>.values` has shape (k,). The
    shapes are in the metadata, as JSON under "shapes". Raises ValueError for a diff that does not fit them.
    """
    check_diff(diff, shapes)
    tensors = {}
    for name, (positions, values) in diff.items():
        fits = max(shapes[name], default=1) <= MAX_INT32_ELEMENTS
        rest, indices = positions.cpu(), list[Tensor]()
        for size in reversed(shapes[name]):
            indices.insert(0, rest % size)
            rest = rest // size
        stacked = torch.stack(indices) if indices else torch.empty(0, positions.numel())
        tensors[f"{name}.indices"] = stacked.to(torch.int32 if fits else torch.int64)
        tensors[f"{name}.values"] = values.detach().cpu().contiguous()
    save_tensors(tensors, Path(path), {"shapes": json.dumps({name: list(shapes[name]) for name in diff})})


def from_coo(path: str | os.PathLike[str]) -> tuple[Diff, dict[str, torch.Size]]:
    """Read what [`to_coo`] wrote: the diff, and the shapes of its parameters.

    Raises ValueError for no shapes, or indices outside of them, out of order or of another number than the values.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "shapes" not in metadata:
        raise ValueError(f"{path} has no shapes in its metadata; use a file of to_coo")
    shapes = {name: torch.Size(shape) for name, shape in json.loads(metadata["shapes"]).items()}
    tensors = load_file(path)
    diff = {n: (flatten_indices(n, tensors[f"{n}.indices"], s), tensors[f"{n}.values"]) for n, s in shapes.items()}
    check_diff(diff, shapes)
    return diff, shapes
