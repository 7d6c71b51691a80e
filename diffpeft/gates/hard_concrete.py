"""Hard-concrete gates (Louizos et al. 2018, arXiv 1712.01312), as Diff Pruning uses them (arXiv 2012.07463, section 2).

With noise u, stretch (l, r) and location log_alpha:

    s = sigmoid(logit(u) + log_alpha)        z = clamp(s (r - l) + l, 0, 1)        P(z > 0) = sigmoid(log_alpha - log(-l / r))

Pure functions on tensors; nothing here knows about models.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Stretch = tuple[float, float]

PIECE = 1 << 17
"""Elements worked on at a time on a CPU, so that a chain of elementwise operations stays in its cache."""
GPU_PIECE = 1 << 24
"""Elements worked on at a time on a GPU where all would take too much memory."""


def pieces(*tensors: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, all of one shape, as flat views of PIECE elements each, to read and to write.

    Whole on a GPU, where launches cost more than memory traffic, under a compiler, and where a tensor has no flat view (channels_last).
    """
    present = tuple(tensor for tensor in tensors if tensor is not None)
    first = present[0]
    if torch.compiler.is_compiling():  # a compiler fuses the chain itself, and would unroll the loop
        return iter((present,))
    if first.device.type != "cpu" or first.numel() <= PIECE or not all(t.is_contiguous() for t in present):
        return iter((present,))
    return zip(*(torch.split(tensor.view(-1), PIECE) for tensor in present), strict=True)


def widened(log_alpha: Tensor) -> Tensor:
    """Locations as they are computed with: those of the low-memory mode, fp16, in fp32."""
    return log_alpha.float() if log_alpha.dtype == torch.float16 else log_alpha


def binary_concrete(log_alpha: Tensor, noise: Tensor | None) -> Tensor:
    """s = sigmoid(logit(noise) + log_alpha), same shape as `log_alpha`; without noise u = 1/2, the deterministic gate."""
    log_alpha = widened(log_alpha)
    if noise is None:
        return torch.sigmoid(log_alpha)
    # sigmoid(logit(u) + a) = u / (u + exp(-a) (1 - u)): one transcendental function and one division instead of three of each.
    return noise / torch.exp(-log_alpha).mul_(1 - noise).add_(noise)


def stretch_and_clamp(s: Tensor, stretch: Stretch) -> Tensor:
    """z = clamp(s (r - l) + l, 0, 1)."""
    low, high = stretch
    return torch.mul(s, high - low).add_(low).clamp_(0, 1)


def gate(log_alpha: Tensor, noise: Tensor | None, stretch: Stretch) -> Tensor:
    """The gate z in [0, 1], same shape as `log_alpha`; deterministic without noise. Not differentiable: see
    [`gated_parameter`]."""
    return stretch_and_clamp(binary_concrete(log_alpha, noise), stretch)


def gate_slope(s: Tensor, stretch: Stretch) -> Tensor:
    """dz/dlog_alpha = (r - l) s (1 - s) where the gate is not clamped, else 0."""
    low, high = stretch
    stretched = torch.mul(s, high - low).add_(low)
    inside = (stretched > 0) & (stretched < 1)
    return (1 - s).mul_(s).mul_(high - low).mul_(inside)


def open_shift(stretch: Stretch) -> float:
    """log(-l / r)."""
    low, high = stretch
    return math.log(-low / high)


def open_logit(log_alpha: Tensor, stretch: Stretch) -> Tensor:
    """logit of P(z > 0) = log_alpha - log(-l / r), at least fp32."""
    return widened(log_alpha) - open_shift(stretch)


def open_probability(log_alpha: Tensor, stretch: Stretch) -> Tensor:
    """P(z > 0) of every gate, differentiable (arXiv 2012.07463, equation 4)."""
    return torch.sigmoid(open_logit(log_alpha, stretch))


