"""The tensors of all adapters on one wrapped module: in gating, in fixmask, and on their way between the two."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn

from diffpeft.config import DiffPruningConfig
from diffpeft.files import seal
from diffpeft.files.stored_diff import FixmaskTensors
from diffpeft.files.values import buffer_size
from diffpeft.gates import hard_concrete as gates
from diffpeft.gates.update import factored
from diffpeft.layer.gating import GATING_BUFFERS, GROUP_MOMENTS, LEAN_BUFFERS, MOMENTS, Gating, new_moments

GATING_PARAMETERS = ("diffpruning_w", "diffpruning_log_alpha", "diffpruning_group_log_alpha")
VALUES = "diffpruning_values"
POSITIONS = "diffpruning_positions"


_births = itertools.count()


def own_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the parameters that a diff can be added to, by their names in the module, its children's left out.

    Those are the floating ones, and the weight of a quantised linear layer, in the shape that it had before.
    """
    own = module.named_parameters(recurse=False)
    shapes = {name: parameter.shape for name, parameter in own if parameter.is_floating_point()}
    if is_quantized(module):
        linear: Any = module
        shapes["weight"] = torch.Size((linear.out_features, linear.in_features))
    return shapes


def is_quantized(module: nn.Module) -> bool:
    """Whether PEFT knows the module as one with a quantised weight."""
    return _backend(module) is not None


def _backend(module: nn.Module) -> QuantizationBackend | None:
    # What the argument is called with matters for merging alone, which is refused.
    return resolve_quantization_backend(module, get_apply_tensor_subclass=_no_subclass)


def _no_subclass() -> None:
    return None


def _keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return apply


