"""The ways to run a wrapped module: without a copy of the weight, with sampled gates, on a quantised weight."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffpeft.gates.compile import prepare_transpose, transpose
from diffpeft.gates.forward_pass import may_be_replayed
from diffpeft.gates.functions import GateSample, gated_embedding, gated_linear, gated_parameter_sampled
from diffpeft.gates.hard_concrete import GatedTensors
from diffpeft.gates.small_parameters import MAX_SMALL_ELEMENTS, SmallParameter, small_parameters
from diffpeft.gates.update.low_memory import accumulator, low_memory_gates
from diffpeft.layer.wrapped import device_of, is_offloaded, is_plain
from diffpeft.sparse.functions import sampling_pays, sparse_embedding, sparse_linear, sparse_parameter
from diffpeft.sparse.inplace import Entry, InplaceUpdate, can_be_overwritten
from diffpeft.sparse.sharded import is_sharded

Layer: TypeAlias = Any
"""A `DiffPruningLayer`, whose module imports this one."""

MIN_ROWWISE_ELEMENTS = 1 << 20
"""Elements of an embedding from which on a pass without gradients makes the rows of the batch alone."""


# Without a copy of the weight


def without_copy(layer: Layer, args: Any, kwargs: dict[str, Any]) -> tuple[bool, Any]:
    """Run the module without a copy of its weight: whether that is possible, and the output.

    A module that has no children reads its parameters only while it runs, so that sparse diffs can be added in place.
    """
    module: Any = layer._modules["base_layer"]
    if module._modules or layer.quantized or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False, None
    direct, kind = torch.is_grad_enabled(), type(module)
    if kind is nn.Embedding and not direct:
        direct = module.weight.numel() > MIN_ROWWISE_ELEMENTS  # or else the whole diff is added for a few rows
    if direct and kind in (nn.Linear, nn.Embedding) and len(args) == 1 and not kwargs and is_plain(module):
        selected = layer.selected("weight")
        if len(selected) == 1 and "weight" in layer.shapes:
            output = (_linear if kind is nn.Linear else _embedding)(layer, selected[0], *args)
            if output is not None:
                return True, output
    update = None if torch.is_grad_enabled() else _update_for_pass(layer)
    if update is None:
        return False, None
    with update:
        return True, module(*args, **kwargs)


def _update_for_pass(layer: Layer) -> InplaceUpdate | None:
    """The diffs of a pass without gradients; None where entries of the parameters alone cannot hold them."""
    own: dict[str, nn.Parameter] = layer._modules["base_layer"]._parameters
    if not all(parameter is None or can_be_overwritten(parameter) for parameter in own.values()):
        return None
    active = layer.active_adapters
    if len(active) == 1 and not layer.ties:
        if layer.is_gating(active[0]):
            return None
        return InplaceUpdate(layer.entries(active[0]).values() if active[0] in layer.configs else ())
    entries = []
    for name, parameter in own.items():
        for adapter_name in layer.selected(name):
            if layer.is_gating(adapter_name) or name not in layer.shapes or parameter is None:
                return None
            diff = layer.sparse(adapter_name, name)
            entries.append(Entry(parameter, diff.positions, diff.values))
    return InplaceUpdate(entries)


def _linear(layer: Layer, adapter_name: str, x: Tensor) -> Tensor | None:
    module: Any = layer.base_layer
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    if x.dtype != module.weight.dtype and not autocast:
        return None  # nn.Linear says what is wrong
    if not layer.is_gating(adapter_name):
        if not can_be_overwritten(module.weight):
            return None
        diff = layer.sparse(adapter_name, "weight")
        pattern = diff.pattern if sampling_pays(diff.count, module.weight.shape, x) else None
        if pattern is not None and layer.fused and not torch.compiler.is_compiling():
            prepare_transpose()
            pattern = pattern._replace(transpose=transpose)
        return sparse_linear(x, layer.read("bias"), module.weight, diff.values, diff.positions, pattern)
    w, log_alpha, group_log_alpha = layer.gates_of_parameter(adapter_name, "weight")
    if log_alpha is None or not layer.training:
        return None
    sample = _sample(layer, adapter_name, "weight")  # before the bias's
    return gated_linear(x, layer.read("bias"), GatedTensors(module.weight, w, log_alpha, group_log_alpha), sample)


def _embedding(layer: Layer, adapter_name: str, ids: Tensor) -> Tensor | None:
    module: Any = layer.base_layer
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    if not layer.is_gating(adapter_name):
        diff = layer.sparse(adapter_name, "weight")
        return sparse_embedding(ids, module.padding_idx, module.weight, diff.values, diff.pattern)
    w, log_alpha, group_log_alpha = layer.gates_of_parameter(adapter_name, "weight")
    if log_alpha is None or not layer.training:
        return None
    sample = _sample(layer, adapter_name, "weight")
    return gated_embedding(ids, module.padding_idx, GatedTensors(module.weight, w, log_alpha, group_log_alpha), sample)


# With sampled gates


def sampled(layer: Layer, parameter: Tensor, adapter_name: str, name: str) -> Tensor:
    """The effective parameter under sampled gates; small ones of the whole model are made at the first use of one."""
    sample = _sample(layer, adapter_name, name)
    small = _small_effective(layer, adapter_name, name)
    if small is not None:
        return small
    w, log_alpha, group_log_alpha = layer.gates_of_parameter(adapter_name, name)
    assert log_alpha is not None
    return gated_parameter_sampled(GatedTensors(parameter, w, log_alpha, group_log_alpha), sample)


def _sample(layer: Layer, adapter_name: str, name: str) -> GateSample:
    """How a parameter's gates are sampled in this pass."""
    config, key = layer.configs[adapter_name], (layer.key, adapter_name, name)
    keep = not config.low_memory and not torch.compiler.is_compiling() and not may_be_replayed()
    return GateSample(
        layer.noise.seed(key),
        config.stretch,
        layer.fused,
        layer.noise.workspace,
        accumulator(layer, adapter_name, name),
        key if keep else None,
    )


