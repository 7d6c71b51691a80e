"""Small parameters under sampled gates, all of a model's at once: biases and norms.

Each by itself would cost more in launches than in arithmetic. Noise, values and gradients are those of
[`diffpeft.gates.functions.gated_parameter_sampled`].
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffpeft.gates.hard_concrete import GatedTensors, Stretch, binary_concrete, gate_slope, stretch_and_clamp
from diffpeft.gates.noise import uniform

MAX_SMALL_ELEMENTS = 1 << 14
"""Elements of a small parameter at most."""


class SmallParameter(NamedTuple):
    """One of the parameters, all of which are on one device, and all with a group gate or all without."""

    tensors: GatedTensors
    seed: Tensor
    """int64, shape (2,), of the noise."""


@functools.lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Index of each joined element's parameter, int64, and its position there, int32."""
    lengths = torch.tensor(sizes)
    owner = torch.arange(len(sizes)).repeat_interleave(lengths)
    positions = torch.arange(len(owner)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return owner.to(device), positions.to(device, torch.int32)


def _noise(small: Sequence[SmallParameter], sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The noise of the elements and of the groups, which stands behind the elements'."""
    owner, positions = _layout(tuple(sizes), small[0].tensors.w.device)
    seeds = torch.stack([one.seed for one in small]).view(torch.int32).to(owner.device).t()
    behind = torch.tensor(sizes, dtype=torch.int32, device=owner.device)
    return uniform(seeds.index_select(1, owner), positions), uniform(seeds, behind)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])


class _SmallParameters(torch.autograd.Function):
    # What backward needs is not saved with autograd, which would free it after the first of several backward passes
    # that each come through some of the outputs.
    @staticmethod
    def forward(
        ctx: Any, small: Sequence[SmallParameter], stretch: Stretch, *trained: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        bases, ws, log_alphas, groups = zip(*(one.tensors for one in small), strict=True)
        sizes = [w.numel() for w in ws]
        owner, _ = _layout(tuple(sizes), ws[0].device)
        w, noise = _join(ws), _noise(small, sizes)
        s = binary_concrete(_join(log_alphas), noise[0])
        z, group_gate, group_s = stretch_and_clamp(s, stretch), w.new_ones(len(small)), None
        if groups[0] is not None:
            group_s = torch.sigmoid(_join(groups) + noise[1].logit())
            group_gate = stretch_and_clamp(group_s, stretch)
        effective = z * (w * group_gate.index_select(0, owner)) + _join(bases)
        ctx.kept, ctx.shapes, ctx.stretch = (w, s, z, group_gate, group_s, owner), [w.shape for w in ws], stretch
        parts = zip(torch.split(effective, sizes), bases, strict=True)
        return tuple(part.view(base.shape).to(base.dtype) for part, base in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        w, s, z, group_gate, group_s, owner = ctx.kept
        sizes = [shape.numel() for shape in ctx.shapes]
        low, high = ctx.stretch
        grad = _join([w.new_zeros(n) if own is None else own for own, n in zip(upstream, sizes, strict=True)])
        by_delta = grad * group_gate.index_select(0, owner)
        joined = z * by_delta, gate_slope(s, ctx.stretch) * (w * by_delta)
        kinds: list[Sequence[Tensor]] = [
            [part.view(shape) for part, shape in zip(torch.split(gradient, sizes), ctx.shapes, strict=True)]
            for gradient in joined
        ]
        if group_s is not None:
            totals = torch.stack([own.sum() for own in torch.split(z * w * grad, sizes)])
            slope = (1 - group_s) * group_s * ((high - low) * ((group_gate > 0) & (group_gate < 1)))
            kinds.append(torch.split(totals * slope, 1))
        gradients = [None if own is None else one for ones in kinds for one, own in zip(ones, upstream, strict=True)]
        return None, None, *gradients


def small_parameters(small: Sequence[SmallParameter], stretch: Stretch) -> tuple[Tensor, ...]:
    """The effective parameter of each, differentiable in its `w`, `log_alpha` and `group_log_alpha`."""
    kinds = (1, 2) if small[0].tensors.group_log_alpha is None else (1, 2, 3)
    trained = [one.tensors[kind] for kind in kinds for one in small]
    made: tuple[Tensor, ...] = _SmallParameters.apply(small, stretch, *trained)  # type: ignore[no-untyped-call]
    return made
