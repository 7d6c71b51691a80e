"""Parameters under sampled gates, and linear layers and embeddings that use them without keeping them.

The effective parameter is made for a forward pass, let go of, and made again for the backward pass, from the seed of its noise:
between the two only the module's input is kept. Weights of linear layers may stay in memory that every pass uses again. [`diffpeft.gates.hard_concrete.gated_parameter`] is the plain form, with noise that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffpeft.gates import kernels
from diffpeft.gates.hard_concrete import Stretch, stretch_and_clamp
from diffpeft.gates.noise import parts, uniform, uniform_at
from diffpeft.gates.workspace import Scratch
from diffpeft.sparse.linear import compute_dtype, embedding_gradient


class Sample(NamedTuple):
    """How the gates of one parameter are sampled."""

    seed: Tensor
    """int64, shape (2,), of the noise."""
    stretch: Stretch
    fused: bool
    """Whether chains of elementwise operations are compiled."""
    scratch: Scratch
    """For effective weights of linear layers."""
    fold: Callable[[Tensor, Tensor | None], None] | None = None
    """Takes the gradient of the elements' locations, and of which rows it is (None: of all), in place of autograd."""
    keep: Hashable = None
    """What the memory is known by in which the effective weight of a linear layer stays until the backward pass; None: it is
    made again."""


class _Gates:
    """The gates of one parameter in one forward pass, and what its backward needs of it."""

    def __init__(self, ctx: Any, sample: Sample, w: Tensor, group_log_alpha: Tensor | None) -> None:
        self.sample, self.seed = sample, parts(sample.seed, w.device)
        self.group_s: Tensor | None = None
        self.claim: object | None = None
        if group_log_alpha is None:
            self.whole = w.new_ones(())
        else:
            self.group_s = torch.sigmoid(group_log_alpha + self._group_noise(w.numel()).logit())
            self.whole = stretch_and_clamp(self.group_s, sample.stretch).reshape(())
        ctx.gates = self

    def _group_noise(self, place: int) -> Tensor:
        """The noise of the group's gate, which stands behind the elements'."""
        if torch.compiler.is_compiling():
            return uniform(self.seed, torch.full((), place, dtype=torch.int32, device=self.seed.device))
        return uniform_at(self.sample.seed, place)

    def effective(self, out: Tensor, base: Tensor, w: Tensor, log_alpha: Tensor, rows: Tensor | None = None) -> Tensor:
        """The effective parameter, or some rows of it, in `out`."""
        stretch, fused = self.sample.stretch, self.sample.fused
        kernels.effective(out, base, w, log_alpha, self.whole, self.seed, stretch, rows, fused)
        return out

    def passing(self, base: Tensor, w: Tensor, log_alpha: Tensor, dtype: torch.dtype, keep: bool = False) -> Tensor:
        """The effective parameter in memory that the next one takes, or that is its own until the next pass."""
        scratch, own = self.sample.scratch, self.sample.keep
        if not keep or own is None:
            return self.effective(scratch.take("weight", w.shape, dtype, w.device), base, w, log_alpha)
        made = self.effective(scratch.take(own, w.shape, dtype, w.device), base, w, log_alpha)
        self.claim = scratch.claim(own)
        return made

    def again(self, base: Tensor, w: Tensor, log_alpha: Tensor, dtype: torch.dtype) -> Tensor:
        """What [`passing`] made, in the backward pass."""
        kept = None
        if self.claim is not None:
            kept = self.sample.scratch.claimed(self.sample.keep, self.claim, w.shape, dtype)
        return self.passing(base, w, log_alpha, dtype) if kept is None else kept

    def gradients(
        self, grad: Tensor, w: Tensor, log_alpha: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """By w, by the elements' locations, unless these are folded, and by the group's.

        Args:
            grad: of the effective parameter, or of `rows` of it, each of them once.
            w: all of the diff, as `log_alpha` of the locations.
            log_alpha: the locations.
            rows: int64, shape (n,).
        """
        stretch, fused, fold = self.sample.stretch, self.sample.fused, self.sample.fold
        own, own_log_alpha = (part if rows is None else part.index_select(0, rows) for part in (w, log_alpha))
        by_w, own_gradient, total = kernels.gradients(
            grad, own, own_log_alpha, self.whole, self.seed, stretch, rows, fused
        )
        by_w, by_elements = _spread(by_w, w, rows), None
        if fold is None:
            by_elements = _spread(own_gradient, w, rows)
        else:
            fold(own_gradient, rows)
        if self.group_s is None:
            return by_w, by_elements, None
        inside = (self.whole > 0) & (self.whole < 1)
        slope = (1 - self.group_s) * self.group_s * ((stretch[1] - stretch[0]) * inside)
        return by_w, by_elements, total * slope


def _spread(part: Tensor, like: Tensor, rows: Tensor | None) -> Tensor:
    """A matrix like another that has a part in some rows, and nought in others."""
    return part if rows is None else torch.zeros_like(like).index_copy_(0, rows, part)


class _SampledParameter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, w: Tensor, log_alpha: Tensor, group_log_alpha: Tensor | None, sample: Sample
    ) -> Tensor:
        ctx.save_for_backward(w, log_alpha)
        return _Gates(ctx, sample, w, group_log_alpha).effective(torch.empty_like(base), base, w, log_alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, log_alpha = ctx.saved_tensors
        return None, *ctx.gates.gradients(grad, w, log_alpha), None


class _SampledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        base: Tensor,
        w: Tensor,
        log_alpha: Tensor,
        group_log_alpha: Tensor | None,
        sample: Sample,
    ) -> Tensor:
        dtype = compute_dtype(x, base)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, base, w, log_alpha)
        keep = ctx.needs_input_grad[0]
        effective = _Gates(ctx, sample, w, group_log_alpha).passing(base, w, log_alpha, dtype, keep)
        return functional.linear(x, effective, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, base, w, log_alpha = ctx.saved_tensors
        by_x = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = (grad @ ctx.gates.again(base, w, log_alpha, grad.dtype)).to(ctx.dtypes[0])
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            by_bias = rows.sum(0).to(ctx.dtypes[1])
        by_weight = ctx.gates.sample.scratch.take("gradient", w.shape, grad.dtype, grad.device)
        torch.mm(rows.t(), x.reshape(-1, x.shape[-1]), out=by_weight)
        return by_x, by_bias, None, *ctx.gates.gradients(by_weight, w, log_alpha), None


class _SampledEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        padding_idx: int | None,
        base: Tensor,
        w: Tensor,
        log_alpha: Tensor,
        group_log_alpha: Tensor | None,
        sample: Sample,
    ) -> Tensor:
        rows, places = torch.unique(ids, return_inverse=True)
        ctx.save_for_backward(rows, places, w, log_alpha)
        ctx.padding_idx = padding_idx
        own, own_w, own_log_alpha = (tensor.index_select(0, rows) for tensor in (base, w, log_alpha))
        out = torch.empty_like(own)
        effective = _Gates(ctx, sample, w, group_log_alpha).effective(out, own, own_w, own_log_alpha, rows)
        return functional.embedding(places, effective)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, places, w, log_alpha = ctx.saved_tensors
        by_row = embedding_gradient(grad, rows, places, ctx.padding_idx)
        return None, None, None, *ctx.gates.gradients(by_row, w, log_alpha, rows), None


