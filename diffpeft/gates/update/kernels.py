"""The elementwise chains that move gates and count open ones, as `diffpeft/gates/kernels.py` has those of a pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpeft.gates.compile import elementwise
from diffpeft.gates.hard_concrete import widened

BETAS = (0.9, 0.999)
"""Adam's, of the two moments of the gates' gradients."""
EPSILON = 1e-8
"""Adam's, of the paper's rule."""
MIN_DIVISOR = 1e-30
"""Keeps what is divided by above zero."""
PROBABILITY_UNIT = 1 << 30
"""Probabilities are added in integer units of 2^-30, so that their sum does not depend on the order."""


def open_units(log_alpha: Tensor, shift: float) -> Tensor:
    """P(z > 0) in units of 2^-30, int32, shape of `log_alpha`; `shift` is log(-l / r)."""
    return (torch.sigmoid(widened(log_alpha) - shift) * PROBABILITY_UNIT).to(torch.int32)


@elementwise
def open_elements(tensors: Sequence[Tensor], start: int, shift: float) -> Tensor:
    """Sum of P(z > 0) over one tensor of log_alpha, in units of 2^-30, int64, shape ()."""
    return open_units(tensors[0], shift).sum(dtype=torch.int64)


def direction(mean: Tensor, square: Tensor, l0_lambda: Tensor | float) -> Tensor:
    """(m + lambda) / (sqrt(v) + lambda), in [-1, 1] up to bias correction; gates without any gradient just close."""
    return ((mean + l0_lambda) / (square.sqrt() + (l0_lambda + MIN_DIVISOR))).clamp(-1, 1)


@elementwise
def automatic(tensors: Sequence[Tensor], start: int, rule: Tensor) -> None:
    """Move gates by the automatic rule of `diffpeft/gates/update/rules.py`.

    Args:
        tensors: log_alpha, its gradient and the two moments, fp32.
        rule: fp32, shape (5,) or (5, elements): lambda, the largest step of opening and of closing, and the factors
            that correct the bias of the two moments.
    """
    log_alpha, grad, exp_avg, exp_avg_sq = tensors
    mean = torch.lerp(exp_avg, grad, 1 - BETAS[0])
    square = exp_avg_sq * BETAS[1] + grad * grad * (1 - BETAS[1])
    move = direction(mean * rule[3], square * rule[4], rule[0])
    log_alpha.copy_(log_alpha - torch.where(move > 0, rule[2], rule[1]) * move)
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)


def _penalised(grad: Tensor, log_alpha: Tensor, shift: float, weight: Tensor) -> Tensor:
    """Gradient of loss + `weight` * sum P(z > 0)."""
    chance = torch.sigmoid(log_alpha - shift)
    return grad + weight * (chance * (1 - chance))


@elementwise
def penalised_square(tensors: Sequence[Tensor], start: int, shift: float, weight: Tensor) -> Tensor:
    """Squared norm of the gradient of loss + `weight` * sum P(z > 0), shape (); tensors: gradient and log_alpha."""
    grad, log_alpha = tensors
    return _penalised(grad, log_alpha, shift, weight).square().sum()


@elementwise
def adam(tensors: Sequence[Tensor], start: int, shift: float, weight: Tensor, rule: Tensor) -> None:
    """Move gates by Adam on loss + `weight` * sum P(z > 0).

    Args:
        tensors: log_alpha, its gradient and the two moments, fp32.
        weight: of the penalty, fp32, shape (); `shift` is log(-l / r).
        rule: fp32, shape (3,): the gradient's factor, the step's length corrected for the first moment's bias, and the
            factor that corrects the second's.
    """
    log_alpha, grad, exp_avg, exp_avg_sq = tensors
    clipped = _penalised(grad, log_alpha, shift, weight) * rule[0]
    mean = torch.lerp(exp_avg, clipped, 1 - BETAS[0])
    square = exp_avg_sq * BETAS[1] + clipped * clipped * (1 - BETAS[1])
    log_alpha.copy_(log_alpha - rule[1] * mean / ((square * rule[2]).sqrt() + EPSILON))
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)
