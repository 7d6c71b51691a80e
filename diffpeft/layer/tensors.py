"""The tensors of all adapters on one wrapped module: in gating, in fixmask, and on their way between the two."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffpeft.config import DiffPruningConfig
from diffpeft.files.encoding import buffer_size, pack
from diffpeft.files.keys import POSITIONS, VALUES
from diffpeft.files.stored_diff import StoredDiff
from diffpeft.gates import hard_concrete as gates
from diffpeft.gates.update.held import GATING_BUFFERS, UpdateStatus
from diffpeft.layer.initial import GATING_PARAMETERS, check_phases, fixmask_tensors, gating_tensors, materialize
from diffpeft.layer.wrapped import device_of, is_offloaded, keeping_dtype, own_shapes, quantization_backend
from diffpeft.sparse.sharded import local, whole

_generations = itertools.count()


class AdapterTensors(nn.Module, BaseTunerLayer):
    """Holds the tensors of the adapters on one wrapped module; [`DiffPruningLayer`] runs the module with them.

    Every tensor of an adapter lives in an attribute of the class's prefix, by adapter, then by parameter name:

    - gating: `diffpruning_w` and `diffpruning_log_alpha` (shape of the parameter, fp32), `diffpruning_group_log_alpha`
      (shape (1,)), and as buffers the moments of the gates' gradients, coarser ones in the low-memory mode;
    - fixmask: `diffpruning_values` (shape (k,), fp32 while they train) and, as a buffer, `diffpruning_positions`
      (packed, uint8); [`sparse`] gives both decoded.
    """

    adapter_layer_names = (*GATING_PARAMETERS, VALUES)
    other_param_names = (*GATING_BUFFERS, POSITIONS)
    all_names = (*adapter_layer_names, *other_param_names)

    # ModuleDicts: adapter name -> ParameterDict or BufferDict: parameter name -> tensor.
    diffpruning_w: Any
    diffpruning_values: Any
    diffpruning_positions: Any

    def __init__(self, base_layer: nn.Module, key: str, ties: dict[str, tuple[Any, str]]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.key = self.module_key = key
        """The module's name in the base model, and the layer's own in the model, without what wraps it."""
        self.ties = ties
        self.shapes = {name: shape for name, shape in own_shapes(base_layer).items() if name not in ties}
        """Shapes of the parameters that this layer adapts, by their name in the module."""
        self.quantization_backend = quantization_backend(base_layer)  # PEFT reads it
        self.quantized = self.quantization_backend is not None
        """Whether the wrapped module's weight is quantised, so that a diff cannot be added to it."""
        for name in self.all_names:
            self.__dict__[name] = {}  # until there is something to hold: a module costs time in every search
        self.configs: dict[str, DiffPruningConfig] = {}
        self.generations: dict[str, int] = {}
        """A number that is new each time an adapter's gates are made: their memory may be that of others before."""
        self.update_status: dict[str, UpdateStatus] = {}
        self._sparse: dict[tuple[str, str], StoredDiff] = {}
        self._disable_adapters = False
        self._trained: set[str] = set()  # while adapters are disabled: those that train otherwise
        self._active_adapter: str | list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        """The state without what is kept for speed, which belongs to these very tensors."""
        return {**self.__dict__, "_sparse": {}}

    def parameter_key(self, name: str) -> str:
        """The name in the base model of the wrapped module's parameter `name`."""
        return f"{self.key}.{name}" if self.key else name

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this layer adapts, by their name in the module; a quantised weight as it is stored."""
        own = dict(self.base_layer.named_parameters(recurse=False))
        return {name: own[name] for name in self.shapes if name in own}

    # What PEFT asks

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones (PEFT's hook); while adapters are off, they train once these are on again.

        Parameters are looked up directly: PEFT's way takes most of the time of a switch between merged adapters.
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

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter's tensors (PEFT's hook)."""
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        self.generations.pop(adapter_name, None)
        self._trained.discard(adapter_name)
        self._forget(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter's tensors beside the base parameters (PEFT's hook after loading), in their dtypes."""
        target = device_of(self.base_layer) if device is None else device
        for attribute in self.all_names if target.type != "meta" else ():
            if not any(tensor.is_meta for tensor in self.held(attribute, adapter_name).values()):
                container: Any = getattr(self, attribute)
                if adapter_name in container:
                    container[adapter_name].to(target)

    def _save_to_state_dict(self, *args: Any) -> None:
        """Add to a state dict (torch's hook); a checkpoint of shards is loaded into the tensors of one."""
        for adapter_name in self.configs:
            materialize(self, adapter_name)
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load what a state dict has of this module (torch's hook). ValueError for adapters of another phase."""
        check_phases(state_dict, prefix, {name: self.is_gating(name) for name in self.configs})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterTensors:
        """Move or cast the wrapped module; the adapter moves along but keeps its dtypes.

        bf16 gates would lose updates: near log_alpha = 5 half an ulp is 0.016. fp16 ones are rounded stochastically.
        """
        for name, child in self.named_children():
            child._apply(fn if name == "base_layer" else keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    # Phases

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
        config = self.configs[adapter_name]
        if self.quantized and config.chosen_in_training:
            raise ValueError(
                f"{self.key} is quantised, where gates cannot be learned; use selection='gradient', or train and prune "
                "the adapter on the model as it was and load it here, or leave the module out with exclude_modules"
            )
        # Some loaders leave what is offloaded as it was: zeros must not pass for a diff that was loaded.
        unknown = config.inference_mode and is_offloaded(self.base_layer)
        self._set_tensors(adapter_name, gating_tensors(self.shapes, device_of(self.base_layer), config, unknown))
        self.generations[adapter_name] = next(_generations)

    def start_fixmask(self, adapter_name: str, nnz: dict[str, int]) -> None:
        """Give the adapter room for `nnz` values in each parameter, in place of what it had.

        Until a file or [`set_diff`] fills them they are NaN and their positions nowhere, so that what was never loaded
        is not taken for a diff of zeros. Parameters without nonzeros take no tensors at all.
        """
        for name in (name for name, count in nnz.items() if count > self.shapes[name].numel()):
            raise ValueError(f"{self.parameter_key(name)} has no {nnz[name]} elements; the adapter is of another model")
        device, config = device_of(self.base_layer), self.configs[adapter_name]
        self._set_tensors(adapter_name, fixmask_tensors(self.shapes, nnz, device, config))

    def make_room(self, adapter_name: str, nnz: dict[str, int]) -> None:
        """Bring the adapter's tensors into the shapes of a file with `nnz` values in each parameter.

        Where they are as many already, parameters that train stay the same objects.
        """
        self._forget(adapter_name)
        if self.nnz(adapter_name) != nnz:
            self.start_fixmask(adapter_name, nnz)
        packed: Any = getattr(self, POSITIONS)[adapter_name]
        for name, count in nnz.items():
            size = buffer_size(count, self.shapes[name].numel(), self.configs[adapter_name].value_dtype)
            if packed[name].numel() != size:
                packed[name] = packed[name].new_zeros(size)

    def set_diff(self, adapter_name: str, diff: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Put the adapter into fixmask with these (positions, values), flat and sorted, by parameter."""
        trainable = any(parameter.requires_grad for parameter in self.adapter_parameters(adapter_name))
        self.start_fixmask(adapter_name, {})
        for name, (positions, values) in diff.items():
            if len(positions):
                packed = pack(positions, self.shapes[name].numel())
                getattr(self, VALUES)[adapter_name][name] = nn.Parameter(values.clone(), requires_grad=trainable)
                getattr(self, POSITIONS)[adapter_name][name] = packed
                self.sparse(adapter_name, name).note(positions.clone())

    def _set_tensors(self, adapter_name: str, made: dict[str, nn.Module]) -> None:
        """Give the adapter these tensors, by attribute; they train if it is active and not loaded for inference."""
        for attribute in self.all_names:
            container: Any = getattr(self, attribute)
            if adapter_name in container:
                del container[adapter_name]
        self.update_status.pop(adapter_name, None)
        self._forget(adapter_name)
        for attribute, tensors in made.items():
            if attribute not in self._modules:
                setattr(self, attribute, nn.ModuleDict())
            getattr(self, attribute)[adapter_name] = tensors
        active: Any = self.active_adapters
        trainable = adapter_name in active and not self.configs[adapter_name].inference_mode
        for parameter in self.adapter_parameters(adapter_name):
            parameter.requires_grad_(trainable)

    def _forget(self, adapter_name: str) -> None:
        for key in [key for key in self._sparse if key[0] == adapter_name]:
            del self._sparse[key]

    # What an adapter has here

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
        return {name: values.numel() for name, values in self.held(VALUES, adapter_name).items()}

    def sparse(self, adapter_name: str, name: str) -> StoredDiff:
        """The adapter's sparse diff of parameter `name`; fixmask only."""
        found = self._sparse.get((adapter_name, name))
        if found is None:
            found = self._sparse[adapter_name, name] = StoredDiff(self, adapter_name, name)
        return found

    def sparse_diffs(self, adapter_name: str) -> dict[str, StoredDiff]:
        """The adapter's sparse diffs by parameter name; none in gating."""
        return {name: self.sparse(adapter_name, name) for name in self.held(VALUES, adapter_name)}

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """All parameters of the adapter, trainable or not."""
        return [p for attribute in self.adapter_layer_names for p in self.held(attribute, adapter_name).values()]

    def tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """All tensors of the adapter, by their names in the layer."""
        held = {attribute: self.held(attribute, adapter_name) for attribute in self.all_names}
        return {f"{attribute}.{adapter_name}.{n}": t for attribute, own in held.items() for n, t in own.items()}

    def held(self, attribute: str, adapter_name: str) -> dict[str, Any]:
        """The adapter's tensors in one attribute, by parameter name."""
        container = self._modules.get(attribute)
        own = None if container is None else container._modules.get(adapter_name)
        return {} if own is None else own._parameters | own._buffers

    def gates_of_parameter(self, adapter_name: str, name: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """w, log_alpha of the element gates and of the group gate; None for gates that there are not."""
        w, log_alpha, group_log_alpha = (
            self.held(attribute, adapter_name).get(name) for attribute in GATING_PARAMETERS
        )
        assert w is not None
        return w, log_alpha, group_log_alpha

    def piece(self, adapter_name: str, name: str) -> gates.GatedDiff:
        """The parameter's diff in gating, without gradient; of a sharded one the piece that this process holds."""
        w, log_alpha, group_log_alpha = self.gates_of_parameter(adapter_name, name)
        group = None if group_log_alpha is None else whole(group_log_alpha)
        return gates.GatedDiff(
            local(w), None if log_alpha is None else local(log_alpha), group, self.configs[adapter_name].stretch
        )

    def delta(self, adapter_name: str, name: str) -> Tensor:
        """z w with deterministic gates, fp32, shape of the parameter or [`piece`]; gating only, without gradient."""
        return gates.delta(*self.piece(adapter_name, name))
