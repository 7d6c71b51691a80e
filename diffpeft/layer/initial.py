"""An adapter's tensors on one layer, at their initial values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from diffpeft.config import DiffPruningConfig
from diffpeft.files.encoding import buffer_size
from diffpeft.files.keys import POSITIONS, VALUES
from diffpeft.gates.update.factored import is_large, new_moments
from diffpeft.gates.update.held import GATING_BUFFERS, GROUP_MOMENTS, LOG_ALPHAS, LOW_MEMORY_BUFFERS, MOMENTS
from diffpeft.sparse.sharded import is_sharded, local, shard_like

GATING_PARAMETERS = ("diffpruning_w", *LOG_ALPHAS)
INIT_STD = 0.02
"""Standard deviation of diffs that start at random, as tests want them."""


def gating_tensors(
    shapes: Mapping[str, torch.Size], device: torch.device, config: DiffPruningConfig, unknown: bool
) -> dict[str, nn.Module]:
    """The containers of an adapter in gating, by attribute of the layer: w, gates, and the moments of their gradients.

    Args:
        shapes: the parameters to adapt, by name.
        device: where to make the tensors.
        config: the adapter's.
        unknown: whether w is NaN until something is loaded.
    """
    parameters = {attribute: nn.ParameterDict() for attribute in GATING_PARAMETERS}
    w, log_alpha, group_log_alpha = parameters.values()
    moments = {attribute: BufferDict(persistent=True) for attribute in GATING_BUFFERS}
    for name, shape in shapes.items():
        if not config.chosen_in_training:  # nothing but a place in the optimizer
            w[name] = nn.Parameter(torch.empty(0, dtype=torch.float32, device=device))
            continue
        zeros = torch.zeros(shape, dtype=torch.float32, device=device)
        w[name] = nn.Parameter(zeros if config.init_weights else torch.randn_like(zeros).mul_(INIT_STD))
        if unknown:
            w[name].data.fill_(torch.nan)
        if w[name].is_meta:  # PEFT's low_cpu_mem_usage
            zeros = zeros.to("meta")
        if not config.gated:
            continue
        coarse = config.low_memory and is_large(shape)
        dtype = torch.float16 if coarse else torch.float32
        log_alpha[name] = nn.Parameter(torch.full_like(zeros, config.init_log_alpha, dtype=dtype))
        own = new_moments(zeros) if coarse else {kind: torch.zeros_like(zeros) for kind in MOMENTS}
        if config.structured:
            zero = zeros.new_zeros(1)
            group_log_alpha[name] = nn.Parameter(torch.full_like(zero, config.init_log_alpha))
            own |= {kind: zero.clone() for kind in GROUP_MOMENTS}
        for attribute, tensor in own.items():
            moments[attribute][name] = tensor
    kept = {attribute: own for attribute, own in moments.items() if len(own) or attribute not in LOW_MEMORY_BUFFERS}
    return {**parameters, **kept}


def fixmask_tensors(
    shapes: Mapping[str, torch.Size], nnz: Mapping[str, int], device: torch.device, config: DiffPruningConfig
) -> dict[str, nn.Module]:
    """Room for an adapter's values, NaN, and for their packed positions, zeros, by attribute of the layer.

    `nnz` has the number of values of each parameter that has any. With `init_weights=False` they are random.
    """
    values, packed = nn.ParameterDict(), BufferDict(persistent=True)
    for name, count in nnz.items():
        unknown = torch.full((count,), torch.nan, dtype=torch.float32, device=device)
        values[name] = nn.Parameter(unknown if config.init_weights else torch.randn_like(unknown).mul_(INIT_STD))
        size = buffer_size(count, shapes[name].numel(), config.value_dtype)
        packed[name] = torch.zeros(size, dtype=torch.uint8, device=device)
    return {VALUES: values, POSITIONS: packed}


def check_phases(state: Collection[str], prefix: str, gating: Mapping[str, bool]) -> None:
    """Raise ValueError where a state dict has an adapter of a layer in the other phase than the model.

    `state` are its keys, those of the layer begin with `prefix`; `gating` tells each adapter's phase in the model.
    """
    for adapter_name, is_gating in gating.items():
        kinds = (GATING_PARAMETERS[0], VALUES)
        held = [any(key.startswith(f"{prefix}{kind}.{adapter_name}.") for key in state) for kind in kinds]
        if held == [not is_gating, is_gating]:
            theirs, ours = ("fixmask", "gating") if is_gating else ("gating", "fixmask")
            raise ValueError(
                f"the state that is loaded has adapter {adapter_name!r} in {theirs}, and the model has it in {ours}; "
                "save the adapter with save_pretrained beside the state, make the model with "
                "PeftModel.from_pretrained(base, directory, is_trainable=True), then the optimizer, and load the state"
            )


# On shards of FSDP2: each process makes and keeps its own pieces


def give_addresses(layer: Any, adapter_name: str) -> None:
    """Put dense diffs that are on the meta device on the CPU, untouched, so that they take no memory there yet.

    Accelerate finds the optimizer's parameters by their addresses.
    """
    for name, w in layer.held(GATING_PARAMETERS[0], adapter_name).items():
        if w.is_meta:
            layer.diffpruning_w[adapter_name][name] = nn.Parameter(torch.zeros(w.shape), w.requires_grad)


def materialize(layer: Any, adapter_name: str) -> None:
    """Give sharded gating tensors that are on the meta device their initial values."""
    for kind in GATING_PARAMETERS:
        held = layer.held(kind, adapter_name).values()
        if any(is_sharded(parameter) and parameter.is_meta for parameter in held):
            getattr(layer, kind)[adapter_name].to_empty(device=next(iter(held)).device_mesh.device_type)
            for parameter in layer.held(kind, adapter_name).values():
                local(parameter).fill_(layer.configs[adapter_name].init_log_alpha if kind in LOG_ALPHAS else 0.0)
    shard_moments(layer, adapter_name)


def shard_moments(layer: Any, adapter_name: str) -> None:
    """Shard the moments of gates as the gates are: FSDP2 shards parameters alone, and moments are buffers."""
    for log_alphas, kinds in zip(LOG_ALPHAS, (MOMENTS, GROUP_MOMENTS), strict=True):
        for name, log_alpha in layer.held(log_alphas, adapter_name).items():
            for kind in kinds if is_sharded(log_alpha) and not log_alpha.is_meta else ():
                moments = getattr(layer, kind)[adapter_name]
                if moments[name].is_meta:
                    moments[name] = torch.zeros_like(log_alpha, requires_grad=False)
                elif not is_sharded(moments[name]):
                    moments[name] = shard_like(moments[name], log_alpha)
