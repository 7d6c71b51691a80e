"""One wrapped module of any type: its effective parameters, and running it with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from diffpeft.gates import hard_concrete as gates
from diffpeft.gates.functions import Sample, sampled_embedding, sampled_linear, sampled_parameter
from diffpeft.gates.noise import NoisePass, may_be_replayed
from diffpeft.gates.small_parameters import SMALL, Part, sampled_together
from diffpeft.layer.find import layers_in
from diffpeft.layer.merging import MergeStack
from diffpeft.layer.tensors import AdapterTensors
from diffpeft.sparse.functions import Diff, patched_embedding, patched_linear, sampling_pays, sparse_parameter
from diffpeft.sparse.inplace import Entry, InplaceUpdate, can_be_overwritten
from diffpeft.sparse.sharded import check_whole

MANY = 1 << 20
"""Elements of an embedding beyond which the rows of a batch are made, and no others."""


class DiffPruningLayer(AdapterTensors):
    """Wraps a module and replaces its own parameters theta by theta + delta whenever it runs or they are read.

    Args:
        base_layer: the module to wrap; its parameters stay as they are.
        key: the module's name in the base model.
        ties: parameters of `base_layer` that are the same tensor as one of another layer, which then owns the diff.
        noise: gives the seeds of the gates' noise; one for the whole model.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        key: str,
        ties: dict[str, tuple[DiffPruningLayer, str]],
        noise: NoisePass | None = None,
    ) -> None:
        super().__init__(base_layer, key, ties)
        self.noise = NoisePass() if noise is None else noise
        self.fused = False
        """Whether the gates' elementwise chains are compiled."""
        self._patchable_at: list[int] = []  # addresses of parameters that can be patched
        self.shared_with: dict[str, list[str]] = {}
        """Modules that have a parameter of this layer too and are not adapted, by the parameter's name."""
        self.tied_layers: dict[str, list[DiffPruningLayer]] = {}
        """Layers that have a parameter of this layer as a tie, by its name."""
        self._merges = MergeStack()
        self._running: dict[str, tuple[Tensor, Tensor]] = {}  # effective and plain parameters
        self.train(base_layer.training)

    def train(self, mode: bool = True) -> DiffPruningLayer:
        """As of any module, but a batch norm keeps its running statistics: they are the base's, and no diff has them."""
        super().train(mode)
        if isinstance(self.base_layer, _BatchNorm):
            self.base_layer.eval()
        return self

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's; what is merged is taken out first, since the base is read without running its module too."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    # Merging

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """The adapters that are in the base parameters now, in the order in which they were merged."""
        return self._merges.names

    def changes(self, adapter_name: str, name: str) -> bool:
        """Whether the adapter has a diff for parameter `name`, tied or not."""
        if name in self.ties:
            owner: DiffPruningLayer = self.ties[name][0]
            return adapter_name in self.configs and owner.changes(adapter_name, self.ties[name][1])
        if self.is_gating(adapter_name):
            return name in self.diffpruning_w[adapter_name]
        return adapter_name in self.diffpruning_values and name in self.diffpruning_values[adapter_name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the diffs of the adapters (default: the active ones) into the base parameters.

        What they overwrite is kept, so that [`unmerge`] restores the base to the bit.

        Raises:
            ValueError: with `safe_merge`, where the result would not be finite; nothing is written then.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name in self.configs:
                self._check_mergeable(adapter_name)
                entries = {self.parameter_key(name): entry for name, entry in self._entries(adapter_name).items()}
                self._merges.push(adapter_name, entries, check_finite=safe_merge)

    def unmerge(self, keep: int = 0) -> None:
        """Restore the base parameters to the bit, without the merged adapters after the first `keep`."""
        while len(self._merges) > keep:
            self._merges.pop({self.parameter_key(name): parameter for name, parameter in self._own().items()})

    def _check_mergeable(self, adapter_name: str) -> None:
        for name in self.shapes if self.shared_with or self.tied_layers else ():
            others = [*self.shared_with.get(name, [])]
            others += [layer.key for layer in self.tied_layers.get(name, []) if adapter_name not in layer.configs]
            if others and self.changes(adapter_name, name):
                raise ValueError(
                    f"{self.parameter_key(name)} is also a parameter of {others}, which the adapter leaves alone: "
                    f"merging adapter {adapter_name!r} would change them too; adapt or exclude all of them, or untie "
                    "them"
                )
        if self.quantized and "weight" in (self.nnz(adapter_name) or {}):
            raise ValueError(
                f"{self.key} is quantised: merging adapter {adapter_name!r} into it would round it anew and lose both; "
                "use it unmerged, or merge into the model loaded unquantised"
            )
        check_whole(self._own().values(), "merging")

    def _own(self) -> dict[str, nn.Parameter]:
        """All parameters of the wrapped module, as it holds them."""
        return cast(dict[str, nn.Parameter], self.base_layer._parameters)

    def _entries(self, adapter_name: str) -> dict[str, Entry]:
        """What the adapter adds to the module's parameters, by name.

        Raises:
            IndexError: a parameter is smaller than it was when the adapter was attached, and the diff reaches beyond it.
        """
        own = self._own()
        if self.is_gating(adapter_name):
            return {name: Entry(own[name], None, self.dense_delta(adapter_name, name)) for name in self.shapes}
        entries = {}
        for name, values, positions in self.fixed(adapter_name):
            numel = own[name].numel()
            if numel < self.shapes[name].numel() and int(positions[-1]) >= numel:
                raise IndexError(
                    f"the diff of {self.parameter_key(name)} reaches beyond its {numel} elements: it was larger when the adapter "
                    "was attached; load the adapter onto the model as it is now"
                )
            entries[name] = Entry(own[name], positions, values)
        return entries

    # Effective parameters

    def _with_adapter(self, parameter: Tensor, adapter_name: str, name: str) -> Tensor:
        """`parameter` plus the adapter's diff; gates are sampled in training mode only."""
        if adapter_name in self.diffpruning_values:
            if name not in self.diffpruning_values[adapter_name]:
                return parameter
            return sparse_parameter(parameter, self.kept_values(adapter_name, name), self.positions(adapter_name, name))
        if adapter_name not in self.diffpruning_w:
            return parameter
        w = self._tensor("diffpruning_w", adapter_name, name)
        if name not in self.diffpruning_log_alpha[adapter_name]:
            return (parameter + w).to(parameter.dtype)
        if self.training:
            sample = self._sample(adapter_name, name)
            made = self._made_together(adapter_name, name)
            return sampled_parameter(parameter, *self._gates_of(adapter_name, name), sample) if made is None else made
        return gates.gated_parameter(parameter, *self._gates_of(adapter_name, name), self.configs[adapter_name].stretch)

    def _made_together(self, adapter_name: str, name: str) -> Tensor | None:
        """A small effective parameter, which the first use of one in a pass makes for all; None for others."""
        noise = self.noise
        if noise.model is None or torch.compiler.is_compiling() or may_be_replayed():
            return None
        if noise.made is None:
            noise.made, parts, device = {}, {}, self._device()
            for layer in layers_in(noise.model, DiffPruningLayer):
                if layer.noise is noise:
                    parts.update(layer._small_parts(adapter_name, device))
            if parts:
                made = sampled_together(list(parts.values()), self.configs[adapter_name].stretch)
                noise.made.update(zip(parts, made, strict=True))
        return noise.made.get((self.key, adapter_name, name))

    def _small_parts(self, adapter_name: str, device: torch.device) -> dict[tuple[str, str, str], Part]:
        """The module's small parameters that one adapter changes, and whose gates are sampled."""
        module: Any = self.base_layer
        plain = not (self.disable_adapters or self.merged or self.quantized or self.is_offloaded()) and self.training
        if not plain or self.active_adapters != [adapter_name] or not self.has_adapter(adapter_name):
            return {}
        parts = {}
        for name, log_alpha in self.diffpruning_log_alpha[adapter_name].items():
            own = module._parameters.get(name)
            apart = name == "weight" and type(module) in (nn.Linear, nn.Embedding)  # with a way of its own
            apart = apart or log_alpha.numel() > SMALL or self.lean_gates(adapter_name, name) is not None
            if own is not None and log_alpha.device == own.device == device and not apart:
                key = self.key, adapter_name, name
                parts[key] = Part(own, *self._gates_of(adapter_name, name), self.noise.seed_of(key))
        return parts

    def _gates_of(self, adapter_name: str, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """w, locations of the element gates, and location of the group gate if there is one."""
        w, log_alpha = (self._tensor(f"diffpruning_{kind}", adapter_name, name) for kind in ("w", "log_alpha"))
        return w, log_alpha, self.diffpruning_group_log_alpha[adapter_name].get(name, None)

    def _sample(self, adapter_name: str, name: str) -> Sample:
        """How a parameter's gates are sampled in this pass."""
        config, key = self.configs[adapter_name], (self.key, adapter_name, name)
        keep = not config.low_memory and not torch.compiler.is_compiling() and not may_be_replayed()
        return Sample(
            self.noise.seed(key),
            config.stretch,
            self.fused,
            self.noise.scratch,
            self.folding(adapter_name, name),
            key if keep else None,
        )

    def _selected(self, name: str, targeting: Collection[str]) -> list[str]:
        """The adapters, of those that target the reading module, that change parameter `name` just now."""
        if self.disable_adapters or self.merged:
            return []
        return [adapter for adapter in self.active_adapters if adapter in targeting and self.changes(adapter, name)]

    def effective(self, name: str, targeting: Mapping[str, Any] | None = None) -> Tensor:
        """The parameter `name` of the wrapped module as the active adapters change it.

        With `targeting`, as those of them do that target another module, which is tied to this one by the parameter.
        """
        if name in self.ties:
            owner: DiffPruningLayer = self.ties[name][0]
            return owner.effective(self.ties[name][1], self.configs)
        # While the module runs, its own attribute is the effective parameter already.
        effective, plain = self._running.get(name, (None, None))
        if effective is not None and (targeting is None or targeting.keys() >= set(self._selected(name, self.configs))):
            return effective
        parameter: Tensor = getattr(self.base_layer, name) if plain is None else plain
        selected = self._selected(name, self.configs if targeting is None else targeting)
        if selected and not parameter.is_floating_point():
            raise ValueError(
                f"{self.parameter_key(name)} is quantised and is read without running its module, so the diff of "
                f"{selected} cannot be added; load the base model unquantised"
            )
        if selected and parameter.is_meta:
            raise ValueError(
                f"{self.parameter_key(name)} is offloaded and is read without running its module, so the diff of "
                f"{selected} cannot be added; keep {self.key} on a device through device_map"
            )
        for adapter_name in selected:
            parameter = self._with_adapter(parameter, adapter_name, name)
        return parameter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module, hooks and all, with its effective parameters."""
        if self.merged_adapters:
            if self._disable_adapters:
                self.unmerge()
            elif "_hf_hook" not in self.base_layer.__dict__:
                return self.base_layer(*args, **kwargs)
        if self.is_offloaded():
            return self._forward_offloaded(*args, **kwargs)
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._disable_adapters or self.merged_adapters or torch.compiler.is_compiling()):
            output = self._forward_lean(*args, **kwargs)
            if output is not None:
                return output
        changed = {}
        for name, parameter in self.base_layer.named_parameters(recurse=False):
            if parameter.is_floating_point():
                effective = self.effective(name)
                if effective is not parameter:
                    changed[name] = effective
        if not changed:
            output = self.base_layer(*args, **kwargs)
        else:
            own = dict(self.base_layer.named_parameters(recurse=False))
            self._running = {name: (tensor, own[name]) for name, tensor in changed.items()}
            try:
                output = functional_call(self.base_layer, changed, args, kwargs)
            finally:
                self._running = {}
        return self._add_to_quantized(output, *args) if self.quantized else output

    def _forward_lean(self, *args: Any, **kwargs: Any) -> Any:
        """The output without a copy of the weight, or None where that is not possible: then the effective parameters are made.

        A module that has no children reads its parameters only while it runs, so that finished diffs can be patched in.
        """
        module: Any = self._modules["base_layer"]
        if module._modules or self.quantized or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return None
        direct, kind = torch.is_grad_enabled(), type(module)
        if kind is nn.Embedding and not direct:
            direct = module.weight.numel() > MANY  # or else all of it would be patched for a few rows
        if direct and kind in (nn.Linear, nn.Embedding) and len(args) == 1 and not kwargs and _is_plain(module):
            selected = self._selected("weight", self.configs)
            if len(selected) == 1 and "weight" in self.shapes:
                run = self._linear if kind is nn.Linear else self._embedding
                output = run(selected[0], *args)
                if output is not None:
                    return output
        patch = None if torch.is_grad_enabled() else self._patch()
        if patch is None:
            return None
        with patch:
            return module(*args, **kwargs)

    def _patch(self) -> InplaceUpdate | None:
        """What to have in the module's parameters while it runs without gradients; None if that is not all of it."""
        own: dict[str, nn.Parameter] = self._modules["base_layer"]._parameters  # type: ignore[union-attr,assignment]
        addresses = [parameter.data_ptr() for parameter in own.values() if parameter is not None]
        if self._patchable_at != addresses:  # parameters that are shared or laid out anew are elsewhere
            if not all(parameter is None or can_be_overwritten(parameter) for parameter in own.values()):
                return None
            self._patchable_at = addresses
        active = self.active_adapters
        if len(active) == 1 and not self.ties:
            if active[0] in self.diffpruning_w:
                return None
            return InplaceUpdate(self._entries(active[0]).values() if active[0] in self.configs else ())
        entries = []
        for name, parameter in own.items():
            for adapter_name in self._selected(name, self.configs):
                if adapter_name not in self.diffpruning_values or name not in self.shapes or parameter is None:
                    return None
                diff = self._diff(adapter_name, name)
                entries.append(Entry(parameter, diff.positions, diff.values))
        return InplaceUpdate(entries)

    def _diff(self, adapter_name: str, name: str) -> Diff:
        return Diff(self.kept_values(adapter_name, name), self.positions(adapter_name, name))

    def _linear(self, adapter_name: str, x: Tensor) -> Tensor | None:
        module: Any = self.base_layer
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        if x.dtype != module.weight.dtype and not autocast:
            return None  # nn.Linear says what is wrong
        if adapter_name in self.diffpruning_values:
            if not can_be_overwritten(module.weight):
                return None
            diff = self._diff(adapter_name, "weight")
            sampling = sampling_pays(diff.values.numel(), module.weight.shape, x)
            pattern = self.pattern(adapter_name, "weight") if sampling else None
            return patched_linear(x, self._read("bias"), module.weight, diff, pattern, self.fused)
        if not self._samples(adapter_name, "weight"):
            return None
        sample = self._sample(adapter_name, "weight")  # before the bias's
        tensors = module.weight, *self._gates_of(adapter_name, "weight")
        return sampled_linear(x, self._read("bias"), *tensors, sample)

    def _embedding(self, adapter_name: str, ids: Tensor) -> Tensor | None:
        module: Any = self.base_layer
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return None
        if adapter_name in self.diffpruning_values:
            values, pattern = self.kept_values(adapter_name, "weight"), self.pattern(adapter_name, "weight")
            return patched_embedding(ids, module.padding_idx, module.weight, values, pattern)
        if not self._samples(adapter_name, "weight"):
            return None
        tensors = module.weight, *self._gates_of(adapter_name, "weight")
        return sampled_embedding(ids, module.padding_idx, *tensors, self._sample(adapter_name, "weight"))

    def _samples(self, adapter_name: str, name: str) -> bool:
        """Whether the parameter's gates are sampled in this pass."""
        return self.training and adapter_name in self.diffpruning_w and name in self.diffpruning_log_alpha[adapter_name]

    def _forward_offloaded(self, *args: Any, **kwargs: Any) -> Any:
        """The module's parameters are elsewhere until it runs: bring them first, and keep its hook, which would bring
        the plain ones again, out of the way."""
        module: Any = self.base_layer
        hook, hooked = module._hf_hook, module.forward
        own = [tensors for name in self._all_names() for tensors in getattr(self, name).values()]
        hooks = [(tensors, tensors._hf_hook) for tensors in own if hasattr(tensors, "_hf_hook")]
        for tensors, its_hook in hooks:  # nothing else calls the containers of the adapters' tensors
            its_hook.pre_forward(tensors)
        self._check_loaded()
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        module.forward = module._old_forward
        try:
            output = self._forward(*args, **kwargs)
        finally:
            module.forward = hooked
            for tensors, its_hook in hooks:
                its_hook.post_forward(tensors, None)
        return hook.post_forward(module, output)

    def _add_to_quantized(self, output: Tensor, x: Tensor) -> Tensor:
        """x delta^T on top of what the quantised weight gives: the sum of the two weights cannot be stored."""
        for adapter_name in self._selected("weight", self.configs):
            values = self.kept_values(adapter_name, "weight")
            zeros = torch.zeros(self.shapes["weight"], dtype=x.dtype, device=x.device)
            delta = sparse_parameter(zeros, values, self.positions(adapter_name, "weight"))
            output = output + functional.linear(x, delta).to(output.dtype)
        return output

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
        modules = self.__dict__.get("_modules", ())
        if name in modules:  # nearly always, and in a fraction of the time
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not yet set: looking further would never end
                raise
            return self._read(name)


def _is_plain(module: nn.Module) -> bool:
    """Whether running the module is its class's forward and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__
