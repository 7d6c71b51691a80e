"""The elementwise chains of the gating phase: one source for a compiler, which fuses each into one pass, and for eager mode.

A gate's noise follows from a seed and the gate's place in its tensor (`diffpeft/gates/noise.py`): it is made here, wherever it is
needed, and stored nowhere.

torch.compile turns a chain into one loop (`diffpeft/gates/compile.py`). Where it cannot, as without a C++ compiler, the same source
runs eagerly, on a CPU in pieces that stay in its cache: the noise is the same to the bit, the rest to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffpeft.gates.compile import compile_and_run
from diffpeft.gates.hard_concrete import (
    PIECE,
    Stretch,
    binary_concrete,
    gate_slope,
    open_shift,
    stretch_and_clamp,
    widened,
)
from diffpeft.gates.noise import uniform

WORTH_FUSING = 1 << 20
"""Gates of an adapter from which on a compiler's time pays."""
BETAS = (0.9, 0.999)
EPS = 1e-8
_SMALLEST = 1e-30
UNIT = 1 << 30
"""Probabilities are added in integer units of 2^-30, so that their sum does not depend on the order."""


def _places(like: Tensor, start: int, rows: Tensor | None) -> Tensor:
    """Where the elements of `like` stand in the whole tensor: from `start` on, or in some rows of a matrix."""
    if rows is None:
        return torch.arange(start, start + like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    columns = torch.arange(like.shape[1], dtype=torch.int32, device=like.device)
    return rows.to(torch.int32).unsqueeze(1) * like.shape[1] + columns


def _effective(
    out: Tensor,
    base: Tensor,
    w: Tensor,
    log_alpha: Tensor,
    start: int,
    whole: Tensor,
    seed: Tensor,
    stretch: Stretch,
    rows: Tensor | None,
) -> None:
    s = binary_concrete(log_alpha, uniform(seed, _places(w, start, rows)))
    out.copy_(stretch_and_clamp(s, stretch) * (w * whole) + base)


def _gradients(
    by_w: Tensor,
    by_log_alpha: Tensor,
    grad: Tensor,
    w: Tensor,
    log_alpha: Tensor,
    start: int,
    whole: Tensor,
    seed: Tensor,
    stretch: Stretch,
    rows: Tensor | None,
) -> Tensor:
    s, grad = binary_concrete(log_alpha, uniform(seed, _places(w, start, rows))), grad.float()
    by_log_alpha.copy_(gate_slope(s, stretch) * (w * (grad * whole)))
    z = stretch_and_clamp(s, stretch)
    by_w.copy_(z * (grad * whole))
    return (z * w * grad).sum()


def open_units(log_alpha: Tensor, shift: float) -> Tensor:
    """P(z > 0) in units of 2^-30, int32."""
    return (torch.sigmoid(widened(log_alpha) - shift) * UNIT).to(torch.int32)


def _open_elements(log_alpha: Tensor, start: int, shift: float) -> Tensor:
    return open_units(log_alpha, shift).sum(dtype=torch.int64)


def direction(mean: Tensor, square: Tensor, pull: Tensor | float) -> Tensor:
    """(m + lambda) / (sqrt(v) + lambda), in [-1, 1] up to bias correction; gates without any gradient just close."""
    return ((mean + pull) / (square.sqrt() + (pull + _SMALLEST))).clamp(-1, 1)


def _automatic(log_alpha: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, start: int, rule: Tensor) -> None:
    mean = torch.lerp(exp_avg, grad, 1 - BETAS[0])
    square = exp_avg_sq * BETAS[1] + grad * grad * (1 - BETAS[1])
    move = direction(mean * rule[3], square * rule[4], rule[0])
    log_alpha.copy_(log_alpha - torch.where(move > 0, rule[2], rule[1]) * move)
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)


def _penalised(grad: Tensor, log_alpha: Tensor, shift: float, weight: Tensor) -> Tensor:
    chance = torch.sigmoid(log_alpha - shift)
    return grad + weight * (chance * (1 - chance))


def _penalised_square(grad: Tensor, log_alpha: Tensor, start: int, shift: float, weight: Tensor) -> Tensor:
    return _penalised(grad, log_alpha, shift, weight).square().sum()


def _adam(
    log_alpha: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    start: int,
    shift: float,
    weight: Tensor,
    rule: Tensor,
) -> None:
    clipped = _penalised(grad, log_alpha, shift, weight) * rule[0]
    mean = torch.lerp(exp_avg, clipped, 1 - BETAS[0])
    square = exp_avg_sq * BETAS[1] + clipped * clipped * (1 - BETAS[1])
    log_alpha.copy_(log_alpha - rule[1] * mean / ((square * rule[2]).sqrt() + EPS))
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)


