"""Small parameters under sampled gates, all of a model's at once: biases and norms, each of which would cost more in launches
than in arithmetic. Noise, values and gradients are those of [`diffpeft.gates.functions.sampled_parameter`]."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffpeft.gates.hard_concrete import Stretch, binary_concrete, gate_slope, stretch_and_clamp
from diffpeft.gates.noise import uniform

SMALL = 1 << 14
"""Elements of a small parameter at most."""


class Part(NamedTuple):
    """One of the parameters, all of which are on one device, and all with a group gate or all without."""

    base: Tensor
    """Any shape and floating dtype."""
    w: Tensor
    """fp32, shape of `base`, as is `log_alpha`."""
    log_alpha: Tensor
    group_log_alpha: Tensor | None
    """fp32, shape (1,)."""
    seed: Tensor
    """int64, shape (2,), of the noise."""


class _Layout(NamedTuple):
    sizes: list[int]
    owner: Tensor
    """int64: whose each element of the joined parameters is."""
    places: Tensor
    """int32: its place there."""


@functools.lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...], device: torch.device) -> _Layout:
    lengths = torch.tensor(sizes)
    owner = torch.arange(len(sizes)).repeat_interleave(lengths)
    places = torch.arange(len(owner)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return _Layout(list(sizes), owner.to(device), places.to(device, torch.int32))


def _noise(parts: Sequence[Part], layout: _Layout) -> tuple[Tensor, Tensor]:
    """The noise of the elements and of the groups, which stands behind the elements'."""
    seeds = torch.stack([part.seed for part in parts]).view(torch.int32).to(layout.owner.device).t()
    behind = torch.tensor(layout.sizes, dtype=torch.int32, device=seeds.device)
    return uniform(seeds.index_select(1, layout.owner), layout.places), uniform(seeds, behind)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])


class _SampledTogether(torch.autograd.Function):
    # What backward needs is not saved with autograd, which would free it after the first of several backward passes that each
    # come through some of the outputs.
    @staticmethod
    def forward(ctx: Any, parts: Sequence[Part], stretch: Stretch, *trained: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        layout = _layout(tuple(part.w.numel() for part in parts), parts[0].w.device)
        w, noise = _join([part.w for part in parts]), _noise(parts, layout)
        s = binary_concrete(_join([part.log_alpha for part in parts]), noise[0])
        z, whole, group_s = stretch_and_clamp(s, stretch), w.new_ones(len(parts)), None
        groups = [part.group_log_alpha for part in parts if part.group_log_alpha is not None]
        if groups:
            group_s = torch.sigmoid(_join(groups) + noise[1].logit())
            whole = stretch_and_clamp(group_s, stretch)
        effective = z * (w * whole.index_select(0, layout.owner)) + _join([part.base for part in parts])
        ctx.kept, ctx.shapes, ctx.stretch = (w, s, z, whole, group_s, layout), [p.w.shape for p in parts], stretch
        made = torch.split(effective, layout.sizes)
        return tuple(one.view(part.base.shape).to(part.base.dtype) for one, part in zip(made, parts, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        w, s, z, whole, group_s, layout = ctx.kept
        sizes: list[int] = layout.sizes
        low, high = ctx.stretch
        grad = _join([w.new_zeros(n) if own is None else own for own, n in zip(upstream, sizes, strict=True)])
        by_delta = grad * whole.index_select(0, layout.owner)
        joined = z * by_delta, gate_slope(s, ctx.stretch) * (w * by_delta)
        apart: list[Sequence[Tensor]] = [torch.split(gradient, sizes) for gradient in joined]
        if group_s is not None:
            totals = torch.stack([own.sum() for own in torch.split(z * w * grad, sizes)])
            slope = (1 - group_s) * group_s * ((high - low) * ((whole > 0) & (whole < 1)))
            apart.append(torch.split(totals * slope, 1))
        for kind in (0, 1):
            apart[kind] = [one.view(shape) for one, shape in zip(apart[kind], ctx.shapes, strict=True)]
        gradients = [None if own is None else one for ones in apart for one, own in zip(ones, upstream, strict=True)]
        return None, None, *gradients


def sampled_together(parts: Sequence[Part], stretch: Stretch) -> tuple[Tensor, ...]:
    """The effective parameter of each part, differentiable in its `w`, `log_alpha` and `group_log_alpha`. Backward may come through
    some of them first and through others later."""
    kinds = (1, 2) if parts[0].group_log_alpha is None else (1, 2, 3)
    trained = [part[kind] for kind in kinds for part in parts]
    made: tuple[Tensor, ...] = _SampledTogether.apply(parts, stretch, *trained)  # type: ignore[no-untyped-call]
    return made
