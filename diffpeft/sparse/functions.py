"""Finished diffs on weights that are never copied: the k entries stand in the weight while a module runs, and no longer.

What stood there is put back to the bit as soon as the module has run, forward or backward, also after an error. Nothing else
reads the weight meanwhile: a model with diffs runs in one thread, and what other processes share is not patched.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffpeft.sparse.inplace import Entry, InplaceUpdate, read_at, write_at
from diffpeft.sparse.linear import compute_dtype, embedding_gradient


class _SparseParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.dtype = values.dtype
        effective = base.clone()
        write_at(effective, read_at(base, positions) + values, positions)
        return effective

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        return None, torch.take(grads[0], positions).to(ctx.dtype), None


def sparse_parameter(base: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """The effective parameter: `base` with `values` added at flat `positions`; differentiable in `values`.

    Args:
        base: the frozen pretrained parameter, any shape and floating dtype.
        values: shape (k,), floating.
        positions: int64, shape (k,), sorted flat positions in `base`.
    """
    effective: Tensor = _SparseParameter.apply(base, values, positions)  # type: ignore[no-untyped-call]
    return effective


class Diff(NamedTuple):
    """A finished diff of one parameter."""

    values: Tensor
    """fp32, shape (k,)."""
    positions: Tensor
    """int64, shape (k,), sorted."""


class Pattern(NamedTuple):
    """The positions in a matrix as compressed sparse rows."""

    offsets: Tensor
    """int32, shape (rows + 1,)."""
    columns: Tensor
    """int32, shape (k,)."""

    @classmethod
    def of(cls, positions: Tensor, shape: torch.Size) -> Pattern:
        """Of sorted flat positions in a matrix."""
        rows = torch.arange(shape[0] + 1, device=positions.device) * shape[1]
        return cls(torch.searchsorted(positions, rows, out_int32=True), (positions % shape[1]).to(torch.int32))

    def of_rows(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Which of the k positions lie in some rows, and where they lie in a matrix of these rows alone, flat."""
        start, end = self.offsets.index_select(0, rows), self.offsets.index_select(0, rows + 1)
        count = end - start
        row = torch.repeat_interleave(count)
        before = count.cumsum(0) - count
        which = torch.arange(len(row), device=rows.device) + (start - before).index_select(0, row)
        return which, row.to(torch.int64) * width + self.columns.index_select(0, which)


CHUNK = 1 << 20
"""Entries of both operands that are turned round at a time."""


def sampling_pays(k: int, shape: torch.Size, grad: Tensor) -> bool:
    """Whether the gradient of a weight is cheaper at `k` places than everywhere. Measured on one CPU in fp32, with eager transposes, a product at a place
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
    if pattern is None or grad.dtype != torch.float32:  # as under autocast
        return torch.take(grad.t() @ x, positions)
    _accept_beta()
    size, found = (grad.shape[1], x.shape[1]), values.detach()
    rows = max(64, CHUNK // sum(size))
    for part, (own, other) in enumerate(zip(torch.split(grad, rows), torch.split(x, rows), strict=True)):
        places = torch.sparse_csr_tensor(*pattern, found, size, check_invariants=False)
        # It reads rows of the one and columns of the other.
        by_column = own.t().contiguous(), other.t().contiguous().t()
        product = torch.sparse.sampled_addmm(places, *by_column, beta=1.0 if part else 0.0)
        found = product.values()
    return found


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
        with InplaceUpdate([Entry(weight, positions, values)]):
            return functional.linear(x, weight.data.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, positions = ctx.saved_tensors
        by_x = by_bias = by_values = None
        if ctx.needs_input_grad[0]:
            with InplaceUpdate([Entry(ctx.weight, positions, values)]):
                by_x = (grad @ ctx.weight.data.to(grad.dtype)).to(ctx.dtypes[0])
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            by_bias = rows.sum(0).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            x = x.reshape(-1, x.shape[-1])
            by_values = gradient_at(rows, x, values, positions, ctx.pattern).to(values.dtype)
        return by_x, by_bias, by_values, None, None, None


class _PatchedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, padding_idx: int | None, values: Tensor, weight: Tensor, pattern: Pattern
    ) -> Tensor:
        rows, places = torch.unique(ids, return_inverse=True)
        which, local = pattern.of_rows(rows, weight.shape[1])
        ctx.save_for_backward(rows, places, which, local, values)
        ctx.padding_idx = padding_idx
        own = weight.data.index_select(0, rows)
        flat = own.view(-1)
        added = flat.index_select(0, local) + values.detach().index_select(0, which)
        write_at(flat, added, local)
        return functional.embedding(places, own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, places, which, local, values = ctx.saved_tensors
        by_row = embedding_gradient(grad, rows, places, ctx.padding_idx).view(-1)
        by_values = torch.zeros_like(values).scatter_(0, which, by_row.index_select(0, local).to(values.dtype))
        return None, None, by_values, None, None


def patched_linear(
    x: Tensor, bias: Tensor | None, weight: Tensor, diff: Diff, pattern: Pattern | None = None
) -> Tensor:
    """`torch.nn.functional.linear` of `x` (..., in) with `diff` added to `weight` (out, in), differentiable in `x`, `bias` and the
    diff's values. With a `pattern` of its positions the values' gradient is computed at these alone."""
    return _PatchedLinear.apply(x, bias, diff.values, weight, diff.positions, pattern)  # type: ignore[no-any-return,no-untyped-call]


def patched_embedding(ids: Tensor, padding_idx: int | None, weight: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """`torch.nn.functional.embedding` of `ids` with `values` added to `weight` (rows, width) where `pattern` says, differentiable in
    the values. Only the rows of the batch are looked at; the weight is not touched."""
    return _PatchedEmbedding.apply(ids, padding_idx, values, weight, pattern)  # type: ignore[no-any-return,no-untyped-call]
