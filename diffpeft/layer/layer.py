"""One wrapped module of any type: its effective parameters, running it with them, and merging them into it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from diffpeft.files.keys import ROOT
from diffpeft.gates.forward_pass import ForwardPass, remove_hooks
from diffpeft.gates.hard_concrete import gated_parameter
from diffpeft.layer import run
from diffpeft.layer.find import layers_in
from diffpeft.layer.merging import MergeStack, check_mergeable
from diffpeft.layer.tensors import AdapterTensors
from diffpeft.layer.wrapped import is_offloaded, run_onloaded, take_hiding
from diffpeft.sparse.functions import sparse_parameter
from diffpeft.sparse.inplace import Entry
from diffpeft.sparse.sharded import check_whole


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
        noise: ForwardPass | None = None,
    ) -> None:
        super().__init__(base_layer, key, ties)
        self.noise = ForwardPass() if noise is None else noise
        self.fused = False
        """Whether the gates' elementwise chains are compiled."""
        self.shared_with: dict[str, list[str]] = {}
        """Modules that have a parameter of this layer too and are not adapted, by the parameter's name."""
        self.tied_layers: dict[str, list[DiffPruningLayer]] = {}
        """Layers that have a parameter of this layer as a tie, by its name."""
        self._merges = MergeStack()
        self._running: dict[str, tuple[Tensor, Tensor]] = {}  # while the module runs: effective and plain parameters
        self.train(base_layer.training)

    # Effective parameters

    def effective(self, name: str, targeting: Mapping[str, Any] | None = None) -> Tensor:
        """The parameter `name` of the wrapped module as the active adapters change it.

        With `targeting`, only by those that target another module, which is tied to this one by the parameter.
        """
        if name in self.ties:
            owner: DiffPruningLayer = self.ties[name][0]
            return owner.effective(self.ties[name][1], self.configs)
        # While the module runs, its own attribute is the effective parameter already.
        effective, plain = self._running.get(name, (None, None))
        if effective is not None and (targeting is None or targeting.keys() >= set(self.selected(name))):
            return effective
        parameter: Tensor = getattr(self.base_layer, name) if plain is None else plain
        selected = self.selected(name, targeting)
        if selected and (not parameter.is_floating_point() or parameter.is_meta):
            raise ValueError(
                f"{self.parameter_key(name)} is quantised or offloaded and is read without running its module, so the "
                f"diff of {selected} cannot be added; load {self.key} unquantised, on a device"
            )
        for adapter_name in selected:
            parameter = self._with_adapter(parameter, adapter_name, name)
        return parameter

    def selected(self, name: str, targeting: Collection[str] | None = None) -> list[str]:
        """The active adapters that change parameter `name` now, of those in `targeting` (None: of this layer)."""
        if self.disable_adapters or self._merges:
            return []
        targeting = self.configs if targeting is None else targeting
        return [adapter for adapter in self.active_adapters if adapter in targeting and self.changes(adapter, name)]

    def changes(self, adapter_name: str, name: str) -> bool:
        """Whether the adapter has a diff for parameter `name`, tied or not."""
        if name in self.ties:
            owner: DiffPruningLayer = self.ties[name][0]
            return adapter_name in self.configs and owner.changes(adapter_name, self.ties[name][1])
        if self.is_gating(adapter_name):
            w = self.diffpruning_w[adapter_name]
            return name in w and w[name].shape == self.shapes[name]  # until positions are chosen it may be a place only
        return adapter_name in self.diffpruning_values and name in self.diffpruning_values[adapter_name]

    def _with_adapter(self, parameter: Tensor, adapter_name: str, name: str) -> Tensor:
        """`parameter` plus the adapter's diff; gates are sampled in training mode only."""
        if not self.is_gating(adapter_name):
            diff = self.sparse(adapter_name, name)
            return sparse_parameter(parameter, diff.values, diff.positions)
        w, log_alpha, group_log_alpha = self.gates_of_parameter(adapter_name, name)
        if log_alpha is None:
            return (parameter + w).to(parameter.dtype)
        if self.training:
            return run.sampled(self, parameter, adapter_name, name)
        return gated_parameter(parameter, w, log_alpha, group_log_alpha, self.configs[adapter_name].stretch)

    def read(self, name: str) -> Any:
        """The attribute `name` of the wrapped module; a parameter as the adapters change it."""
        own = self.base_layer._parameters.get(name)
        if own is not None and self.noise.sharded and self.noise.model is None:
            return own
        return getattr(self.base_layer, name) if own is None else self.effective(name)

    @property
    def weight(self) -> Tensor:
        """The effective weight: some models read it without calling the module."""
        return cast(Tensor, self.read("weight"))

    @property
    def bias(self) -> Tensor:
        """The effective bias."""
        return cast(Tensor, self.read("bias"))

    def __getattr__(self, name: str) -> Any:
        """The wrapped module's attribute where the wrapper has none; parameters as the adapters change them."""
        modules = self.__dict__.get("_modules", ())
        if name in modules:  # nearly always, and in a fraction of the time
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not yet set: looking further would never end
                raise
            return self.read(name)

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module, hooks and all, with its effective parameters."""
        if self._merges:
            if self._disable_adapters:
                self.unmerge()
            elif "_hf_hook" not in self.base_layer.__dict__:  # Accelerate's, around the module's forward
                return self.base_layer(*args, **kwargs)
        if is_offloaded(self.base_layer):
            containers = [tensors for name in self.all_names for tensors in getattr(self, name).values()]
            return run_onloaded(self.base_layer, containers, self._forward_loaded, args, kwargs)
        return self._forward(*args, **kwargs)

    def running_layers(self) -> list[DiffPruningLayer]:
        """All layers of the model that runs now."""
        return [] if self.noise.model is None else layers_in(self.noise.model, DiffPruningLayer)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._disable_adapters or self._merges or torch.compiler.is_compiling()):
            done, output = run.without_copy(self, args, kwargs)
            if done:
                return output
        own = {n: p for n, p in self.base_layer.named_parameters(recurse=False) if p.is_floating_point()}
        changed = {name: tensor for name in own if (tensor := self.effective(name)) is not own[name]}
        if not changed:
            output = self.base_layer(*args, **kwargs)
        else:
            if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
                raise NotImplementedError(f"torch.jit.trace cannot follow the diff of {self.key}; merge first")
            self._running = {name: (tensor, own[name]) for name, tensor in changed.items()}
            hiding = take_hiding(self.base_layer, changed)
            try:
                output = functional_call(self.base_layer, changed, args, kwargs)
            finally:
                self.base_layer.__dict__.update(hiding)
                self._running = {}
        return run.add_to_quantized(self, output, *args) if self.quantized else output

    def _forward_loaded(self, *args: Any, **kwargs: Any) -> Any:
        """Run with offloaded parameters, which are here now."""
        run.check_loaded(self)
        return self._forward(*args, **kwargs)

    def train(self, mode: bool = True) -> DiffPruningLayer:
        """Set the training mode; a batch norm stays in evaluation: its running statistics are the base's."""
        super().train(mode)
        if isinstance(self.base_layer, _BatchNorm):
            self.base_layer.eval()
        return self

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off (PEFT's hook); merged ones are taken out first, since the base may be read."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    # Merging

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are in the base parameters now, in the order in which they were merged."""
        return self._merges.names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the diffs of the adapters (default: the active ones) into the base parameters.

        What they overwrite is kept, so that [`unmerge`] restores the base to the bit.

        Raises:
            ValueError: with `safe_merge`, where the result would not be finite; nothing is written then.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name in self.configs:
                check_mergeable(self, adapter_name)
                check_whole(self._own().values(), "merging")
                entries = {self.parameter_key(name): entry for name, entry in self.entries(adapter_name).items()}
                self._merges.push(adapter_name, entries, check_finite=safe_merge)

    def unmerge(self, keep: int = 0) -> None:
        """Restore the base parameters to the bit, except for the first `keep` merged adapters."""
        while len(self._merges) > keep:
            self._merges.pop({self.parameter_key(name): parameter for name, parameter in self._own().items()})

    def entries(self, adapter_name: str) -> dict[str, Entry]:
        """The entries that the adapter adds to the module's parameters, by parameter name.

        Raises:
            IndexError: the diff reaches beyond a parameter that was larger when the adapter was attached.
        """
        own = self._own()
        if self.is_gating(adapter_name):
            names = [name for name in self.shapes if self.changes(adapter_name, name)]
            return {name: Entry(own[name], None, self.delta(adapter_name, name)) for name in names}
        entries = {}
        for name, diff in self.sparse_diffs(adapter_name).items():
            numel, positions = own[name].numel(), diff.positions
            if numel < self.shapes[name].numel() and int(positions[-1]) >= numel:
                raise IndexError(
                    f"the diff of {self.parameter_key(name)} reaches beyond its {numel} elements: it was larger when "
                    "the adapter was attached; load the adapter onto the model as it is now"
                )
            entries[name] = Entry(own[name], positions, diff.parameter)
        return entries

    def _own(self) -> dict[str, nn.Parameter]:
        """All parameters of the wrapped module, as it holds them."""
        return cast(dict[str, nn.Parameter], self.base_layer._parameters)


class RootParameters(DiffPruningLayer):
    """The parameters that the model itself owns, such as CLIP's logit scale.

    Nothing can wrap the model, so this is a child of it that puts effective parameters in their place while it runs.

    Args:
        model: the base model.
        noise: as in [`DiffPruningLayer`].
    """

    NAME = ROOT

    def __init__(self, model: nn.Module, noise: ForwardPass) -> None:
        super().__init__(model, "", {}, noise)
        self.module_key = self.NAME
        self._plain: dict[str, nn.Parameter | None] = {}
        self._hiding: dict[str, Tensor] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer":  # not as a submodule: the model would contain itself
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def watch(self) -> None:
        """Put effective parameters in whenever the model runs."""
        self.base_layer.register_forward_pre_hook(self.put)
        self.base_layer.register_forward_hook(self.put_back, always_call=True)

    def unwatch(self) -> None:
        """Undo [`watch`]."""
        remove_hooks(self.base_layer, self.put, self.put_back)

    def put(self, *_: Any) -> None:
        """Put the effective parameters in the place of the plain ones."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        own = self._own()
        for name, tensor in {name: self.effective(name) for name in self.shapes}.items():
            if tensor is not own[name]:
                self._plain[name] = own[name]
                self._running[name] = tensor, own[name]
                own[name] = tensor  # type: ignore[assignment]
        self._hiding = take_hiding(self.base_layer, self._plain)

    def put_back(self, *_: Any) -> None:
        """Undo [`put`]."""
        self.base_layer._parameters.update(self._plain)
        self.base_layer.__dict__.update(self._hiding)
        self._plain, self._hiding, self._running = {}, {}, {}
