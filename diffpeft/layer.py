"""One wrapped module of any type: its effective parameters, and merging them into the base and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from diffpeft import gates, positions
from diffpeft.config import DiffPruningConfig
from diffpeft.diff import add_, restore_, sparse_parameter

GATING_PARAMETERS = ("diffpruning_w", "diffpruning_log_alpha", "diffpruning_group_log_alpha")
GATING_BUFFERS = (
    "diffpruning_exp_avg",
    "diffpruning_exp_avg_sq",
    "diffpruning_group_exp_avg",
    "diffpruning_group_exp_avg_sq",
)
VALUES = "diffpruning_values"
POSITIONS = "diffpruning_positions"


class GateTensors(NamedTuple):
    """The gates of one parameter: locations and the two moments of their gradients."""

    log_alpha: nn.Parameter
    exp_avg: Tensor
    exp_avg_sq: Tensor


class _Merge(NamedTuple):
    """What a merge overwrote: `positions` None means the whole parameter."""

    adapter_name: str
    parameter_name: str
    positions: Tensor | None
    old: Tensor


class _Unpacked(NamedTuple):
    """Decoded positions and the packed tensor and version that they were decoded from."""

    packed: Tensor
    version: int
    positions: Tensor


def _keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return apply


class DiffPruningLayer(nn.Module, BaseTunerLayer):
    """Wraps a module and replaces its own parameters theta by theta + delta whenever it runs or they are read.

    Every tensor of an adapter lives in an attribute of the class's prefix, by adapter, then by parameter name:

    - gating: `diffpruning_w` and `diffpruning_log_alpha` (shape of the parameter, fp32), `diffpruning_group_log_alpha`
      (shape (1,)), and as buffers the moments of the gates' gradients;
    - fixmask: `diffpruning_values` (shape (k,), fp32) and, as a buffer, `diffpruning_positions` (packed, uint8).

    Args:
        base_layer: the module to wrap; its parameters stay as they are.
        key: the module's name in the base model.
        ties: parameters of `base_layer` that are the same tensor as one of another layer, which then owns the diff.
    """

    adapter_layer_names = (*GATING_PARAMETERS, VALUES)
    other_param_names = (*GATING_BUFFERS, POSITIONS)

    def __init__(self, base_layer: nn.Module, key: str, ties: dict[str, tuple[DiffPruningLayer, str]]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.key = key
        self.ties = ties
        for name in (*self.adapter_layer_names, *self.other_param_names):
            setattr(self, name, nn.ModuleDict())
        self.configs: dict[str, DiffPruningConfig] = {}
        self.merged_adapters: list[str] = []
        self._merges: list[_Merge] = []
        self._unpacked: dict[tuple[str, str], _Unpacked] = {}
        self._running: dict[str, Tensor] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this layer adapts, by their name in the wrapped module."""
        own = self.base_layer.named_parameters(recurse=False)
        return {name: parameter for name, parameter in own if name not in self.ties}

    def parameter_key(self, name: str) -> str:
        """The name in the base model of the wrapped module's parameter `name`."""
        return f"{self.key}.{name}" if self.key else name

    # Adapters

    def update_layer(self, adapter_name: str, config: DiffPruningConfig) -> None:
        """Add an adapter, in the phase that the config tells: gating while `nnz_pattern` is None, else fixmask."""
        self.configs[adapter_name] = config
        if config.nnz_pattern is None:
            self.start_gating(adapter_name)
        else:
            nnz = {name: config.nnz_pattern.get(self.parameter_key(name), 0) for name in self.own_parameters()}
            self.start_fixmask(adapter_name, {name: count for name, count in nnz.items() if count})

    def start_gating(self, adapter_name: str) -> None:
        """Give the adapter w and gates at their initial values, in place of what it had."""
        config = self.configs[adapter_name]
        self._clear(adapter_name)
        w, log_alpha, group_log_alpha = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        moments = [BufferDict(persistent=True) for _ in GATING_BUFFERS]
        for name, parameter in self.own_parameters().items():
            zeros = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            w[name] = nn.Parameter(zeros if config.init_weights else torch.randn_like(zeros).mul_(0.02))
            if not config.gated:
                continue
            log_alpha[name] = nn.Parameter(torch.full_like(zeros, config.init_log_alpha))
            moments[0][name], moments[1][name] = torch.zeros_like(zeros), torch.zeros_like(zeros)
            if config.structured:
                zero = zeros.new_zeros(1)
                group_log_alpha[name] = nn.Parameter(torch.full_like(zero, config.init_log_alpha))
                moments[2][name], moments[3][name] = zero, zero.clone()
        for attribute, tensors in zip(GATING_PARAMETERS, (w, log_alpha, group_log_alpha), strict=True):
            getattr(self, attribute)[adapter_name] = tensors
        for attribute, buffers in zip(GATING_BUFFERS, moments, strict=True):
            getattr(self, attribute)[adapter_name] = buffers
        self._set_trainable(adapter_name)

    def start_fixmask(self, adapter_name: str, nnz: dict[str, int]) -> None:
        """Give the adapter room for `nnz` values a parameter, in place of what it had; the first positions, zeros.

        Parameters without nonzeros take no tensors at all.
        """
        self._clear(adapter_name)
        values, packed = nn.ParameterDict(), BufferDict(persistent=True)
        random = not self.configs[adapter_name].init_weights
        for name, count in nnz.items():
            parameter = self.own_parameters()[name]
            if count > parameter.numel():
                raise ValueError(
                    f"nnz_pattern gives {self.parameter_key(name)} {count} nonzeros, but it has {parameter.numel()} "
                    "elements; the adapter belongs to another model"
                )
            zeros = torch.zeros(count, dtype=torch.float32, device=parameter.device)
            values[name] = nn.Parameter(torch.randn_like(zeros).mul_(0.02) if random else zeros)
            packed[name] = positions.pack(torch.arange(count), parameter.numel()).to(parameter.device)
        getattr(self, VALUES)[adapter_name] = values
        getattr(self, POSITIONS)[adapter_name] = packed
        self._set_trainable(adapter_name)

    def _set_trainable(self, adapter_name: str) -> None:
        """New tensors of the active adapter train, unless it was loaded for inference; those of others do not."""
        trainable = adapter_name in self.active_adapters and not self.configs[adapter_name].inference_mode
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
                numel = self.own_parameters()[name].numel()
                getattr(self, VALUES)[adapter_name][name] = nn.Parameter(values.clone(), requires_grad=trainable)
                getattr(self, POSITIONS)[adapter_name][name] = positions.pack(where, numel)

    def _clear(self, adapter_name: str) -> None:
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, attribute)
            if adapter_name in container:
                del container[adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter's tensors (PEFT's hook)."""
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)

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

    def gates(self, adapter_name: str) -> dict[str, tuple[GateTensors, GateTensors | None]]:
        """Element gates and group gate of each parameter."""
        found: dict[str, tuple[GateTensors, GateTensors | None]] = {}
        if adapter_name not in self.diffpruning_log_alpha:
            return found
        groups = self.diffpruning_group_log_alpha[adapter_name]
        for name, log_alpha in self.diffpruning_log_alpha[adapter_name].items():
            element = GateTensors(
                log_alpha, self.diffpruning_exp_avg[adapter_name][name], self.diffpruning_exp_avg_sq[adapter_name][name]
            )
            group = None
            if name in groups:
                averages = self.diffpruning_group_exp_avg[adapter_name], self.diffpruning_group_exp_avg_sq[adapter_name]
                group = GateTensors(groups[name], averages[0][name], averages[1][name])
            found[name] = (element, group)
        return found

    # Effective parameters

    def _tensor(self, attribute: str, adapter_name: str, name: str) -> Tensor:
        tensor: Tensor = getattr(self, attribute)[adapter_name][name]
        return tensor

    def positions(self, adapter_name: str, name: str) -> Tensor:
        """Sorted flat positions, int64, of the adapter's nonzeros in parameter `name`.

        Decoded when first needed: some loaders fill the packed buffer in place and tell nobody.
        """
        packed = self.diffpruning_positions[adapter_name][name]
        version = 0 if packed.is_inference() else packed._version
        cached = self._unpacked.get((adapter_name, name))
        if cached is None or cached.packed is not packed or cached.version != version:
            count = self.diffpruning_values[adapter_name][name].numel()
            try:
                decoded = positions.unpack(packed, count, self.own_parameters()[name].numel())
            except ValueError as error:
                raise ValueError(f"{self.parameter_key(name)}, adapter {adapter_name!r}: {error}") from None
            cached = self._unpacked[adapter_name, name] = _Unpacked(packed, version, decoded)
        return cached.positions

    def dense_delta(self, adapter_name: str, name: str) -> Tensor:
        """z w with deterministic gates, fp32, shape of the parameter; gating only, without gradient."""
        with torch.no_grad():
            w: Tensor = self._tensor("diffpruning_w", adapter_name, name)
            if name not in self.diffpruning_log_alpha[adapter_name]:
                return w.clone()
            stretch = self.configs[adapter_name].stretch
            delta = gates.gate(self._tensor("diffpruning_log_alpha", adapter_name, name), None, stretch).mul_(w)
            if name in self.diffpruning_group_log_alpha[adapter_name]:
                group_log_alpha = self._tensor("diffpruning_group_log_alpha", adapter_name, name)
                delta.mul_(gates.gate(group_log_alpha, None, stretch).reshape(()))
            return delta

    def _with_adapter(self, parameter: Tensor, adapter_name: str, name: str) -> Tensor:
        """`parameter` plus the adapter's diff; gates are sampled in training mode only."""
        if adapter_name in self.diffpruning_values:
            values = self.diffpruning_values[adapter_name]
            if name not in values:
                return parameter
            return sparse_parameter(parameter, values[name], self.positions(adapter_name, name))
        if adapter_name not in self.diffpruning_w:
            return parameter
        w = self._tensor("diffpruning_w", adapter_name, name)
        if name not in self.diffpruning_log_alpha[adapter_name]:
            return (parameter + w).to(parameter.dtype)
        log_alpha = self._tensor("diffpruning_log_alpha", adapter_name, name)
        group = self.diffpruning_group_log_alpha[adapter_name]
        group_log_alpha = group.get(name, None)
        noise = group_noise = None
        if self.training:
            noise = gates.sample_noise(log_alpha)
            group_noise = None if group_log_alpha is None else gates.sample_noise(group_log_alpha)
        stretch = self.configs[adapter_name].stretch
        return gates.gated_parameter(parameter, w, log_alpha, group_log_alpha, stretch, noise, group_noise)

    def effective(self, name: str) -> Tensor:
        """The parameter `name` of the wrapped module as the active adapters change it."""
        if name in self.ties:
            owner, owner_name = self.ties[name]
            return owner.effective(owner_name)
        if name in self._running:  # while the module runs, its own attribute is the effective parameter already
            return self._running[name]
        parameter: Tensor = getattr(self.base_layer, name)
        if self.disable_adapters or self.merged:
            return parameter
        for adapter_name in self.active_adapters:
            parameter = self._with_adapter(parameter, adapter_name, name)
        return parameter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module, hooks and all, with its effective parameters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        changed = {}
        for name, parameter in self.base_layer.named_parameters(recurse=False):
            effective = self.effective(name)
            if effective is not parameter:
                changed[name] = effective
        if not changed:
            return self.base_layer(*args, **kwargs)
        self._running = changed
        try:
            return functional_call(self.base_layer, changed, args, kwargs)
        finally:
            self._running = {}

    @property
    def weight(self) -> Tensor:
        """The effective weight: some models read it without calling the module."""
        weight: Tensor = self._read("weight")
        return weight

    @property
    def bias(self) -> Tensor:
        """The effective bias."""
        bias: Tensor = self._read("bias")
        return bias

    def _read(self, name: str) -> Any:
        base_layer = self.base_layer
        return self.effective(name) if base_layer._parameters.get(name) is not None else getattr(base_layer, name)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks is the wrapped module's; its parameters are read as the adapters change them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not yet set: looking further would never end
                raise
            return self._read(name)

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the diffs of the adapters (default: the active ones) into the base parameters.

        What they overwrite is kept, so that [`unmerge`] restores the base to the bit.

        Raises:
            ValueError: with `safe_merge`, where the result would not be finite; nothing is written then.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if not self.has_adapter(adapter_name):
                continue
            if safe_merge:
                self._check_finite(adapter_name)
            with torch.no_grad():
                self._merges.extend(self._merge_one(adapter_name))
            self.merged_adapters.append(adapter_name)

    def _merge_one(self, adapter_name: str) -> list[_Merge]:
        done = []
        for name, parameter in self.own_parameters().items():
            if self.is_gating(adapter_name):
                done.append(_Merge(adapter_name, name, None, parameter.data.clone()))
                parameter.data.copy_(parameter.data + self.dense_delta(adapter_name, name))
            elif name in self.diffpruning_values[adapter_name]:
                where = self.positions(adapter_name, name)
                old = add_(parameter.data, self.diffpruning_values[adapter_name][name].data, where)
                done.append(_Merge(adapter_name, name, where, old))
        return done

    def _check_finite(self, adapter_name: str) -> None:
        for name, parameter in self.own_parameters().items():
            if self.is_gating(adapter_name):
                delta = self.dense_delta(adapter_name, name)
            elif name in self.diffpruning_values[adapter_name]:
                delta = self.diffpruning_values[adapter_name][name].data
            else:
                continue
            if not bool(torch.isfinite(delta.to(parameter.dtype)).all()):
                raise ValueError(
                    f"merging adapter {adapter_name!r} would make {self.parameter_key(name)} NaN or infinite; "
                    "the adapter seems to be broken"
                )

    def unmerge(self) -> None:
        """Restore the base parameters of all merged adapters to the bit."""
        parameters = self.own_parameters()
        with torch.no_grad():
            while self._merges:
                merge = self._merges.pop()
                target = parameters[merge.parameter_name].data
                if merge.positions is None:
                    target.copy_(merge.old)
                else:
                    restore_(target, merge.old.to(target.device), merge.positions.to(target.device))
        self.merged_adapters.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffPruningLayer:
        """Move or cast the wrapped module; the adapter moves along but keeps its dtypes.

        bf16 gates would lose updates: near log_alpha = 5 half an ulp is 0.016.
        """
        for name, child in self.named_children():
            child._apply(fn if name == "base_layer" else _keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter's tensors beside the base parameters (PEFT's hook after loading); gates stay fp32."""
        own = self.own_parameters()
        if not own:
            return
        target = device if device is not None else next(iter(own.values())).device
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, attribute)
            if adapter_name not in container or target.type == "meta":
                continue
            tensors = [*container[adapter_name].parameters(), *container[adapter_name].buffers()]
            if not any(tensor.is_meta for tensor in tensors):
                container[adapter_name].to(target)
