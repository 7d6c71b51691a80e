"""Adding a sparse diff to a tensor in place, and putting back to the bit what stood there."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """Values to add to one tensor."""

    tensor: Tensor
    """Any shape and floating dtype. Its storage is looked up at each use, so that a model may move in between."""
    positions: Tensor | None
    """int64, sorted flat positions, shape (k,), each once; None stands for all of the tensor."""
    values: Tensor
    """Floating, shape (k,), or the tensor's own where `positions` is None."""


class InplaceUpdate:
    """Values added to entries of some tensors, which `revert` puts back to the bit.

    A sum is rounded once, from the wider of the two dtypes, so that merged and unmerged models agree to the bit. What
    is overwritten is noted first: after an error or an interrupt, also while reverting, `revert` puts back all of it.
    Entries of one tensor add up in their order. Autograd's version of a tensor stays as it is. As a context manager it
    applies the update for the block.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = list(entries)
        self._old: list[Tensor] = []  # of the first entries: what stood there

    def apply(self) -> None:
        """Add the values. An error reverts what was written by then."""
        self.revert()  # what an interrupted `revert` has left
        try:
            for tensor, positions, values in self._entries:
                self._old.append(read_at(tensor.data, positions))
                write_at(tensor.data, self._old[-1] + values.data, positions)
        except BaseException:
            self.revert()
            raise

    def revert(self, tensors: Sequence[Tensor] | None = None) -> None:
        """Put back what stood there before; does nothing where nothing is applied.

        `tensors` are those that hold the entries now, in their order, where they are no longer the same objects.
        """
        while self._old:
            index, old = len(self._old) - 1, self._old[-1]
            tensor, positions, _ = self._entries[index]
            data = (tensors[index] if tensors else tensor).data
            if old.device != data.device:  # the model has moved
                old, positions = old.to(data.device), None if positions is None else positions.to(data.device)
            write_at(data, old, positions)
            self._old.pop()

    def __enter__(self) -> None:
        self.apply()

    def __exit__(self, *error: object) -> None:
        self.revert()


def can_be_overwritten(tensor: Tensor) -> bool:
    """Whether a pass may overwrite entries for a while: the tensor lies here, in one piece, in this process alone."""
    return (
        tensor.is_contiguous()
        and not tensor.is_meta
        and not (tensor.is_cpu and tensor.is_shared())  # type: ignore[no-untyped-call]
        and not (tensor.is_inference() and not torch.is_inference_mode_enabled())
    )


def read_at(tensor: Tensor, positions: Tensor | None) -> Tensor:
    """A copy of the entries at flat `positions`, shape (k,), or of the whole tensor."""
    if positions is None:
        return tensor.clone()
    # index_select takes half of the time of torch.take
    return tensor.view(-1).index_select(0, positions) if tensor.is_contiguous() else torch.take(tensor, positions)


def write_at(tensor: Tensor, values: Tensor, positions: Tensor | None) -> None:
    """Write `values` of any dtype, shape (k,), at flat `positions`, each of them once, or over the whole tensor."""
    if positions is None:
        tensor.copy_(values)
        return
    values = values.to(tensor.dtype)
    if not tensor.is_contiguous():
        tensor.index_put_(torch.unravel_index(positions, tensor.shape), values)  # put_ has no deterministic form
    elif tensor.dtype == torch.float32:
        tensor.view(-1).scatter_(0, positions, values)
    else:  # on a CPU, scatter_ takes ten times as long in the dtypes of half the width
        tensor.view(-1).index_copy_(0, positions, values)
