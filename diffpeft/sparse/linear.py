"""Pieces of linear layers and embeddings whose backward pass is written by hand."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: autocast's, or the weight's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def embedding_gradient(grad: Tensor, rows: Tensor, inverse: Tensor, padding_idx: int | None) -> Tensor:
    """The gradient of the rows that an embedding used, shape (n, width). That of the padding row is 0.

    Args:
        grad: of the embedding's output, shape (..., width).
        rows: indices of the used rows, each once, int64, shape (n,).
        inverse: index into `rows` of each vector in `grad`, int64, shape (...).
        padding_idx: the row of padding.
    """
    by_row: Tensor = torch.ops.aten.embedding_dense_backward(grad, inverse, len(rows), -1, False)
    return by_row if padding_idx is None else by_row.masked_fill_((rows == padding_idx).unsqueeze(1), 0)
