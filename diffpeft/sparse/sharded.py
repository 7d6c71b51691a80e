"""Parameters that FSDP2 has sharded by rows over processes: the pieces that this one holds, and sums over all."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Shard

Processes = Any
"""A process group, or None where every process has everything."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a piece of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The piece of a tensor that this process holds, in the tensor's own memory, without gradient."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the pieces of all processes, without gradient."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def offset(tensor: Tensor) -> int:
    """Flat position in the whole tensor of the first element that this process holds."""
    if not isinstance(tensor, DTensor):
        return 0
    rows = tensor.shape[0]
    first = tensor.device_mesh.get_local_rank() * -(-rows // tensor.device_mesh.size())
    return min(first, rows) * (tensor.numel() // max(rows, 1))


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a whole tensor, as a tensor that is sharded as `like`, of the same shape."""
    assert isinstance(like, DTensor)
    start, own = offset(like), local(like)
    piece = tensor.reshape(-1)[start : start + own.numel()].view(own.shape).clone()
    return DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def processes_of(tensors: Iterable[Tensor]) -> Processes:
    """The processes that tensors are sharded over; None where none is.

    Raises:
        ValueError: a mesh of several dimensions, or shards of other dimensions than the first.
    """
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            if tensor.device_mesh.ndim != 1 or tensor.placements != (Shard(0),):
                raise ValueError(
                    f"gating on a device mesh of {tensor.device_mesh.ndim} dimensions with placements "
                    f"{tensor.placements} does not work; use fully_shard on a mesh of one dimension"
                )
            return tensor.device_mesh.get_group()
    return None


def add_up(tensor: Tensor, processes: Processes) -> Tensor:
    """The sum of a tensor over the processes, in its place; every process gets the same bits."""
    if processes is not None:
        total = tensor.to(_device(tensor, processes))
        distributed.all_reduce(total, group=processes)
        tensor.copy_(total)
    return tensor


def gather(tensor: Tensor, processes: Processes) -> list[Tensor]:
    """A flat tensor of each process, in their order, on all of them; lengths may differ."""
    lengths = gather_equal(torch.tensor([len(tensor)]), processes)
    padded = torch.cat([tensor, tensor.new_zeros(int(max(lengths)) - len(tensor))])
    return [own[: int(length)] for own, length in zip(gather_equal(padded, processes), lengths, strict=True)]


def gather_equal(tensor: Tensor, processes: Processes) -> list[Tensor]:
    """A tensor of each process, in their order, on all of them; all have one shape."""
    own = tensor.to(_device(tensor, processes))
    found = [torch.empty_like(own) for _ in range(distributed.get_world_size(processes))]
    distributed.all_gather(found, own, group=processes)
    return [one.to(tensor.device) for one in found]


def _device(tensor: Tensor, processes: Processes) -> torch.device:
    """The tensor's device, or the GPU where the processes cannot send what is on the CPU."""
    if tensor.is_cpu and "gloo" not in distributed.get_backend(processes):
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device


def check_whole(tensors: Iterable[Tensor], action: str) -> None:
    """Raise ValueError if one of the tensors is sharded; `action` says what needs them whole."""
    if distributed.is_initialized() and any(is_sharded(tensor) for tensor in tensors):
        raise ValueError(
            f"{action} needs whole parameters, but FSDP has sharded these over processes; do it before the model is "
            "sharded, or save the adapter and load it in one process"
        )
