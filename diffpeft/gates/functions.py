"""Parameters under sampled gates, and linear layers and embeddings that use them without keeping them.

The effective parameter is made for a forward pass, let go of, and made again for the backward pass from the seed of its
noise; weights of linear layers may stay in memory that every pass uses again.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffpeft.gates import kernels
from diffpeft.gates.forward_pass import Workspace
from diffpeft.gates.hard_concrete import GatedTensors, Stretch, stretch_and_clamp
from diffpeft.gates.kernels import Draw
from diffpeft.gates.noise import seed_words, uniform
from diffpeft.sparse.functions import compute_dtype, embedding_gradient, no_view

Accumulate = Callable[[Tensor, Tensor | None], None]
"""Takes a gradient of log_alpha, fp32, and which rows it is; None: all of them."""


class GateSample(NamedTuple):
    """How the gates of one parameter are sampled."""

    seed: Tensor
    """int64, shape (2,), of the noise."""
    stretch: Stretch
    fused: bool
    """Whether chains of elementwise operations are compiled."""
    workspace: Workspace
    accumulate: Accumulate | None = None
    """Takes the gradient of the elements' log_alpha in place of autograd."""
    reserve_as: Hashable = None
    """Use of the memory in which a linear layer's effective weight stays until backward; None: it is made again."""


