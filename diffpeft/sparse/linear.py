"""What linear layers and embeddings with gradients of their own share."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What a linear layer computes in: autocast's dtype, or the weight's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def embedding_gradient(grad: Tensor, rows: Tensor, places: Tensor, padding_idx: int | None) -> Tensor:
    """The gradient of the rows that an embedding used, shape (n, width): `rows` (n,) says which, `places` where in `grad` each
    was used. The row of padding learns nothing."""
    by_row: Tensor = torch.ops.aten.embedding_dense_backward(grad, places, len(rows), -1, False)
    return by_row if padding_idx is None else by_row.masked_fill_((rows == padding_idx).unsqueeze(1), 0)