def _small_effective(layer: Layer, adapter_name: str, name: str) -> Tensor | None:
    """A small effective parameter, which the first use of one in a pass makes for all; None for others."""
    noise = layer.noise
    if noise.model is None or torch.compiler.is_compiling() or may_be_replayed():
        return None
    if noise.small_effective is None:
        noise.small_effective, small, device = {}, {}, device_of(layer.base_layer)
        for other in layer.running_layers():
            if other.noise is noise:
                small.update(_small_parameters(other, adapter_name, device))
        if small:
            made = small_parameters(list(small.values()), layer.configs[adapter_name].stretch)
            noise.small_effective.update(zip(small, made, strict=True))
    effective: Tensor | None = noise.small_effective.get((layer.key, adapter_name, name))
    return effective


def _small_parameters(
    layer: Layer, adapter_name: str, device: torch.device
) -> dict[tuple[str, str, str], SmallParameter]:
    """The module's small parameters that one adapter changes, and whose gates are sampled."""
    module: Any = layer.base_layer
    idle = layer.disable_adapters or layer.merged or layer.quantized or is_offloaded(module) or not layer.training
    if idle or layer.active_adapters != [adapter_name] or not layer.is_gating(adapter_name):
        return {}
    small = {}
    for name in layer.shapes:
        w, log_alpha, group_log_alpha = layer.gates_of_parameter(adapter_name, name)
        own = module._parameters.get(name)
        apart = name == "weight" and type(module) in (nn.Linear, nn.Embedding)  # these have a way of their own
        if log_alpha is None or own is None or apart or log_alpha.numel() > MAX_SMALL_ELEMENTS or is_sharded(w):
            continue
        if log_alpha.device == own.device == device and low_memory_gates(layer, adapter_name, name) is None:
            key = layer.key, adapter_name, name
            small[key] = SmallParameter(GatedTensors(own, w, log_alpha, group_log_alpha), layer.noise.seed_of(key))
    return small


# On offloaded parameters, and on a quantised weight


def check_loaded(layer: Layer) -> None:
    """Raise ValueError where a gating adapter's w, which was offloaded, was never loaded."""
    for adapter_name, tensors in layer.diffpruning_w.items():
        for name, w in tensors.items():
            if bool(w.isnan().any()):
                raise ValueError(
                    f"{layer.parameter_key(name)}, adapter {adapter_name!r}: w was never loaded or is damaged; load "
                    "the adapter again, with PeftModel.from_pretrained"
                )


def add_to_quantized(layer: Layer, output: Tensor, x: Tensor) -> Tensor:
    """The output plus x delta^T: the sum of a quantised weight and a diff cannot be stored."""
    for adapter_name in layer.selected("weight"):
        diff = layer.sparse(adapter_name, "weight")
        zeros = torch.zeros(layer.shapes["weight"], dtype=x.dtype, device=x.device)
        delta = sparse_parameter(zeros, diff.values, diff.positions)
        output = output + functional.linear(x, delta).to(output.dtype)
    return output