class _Gates:
    """The gates of one parameter in one forward pass, and what its backward needs of it."""

    def __init__(self, ctx: Any, sample: GateSample, w: Tensor, group_log_alpha: Tensor | None) -> None:
        self.sample, seed = sample, seed_words(sample.seed, w.device)
        self.group_s: Tensor | None = None
        self.reservation: object | None = None
        group_gate = w.new_ones(())
        if group_log_alpha is not None:
            behind = torch.full((), w.numel(), dtype=torch.int32, device="cpu")  # the position after the elements'
            noise = uniform(sample.seed.view(torch.int32), behind)  # on the CPU: a GPU would launch each operation
            self.group_s = torch.sigmoid(group_log_alpha + noise.logit())
            group_gate = stretch_and_clamp(self.group_s, sample.stretch).reshape(())
        self.draw = Draw(seed, group_gate, sample.stretch)
        ctx.gates = self

    def effective(self, out: Tensor, base: Tensor, w: Tensor, log_alpha: Tensor, rows: Tensor | None = None) -> Tensor:
        """The effective parameter, or some rows of it, in `out`."""
        draw = self.draw._replace(rows=rows)
        kernels.effective((out, base, w, log_alpha), draw, fused=self.sample.fused, whole=rows is not None)
        return out

    def weight(self, base: Tensor, w: Tensor, log_alpha: Tensor, dtype: torch.dtype, reserve: bool = False) -> Tensor:
        """The effective parameter, in memory that the next one takes or that is reserved until the next pass."""
        workspace, use = self.sample.workspace, self.sample.reserve_as if reserve else None
        out = workspace.take("weight" if use is None else use, w.shape, dtype, w.device)
        if use is not None:
            self.reservation = workspace.reserve(use)
        return self.effective(out, base, w, log_alpha)

    def weight_again(self, base: Tensor, w: Tensor, log_alpha: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight of the forward pass, in the backward pass."""
        kept = None
        if self.reservation is not None:
            kept = self.sample.workspace.reserved(self.sample.reserve_as, self.reservation, w.shape, dtype)
        return self.weight(base, w, log_alpha, dtype) if kept is None else kept

    def gradients(
        self, grad: Tensor, w: Tensor, log_alpha: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients by w, by the elements' log_alpha unless it is accumulated, and by the group's.

        `grad` is that of the effective parameter, or of `rows` of it (int64, shape (n,)), each of them once.
        """
        accumulate, draw = self.sample.accumulate, self.draw._replace(rows=rows)
        own_w, own_log_alpha = (tensor if rows is None else tensor.index_select(0, rows) for tensor in (w, log_alpha))
        by_w, by_log_alpha = torch.empty_like(own_w), torch.empty_like(own_w)
        tensors = by_w, by_log_alpha, grad, own_w, own_log_alpha
        total = kernels.gradients(tensors, draw, fused=self.sample.fused, whole=rows is not None)
        by_w, by_elements = _spread(by_w, w, rows), None
        if accumulate is None:
            by_elements = _spread(by_log_alpha, w, rows)
        else:
            accumulate(by_log_alpha, rows)
        if self.group_s is None:
            return by_w, by_elements, None
        low, high = draw.stretch
        inside = (draw.group_gate > 0) & (draw.group_gate < 1)
        return by_w, by_elements, total * ((1 - self.group_s) * self.group_s * ((high - low) * inside))


def _spread(part: Tensor, like: Tensor, rows: Tensor | None) -> Tensor:
    """A matrix with the part in some rows, and zeros in the others."""
    return part if rows is None else torch.zeros_like(like).index_copy_(0, rows, part)


class _GatedParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sample: GateSample, *tensors: Any) -> Tensor:
        base, w, log_alpha, group_log_alpha = tensors
        ctx.save_for_backward(w, log_alpha)
        return _Gates(ctx, sample, w, group_log_alpha).effective(torch.empty_like(base), base, w, log_alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, log_alpha = ctx.saved_tensors
        return None, None, *ctx.gates.gradients(grad, w, log_alpha)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, sample: GateSample, *tensors: Any) -> Tensor:
        base, w, log_alpha, group_log_alpha = tensors
        dtype = compute_dtype(x, base)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, base, w, log_alpha)
        gates, needed_again = _Gates(ctx, sample, w, group_log_alpha), ctx.needs_input_grad[0]
        weight = gates.weight(base, w, log_alpha, dtype, needed_again)
        return no_view(functional.linear(x, weight, None if bias is None else bias.to(dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, base, w, log_alpha = ctx.saved_tensors
        by_x = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = (grad @ ctx.gates.weight_again(base, w, log_alpha, grad.dtype)).to(ctx.dtypes[0])
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            by_bias = rows.sum(0).to(ctx.dtypes[1])
        by_weight = ctx.gates.sample.workspace.take("gradient", w.shape, grad.dtype, grad.device)
        torch.mm(rows.t(), x.reshape(-1, x.shape[-1]), out=by_weight)
        return by_x, by_bias, None, None, *ctx.gates.gradients(by_weight, w, log_alpha)


class _GatedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, padding_idx: int | None, sample: GateSample, *tensors: Any) -> Tensor:
        base, w, log_alpha, group_log_alpha = tensors
        rows, positions = torch.unique(ids, return_inverse=True)
        ctx.save_for_backward(rows, positions, w, log_alpha)
        ctx.padding_idx = padding_idx
        own_base, own_w, own_log_alpha = (tensor.index_select(0, rows) for tensor in (base, w, log_alpha))
        gates = _Gates(ctx, sample, w, group_log_alpha)
        effective = gates.effective(torch.empty_like(own_base), own_base, own_w, own_log_alpha, rows)
        return no_view(functional.embedding(positions, effective))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, positions, w, log_alpha = ctx.saved_tensors
        by_row = embedding_gradient(grad, rows, positions, ctx.padding_idx)
        return None, None, None, None, *ctx.gates.gradients(by_row, w, log_alpha, rows)


def gated_parameter_sampled(tensors: GatedTensors, sample: GateSample) -> Tensor:
    """The effective parameter theta + z z_group w with sampled gates, in theta's dtype, differentiable in the rest."""
    return _GatedParameter.apply(sample, *tensors)  # type: ignore[no-any-return,no-untyped-call]


def gated_linear(x: Tensor, bias: Tensor | None, weight: GatedTensors, sample: GateSample) -> Tensor:
    """`torch.nn.functional.linear` of `x` (..., in) with the effective weight (out, in) and `bias` (out,)."""
    return _GatedLinear.apply(x, bias, sample, *weight)  # type: ignore[no-any-return,no-untyped-call]


def gated_embedding(ids: Tensor, padding_idx: int | None, weight: GatedTensors, sample: GateSample) -> Tensor:
    """`torch.nn.functional.embedding` of `ids` with the effective weight, of which only the batch's rows are made."""
    return _GatedEmbedding.apply(ids, padding_idx, sample, *weight)  # type: ignore[no-any-return,no-untyped-call]
