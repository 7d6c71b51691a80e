"""One wrapped module of any type: its effective parameters, and merging them into the base and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from diffpeft import gates
from diffpeft.adapter import AdapterTensors
from diffpeft.diff import add_, restore_, sparse_parameter
from diffpeft.mixed import MixedBatch
from diffpeft.noise import NoisePass, remove_hooks
from diffpeft.patched import Diff, Patch, can_be_patched, patched_embedding, patched_linear, sampling_pays
from diffpeft.sampled import Sample, sampled_embedding, sampled_linear, sampled_parameter
from diffpeft.sharding import check_whole

MANY = 1 << 20
"""Elements of an embedding beyond which the rows of a batch are made, and no others."""


class _Merge(NamedTuple):
    """What a merge overwrote: `positions` None means the whole parameter."""

    adapter_name: str
    parameter_name: str
    positions: Tensor | None
    old: Tensor


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
        self.mixed: MixedBatch | None = None
        """Which rows of the batch belong to which adapter, while they differ."""
        self.shared_with: dict[str, list[str]] = {}
        """Modules that have a parameter of this layer too and are not adapted, by the parameter's name."""
        self.tied_layers: dict[str, list[DiffPruningLayer]] = {}
        """Layers that have a parameter of this layer as a tie, by its name."""
        self._patchable_at: list[int] = []  # addresses of parameters that can be patched
        self._merges: list[_Merge] = []
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
            return sampled_parameter(parameter, *self._gates_of(adapter_name, name), self._sample(adapter_name, name))
        return gates.gated_parameter(parameter, *self._gates_of(adapter_name, name), self.configs[adapter_name].stretch)

    def _gates_of(self, adapter_name: str, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """w, locations of the element gates, and location of the group gate if there is one."""
        w, log_alpha = (self._tensor(f"diffpruning_{kind}", adapter_name, name) for kind in ("w", "log_alpha"))
        return w, log_alpha, self.diffpruning_group_log_alpha[adapter_name].get(name, None)

    def _sample(self, adapter_name: str, name: str) -> Sample:
        """How a parameter's gates are sampled in this pass."""
        seed = self.noise.seed((self.key, adapter_name, name))
        return Sample(seed, self.configs[adapter_name].stretch, self.fused, self.noise.scratch)

    def changes(self, adapter_name: str, name: str) -> bool:
        """Whether the adapter has a diff for parameter `name`, tied or not."""
        if name in self.ties:
            owner: DiffPruningLayer = self.ties[name][0]
            return adapter_name in self.configs and owner.changes(adapter_name, self.ties[name][1])
        if self.is_gating(adapter_name):
            return name in self.diffpruning_w[adapter_name]
        return adapter_name in self.diffpruning_values and name in self.diffpruning_values[adapter_name]

    def changes_any(self, adapter_name: str) -> bool:
        """Whether the adapter has a diff for one of the module's own parameters."""
        return any(self.changes(adapter_name, name) for name in (*self.shapes, *self.ties))

    def _selected(self, name: str, targeting: Collection[str]) -> list[str]:
        """The adapters, of those that target the reading module, that change parameter `name` just now."""
        if self.disable_adapters or self.merged:
            return []
        selected = self.active_adapters if self.mixed is None else self.mixed.selected(self, name)
        return [adapter for adapter in selected if adapter in targeting and self.changes(adapter, name)]

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

    def _patch(self) -> Patch | None:
        """What to have in the module's parameters while it runs without gradients; None if that is not all of it."""
        own: dict[str, nn.Parameter] = self._modules["base_layer"]._parameters  # type: ignore[union-attr,assignment]
        addresses = [parameter.data_ptr() for parameter in own.values() if parameter is not None]
        if self._patchable_at != addresses:  # parameters that are shared or laid out anew are elsewhere
            if not all(parameter is None or can_be_patched(parameter) for parameter in own.values()):
                return None
            self._patchable_at = addresses
        active = self.active_adapters
        if len(active) == 1 and self.mixed is None and not self.ties:
            if active[0] in self.diffpruning_w:
                return None
            fixed = self.fixed(active[0]) if active[0] in self.configs else ()
            return Patch([(own[name], values, positions) for name, values, positions in fixed])
        diffs = []
        for name, parameter in own.items():
            for adapter_name in self._selected(name, self.configs):
                if adapter_name not in self.diffpruning_values or name not in self.shapes or parameter is None:
                    return None
                diffs.append((parameter, *self._diff(adapter_name, name)))
        return Patch(diffs)

    def _diff(self, adapter_name: str, name: str) -> Diff:
        return Diff(self.kept_values(adapter_name, name), self.positions(adapter_name, name))

    def _linear(self, adapter_name: str, x: Tensor) -> Tensor | None:
        module: Any = self.base_layer
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        if x.dtype != module.weight.dtype and not autocast:
            return None  # nn.Linear says what is wrong
        if adapter_name in self.diffpruning_values:
            if not can_be_patched(module.weight):
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
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not yet set: looking further would never end
                raise
            return self._read(name)

    # Merging

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, which takes most of the time of a switch between merged adapters: parameters are looked up directly."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if self.disable_adapters or self.frozen_peft_weight_names:
            super().set_adapter(names, inference_mode)
            return
        for attribute in self.adapter_layer_names:
            for adapter_name, tensors in getattr(self, attribute).items():
                trains = adapter_name in names and not inference_mode
                for parameter in tensors._parameters.values():
                    if parameter is not None and parameter.requires_grad is not trains and parameter.is_leaf:
                        parameter.requires_grad_(trains)
        self._active_adapter = names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the diffs of the adapters (default: the active ones) into the base parameters.

        What they overwrite is kept, so that [`unmerge`] restores the base to the bit.

        Raises:
            ValueError: with `safe_merge`, where the result would not be finite; nothing is written then.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.configs:
                continue
            self._check_mergeable(adapter_name)
            done: list[_Merge] = []
            for merge in self._merge_one(adapter_name):
                done.append(merge)
                if safe_merge and not self._is_finite(merge):
                    self._revert(done)
                    raise ValueError(
                        f"merging adapter {adapter_name!r} would make {self.parameter_key(merge.parameter_name)} NaN "
                        "or infinite; the adapter seems to be broken"
                    )
            self._merges.extend(done)
            self.merged_adapters.append(adapter_name)

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
        own = self._own()
        check_whole((own[name] for name in self.shapes), "merging")

    def _own(self) -> dict[str, nn.Parameter]:
        """All parameters of the wrapped module, as it holds them."""
        return cast(dict[str, nn.Parameter], self.base_layer._parameters)

    def _merge_one(self, adapter_name: str) -> Iterator[_Merge]:
        # `.data` keeps autograd out, and the parameter's version as it is.
        own = self._own()
        if self.is_gating(adapter_name):
            for name in self.shapes:
                data = own[name].data
                old = data.clone()
                data.copy_(data + self.dense_delta(adapter_name, name))
                yield _Merge(adapter_name, name, None, old)
        else:
            for name, values, where in self.fixed(adapter_name):
                yield _Merge(adapter_name, name, where, add_(own[name].data, values.data, where))

    def _is_finite(self, merge: _Merge) -> bool:
        merged = self.own_parameters()[merge.parameter_name].data
        written = merged if merge.positions is None else torch.take(merged, merge.positions)
        return bool(torch.isfinite(written).all())

    def _revert(self, merges: list[_Merge]) -> None:
        """Undo the merges, the last one first, and empty the list."""
        own = self._own()
        while merges:
            merge = merges.pop()
            target = own[merge.parameter_name].data
            if merge.positions is None:
                target.copy_(merge.old)
            else:
                restore_(target, merge.old.to(target.device), merge.positions.to(target.device))

    def unmerge(self, keep: int = 0) -> None:
        """Restore the base parameters to the bit, of all merged adapters but the first `keep`."""
        kept = self.merged_adapters[:keep]
        first = next((i for i, merge in enumerate(self._merges) if merge.adapter_name not in kept), len(self._merges))
        undone, self._merges = self._merges[first:], self._merges[:first]
        self._revert(undone)
        self.merged_adapters[keep:] = []


def _is_plain(module: nn.Module) -> bool:
    """Whether running the module is its class's forward and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__


class RootParameters(DiffPruningLayer):
    """The parameters that the model itself owns, like CLIP's logit scale. Nothing can wrap the model, so this is a child
    of it that puts the effective parameters in their place while it runs.

    Args:
        model: the base model.
        noise: as of [`DiffPruningLayer`].
    """

    NAME = "root_parameters"

    def __init__(self, model: nn.Module, noise: NoisePass) -> None:
        super().__init__(model, "", {}, noise)
        self._plain: dict[str, nn.Parameter | None] = {}

    @property
    def module_key(self) -> str:
        """The name of the child, which is not the model's own."""
        return self.NAME

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer":  # not as a submodule: the model would contain itself
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def watch(self) -> None:
        """Put effective parameters in whenever the model runs."""
        self.base_layer.register_forward_pre_hook(self._before)
        self.base_layer.register_forward_hook(self._after, always_call=True)

    def unwatch(self) -> None:
        """Undo [`watch`]."""
        remove_hooks(self.base_layer, self._before, self._after)

    def _before(self, module: nn.Module, args: Any) -> None:
        if self.mixed is None:
            self._put()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._put_back()

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`forward`, the model's own, with effective parameters."""
        self._put()
        try:
            return forward(*args, **kwargs)
        finally:
            self._put_back()

    def _put(self) -> None:
        if self.disable_adapters and self.merged:
            self.unmerge()
        effective = {name: self.effective(name) for name in self.shapes}
        model = self.base_layer
        for name, tensor in effective.items():
            if tensor is not model._parameters[name]:
                self._plain[name] = model._parameters[name]
                self._running[name] = tensor, cast(Tensor, model._parameters[name])
                model._parameters[name] = tensor  # type: ignore[assignment]

    def _put_back(self) -> None:
        self.base_layer._parameters.update(self._plain)
        self._plain, self._running = {}, {}
