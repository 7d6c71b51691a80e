"""Finished diffs on weights that are never copied: the k entries stand in the weight while a module runs, and no longer.

What stood there is put back to the bit as soon as the module has run, forward or backward, also after an error. Nothing else
reads the weight meanwhile: a model with diffs runs in one thread, and what other processes share is not patched.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffpeft.autograd import compute_dtype, embedding_gradient


def can_be_patched(weight: Tensor) -> bool:
    """Whether entries of the weight may be overwritten for a while: it is laid out in one piece, here, and this process's own."""
    return (
        weight.is_contiguous()
        and not weight.is_meta
        and not (weight.is_cpu and weight.is_shared())  # type: ignore[no-untyped-call]
        and not (weight.is_inference() and not torch.is_inference_mode_enabled())
    )


class Patch:
    """Within the block, `weight` has `values` added at flat `positions`, rounded once as merging does.

    Autograd's version of the weight stays as it is: it does not change for whoever kept it.
    """

    def __init__(self, weight: Tensor, values: Tensor, positions: Tensor) -> None:
        self._flat = weight.data.view(-1)
        self._positions = positions
        self._values = values.detach()

    def __enter__(self) -> None:
        self._old = self._flat.index_select(0, self._positions)
        self._flat.scatter_(0, self._positions, (self._old + self._values).to(self._flat.dtype))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flat.scatter_(0, self._positions, self._old)


class ModelPatch:
    """Finished diffs that stand in the weights of a whole model for as long as it runs: one for all its layers.

    Whatever changes which diffs count, or reads the plain weights, calls [`undo`] first.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor, Tensor, Tensor]] = []  # flat weight, positions, what stood there
        self.active = False

    def apply(self, diffs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Write (weight, values, positions) of each parameter; all of them or, after an error, none."""
        self.active = True
        try:
            for weight, values, positions in diffs:
                flat = weight.data.view(-1)
                old = flat.index_select(0, positions)
                self._entries.append((flat, positions, old))
                flat.scatter_(0, positions, (old + values.detach()).to(flat.dtype))
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Restore the weights to the bit, if anything stands in them."""
        while self._entries:
            flat, positions, old = self._entries[-1]
            flat.scatter_(0, positions, old)
            self._entries.pop()  # after it is restored: an interruption in between must not lose it
        self.active = False

    def __deepcopy__(self, memo: Any) -> ModelPatch:
        self.undo()  # a copy of a patched weight would never be restored
        return ModelPatch()

    def __reduce__(self) -> Any:
        self.undo()
        return ModelPatch, ()


class Diff(NamedTuple):
    """A finished diff of one parameter."""

    values: Tensor
    """fp32, shape (k,)."""
    positions: Tensor
    """int64, shape (k,), sorted."""


class Pattern(NamedTuple):
    """The positions in a matrix as compressed sparse rows."""

    offsets: Tensor
    """int64, shape (rows + 1,)."""
    columns: Tensor
    """int64, shape (k,)."""

    @classmethod
    def of(cls, positions: Tensor, shape: torch.Size) -> Pattern:
        """Of sorted flat positions in a matrix."""
        rows = torch.arange(shape[0] + 1, device=positions.device) * shape[1]
        return cls(torch.searchsorted(positions, rows), positions % shape[1])


def sampling_pays(k: int, shape: torch.Size, grad: Tensor) -> bool:
    """Whether the gradient of a weight is cheaper at `k` places than everywhere. Measured on a CPU in fp32, a product at a place
    of its own costs 9 times one in a dense product, and turning an entry of the operands round 30 times one."""
    rows, columns = shape
    return grad.is_cpu and grad.dtype == torch.float32 and 9 * k + 30 * (rows + columns) < rows * columns


@functools.cache
def _accept_beta() -> None:
    """torch warns once that its compressed sparse rows are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(
            torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), (1, 1)
        )


def gradient_at(grad: Tensor, x: Tensor, values: Tensor, positions: Tensor, pattern: Pattern | None) -> Tensor:
    """grad^T x, grad (n, out) and x (n, in), at flat `positions`: shape (k,); with a pattern, nowhere else."""
    if pattern is None:
        return torch.take(grad.t() @ x, positions)
    _accept_beta()
    size = (grad.shape[1], x.shape[1])
    places = torch.sparse_csr_tensor(*pattern, values.detach(), size, check_invariants=False)
    turned = x.t().contiguous().t()  # its rows are read as columns
    product: Tensor = torch.sparse.sampled_addmm(places, grad.t().contiguous(), turned, beta=0.0)
    return product.values()


class _PatchedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        values: Tensor,
        weight: Tensor,
        positions: Tensor,
        pattern: Pattern | None,
    ) -> Tensor:
        dtype = compute_dtype(x, weight)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, values, positions)
        ctx.weight, ctx.pattern = weight, pattern
        with Patch(weight, values, positions):
            return functional.linear(x, weight.data.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, positions = ctx.saved_tensors
        by_x = by_bias = by_values = None
        if ctx.needs_input_grad[0]:
            with Patch(ctx.weight, values, positions):
                by_x = (grad @ ctx.weight.data.to(grad.dtype)).to(ctx.dtypes[0])
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            by_bias = rows.sum(0).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            by_values = gradient_at(rows, x.reshape(-1, x.shape[-1]), values, positions, ctx.pattern).to(values.dtype)
        return by_x, by_bias, by_values, None, None, None


class _PatchedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, padding_idx: int | None, values: Tensor, weight: Tensor, positions: Tensor
    ) -> Tensor:
        ctx.save_for_backward(ids, values, positions)
        ctx.padding_idx, ctx.shape = padding_idx, weight.shape
        with Patch(weight, values, positions):
            return functional.embedding(ids, weight.data)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, values, positions = ctx.saved_tensors
        height, width = ctx.shape
        rows, places = torch.unique(ids, return_inverse=True)
        by_row = embedding_gradient(grad, rows, places, ctx.padding_idx)
        compact = rows.new_full((height,), -1).index_copy_(0, rows, torch.arange(len(rows), device=rows.device))
        row = torch.div(positions, width, rounding_mode="floor")
        start = compact.index_select(0, row)
        used = torch.nonzero(start >= 0).squeeze(1)  # of the values, those in rows of the batch
        column = (positions - row * width).index_select(0, used)
        part = torch.take(by_row, start.index_select(0, used) * width + column)
        return None, None, torch.zeros_like(values).index_copy_(0, used, part.to(values.dtype)), None, None


def patched_linear(
    x: Tensor, bias: Tensor | None, weight: Tensor, diff: Diff, pattern: Pattern | None = None
) -> Tensor:
    """`torch.nn.functional.linear` of `x` (..., in) with `diff` added to `weight` (out, in), differentiable in `x`, `bias` and the
    diff's values. With a `pattern` of its positions the values' gradient is computed at these alone."""
    return _PatchedLinear.apply(x, bias, diff.values, weight, diff.positions, pattern)  # type: ignore[no-any-return,no-untyped-call]


def patched_embedding(ids: Tensor, padding_idx: int | None, weight: Tensor, diff: Diff) -> Tensor:
    """`torch.nn.functional.embedding` of `ids` with `diff` added to `weight` (rows, width), differentiable in the diff's values."""
    return _PatchedEmbedding.apply(ids, padding_idx, diff.values, weight, diff.positions)  # type: ignore[no-any-return,no-untyped-call]
