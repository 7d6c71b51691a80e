"""A sparse diff of one parameter: apply it, gather its gradient, write it into a weight and revert the write exactly."""

from typing import Any

import torch
from torch import Tensor


class _SparseParameter(torch.autograd.Function):
    """theta with k values added; the gradient is the effective parameter's at the k positions."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.dtype = values.dtype
        effective = base.clone()
        add_(effective, values, positions)
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


def add_(target: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Add `values` at flat `positions` of `target` in place and return what stood there.

    Writing the returned tensor back with [`put_`] is exact to the bit, which subtracting is not. The sum is rounded
    once, from the wider of the two dtypes, so that merged and unmerged models agree bit for bit.
    """
    old = take(target, positions)
    put_(target, old + values, positions)
    return old


def take(target: Tensor, positions: Tensor) -> Tensor:
    """What stands at flat positions of `target`; as `torch.take`, which needs twice the time."""
    return target.view(-1).index_select(0, positions) if target.is_contiguous() else torch.take(target, positions)


def put_(target: Tensor, values: Tensor, positions: Tensor) -> None:
    """`target.put_(positions, values)`, which has no deterministic form, for positions that occur once, with values of any dtype."""
    if values.dtype != target.dtype:
        values = values.to(target.dtype)
    if target.is_contiguous():
        write_(target.view(-1), values, positions)
    else:
        target.index_put_(torch.unravel_index(positions, target.shape), values)


def write_(flat: Tensor, values: Tensor, positions: Tensor) -> None:
    """Write `values`, shape (k,), at `positions` of `flat`, each of which occurs once."""
    # On a CPU, scatter is the faster one in fp32, and ten times slower in the dtypes of half the width.
    if flat.dtype == torch.float32:
        flat.scatter_(0, positions, values)
    else:
        flat.index_copy_(0, positions, values)
