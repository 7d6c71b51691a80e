"""Questions about a wrapped module: is it quantised, offloaded, plain, and where does it run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn


def own_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the parameters that a diff can be added to, by their names in the module, without its children's.

    Those are the floating ones, and the weight of a quantised linear layer, in the shape that it had before.
    """
    own = module.named_parameters(recurse=False)
    shapes = {name: parameter.shape for name, parameter in own if parameter.is_floating_point()}
    if is_quantized(module):
        linear: Any = module
        shapes["weight"] = torch.Size((linear.out_features, linear.in_features))
    return shapes


def quantization_backend(module: nn.Module) -> QuantizationBackend | None:
    """PEFT's backend for a module with a quantised weight; None for others."""
    # How the argument is called matters for merging alone, which layers refuse.
    return resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None)


def is_quantized(module: nn.Module) -> bool:
    """Whether PEFT knows the module as one with a quantised weight."""
    return quantization_backend(module) is not None


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's parameters are brought to a device only while it runs."""
    hook = module.__dict__.get("_hf_hook")
    return isinstance(hook, AlignDevicesHook) and bool(hook.offload)


def device_of(module: nn.Module) -> torch.device:
    """The device of the module's own tensors, or the one that offloaded ones are brought to."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type != "meta":
        return device
    return torch.device(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or "cpu")


def is_plain(module: nn.Module) -> bool:
    """Whether running the module is its class's forward and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__


def take_hiding(module: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Take tensors off the module that hide its parameters, as FSDP version 1 sets them while a module runs."""
    return {name: module.__dict__.pop(name) for name in names if name in module.__dict__}


def run_onloaded(
    module: nn.Module, containers: Iterable[Any], forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """The output of `forward`, run while an offloaded module's tensors are on the device that runs them.

    The arguments are brought along, and so are the tensors of `containers`, which nothing calls, so that their hooks
    would never run. `forward` may call the module, without the hook that would bring the plain parameters again.
    """
    offloaded: Any = module
    hook, hooked = offloaded._hf_hook, offloaded.forward
    held = [one for one in containers if hasattr(one, "_hf_hook")]
    for one in held:
        one._hf_hook.pre_forward(one)
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    offloaded.forward = offloaded._old_forward
    try:
        output = forward(*args, **kwargs)
    finally:
        offloaded.forward = hooked
        for one in held:
            one._hf_hook.post_forward(one, None)
    return hook.post_forward(module, output)


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function with results that have the dtypes of its arguments."""

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return apply