def sampled_parameter(
    base: Tensor, w: Tensor, log_alpha: Tensor, group_log_alpha: Tensor | None, sample: Sample
) -> Tensor:
    """The effective parameter theta + z z_group w with sampled gates (arXiv 2012.07463, equations 3 and 6).

    Args:
        base: the frozen pretrained parameter theta, any shape and floating dtype.
        w: the dense diff, fp32, shape of `base`.
        log_alpha: locations of the element gates, fp32 or fp16, shape of `base`.
        group_log_alpha: location of the group gate, fp32, shape (1,); None without structure.
        sample: how the gates are sampled.

    Returns:
        A tensor of the shape and dtype of `base`, differentiable in `w`, `log_alpha` and `group_log_alpha`.
    """
    return _SampledParameter.apply(base, w, log_alpha, group_log_alpha, sample)  # type: ignore[no-any-return,no-untyped-call]


def sampled_linear(
    x: Tensor,
    bias: Tensor | None,
    base: Tensor,
    w: Tensor,
    log_alpha: Tensor,
    group_log_alpha: Tensor | None,
    sample: Sample,
) -> Tensor:
    """`torch.nn.functional.linear` of `x` (..., in) with the effective weight (out, in) and `bias`; see [`sampled_parameter`]."""
    return _SampledLinear.apply(x, bias, base, w, log_alpha, group_log_alpha, sample)  # type: ignore[no-any-return,no-untyped-call]


def sampled_embedding(
    ids: Tensor,
    padding_idx: int | None,
    base: Tensor,
    w: Tensor,
    log_alpha: Tensor,
    group_log_alpha: Tensor | None,
    sample: Sample,
) -> Tensor:
    """`torch.nn.functional.embedding` of `ids` with the effective weight (rows, width), of which only the rows of the batch are
    made; see [`sampled_parameter`]."""
    return _SampledEmbedding.apply(ids, padding_idx, base, w, log_alpha, group_log_alpha, sample)  # type: ignore[no-any-return,no-untyped-call]