def split_flat(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor, flat, in chunks that are worked on at a time; views if it is contiguous."""
    return torch.split(tensor.detach().reshape(-1), PIECE if tensor.device.type == "cpu" else GPU_PIECE)


def delta_chunks(
    w: Tensor, log_alpha: Tensor | None, group_log_alpha: Tensor | None, stretch: Stretch
) -> Iterator[Tensor]:
    """The chunks of [`delta`], flat and in order."""
    if log_alpha is None:
        yield from split_flat(w)
        return
    group = None if group_log_alpha is None else gate(group_log_alpha.detach(), None, stretch).reshape(())
    for own, location in zip(split_flat(w), split_flat(log_alpha), strict=True):
        chunk = gate(location, None, stretch).mul_(own)
        yield chunk if group is None else chunk.mul_(group)


def delta(w: Tensor, log_alpha: Tensor | None, group_log_alpha: Tensor | None, stretch: Stretch) -> Tensor:
    """z z_group w with deterministic gates, fp32, shape of `w`, without gradient.

    Args:
        w: the dense diff, fp32, any shape.
        log_alpha: of the element gates, fp32 or fp16, shape of `w`; None for a diff without gates.
        group_log_alpha: of the group gate, shape (1,), or None.
        stretch: (l, r) with l < 0 and 1 < r.
    """
    if log_alpha is None:
        return w.detach().clone()
    result = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    for out, chunk in zip(split_flat(result), delta_chunks(w, log_alpha, group_log_alpha, stretch), strict=True):
        out.copy_(chunk)
    return result


class _GatedParameter(torch.autograd.Function):
    """theta + z z_group w with both gradients from the one gradient of the effective parameter."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        w: Tensor,
        log_alpha: Tensor,
        group_log_alpha: Tensor | None,
        noise: Tensor | None,
        group_noise: Tensor | None,
        stretch: Stretch,
    ) -> Tensor:
        group_s = group_z = None
        if group_log_alpha is not None:
            group_s = binary_concrete(group_log_alpha, group_noise).reshape(())
            group_z = stretch_and_clamp(group_s, stretch)
        s, effective = torch.empty_like(w), torch.empty_like(w)
        for piece in pieces(base, w, log_alpha, s, effective, noise):
            s_ = piece[3].copy_(binary_concrete(piece[2], piece[5] if noise is not None else None))
            delta = stretch_and_clamp(s_, stretch).mul_(piece[1])
            if group_z is not None:
                delta.mul_(group_z)
            torch.add(delta, piece[0], out=piece[4])
        ctx.save_for_backward(w, s, group_s, group_z)
        ctx.stretch = stretch
        return effective.to(base.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, s, group_s, group_z = ctx.saved_tensors
        grad_w, grad_log_alpha = torch.empty_like(w), torch.empty_like(w)
        grad_group = None if group_s is None else torch.zeros_like(group_s)
        for g, w_, s_, out_w, out_log_alpha in pieces(grads[0].float(), w, s, grad_w, grad_log_alpha):
            z = stretch_and_clamp(s_, ctx.stretch)
            by_delta = g
            if grad_group is not None:
                grad_group += (z * w_).mul_(g).sum()
                by_delta = g * group_z
            torch.mul(z, by_delta, out=out_w)
            torch.mul(gate_slope(s_, ctx.stretch).mul_(w_), by_delta, out=out_log_alpha)
        if grad_group is not None:
            grad_group = (grad_group * gate_slope(group_s, ctx.stretch)).reshape(1)
        return None, grad_w, grad_log_alpha, grad_group, None, None, None


def gated_parameter(
    base: Tensor,
    w: Tensor,
    log_alpha: Tensor,
    group_log_alpha: Tensor | None,
    stretch: Stretch,
    noise: Tensor | None = None,
    group_noise: Tensor | None = None,
) -> Tensor:
    """The effective parameter theta + z z_group w (arXiv 2012.07463, equations 3 and 5).

    Args:
        base: the frozen pretrained parameter, any shape and floating dtype; receives no gradient.
        w: the dense diff, fp32, shape of `base`.
        log_alpha: locations of the element gates, fp32 or fp16, shape of `base`.
        group_log_alpha: location of the group gate, fp32, shape (1,), or None for the unstructured form.
        stretch: (l, r) with l < 0 and 1 < r.
        noise: uniform noise of the shape of `base`, or None for deterministic gates.
        group_noise: the same for the group gate.

    Returns:
        A tensor of the shape and dtype of `base`, differentiable in `w`, `log_alpha` and `group_log_alpha`.
    """
    effective: Tensor = _GatedParameter.apply(  # type: ignore[no-untyped-call]
        base, w, log_alpha, group_log_alpha, noise, group_noise, stretch
    )
    return effective


def expected_l0(
    log_alpha: Tensor, group_log_alpha: Tensor | None, stretch: Stretch, group_penalty: str = "product"
) -> Tensor:
    """The expected number of nonzeros of one group, a differentiable scalar.

    "product" is the paper's P(group open) * sum P(element open); "additive" is what the authors' released code
    computes: the group's probability is added once. Without a group gate both are sum P(element open).
    """
    elements = open_probability(log_alpha, stretch).sum()
    if group_log_alpha is None:
        return elements
    group = open_probability(group_log_alpha, stretch).sum()
    return elements + group if group_penalty == "additive" else elements * group