class AdapterTensors(FixmaskTensors, Gating, BaseTunerLayer):
    """The adapters' part of [`DiffPruningLayer`].

    Every tensor of an adapter lives in an attribute of the class's prefix, by adapter, then by parameter name:

    - gating: `diffpruning_w` and `diffpruning_log_alpha` (shape of the parameter, fp32), `diffpruning_group_log_alpha`
      (shape (1,)), and as buffers the moments of the gates' gradients; large parameters in the low-memory mode have their
      own forms of these (`diffpeft/gates/update/low_memory.py`, `diffpeft/gates/update/in_backward.py`);
    - fixmask: `diffpruning_values` (shape (k,), fp32 while they train) and, as a buffer, `diffpruning_positions` (packed,
      uint8).

    Args:
        base_layer: the module; its parameters stay as they are.
        key: the module's name in the base model.
        ties: parameters of `base_layer` that are the same tensor as one of another layer, which then owns the diff.
    """

    adapter_layer_names = (*GATING_PARAMETERS, VALUES)
    other_param_names = (*GATING_BUFFERS, POSITIONS)

    def __init__(self, base_layer: nn.Module, key: str, ties: dict[str, tuple[Any, str]]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.key = key
        self.ties = ties
        self.shapes = {name: shape for name, shape in own_shapes(base_layer).items() if name not in ties}
        """Shapes of the parameters that this layer adapts, by their name in the module."""
        self.quantization_backend = _backend(base_layer)
        for name in self._all_names():
            self.__dict__[name] = {}  # until there is something to hold: a module costs time in every search
        self.configs: dict[str, DiffPruningConfig] = {}
        self.gates_born: dict[str, int] = {}
        """A number of its own each time that an adapter's gates are made: their memory may be that of others before."""
        self.pending = {}
        self._disable_adapters = False
        self._trained: set[str] = set()  # while adapters are disabled: those that train otherwise
        self._active_adapter: str | list[str] = []

    @property
    def quantized(self) -> bool:
        """Whether the wrapped module's weight is quantised, so that a diff cannot be added to it."""
        return self.quantization_backend is not None

    def _all_names(self) -> tuple[str, ...]:
        return (*self.adapter_layer_names, *self.other_param_names)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this layer adapts, by their name in the module; a quantised weight as it is stored."""
        own = dict(self.base_layer.named_parameters(recurse=False))
        return {name: own[name] for name in self.shapes if name in own}

    @property
    def module_key(self) -> str:
        """The layer's own name in the model that it is injected into, without what wraps it."""
        return self.key

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones (PEFT's hook); while adapters are off, they train once these are on again.

        Parameters are looked up directly, because PEFT's way takes most of the time of a switch between merged adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if self.disable_adapters or self.frozen_peft_weight_names:
            super().set_adapter(names, inference_mode)
            if self.disable_adapters:
                self._trained = set() if inference_mode else set(names)
            return
        for attribute in self.adapter_layer_names:
            held = self._modules.get(attribute)
            for adapter_name, tensors in held._modules.items() if held is not None else ():
                trains = adapter_name in names and not inference_mode
                for parameter in tensors._parameters.values():  # type: ignore[union-attr]
                    if parameter is not None and parameter.requires_grad is not trains and parameter.is_leaf:
                        parameter.requires_grad = trains
        self.__dict__["_active_adapter"] = names  # a module would look for parameters first

    def is_offloaded(self) -> bool:
        """Whether the parameters are brought to a device only while the module runs."""
        hook = self.base_layer.__dict__.get("_hf_hook")
        return isinstance(hook, AlignDevicesHook) and bool(hook.offload)

    def _check_loaded(self) -> None:
        """Raise ValueError where a gating adapter on offloaded parameters was never loaded."""
        for adapter_name, tensors in self.diffpruning_w.items():
            for name, w in tensors.items():
                if bool(w.isnan().any()):
                    raise ValueError(
                        f"{self.parameter_key(name)}, adapter {adapter_name!r}: w was never loaded or is damaged; load the "
                        "adapter anew, with PeftModel.from_pretrained"
                    )

    def _device(self) -> torch.device:
        """Where the adapter's tensors belong: beside the parameters, or where these are brought to run."""
        tensors = [*self.base_layer.parameters(recurse=False), *self.base_layer.buffers(recurse=False)]
        device = tensors[0].device if tensors else torch.device("cpu")
        if device.type != "meta":
            return device
        return torch.device(getattr(getattr(self.base_layer, "_hf_hook", None), "execution_device", None) or "cpu")

    # Adapters

    def update_layer(self, adapter_name: str, config: DiffPruningConfig) -> None:
        """Add an adapter, in the phase that the config tells: gating while `nnz_pattern` is None, else fixmask."""
        self.configs[adapter_name] = config
        if config.nnz_pattern is None:
            self.start_gating(adapter_name)
        else:
            nnz = {name: config.nnz_pattern.get(self.parameter_key(name), 0) for name in self.shapes}
            self.start_fixmask(adapter_name, {name: count for name, count in nnz.items() if count})

    def start_gating(self, adapter_name: str) -> None:
        """Give the adapter w and gates at their initial values, in place of what it had."""
        if self.quantized:
            raise ValueError(
                f"{self.key} is quantised, where gates cannot be learned; train and prune the adapter on the model as it "
                "was, then load it here, or leave the module out with exclude_modules"
            )
        config = self.configs[adapter_name]
        self._clear(adapter_name)
        w, log_alpha, group_log_alpha = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        moments = {attribute: BufferDict(persistent=True) for attribute in GATING_BUFFERS}
        for name, shape in self.shapes.items():
            zeros = torch.zeros(shape, dtype=torch.float32, device=self._device())
            w[name] = nn.Parameter(zeros if config.init_weights else torch.randn_like(zeros).mul_(0.02))
            if config.inference_mode and self.is_offloaded():
                w[name].data.fill_(torch.nan)  # some loaders leave what is offloaded as it was: it must not pass for w
            if not config.gated:
                continue
            lean = config.low_memory and factored.is_large(shape)
            dtype = torch.float16 if lean else torch.float32
            log_alpha[name] = nn.Parameter(torch.full_like(zeros, config.init_log_alpha, dtype=dtype))
            own = new_moments(zeros) if lean else {kind: torch.zeros_like(zeros) for kind in MOMENTS}
            for attribute, tensor in own.items():
                moments[attribute][name] = tensor
            if config.structured:
                zero = zeros.new_zeros(1)
                group_log_alpha[name] = nn.Parameter(torch.full_like(zero, config.init_log_alpha))
                for attribute in GROUP_MOMENTS:
                    moments[attribute][name] = zero.clone()
        self.gates_born[adapter_name] = next(_births)
        for attribute, tensors in zip(GATING_PARAMETERS, (w, log_alpha, group_log_alpha), strict=True):
            self._hold(attribute, adapter_name, tensors)
        for attribute, buffers in moments.items():
            if len(buffers) or attribute not in LEAN_BUFFERS:
                self._hold(attribute, adapter_name, buffers)
        self._set_trainable(adapter_name)

    def start_fixmask(self, adapter_name: str, nnz: dict[str, int]) -> None:
        """Give the adapter room for `nnz` values a parameter, in place of what it had. Until a file or
        [`set_diff`] fills them they are NaN and their positions nowhere, so that what was never loaded is not taken for a
        diff of zeros.

        Parameters without nonzeros take no tensors at all.
        """
        self._clear(adapter_name)
        values, packed = nn.ParameterDict(), BufferDict(persistent=True)
        random, device = not self.configs[adapter_name].init_weights, self._device()
        for name, count in nnz.items():
            numel = self.shapes[name].numel()
            if count > numel:
                raise ValueError(
                    f"nnz_pattern gives {self.parameter_key(name)} {count} nonzeros, but it has {numel} elements; the "
                    "adapter belongs to another model"
                )
            unknown = torch.full((count,), torch.nan, dtype=torch.float32, device=device)
            values[name] = nn.Parameter(unknown if not random else torch.randn_like(unknown).mul_(0.02))
            size = self._buffer_size(adapter_name, name, count)
            packed[name] = torch.zeros(size, dtype=torch.uint8, device=device)
        self._hold(VALUES, adapter_name, values)
        self._hold(POSITIONS, adapter_name, packed)
        self._set_trainable(adapter_name)

    def _hold(self, attribute: str, adapter_name: str, tensors: nn.Module) -> None:
        if attribute not in self._modules:
            setattr(self, attribute, nn.ModuleDict())
        getattr(self, attribute)[adapter_name] = tensors

    def _buffer_size(self, adapter_name: str, name: str, count: int) -> int:
        return buffer_size(count, self.shapes[name].numel(), self.configs[adapter_name].value_dtype)

    def make_room(self, adapter_name: str, nnz: dict[str, int]) -> None:
        """Have the adapter's tensors in the shapes of a file with `nnz` values a parameter and the config's dtype. Where they
        are as many already, parameters that train stay the same objects."""
        if self.nnz(adapter_name) != nnz:
            self.start_fixmask(adapter_name, nnz)
        packed: Any = getattr(self, POSITIONS)[adapter_name]
        for name, count in nnz.items():
            size = self._buffer_size(adapter_name, name, count)
            if packed[name].numel() != size:
                packed[name] = packed[name].new_zeros(size)

    def _set_trainable(self, adapter_name: str) -> None:
        """New tensors of the active adapter train, unless it was loaded for inference; those of others do not."""
        active: Any = self.active_adapters
        trainable = adapter_name in active and not self.configs[adapter_name].inference_mode
        for parameter in self.adapter_parameters(adapter_name):
            parameter.requires_grad_(trainable)

    def set_diff(self, adapter_name: str, diff: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Put the adapter into fixmask with the given (positions, values), flat and sorted, a parameter."""
        trainable = any(parameter.requires_grad for parameter in self.adapter_parameters(adapter_name))
        self.start_fixmask(adapter_name, {})
        for name, (where, values) in diff.items():
            if where.shape != values.shape:
                raise ValueError(f"{self.parameter_key(name)}: {where.numel()} positions, {values.numel()} values")
            if where.numel():
                numel = self.shapes[name].numel()
                getattr(self, VALUES)[adapter_name][name] = nn.Parameter(values.clone(), requires_grad=trainable)
                packed = seal.pack(where, numel)
                getattr(self, POSITIONS)[adapter_name][name] = packed
                self._remember(adapter_name, name, packed, where.clone())

    def _clear(self, adapter_name: str) -> None:
        for attribute in self._all_names():
            container: Any = getattr(self, attribute)
            if adapter_name in container:
                del container[adapter_name]
        self.pending.pop(adapter_name, None)
        self.forget_positions(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter's tensors (PEFT's hook)."""
        super().delete_adapter(adapter_name)
        self.gates_born.pop(adapter_name, None)
        self.configs.pop(adapter_name, None)
        self._trained.discard(adapter_name)
        self.forget_positions(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off (PEFT's hook); what did not train before they were off does not after."""
        if not enabled and not self.disable_adapters:
            self._trained = {
                name for name in self.configs if any(p.requires_grad for p in self.adapter_parameters(name))
            }
        was_disabled, trained = self.disable_adapters, set(self._trained)
        super().enable_adapters(enabled)  # makes all active ones train
        if enabled and was_disabled:
            for name in self.configs.keys() - trained:
                for parameter in self.adapter_parameters(name):
                    parameter.requires_grad_(False)

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether this layer holds the adapter."""
        return adapter_name in self.diffpruning_w or adapter_name in self.diffpruning_values

    def is_gating(self, adapter_name: str) -> bool:
        """Whether the adapter still has w and gates here, rather than fixed positions."""
        return adapter_name in self.diffpruning_w

    def nnz(self, adapter_name: str) -> dict[str, int] | None:
        """Nonzeros of each parameter that has any; None in gating."""
        if self.is_gating(adapter_name):
            return None
        return {name: values.numel() for name, values in getattr(self, VALUES)[adapter_name].items()}

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """All parameters of the adapter, trainable or not."""
        containers = [getattr(self, attribute) for attribute in self.adapter_layer_names]
        return [p for container in containers if adapter_name in container for p in container[adapter_name].values()]

    def tensors(self, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the adapter, by their names in the layer."""
        for attribute in self._all_names():
            container: Any = getattr(self, attribute)
            if adapter_name in container:
                held = container[adapter_name]
                for name, tensor in (held._parameters | held._buffers).items():
                    yield f"{attribute}.{adapter_name}.{name}", tensor

    def gate_locations(self, adapter_name: str) -> list[nn.Parameter]:
        """The locations of all gates, those of groups included."""
        containers = [getattr(self, attribute) for attribute in GATING_PARAMETERS[1:]]
        held = [container[adapter_name]._parameters for container in containers if adapter_name in container]
        return [location for parameters in held for location in parameters.values()]

    def _tensor(self, attribute: str, adapter_name: str, name: str) -> Tensor:
        tensor: Tensor = getattr(self, attribute)[adapter_name][name]
        return tensor

    def dense_delta(self, adapter_name: str, name: str) -> Tensor:
        """z w with deterministic gates, fp32, shape of the parameter; gating only, without gradient."""
        with torch.no_grad():
            w: Tensor = self._tensor("diffpruning_w", adapter_name, name)
            if name not in self.diffpruning_log_alpha[adapter_name]:
                return w.clone()
            stretch, delta = self.configs[adapter_name].stretch, torch.empty_like(w)
            log_alpha = self._tensor("diffpruning_log_alpha", adapter_name, name)
            for result, location, own in gates.pieces(delta, log_alpha, w):
                torch.mul(gates.gate(location, None, stretch), own, out=result)
            if name in self.diffpruning_group_log_alpha[adapter_name]:
                group_log_alpha = self._tensor("diffpruning_group_log_alpha", adapter_name, name)
                delta.mul_(gates.gate(group_log_alpha, None, stretch).reshape(()))
            return delta

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterTensors:
        """Move or cast the wrapped module; the adapter moves along but keeps its dtypes.

        bf16 gates would lose updates: near log_alpha = 5 half an ulp is 0.016. (fp16 ones, of the low-memory mode, are
        rounded at random.)
        """
        for name, child in self.named_children():
            child._apply(fn if name == "base_layer" else _keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter's tensors beside the base parameters (PEFT's hook after loading); gates keep their dtypes."""
        target = self._device() if device is None else device
        for attribute in self._all_names():
            container: Any = getattr(self, attribute)
            if adapter_name not in container or target.type == "meta":
                continue
            tensors = [*container[adapter_name].parameters(), *container[adapter_name].buffers()]
            if not any(tensor.is_meta for tensor in tensors):
                container[adapter_name].to(target)
