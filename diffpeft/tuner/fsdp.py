"""Pruning an adapter on a model that FSDP2 has sharded: values take the place of dense diffs in its groups.

Only this file touches the private parts of `torch.distributed.fsdp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import _composable_state
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from diffpeft.gates.update.held import check_rule, log_alphas
from diffpeft.layer import initial
from diffpeft.sparse.sharded import processes_of

TESTED_TORCH = "2.13"
"""The version of torch whose groups of sharded parameters this file knows."""


def before_sharding(layers: Sequence[Any], adapter_name: str) -> None:
    """Keep an adapter's gates out of the optimizer, which has no state for them, and give w an address for it."""
    if log_alphas(layers, adapter_name):
        check_rule(layers[0].configs[adapter_name])
    for layer in layers:
        layer.noise.sharded = True
        initial.give_addresses(layer, adapter_name)
    for log_alpha in log_alphas(layers, adapter_name):
        log_alpha.requires_grad_(False)


def after_sharding(layers: Sequence[Any], adapter_name: str) -> None:
    """Make an adapter's gating tensors where there are none yet, and let gates train.

    Raises:
        ValueError: shards that gates cannot be on.
    """
    processes_of(log_alphas(layers, adapter_name))
    for layer in layers:
        initial.materialize(layer, adapter_name)
    for log_alpha in log_alphas(layers, adapter_name):
        log_alpha.requires_grad_(True)


def shard_moments(layers: Iterable[Any], adapter_name: str) -> None:
    """Shard the moments of an adapter's gates as the gates are."""
    for layer in layers:
        initial.shard_moments(layer, adapter_name)


class ShardGroups:
    """The groups of parameters that FSDP2 gathers and shards together, as far as they hold an adapter's."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        wanted, self._groups = {id(parameter) for parameter in parameters}, dict[int, Any]()
        for state in [reference() for reference in _composable_state._module_state_mapping.values()]:
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None and isinstance(state, FSDPState):
                raise RuntimeError(
                    f"torch {torch.__version__} keeps FSDP2's parameters elsewhere than torch {TESTED_TORCH}, which "
                    "pruning on shards was made for; save the adapter in gating, prune it in one process, and train on "
                    "here with gating_steps=0"
                )
            for group in groups or ():
                self._groups.update(
                    {id(p.sharded_param): group for p in group.fsdp_params if id(p.sharded_param) in wanted}
                )

    def replace(self, old: nn.Parameter, module: nn.Module, name: str) -> None:
        """Manage the parameter `name` of `module`, which every process has whole, in the group of an old one."""
        group = self._groups[id(old)]
        mesh = group.mesh_info, group.post_forward_mesh_info, group.device
        info = ParamModuleInfo(module, name)
        group.fsdp_params.append(
            FSDPParam(getattr(module, name), info, *mesh, None, group.mp_policy, group.offload_policy)
        )

    def finish(self) -> None:
        """Let go of the old parameters."""
        for group in {id(group): group for group in self._groups.values()}.values():
            group.fsdp_params = [own for own in group.fsdp_params if id(own.sharded_param) not in self._groups]
            group._init_mp_dtypes()


def fill_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters the optimizer state that they have before their first step, where no other has a gradient.

    A checkpoint of shards needs the state of every parameter, and torch makes what is missing by a step that counts.
    """
    parameters = list(parameters)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in parameters:
        parameter.grad = None
        state = optimizer.state.get(parameter, {})
        if "step" in state:
            state["step"] = state["step"] * 0
