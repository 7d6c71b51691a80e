"""The hooks of a tuner that PEFT calls, each a few lines that hand on to the modules beside this one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffpeft.config import FIXMASK, GATING, DiffPruningConfig
from diffpeft.files import fingerprint
from diffpeft.gates.update.held import GATING_BUFFERS
from diffpeft.layer.find import layers_in, outer_modules
from diffpeft.layer.layer import DiffPruningLayer, RootParameters
from diffpeft.layer.output import OutputLayer
from diffpeft.layer.wrapped import is_quantized, own_shapes
from diffpeft.sparse.sharded import is_sharded
from diffpeft.tuner import injection, lookup, saving, switching


class DiffPruningTuner(BaseTuner):
    """The hooks of PEFT for [`DiffPruningModel`], which adds what a user calls."""

    prefix: str = "diffpruning_"
    tuner_layer_cls = DiffPruningLayer
    target_module_mapping: dict[str, list[str]] = {}  # the default is found in the model, not by its type
    _injection: Any = None  # an `Injection` while adapters are injected

    # Layers and adapters

    def all_layers(self) -> list[DiffPruningLayer]:
        """Every layer of the tuner, whichever adapters it holds."""
        return layers_in(self.model, DiffPruningLayer)

    def layers_of(self, adapter_name: str) -> list[DiffPruningLayer]:
        """The layers that hold the adapter."""
        return [layer for layer in self.all_layers() if layer.has_adapter(adapter_name)]

    def resolve(self, adapter_name: str | None) -> str:
        """The adapter's name, by default that of the active one; see [`diffpeft.tuner.lookup.resolve`]."""
        return lookup.resolve(self, adapter_name)

    def phase(self, adapter_name: str | None = None) -> str:
        """The adapter's phase: "gating" or "fixmask"."""
        name = self.resolve(adapter_name)
        found = (module for _, module in outer_modules(self.model) if isinstance(module, DiffPruningLayer))
        return GATING if any(layer.is_gating(name) for layer in found) else FIXMASK

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the base model by name, each once, without heads that are trained whole."""
        return injection.base_parameters(self.model)

    def num_base_parameters(self) -> int:
        """Parameters of the base model, adapted or not, tied ones once, heads in `modules_to_save` not counted."""
        adapters = tuple(self.peft_config)  # with them come and go the heads that are trained whole
        counted: tuple[tuple[str, ...], int] | None = self.__dict__.get("_counted")
        if counted is None or counted[0] != adapters:
            packed = {id(m.weight): own_shapes(m)["weight"].numel() for m in self.model.modules() if is_quantized(m)}
            total = sum(packed.get(id(p), p.numel()) for _, p in self.base_parameters())
            counted = self.__dict__["_counted"] = adapters, total
        return counted[1]

    def differing_base(self, adapter_name: str, base_fingerprint: fingerprint.Fingerprint) -> list[str]:
        """Names of the base parameters under an adapter that are not those of the fingerprint."""
        parameters = injection.known_parameters(self.layers_of(adapter_name))
        return fingerprint.differing(base_fingerprint, parameters, parameters.__getitem__)

    # Injection

    def _prepare_adapter_config(
        self, peft_config: DiffPruningConfig, model_config: dict[str, Any]
    ) -> DiffPruningConfig:
        injection.complete_config(self.model, peft_config, wrapped=bool(self.all_layers()))
        return peft_config

    def _check_new_adapter_config(self, config: DiffPruningConfig) -> None:
        super()._check_new_adapter_config(config)
        injection.check_model(self.model)

    def _check_target_module_exists(self, peft_config: DiffPruningConfig, key: str) -> Any:
        named = {} if self._injection is None else self._injection.named
        module = self.model if key == RootParameters.NAME else named.get(key) or self.model.get_submodule(key)
        shapes = {**module.shapes, **module.ties} if isinstance(module, DiffPruningLayer) else own_shapes(module)
        config = peft_config
        if peft_config.target_modules is None:
            # PEFT's own matching of exclusions, heads and layer indices, for a target that is this very module.
            if peft_config.layers_to_transform is not None and "." not in key:
                return False
            config = copy.copy(peft_config)
            config.target_modules = [key.rsplit(".", 1)[-1]]
        matched = super()._check_target_module_exists(config, key)
        return matched if shapes or not matched else False

    def _create_and_replace(
        self,
        peft_config: DiffPruningConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        *,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, DiffPruningLayer) else None
        layer = layer or self._injection.wrap(target, current_key, parent, target_name)
        layer.update_layer(adapter_name, peft_config)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the modules that the config matches (PEFT's hook).

        Raises:
            ValueError: a parameter out of reach; a pruned adapter with nonzeros where the model has no parameter.
        """
        # A copy: the caller's object may begin other adapters, and must not take on what is noted of this one.
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        before = self.all_layers()
        self._injection = injection.Injection(model, before)
        try:
            with warnings.catch_warnings():
                if isinstance(self._check_target_module_exists(config, RootParameters.NAME), _ExcludedModule):
                    # PEFT does not know of these parameters and takes the exclusion for a mistake.
                    warnings.filterwarnings("ignore", "You have passed exclude_modules")
                # Without state_dict: the config says it all, and a file has no keys of modules without nonzeros.
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            if not before:
                self._injection.noise.watch(model)
            # PEFT takes a module inside a wrapped one for a part of the other adapter, and skips it.
            for layer in self.all_layers():
                if not layer.has_adapter(adapter_name) and self._check_target_module_exists(config, layer.key):
                    layer.update_layer(adapter_name, config)
            if config.target_modules is None and self._check_target_module_exists(config, RootParameters.NAME):
                self._injection.adapt_root(model, adapter_name, config, self.active_adapters)
        finally:
            self._injection = None
        layers = self.layers_of(adapter_name)
        injection.check_coverage(layers, adapter_name, config)
        injection.check_base(layers, adapter_name, config)
        injection.note_sharing(model, self.all_layers())
        if config.heads_checksum is not None or config.diff_checksum is not None:
            saving.FirstPassCheck(model, config, adapter_name)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze the base model (PEFT's hook); heads manage what trains themselves."""
        injection.freeze(model)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave adapters in fp32, as they are made (PEFT's hook)."""

    # Activating, merging, unwrapping

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter or several the active ones, whose diffs add (PEFT's hook). Raises ValueError for others."""
        lookup.check_names(self, [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        if any(layer.merged for layer in self.all_layers()):
            super().set_adapter(adapter_name, inference_mode)  # warns and unmerges
            return
        for layer in switching.activate(self.model, adapter_name, inference_mode):
            layer.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def switch_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make other adapters active and merge them in place of those that are merged, in one walk through the model.

        The result is that of `unmerge_adapter(); set_adapter(adapter_name, inference_mode); merge_adapter()`.

        Raises:
            ValueError: names that do not exist, or heads that cannot be active together: nothing changes then. Where
                merging refuses, nothing is merged, and the adapters are the active ones.
        """
        lookup.check_names(self, [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        layers = switching.activate(self.model, adapter_name, inference_mode)
        self.active_adapter = adapter_name
        try:
            for layer in layers:
                layer.set_adapter(adapter_name, inference_mode=inference_mode)
                with switching.onloaded(layer):
                    layer.unmerge()
                    layer.merge()
        except BaseException:
            self.unmerge_adapter()
            self.set_adapter(adapter_name, inference_mode)
            raise

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write diffs into the base parameters, k writes a parameter, in all layers or in none.

        Args:
            adapter_names: the adapters, by default the active ones.
            safe_merge: raise ValueError where the result would not be finite.
        """
        lookup.check_names(self, adapter_names or [])
        switching.merge(self.all_layers(), adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the base parameters, to the bit, of all merged adapters."""
        for layer in self.all_layers():
            with switching.onloaded(layer):
                layer.unmerge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Unwrap the model (PEFT's hook behind `unload` and `merge_and_unload`), modules inside others too."""
        if merge:
            self.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        else:
            self.unmerge_adapter()
        if merge and adapter_names is not None:
            switching.choose_heads(self.model, adapter_names)
        switching.unwrap(self.model, progressbar)
        unloaded: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        return unloaded

    def _check_merge_allowed(self) -> None:
        """Allow tied weights, which have one diff here (PEFT's hook); layers refuse what cannot be merged."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put an unwrapped head in its place (PEFT's hook), which may be a module of any kind."""
        setattr(parent, child_name, new_module)

    # Saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: DiffPruningConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's tensors for a file (PEFT's hook)."""
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return saving.tensors_to_save(model, config, adapter_name, own)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DiffPruningConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Bring the adapter into the file's phase and shapes (PEFT's hook), which the loading itself does not."""
        if any(map(is_sharded, state_dict.values())):  # a checkpoint of shards, of the model as it is
            return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)  # type: ignore[no-any-return]
        layers = {name: layer for name, layer in outer_modules(model) if isinstance(layer, DiffPruningLayer)}
        layers = {name: layer for name, layer in layers.items() if layer.has_adapter(adapter_name)}
        tensors = saving.match_file(layers.values(), config, adapter_name, state_dict)
        own = {f"{n}.{key}": t for n, layer in layers.items() for key, t in layer.tensors(adapter_name).items()}
        tensors = saving.rename(tensors, {cls._remove_adapter_name_from_key(key, adapter_name) for key in own})
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)
        saving.check_complete(own, adapter_name, remapped)
        return remapped

    # Running

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Run a mixed batch (PEFT's hook around forward and generate): `adapter_names` has a name for each row."""
        names = kwargs.get("adapter_names")
        return nullcontext() if names is None else switching.mixed(self, names)

    def get_output_embeddings(self) -> nn.Module | None:
        """The model's output layer, as a plain module with the effective weight."""
        output: nn.Module | None = self.model.get_output_embeddings()
        if self.all_layers()[0].noise.sharded:
            return output  # FSDP shards it
        return OutputLayer(output) if isinstance(output, DiffPruningLayer) else output

    def train(self, mode: bool = True) -> DiffPruningTuner:
        """Set the training mode; batch norms stay in evaluation: their running statistics are the base's."""
        super().train(mode)
        for _, module in outer_modules(self.model):
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The gates' moments, by name in the PeftModel, which DistributedDataParallel need not send around.

        They follow from gradients that are equal on all ranks.
        """
        names = [name for name, _ in self.named_buffers()]
        return [f"base_model.{name}" for name in names if any(f".{part}." in name for part in GATING_BUFFERS)]
