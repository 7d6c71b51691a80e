"""Rows of a batch in the tensors that go into a module and come out of it: where they are, taking some, joining them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec


class CannotSplitError(Exception):
    """A module cannot run on some of the rows; says why."""


class Layout(NamedTuple):
    """For each tensor that goes into a module and comes out of it, the dimension that grows with the rows, or None."""

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


class Sketch(NamedTuple):
    """What is remembered of a tensor: its shape; for each dimension that may hold the rows, a random projection of each
    of its entries, and their norms; and the same of the whole tensor."""

    shape: torch.Size
    by_dim: dict[int, tuple[Tensor, Tensor]]
    whole: tuple[Tensor, Tensor]


class Call(NamedTuple):
    """One call of a module; None for what is no tensor."""

    inputs: tuple[Sketch | None, ...]
    outputs: tuple[Sketch | None, ...]


Layouts = dict[str, dict[tuple[Any, ...], Layout | None]]
"""By module, by structure of its inputs; None where its rows cannot be told."""

Calls = dict[str, list[tuple[tuple[Any, ...], Call]]]
"""By module, the structure of inputs and what was seen, call by call."""

TOLERANCE = 0.05
"""Of a norm, between projections of equal rows: kernels round differently for other batch sizes. Unequal ones differ by
about their norm."""


def sketch(leaf: Any, rows: int) -> Sketch | None:
    """What to remember of a tensor in a batch of so many rows."""
    if not isinstance(leaf, Tensor):
        return None
    values = leaf.detach().float()
    dims = [dim for dim, size in enumerate(leaf.shape) if size and size % rows == 0]
    by_dim = {dim: _project(values.movedim(dim, 0).reshape(leaf.shape[dim], -1)) for dim in dims}
    return Sketch(leaf.shape, by_dim, _project(values.reshape(1, -1)))


def _project(entries: Tensor) -> tuple[Tensor, Tensor]:
    entries = entries.nan_to_num(0, 0, 0)  # masks hold minus infinity
    entries = entries.where(entries.abs() < 1e30, 0)
    direction = torch.sin(torch.arange(1, entries.shape[1] + 1, device=entries.device) ** 2 % 8191 * 1.7)
    return entries @ direction, entries.norm(dim=1)


def find_layouts(two: Calls, three: Calls) -> Layouts:
    """Where each module has its rows, from what was seen with two rows and with the same two and a third."""
    found: Layouts = {}
    for key in two.keys() & three.keys():
        layouts: dict[tuple[Any, ...], Layout | None] = {}
        same_calls = [structure for structure, _ in two[key]] == [structure for structure, _ in three[key]]
        for (structure, small), (_, large) in zip(two[key], three[key], strict=False):
            layout = _compare(small, large) if same_calls else None
            layouts[structure] = layout if layouts.get(structure, layout) == layout else None
        found[key] = layouts
    return found


def _compare(two: Call, three: Call) -> Layout | None:
    if len(two.inputs) != len(three.inputs) or len(two.outputs) != len(three.outputs):
        return None
    try:
        inputs = tuple(_row_dim(a, b) for a, b in zip(two.inputs, three.inputs, strict=True))
        return Layout(inputs, tuple(_row_dim(a, b) for a, b in zip(two.outputs, three.outputs, strict=True)))
    except CannotSplitError:
        return None


def _row_dim(two: Sketch | None, three: Sketch | None) -> int | None:
    if two is None or three is None:
        return None
    if len(two.shape) != len(three.shape):
        raise CannotSplitError("the number of dimensions depends on the rows")
    grown = [dim for dim, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    if not grown:
        if not _is_equal(two.whole, three.whole):
            raise CannotSplitError("rows are mixed with each other")
        return None
    dim = grown[0]
    if len(grown) > 1 or two.shape[dim] * 3 != three.shape[dim] * 2:
        raise CannotSplitError("no one dimension grows with the rows")
    if not _is_equal(two.by_dim[dim], three.by_dim[dim]):
        raise CannotSplitError("rows are mixed with each other, or not in order")
    return dim


def _is_equal(two: tuple[Tensor, Tensor], three: tuple[Tensor, Tensor]) -> bool:
    """Whether the entries of the first come first in the second."""
    count = two[0].numel()
    error = (two[0] - three[0][:count]).abs()
    return bool((error <= TOLERANCE * (two[1] + three[1][:count]) + 1e-6).all())


def is_plain(leaf: Any) -> bool:
    """Whether a part of a module's inputs or outputs is a tensor or belongs to no row, unlike a cache."""
    plain = (Tensor, str, bool, int, float, torch.dtype, torch.device, type(None))
    return isinstance(leaf, plain)


def structure_of(leaves: list[Any], spec: TreeSpec) -> tuple[Any, ...]:
    """What calls of one kind have in common, whatever their sizes."""
    return str(spec), tuple(leaf.ndim if isinstance(leaf, Tensor) else None for leaf in leaves)


def _times(size: int, total: int, key: str) -> int:
    """How many entries of a dimension belong to one row."""
    if size % total:
        raise CannotSplitError(f"{key} has {size} entries for {total} rows")
    return size // total


def _index(rows: list[int], times: int, device: torch.device) -> Tensor:
    index = torch.tensor(rows, device=device)
    return (index[:, None] * times + torch.arange(times, device=device)).flatten() if times > 1 else index


def take(leaf: Any, dim: int | None, rows: list[int], total: int, key: str) -> Any:
    """The rows of a tensor whose dimension `dim` holds `total` of them; what has none is left as it is."""
    if dim is None:
        return leaf
    times = _times(leaf.shape[dim], total, key)
    if rows == list(range(rows[0], rows[-1] + 1)):
        return leaf.narrow(dim, rows[0] * times, len(rows) * times)
    return leaf.index_select(dim, _index(rows, times, leaf.device))


def join(
    parts: Sequence[Any], dim: int | None, groups: list[list[int]], total: int, shared_rows: bool, key: str
) -> Any:
    """Put the parts, one a group of rows, together in the order of the rows.

    Raises CannotSplitError where the parts differ and have no rows.
    """
    first = parts[0]
    if not isinstance(first, Tensor):
        if not all(is_plain(part) and part == first for part in parts):
            raise CannotSplitError(f"{key} gives {type(first).__name__}, which cannot be put together")
        return first
    if dim is None:
        if all(torch.equal(part, first) for part in parts[1:]):
            return first
        if not (shared_rows and first.ndim and first.shape[0] == 1):
            raise CannotSplitError(f"{key} gives one result for all rows")
        # One row that would be broadcast: a row for each instead.
        parts = [part.expand(len(rows), *part.shape[1:]) for part, rows in zip(parts, groups, strict=True)]
        dim, times = 0, 1
    else:
        times = _times(first.shape[dim], len(groups[0]), key)
    shape = list(first.shape)
    shape[dim] = total * times
    joined = first.new_empty(shape)
    for part, rows in zip(parts, groups, strict=True):
        joined.index_copy_(dim, _index(rows, times, joined.device), part)
    return joined
