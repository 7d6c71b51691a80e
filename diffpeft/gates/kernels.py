"""The elementwise chains of forward and backward under sampled gates.

One source for a compiler and for eager mode (`diffpeft/gates/compile.py`). A gate's noise is made wherever it is
needed, from a seed and the gate's position: the same to the bit either way, the rest to rounding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.gates.compile import elementwise
from diffpeft.gates.hard_concrete import Stretch, binary_concrete, gate_slope, stretch_and_clamp
from diffpeft.gates.noise import uniform


class Draw(NamedTuple):
    """One sampling of a parameter's gates."""

    seed: Tensor
    """int32, shape (4,), of the noise."""
    group_gate: Tensor
    """The group's gate, fp32, shape (); 1 without structure."""
    stretch: Stretch
    rows: Tensor | None = None
    """int64, shape (n,): which rows of a matrix are given; None: all of the parameter is."""


def element_positions(like: Tensor, start: int, rows: Tensor | None = None) -> Tensor:
    """Positions of the elements of `like` in the whole tensor: from `start` on, or in some rows of a matrix."""
    if rows is None:
        return torch.arange(start, start + like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    columns = torch.arange(like.shape[1], dtype=torch.int32, device=like.device)
    return rows.to(torch.int32).unsqueeze(1) * like.shape[1] + columns


def _sample(w: Tensor, log_alpha: Tensor, start: int, draw: Draw) -> Tensor:
    """s of the elements' gates, before they are stretched."""
    return binary_concrete(log_alpha, uniform(draw.seed, element_positions(w, start, draw.rows)))


@elementwise
def effective(tensors: Sequence[Tensor], start: int, draw: Draw) -> None:
    """Write theta + z z_group w with the sampled gates of `draw`; `start` is the position of the first element.

    Args:
        tensors: the output, any dtype; theta, any dtype; w, fp32; log_alpha; all of one shape.
    """
    out, base, w, log_alpha = tensors
    z = stretch_and_clamp(_sample(w, log_alpha, start, draw), draw.stretch)
    out.copy_(z * (w * draw.group_gate) + base)


@elementwise
def gradients(tensors: Sequence[Tensor], start: int, draw: Draw) -> Tensor:
    """Write the gradients by w and by log_alpha from that of [`effective`], and return sum(gradient z w), shape ().

    Args:
        tensors: the two outputs, fp32; the gradient, any dtype; w, fp32; log_alpha; all of one shape.
    """
    by_w, by_log_alpha, grad, w, log_alpha = tensors
    s, grad = _sample(w, log_alpha, start, draw), grad.float()
    by_log_alpha.copy_(gate_slope(s, draw.stretch) * (w * (grad * draw.group_gate)))
    z = stretch_and_clamp(s, draw.stretch)
    by_w.copy_(z * (grad * draw.group_gate))
    return (z * w * grad).sum()
