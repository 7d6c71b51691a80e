"""Parameters that FSDP has sharded over processes, and the error for what needs them whole."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

REMEDY = "gate and prune in one process or under plain DistributedDataParallel, then train on here with gating_steps=0"
"""The advice in errors about gating and pruning of sharded parameters."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a piece of the tensor."""
    return isinstance(tensor, DTensor)


def check_whole(tensors: Iterable[Tensor], action: str) -> None:
    """Raise ValueError if one of the tensors is sharded; `action` says what needs them whole."""
    if torch.distributed.is_initialized() and any(is_sharded(tensor) for tensor in tensors):
        raise ValueError(f"{action} needs whole parameters, but FSDP has sharded these over processes; {REMEDY}")