def _run(chain: Callable[..., Any], fused: bool, tensors: Sequence[Tensor], *settings: Any, whole: bool = False) -> Any:
    """Run a chain on tensors of one shape: compiled, or eagerly and on a CPU in pieces, unless it is to see them `whole`. What
    it returns is added up."""
    tensors = [tensor.detach() for tensor in tensors]
    if torch.compiler.is_compiling():
        return chain(*tensors, 0, *settings)
    flat = all(tensor.is_contiguous() for tensor in tensors)
    if flat and not whole:
        tensors = [tensor.view(-1) for tensor in tensors]
    if fused and flat and tensors[0].numel() > 1:
        done, result = compile_and_run(chain, *tensors, 0, *settings, again=not whole)
        if done:
            return result
    if not flat or whole or tensors[0].device.type != "cpu" or tensors[0].numel() <= PIECE:
        return chain(*tensors, 0, *settings)
    results, start = [], 0
    for piece in zip(*(torch.split(tensor, PIECE) for tensor in tensors), strict=True):
        results.append(chain(*piece, start, *settings))
        start += piece[0].numel()
    return None if results[0] is None else torch.stack(results).sum()


def effective(
    out: Tensor,
    base: Tensor,
    w: Tensor,
    log_alpha: Tensor,
    whole: Tensor,
    seed: Tensor,
    stretch: Stretch,
    rows: Tensor | None = None,
    fused: bool = False,
) -> None:
    """Write theta + z z_group w with sampled gates into `out`.

    Args:
        out: any dtype, shape of `base`.
        base: theta, or some of its rows; any dtype.
        w: the dense diff, fp32, shape of `base`, as is `log_alpha`.
        log_alpha: locations of the gates.
        whole: the group's gate, fp32, shape ().
        seed: int32, shape (4,), of the noise.
        stretch: (l, r).
        rows: int64, shape (n,): which rows of a matrix the n rows of `base` are; None: all of the parameter is given.
        fused: whether to compile.
    """
    _run(_effective, fused, [out, base, w, log_alpha], whole, seed, stretch, rows, whole=rows is not None)


def gradients(
    grad: Tensor,
    w: Tensor,
    log_alpha: Tensor,
    whole: Tensor,
    seed: Tensor,
    stretch: Stretch,
    rows: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by w and by the locations, and the sum over elements of gradient z w, all from the one gradient of the effective
    parameter. Arguments as of [`effective`]."""
    by_w, by_log_alpha = torch.empty_like(w), torch.empty_like(w)
    tensors = [by_w, by_log_alpha, grad, w, log_alpha]
    by_whole = _run(_gradients, fused, tensors, whole, seed, stretch, rows, whole=rows is not None)
    return by_w, by_log_alpha, by_whole


def open_elements(log_alpha: Tensor, stretch: Stretch, fused: bool = False) -> Tensor:
    """Sum of P(z > 0) over the elements in units of 2^-30, int64, shape (): the same whatever the order."""
    total: Tensor = _run(_open_elements, fused, [log_alpha], open_shift(stretch))
    return total


def automatic_(
    log_alpha: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    stretch: Stretch,
    rule: Tensor,
    fused: bool = False,
) -> Tensor:
    """Move gates by the automatic rule of `diffpeft/gates/update/rules.py`; `rule` is fp32: pull, pace of opening and of closing, and the
    factors that correct the bias of the two moments. Returns what [`open_elements`] counts then."""
    _run(_automatic, fused, [log_alpha, grad, exp_avg, exp_avg_sq], rule)
    return open_elements(log_alpha, stretch, fused)  # while they are in a cache


def penalised_square(grad: Tensor, log_alpha: Tensor, stretch: Stretch, weight: Tensor, fused: bool = False) -> Tensor:
    """Squared norm of the gradient of loss + `weight` * sum P(z > 0), shape ()."""
    return _run(_penalised_square, fused, [grad, log_alpha], open_shift(stretch), weight)  # type: ignore[no-any-return]


def adam_(
    log_alpha: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    stretch: Stretch,
    weight: Tensor,
    rule: Tensor,
    fused: bool = False,
) -> None:
    """Move gates by Adam on loss + `weight` * sum P(z > 0); `rule` is fp32: the gradient's factor, the step's length corrected for
    the first moment's bias, and the factor that corrects the second's."""
    _run(_adam, fused, [log_alpha, grad, exp_avg, exp_avg_sq], open_shift(stretch), weight, rule)
