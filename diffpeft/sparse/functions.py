"""Autograd functions of sparse diffs on frozen weights, and what hand-written backward passes of linear layers share.

Layers and embeddings copy no weight: the k entries stand in it while a module runs, forward or backward, and what stood
there is put back to the bit after it, also after an error. Nothing else may read the weight meanwhile: a model with
diffs runs in one thread, and `can_be_overwritten` excludes what other processes share.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffpeft.sparse.inplace import Entry, InplaceUpdate, read_at, write_at

CHUNK_ELEMENTS = 1 << 20
"""Elements of both operands of a product that are transposed at a time."""


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

    `base` has any shape and floating dtype, `values` (k,) are floating, `positions` (k,) int64 and sorted.
    """
    return _SparseParameter.apply(base, values, positions)  # type: ignore[no-any-return,no-untyped-call]


class RowPattern(NamedTuple):
    """The positions in a matrix as compressed sparse rows."""

    offsets: Tensor
    """int32, shape (rows + 1,)."""
    columns: Tensor
    """int32, shape (k,)."""
    transpose: Callable[[Tensor], Tensor] = torch.t_copy
    """The transpose of an operand, contiguous, for products at these positions."""

    @classmethod
    def of(cls, positions: Tensor, shape: torch.Size) -> RowPattern:
        """Compress sorted flat positions, int64, shape (k,), in a matrix of this shape."""
        rows = torch.arange(shape[0] + 1, device=positions.device) * shape[1]
        return cls(torch.searchsorted(positions, rows, out_int32=True), (positions % shape[1]).to(torch.int32))

    def of_rows(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Indices of those of the k positions that lie in some rows, and their flat positions in these rows alone."""
        start, end = self.offsets.index_select(0, rows), self.offsets.index_select(0, rows + 1)
        count = end - start
        row = torch.repeat_interleave(count)
        before = count.cumsum(0) - count
        index = torch.arange(len(row), device=rows.device) + (start - before).index_select(0, row)
        return index, row.to(torch.int64) * width + self.columns.index_select(0, index)


def no_view(output: Tensor) -> Tensor:
    """The output of an autograd function as a tensor of its own, which models may write into."""
    return output.data


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: autocast's, or the weight's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def sampling_pays(k: int, shape: torch.Size, grad: Tensor) -> bool:
    """Whether the gradient of a weight is cheaper at `k` positions than everywhere.

    Measured on a CPU in fp32, a product for one position costs 9 times one in a dense product, and transposing an
    element of the operands 30 times.
    """
    rows, columns = shape
    return grad.is_cpu and grad.dtype == torch.float32 and 9 * k + 30 * (rows + columns) < rows * columns


@functools.cache
def _accept_beta() -> None:
    """Let torch warn now, unheard, that its compressed sparse rows are new: it does so once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zeros = torch.zeros(2, dtype=torch.int64)
        torch.sparse_csr_tensor(zeros, zeros[:0], torch.zeros(0), (1, 1))


def gradient_at(grad: Tensor, x: Tensor, values: Tensor, positions: Tensor, pattern: RowPattern | None) -> Tensor:
    """grad^T x, grad (n, out) and x (n, in), at flat `positions`: shape (k,); with a pattern, nowhere else."""
    if pattern is None or grad.dtype != torch.float32:  # as under autocast
        return torch.take(grad.t() @ x, positions)
    _accept_beta()
    size, found = (grad.shape[1], x.shape[1]), values.detach()
    rows = max(64, CHUNK_ELEMENTS // sum(size))
    for part, (own, other) in enumerate(zip(torch.split(grad, rows), torch.split(x, rows), strict=True)):
        sparse = torch.sparse_csr_tensor(*pattern[:2], found, size, check_invariants=False)
        by_column = pattern.transpose(own), pattern.transpose(other).t()  # it reads rows of own, columns of other
        found = torch.sparse.sampled_addmm(sparse, *by_column, beta=1.0 if part else 0.0).values()
    return found


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, *diff: Any) -> Tensor:
        values, positions, ctx.pattern = diff
        dtype = compute_dtype(x, weight)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, values, positions)
        ctx.weight = weight
        with InplaceUpdate([Entry(weight, positions, values)]):
            return no_view(functional.linear(x, weight.data.to(dtype), None if bias is None else bias.to(dtype)))

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
        if ctx.needs_input_grad[3]:
            by_values = gradient_at(rows, x.reshape(-1, x.shape[-1]), values, positions, ctx.pattern).to(values.dtype)
        return by_x, by_bias, None, by_values, None, None


def sparse_linear(
    x: Tensor, bias: Tensor | None, weight: Tensor, values: Tensor, positions: Tensor, pattern: RowPattern | None = None
) -> Tensor:
    """`torch.nn.functional.linear` with a diff added to the weight; differentiable in `x`, `bias` and `values`.

    `x` has shape (..., in), `weight` (out, in); fp32 `values` and their sorted flat int64 `positions` (k,). With the
    `pattern` of the positions the values' gradient is computed at these alone.
    """
    return _SparseLinear.apply(x, bias, weight, values, positions, pattern)  # type: ignore[no-any-return,no-untyped-call]


def embedding_gradient(grad: Tensor, rows: Tensor, inverse: Tensor, padding_idx: int | None) -> Tensor:
    """The gradient of the rows that an embedding used, shape (n, width). That of the padding row is 0.

    Args:
        grad: of the embedding's output, shape (..., width).
        rows: indices of the used rows, each once, int64, shape (n,).
        inverse: index into `rows` of each vector in `grad`, int64, shape (...).
        padding_idx: the row of padding.
    """
    by_row: Tensor = torch.ops.aten.embedding_dense_backward(grad, inverse, len(rows), -1, False)
    return by_row if padding_idx is None else by_row.masked_fill_((rows == padding_idx).unsqueeze(1), 0)


class _SparseEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, padding_idx: int | None, weight: Tensor, values: Tensor, pattern: RowPattern
    ) -> Tensor:
        rows, inverse = torch.unique(ids, return_inverse=True)
        index, positions = pattern.of_rows(rows, weight.shape[1])
        ctx.save_for_backward(rows, inverse, index, positions, values)
        ctx.padding_idx = padding_idx
        own = weight.data.index_select(0, rows)
        flat = own.view(-1)
        write_at(flat, flat.index_select(0, positions) + values.detach().index_select(0, index), positions)
        return no_view(functional.embedding(inverse, own))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inverse, index, positions, values = ctx.saved_tensors
        by_row = embedding_gradient(grad, rows, inverse, ctx.padding_idx).view(-1)
        by_values = torch.zeros_like(values).scatter_(0, index, by_row.index_select(0, positions).to(values.dtype))
        return None, None, None, by_values, None


def sparse_embedding(
    ids: Tensor, padding_idx: int | None, weight: Tensor, values: Tensor, pattern: RowPattern
) -> Tensor:
    """`torch.nn.functional.embedding` with `values` added where `pattern` says; differentiable in `values`.

    Only the rows of the batch are looked at: `weight` (rows, width) is not touched. `values` are fp32, shape (k,).
    """
    return _SparseEmbedding.apply(ids, padding_idx, weight, values, pattern)  # type: ignore[no-any-return,no-untyped-call]
