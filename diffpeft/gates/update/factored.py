"""Second moments of matrices by the means of their rows and columns (Adafactor: Shazeer and Stern 2018, arXiv 1804.04235).

Of a matrix of squares V with row means r and column means c only these are kept, and V is taken to be r c^T / mean(r): the
rank-one matrix with the same means. Tensors of more dimensions are matrices for this, cut where that leaves the fewest means.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGE = 1 << 14
"""Elements beyond which it pays."""
SMALLEST = 1e-30
"""Keeps what is divided by above nought."""


def is_large(shape: torch.Size) -> bool:
    """Whether a tensor is one of which means of rows and columns take next to no memory."""
    return len(shape) > 1 and shape.numel() > LARGE


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a tensor of two dimensions at least as a matrix."""
    cuts = [(math.prod(shape[:cut]), math.prod(shape[cut:])) for cut in range(1, len(shape))]
    return min(cuts, key=sum)


def mean_squares(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the squares of a matrix, fp32: of each row and of each column. No copy of the matrix is made."""
    norm = torch.linalg.vector_norm
    by_row, by_column = (norm(matrix, dim=dim, dtype=torch.float32).square() for dim in (1, 0))
    return by_row / matrix.shape[1], by_column / max(1, matrix.shape[0])


def factors(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Two vectors whose outer product is the second moment with these means."""
    return rows, columns / rows.mean().clamp_min(SMALLEST)
