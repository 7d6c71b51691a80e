"""How the tuner gets into a model: finding and wrapping the modules that a config names."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils import TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from diffpeft.config import DiffPruningConfig
from diffpeft.files import fingerprint
from diffpeft.gates.kernels import WORTH_FUSING
from diffpeft.gates.noise import NoisePass
from diffpeft.layer.find import layers_in, outer_modules
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.layer.output import OutputLayer
from diffpeft.layer.root import RootParameters
from diffpeft.layer.tensors import own_shapes
from diffpeft.sparse.sharded import check_whole
from diffpeft.tuner import loading
from diffpeft.tuner.head import FileCheck, fresh_head


class Injection(BaseTuner):
    """PEFT's hooks of [`DiffPruningModel`] for wrapping modules."""

    prefix: str = "diffpruning_"
    tuner_layer_cls = DiffPruningLayer
    target_module_mapping: dict[str, list[str]] = {}  # the default is found in the model, not by its type
    _owners: dict[int, tuple[DiffPruningLayer, str]]  # during injection: which layer has the diff of a parameter
    _noise: NoisePass  # during injection
    _named: dict[str, nn.Module] = {}  # during injection: modules by name
    _references: dict[int, list[tuple[nn.Module, str]]]  # during injection: modules with several names, and these

    def all_layers(self) -> list[DiffPruningLayer]:
        """Every layer of the tuner, whichever adapters it holds."""
        return layers_in(self.model, DiffPruningLayer)

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the base model by name, each once, without heads that are trained whole."""
        modules = list(outer_modules(self.model))
        heads = [module for _, module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
        seen = {id(p) for head in heads for p in head.parameters()}
        for key, module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{key}.{name}".removeprefix(".").replace(".base_layer", ""), parameter

    # Wrapping

    def _prepare_adapter_config(
        self, peft_config: DiffPruningConfig, model_config: dict[str, Any]
    ) -> DiffPruningConfig:
        if peft_config.target_modules is None:
            head = [name for name in fresh_head(self.model) if name not in (peft_config.modules_to_save or [])]
            if head:
                peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *head]
        if peft_config.target_modules == "all-linear" and any(True for _ in self.all_layers()):
            peft_config.target_modules = self._all_linear(peft_config)
        return peft_config

    def _all_linear(self, peft_config: DiffPruningConfig) -> list[str]:
        """What "all-linear" means in a model that is wrapped already, where PEFT would look for linear modules in vain:
        the same modules as before."""
        output = self.model.get_output_embeddings() if isinstance(self.model, PreTrainedModel) else None
        heads = SEQ_CLS_HEAD_NAMES if output is None and peft_config.task_type == TaskType.SEQ_CLS else ()
        names = []
        for name, module in self.model.named_modules():
            linear = module.base_layer if isinstance(module, DiffPruningLayer) else module
            key = name.replace(".base_layer", "")
            trained_whole = any(part in ("original_module", "modules_to_save") for part in key.split("."))
            if isinstance(linear, (nn.Linear, Conv1D)) and module is not output and not trained_whole:
                names.append(key)
        return sorted(set(names) - set(heads))

    def _check_new_adapter_config(self, config: DiffPruningConfig) -> None:
        super()._check_new_adapter_config(config)
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, DiffPruningLayer):
                raise ValueError(
                    f"{name} already carries an adapter of another kind ({type(module).__name__}), under which the base "
                    "weights are not the model's own; unload it or merge it first"
                )
        check_whole(self.model.parameters(), "wrapping a model")
        if not any(p.is_floating_point() for p in self.model.parameters()):
            raise ValueError("the base model has no floating-point parameters, so there is nothing to adapt")

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """PEFT's hook; heads manage what trains themselves. PEFT's own goes through all of the adapters' tensors."""
        modules = [module for _, module in outer_modules(model)]
        heads = {part for head in modules if isinstance(head, AuxiliaryTrainingWrapper) for part in head.modules()}
        for module in modules:
            if module not in heads:
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad = False

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's hook: adapters are fp32 as they are made."""

    def _check_target_module_exists(self, peft_config: DiffPruningConfig, key: str) -> Any:
        module = self.model if key == RootParameters.NAME else self._named.get(key) or self.model.get_submodule(key)
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
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, DiffPruningLayer):
            own = target.named_parameters(recurse=False)
            ties = {name: self._owners[id(p)] for name, p in own if id(p) in self._owners}
            layer = DiffPruningLayer(target, current_key.replace(".base_layer", ""), ties, self._noise)
            self._owners.update(_owners(layer))
            # A module with children may be wrapped before them: they stay children of the wrapped module.
            parent = parent.base_layer if isinstance(parent, DiffPruningLayer) else parent
            setattr(parent, target_name, layer)
            for other, name in self._references.get(id(layer.base_layer), []):
                setattr(other, name, layer)  # the model has the module under several names
            target = layer
        target.update_layer(adapter_name, peft_config)

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
        # The caller's object may begin other adapters and other models, of which it must not say what is said of this one.
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        layers = list(self.all_layers())
        self._references, self._named = {}, dict(outer_modules(model))
        for module in self._named.values():
            for name, child in module._modules.items():  # each name, which named_children leaves out
                self._references.setdefault(id(child), []).append((module, name))
        self._references = {child: places for child, places in self._references.items() if len(places) > 1}
        self._owners = {parameter: owner for layer in layers for parameter, owner in _owners(layer).items()}
        self._noise = layers[0].noise if layers else NoisePass()
        config = self.peft_config[adapter_name]
        with warnings.catch_warnings():
            if isinstance(self._check_target_module_exists(config, RootParameters.NAME), _ExcludedModule):
                # PEFT does not know of these parameters and takes the exclusion for a mistake.
                warnings.filterwarnings("ignore", "You have passed exclude_modules")
            # The config says it all; from a file's keys PEFT would not find modules without nonzeros.
            with _no_garbage():
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        if not layers:
            self._noise.watch(model)
        for layer in self.all_layers():
            # PEFT takes a module inside one that is wrapped already for a part of the other adapter, and skips it.
            if not layer.has_adapter(adapter_name) and self._check_target_module_exists(config, layer.key):
                layer.update_layer(adapter_name, config)
        if config.target_modules is None and not isinstance(getattr(model, RootParameters.NAME, None), RootParameters):
            self._adapt_root(model, adapter_name, config)
        del self._owners, self._noise, self._named, self._references
        self._check_coverage(adapter_name, config)
        self._check_base(adapter_name, config)
        self._note_sharing()
        size = sum(shape.numel() for layer in self.all_layers() for shape in layer.shapes.values())
        for layer in self.all_layers():
            layer.fused = size >= WORTH_FUSING
        if config.heads_checksum is not None or config.diff_checksum is not None:
            FileCheck(config, adapter_name).watch(model)
        if state_dict is not None:
            loading.check_modules(self.all_layers(), adapter_name, state_dict)

    def _known_parameters(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The base parameters under an adapter by which the base is known again, by name."""
        return {
            layer.parameter_key(name): parameter
            for layer in self.all_layers()
            if layer.has_adapter(adapter_name) and not layer.merged
            for name, parameter in layer.own_parameters().items()
            if parameter.is_floating_point() and not parameter.is_meta
        }

    def differing_base(self, adapter_name: str, base_fingerprint: fingerprint.Fingerprint) -> list[str]:
        """Names of the base parameters under an adapter that are not those of the fingerprint."""
        return fingerprint.differing(base_fingerprint, self._known_parameters(adapter_name))

    def _check_base(self, adapter_name: str, config: DiffPruningConfig) -> None:
        """Note by what the base is known again, or warn if it is not the one that the diff was made from."""
        parameters = self._known_parameters(adapter_name)
        if config.base_fingerprint is None:
            config.base_fingerprint = fingerprint.take(parameters)
            return
        other = fingerprint.differing(config.base_fingerprint, parameters)
        if other:
            warnings.warn(
                f"adapter {adapter_name!r} was made from other base weights: {len(other)} of {len(parameters)} parameters "
                f"differ, {other[:3]}; its diff means little here. Load {config.base_model_name_or_path or 'its base'} as it was",
                stacklevel=2,
            )

    def _note_sharing(self) -> None:
        """Tell layers which of their parameters modules that are not adapted have too."""
        layers = list(self.all_layers())
        wrapped = {id(layer.base_layer) for layer in layers}
        plain: dict[int, list[str]] = {}
        for name, module in outer_modules(self.model):
            if (
                module._parameters
                and id(module) not in wrapped
                and not isinstance(module, (DiffPruningLayer, nn.ParameterDict))
            ):
                for parameter in module.parameters(recurse=False):
                    plain.setdefault(id(parameter), []).append(name)
        for layer in layers:
            layer.shared_with = {n: plain[id(p)] for n, p in layer.own_parameters().items() if id(p) in plain}
            layer.tied_layers = {}
        for layer in layers:
            for owner, name in layer.ties.values():
                owner.tied_layers.setdefault(name, []).append(layer)

    def _adapt_root(self, model: nn.Module, adapter_name: str, config: DiffPruningConfig) -> None:
        """Adapt the parameters that the model itself owns: PEFT looks at the modules in it alone."""
        if not own_shapes(model) or not self._check_target_module_exists(config, RootParameters.NAME):
            return
        root = RootParameters(model, self._noise)
        root.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        root.update_layer(adapter_name, config)
        root.watch()
        model.add_module(RootParameters.NAME, root)

    def _check_coverage(self, adapter_name: str, config: DiffPruningConfig) -> None:
        layers = [layer for layer in self.all_layers() if layer.has_adapter(adapter_name)]
        if config.nnz_pattern is not None:
            found = {layer.parameter_key(name) for layer in layers for name in layer.shapes}
            lost = sorted(config.nnz_pattern.keys() - found)
            if lost:
                raise ValueError(
                    f"the adapter has nonzeros in {len(lost)} parameters that the model does not have or does not adapt: "
                    f"{lost[:5]}; it belongs to another model or config"
                )
        for layer in layers:
            for name, (owner, owner_name) in layer.ties.items():
                if not owner.has_adapter(adapter_name):
                    raise ValueError(
                        f"{layer.parameter_key(name)} is the same parameter as {owner.parameter_key(owner_name)}, which "
                        f"holds its diff and is not among the target_modules of adapter {adapter_name!r}; name both modules"
                    )
        if config.target_modules is None and (config.layers_to_transform, config.exclude_modules) == (None, None):
            adapted = {id(p) for layer in layers for p in layer.base_layer.parameters(recurse=False)}
            left = [name for name, p in self.base_parameters() if id(p) not in adapted and p.is_floating_point()]
            if left:
                raise ValueError(
                    f"{len(left)} parameters of the base model cannot be adapted by the default target_modules: "
                    f"{left[:5]}; name the modules to adapt in target_modules"
                )

    def get_output_embeddings(self) -> nn.Module | None:
        """The model's output layer, as a plain module with the effective weight."""
        output: nn.Module | None = self.model.get_output_embeddings()
        return OutputLayer(output) if isinstance(output, DiffPruningLayer) else output

    def train(self, mode: bool = True) -> Injection:
        """As of any module, but batch norms keep their running statistics: they are the base's, and no diff has them."""
        super().train(mode)
        for _, module in outer_modules(self.model):
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Within, thousands of objects are made that all stay: Python would go through all that there is to find garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _owners(layer: DiffPruningLayer) -> dict[int, tuple[DiffPruningLayer, str]]:
    return {id(parameter): (layer, name) for name, parameter in layer.own_parameters().items()}
