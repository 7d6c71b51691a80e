"""Second moments of matrices by the means of their rows and columns, and the update of a diff that follows from them.

Both are Adafactor's (Shazeer and Stern 2018, arXiv 1804.04235): squares V with row means r and column means c are taken
to be r c^T / mean(r). Tensors of more dimensions are matrices for this, cut where that leaves the fewest means.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffpeft.gates.update.held import DIFF_MOMENTS, LOW_MEMORY_MOMENTS
from diffpeft.gates.update.kernels import BETAS, MIN_DIVISOR

MIN_LARGE_ELEMENTS = (1 << 14) + 1
"""Elements from which means of rows and columns take next to no memory."""


def is_large(shape: torch.Size) -> bool:
    """Whether keeping means in place of a tensor of this shape pays."""
    return len(shape) > 1 and shape.numel() >= MIN_LARGE_ELEMENTS


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a tensor of two dimensions at least as a matrix."""
    cuts = [(math.prod(shape[:cut]), math.prod(shape[cut:])) for cut in range(1, len(shape))]
    return min(cuts, key=sum)


def mean_squares(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the squares of a matrix, fp32: of each row and of each column."""
    norm = torch.linalg.vector_norm
    by_row, by_column = (norm(matrix, dim=dim, dtype=torch.float32).square() for dim in (1, 0))
    return by_row / matrix.shape[1], by_column / max(1, matrix.shape[0])


def factors(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Two vectors whose outer product is the second moment with these means."""
    return rows, columns / rows.mean().clamp_min(MIN_DIVISOR)


def new_moments(w: Tensor) -> dict[str, Tensor]:
    """The buffers of a large parameter before any gradient, by their names; `w` is its dense diff."""
    rows, columns = matrix_shape(w.shape)
    made = [torch.zeros_like(w, dtype=torch.int8)]
    made += [w.new_zeros(size) for size in ((rows,), (rows,), (columns,), (rows,), (columns,), ())]
    return dict(zip((*LOW_MEMORY_MOMENTS, *DIFF_MOMENTS), made, strict=True))


class DiffMoments(NamedTuple):
    """The second moment of the gradient of one dense diff."""

    rows: Tensor
    """Means over each row of the diff as a matrix, fp32."""
    columns: Tensor
    """Means over each column, fp32."""
    weight: Tensor
    """Sum of the weights that gradients have in these, fp32, shape (): 1 - beta^t after t updates."""

    @torch.no_grad()
    def step(self, w: Tensor, grad: Tensor, rate: float, decay: float) -> bool:
        """Update a diff by Adafactor's rule without a first moment, with Adam's beta and correction of its bias.

        `w` is fp32, of at least two dimensions; its gradient is overwritten; `decay` is weight decay as a share of the
        learning rate. Returns False, with all as it was, where the gradient is not finite.
        """
        matrix = grad.contiguous().view(len(self.rows), len(self.columns))
        by_row, by_column = mean_squares(matrix)
        if not bool(by_row.sum().isfinite()):
            return False
        for moment, square in zip(self, (by_row, by_column, torch.ones_like(self.weight)), strict=True):
            moment.lerp_(square, 1 - BETAS[1])
        rows, columns = factors(self.rows / self.weight, self.columns / self.weight)
        matrix.mul_(rows.clamp_min(MIN_DIVISOR).rsqrt().unsqueeze(1))
        matrix.mul_(columns.clamp_min(MIN_DIVISOR).rsqrt())
        size = torch.linalg.vector_norm(matrix) / max(1, matrix.numel()) ** 0.5
        if decay:
            w.mul_(1 - rate * decay)
        w.sub_(matrix.mul_(rate / size.clamp_min(1.0)).view(w.shape))
        return True
