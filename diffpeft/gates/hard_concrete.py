"""Hard-concrete gates (Louizos et al. 2018, arXiv 1712.01312), as Diff Pruning uses them (arXiv 2012.07463, section 2).

With noise u, stretch (l, r) and log_alpha:

    s = sigmoid(logit(u) + log_alpha)     z = clamp(s (r - l) + l, 0, 1)     P(z > 0) = sigmoid(log_alpha - log(-l / r))
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.gates.compile import split_flat

Stretch = tuple[float, float]
"""(l, r) with l < 0 and 1 < r."""
SHUT_SCALE = 1e-12
"""Entries of shut gates are ranked by how nearly they are open, far below all others."""


class GatedTensors(NamedTuple):
    """The tensors that one effective parameter is made of."""

    base: Tensor
    """The frozen pretrained parameter theta, any shape and floating dtype."""
    w: Tensor
    """The dense diff, fp32, shape of `base`."""
    log_alpha: Tensor
    """Parameters of the element gates, fp32 or fp16, shape of `base`."""
    group_log_alpha: Tensor | None
    """Parameter of the group gate, fp32, shape (1,); None without structure."""


def widened(log_alpha: Tensor) -> Tensor:
    """log_alpha as it is computed with: that of the low-memory mode, fp16, in fp32."""
    return log_alpha.float() if log_alpha.dtype == torch.float16 else log_alpha


def binary_concrete(log_alpha: Tensor, noise: Tensor | None) -> Tensor:
    """s = sigmoid(logit(noise) + log_alpha), shape of `log_alpha`; without noise u = 1/2, the deterministic gate."""
    log_alpha = widened(log_alpha)
    if noise is None:
        return torch.sigmoid(log_alpha)
    # sigmoid(logit(u) + a) = u / (u + exp(-a) (1 - u)): one transcendental function, one division.
    return noise / (torch.exp(-log_alpha) * (1 - noise) + noise)


def stretch_and_clamp(s: Tensor, stretch: Stretch) -> Tensor:
    """z = clamp(s (r - l) + l, 0, 1)."""
    low, high = stretch
    return torch.mul(s, high - low).add_(low).clamp(0, 1)


def gate(log_alpha: Tensor, noise: Tensor | None, stretch: Stretch) -> Tensor:
    """The gate z in [0, 1], shape of `log_alpha`; deterministic without noise."""
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


def gated_parameter(
    base: Tensor,
    w: Tensor,
    log_alpha: Tensor,
    group_log_alpha: Tensor | None,
    stretch: Stretch,
    noise: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The effective parameter theta + z z_group w (arXiv 2012.07463, equations 3 and 5).

    Tensors are those of [`GatedTensors`]; the result has `base`'s shape and dtype and is differentiable in the others.

    Args:
        noise: uniform noise of the elements, shape of `base`, and of the group, shape (1,); None: deterministic gates.
    """
    if noise[0] is None and not torch.is_grad_enabled():
        return delta(w, log_alpha, group_log_alpha, stretch).add_(base).to(base.dtype)
    change = gate(log_alpha, noise[0], stretch) * w
    if group_log_alpha is not None:
        change = change * gate(group_log_alpha, noise[1], stretch).reshape(())
    return (change + base.detach()).to(base.dtype)


def delta_chunks(
    w: Tensor, log_alpha: Tensor | None, group_log_alpha: Tensor | None, stretch: Stretch
) -> Iterator[Tensor]:
    """The chunks of [`delta`], flat and in order."""
    if log_alpha is None:
        yield from split_flat(w)
        return
    group = None if group_log_alpha is None else gate(group_log_alpha.detach(), None, stretch).reshape(())
    for own_w, own_log_alpha in zip(split_flat(w), split_flat(log_alpha), strict=True):
        chunk = gate(own_log_alpha, None, stretch).mul_(own_w)
        yield chunk if group is None else chunk.mul_(group)


def delta(w: Tensor, log_alpha: Tensor | None, group_log_alpha: Tensor | None, stretch: Stretch) -> Tensor:
    """z z_group w with deterministic gates, fp32, shape of `w`, without gradient; w itself without `log_alpha`."""
    if log_alpha is None:
        return w.detach().clone()
    result = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    for out, chunk in zip(split_flat(result), delta_chunks(w, log_alpha, group_log_alpha, stretch), strict=True):
        out.copy_(chunk)
    return result


class GatedDiff(NamedTuple):
    """A diff in gating as magnitude pruning ranks and keeps its entries; tensors are those of [`GatedTensors`]."""

    w: Tensor
    log_alpha: Tensor | None
    """None for a diff without gates."""
    group_log_alpha: Tensor | None
    stretch: Stretch

    def scores(self) -> Iterator[Tensor]:
        """|z w|, or [`SHUT_SCALE`] P(z > 0) |w| where that is 0, as flat fp32 chunks in order."""
        if self.log_alpha is None:
            yield from (chunk.abs() for chunk in split_flat(self.w))
            return
        of_gates = zip(delta_chunks(*self), split_flat(self.w), split_flat(self.log_alpha), strict=True)
        for delta, w, log_alpha in of_gates:
            shut = open_probability(log_alpha, self.stretch).mul_(w.abs()).mul_(SHUT_SCALE)
            delta.abs_()
            yield torch.where(delta == 0, shut, delta)  # NaN stays, to be refused

    def values(self, positions: Tensor) -> Tensor:
        """z w at sorted flat positions (int64, shape (k,)), fp32, with the bits of the whole tensor's."""
        result, start, filled = self.w.new_empty(len(positions)), 0, 0
        for chunk in delta_chunks(*self):
            stop = start + chunk.numel()
            end = int(torch.searchsorted(positions, stop))
            result[filled:end] = chunk[positions[filled:end] - start]
            start, filled = stop, end
        return result


def expected_l0(
    log_alpha: Tensor, group_log_alpha: Tensor | None, stretch: Stretch, group_penalty: str = "product"
) -> Tensor:
    """The expected number of nonzeros of one group, a differentiable scalar.

    "product" is the paper's P(group open) * sum P(element open); "additive", as in the released code, adds P(group
    open) once. Without a group gate both are sum P(element open).
    """
    elements = open_probability(log_alpha, stretch).sum()
    if group_log_alpha is None:
        return elements
    group = open_probability(group_log_alpha, stretch).sum()
    return elements + group if group_penalty == "additive" else elements * group
