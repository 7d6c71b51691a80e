"""Wrapping the modules that a config names, and the checks before and after."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from diffpeft.config import DiffPruningConfig
from diffpeft.files import fingerprint
from diffpeft.files.checkpoint import fresh_head
from diffpeft.gates.compile import MIN_COMPILED_GATES
from diffpeft.gates.forward_pass import ForwardPass
from diffpeft.layer.find import outer_modules
from diffpeft.layer.layer import DiffPruningLayer, RootParameters
from diffpeft.layer.wrapped import own_shapes
from diffpeft.sparse.sharded import check_whole

Owners = dict[int, tuple[DiffPruningLayer, str]]
"""Identity of a parameter -> the layer that has its diff, and the parameter's name there."""


class Injection:
    """Looks things up while PEFT goes through a model's modules to wrap them.

    Args:
        model: the base model.
        layers: its modules that are wrapped already.
    """

    def __init__(self, model: nn.Module, layers: Sequence[DiffPruningLayer]) -> None:
        self.named = dict(outer_modules(model))
        self.noise = layers[0].noise if layers else ForwardPass()
        self._owners: Owners = {}
        for layer in layers:
            self._own(layer)
        references: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.named.values():
            for name, child in module._modules.items():  # each name, which named_children leaves out
                references.setdefault(id(child), []).append((module, name))
        self._references = {child: names for child, names in references.items() if len(names) > 1}

    def wrap(self, target: nn.Module, key: str, parent: nn.Module, name: str) -> DiffPruningLayer:
        """Put a layer around a module, whose name is `key` in the model and `name` in its parent."""
        own = target.named_parameters(recurse=False)
        ties = {name: self._owners[id(p)] for name, p in own if id(p) in self._owners}
        layer = DiffPruningLayer(target, key.replace(".base_layer", ""), ties, self.noise)
        self._own(layer)
        # A module with children may be wrapped before them: they stay children of the wrapped module.
        parent = parent.base_layer if isinstance(parent, DiffPruningLayer) else parent
        setattr(parent, name, layer)
        for other, its_name in self._references.get(id(target), []):
            setattr(other, its_name, layer)  # the model has the module under several names
        return layer

    def adapt_root(
        self, model: nn.Module, adapter_name: str, config: DiffPruningConfig, active: str | list[str]
    ) -> None:
        """Adapt the parameters that the model itself owns, if it has any: PEFT looks at the modules in it alone."""
        if not own_shapes(model) or isinstance(getattr(model, RootParameters.NAME, None), RootParameters):
            return
        root = RootParameters(model, self.noise)
        root.set_adapter(active, inference_mode=config.inference_mode)
        root.update_layer(adapter_name, config)
        root.watch()
        model.add_module(RootParameters.NAME, root)

    def _own(self, layer: DiffPruningLayer) -> None:
        self._owners.update({id(parameter): (layer, name) for name, parameter in layer.own_parameters().items()})


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the base model by name, each once, without heads that are trained whole."""
    modules = list(outer_modules(model))
    heads = [module for _, module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
    seen = {id(p) for head in heads for p in head.parameters()}
    for key, module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{key}.{name}".removeprefix(".").replace(".base_layer", ""), parameter


def freeze(model: nn.Module) -> None:
    """Let nothing of the base model train; heads manage what trains themselves."""
    modules = [module for _, module in outer_modules(model)]
    heads = {part for head in modules if isinstance(head, AuxiliaryTrainingWrapper) for part in head.modules()}
    for module in modules:
        for parameter in module._parameters.values() if module not in heads else ():
            if parameter is not None:
                parameter.requires_grad = False


def _all_linear(model: nn.Module, config: DiffPruningConfig) -> list[str]:
    """The modules that "all-linear" means in a model that is wrapped already, where PEFT finds no linear modules."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    heads = SEQ_CLS_HEAD_NAMES if output is None and config.task_type == TaskType.SEQ_CLS else ()
    names = []
    for name, module in model.named_modules():
        linear = module.base_layer if isinstance(module, DiffPruningLayer) else module
        key = name.replace(".base_layer", "")
        trained_whole = any(part in ("original_module", "modules_to_save") for part in key.split("."))
        if isinstance(linear, (nn.Linear, Conv1D)) and module is not output and not trained_whole:
            names.append(key)
    return sorted(set(names) - set(heads))


def complete_config(model: nn.Module, config: DiffPruningConfig, wrapped: bool) -> None:
    """Put into a config what depends on the model: the fresh head, and "all-linear" where the model is `wrapped`."""
    if config.target_modules is None:
        head = [name for name in fresh_head(model) if name not in (config.modules_to_save or [])]
        if head:
            config.modules_to_save = [*(config.modules_to_save or []), *head]
    if config.target_modules == "all-linear" and wrapped:
        config.target_modules = _all_linear(model, config)


def check_model(model: nn.Module) -> None:
    """Raise ValueError for a model that cannot be wrapped."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, DiffPruningLayer):
            raise ValueError(f"{name} carries an adapter of another kind ({type(module).__name__}); unload it first")
    check_whole(model.parameters(), "wrapping a model")
    if not any(p.is_floating_point() for p in model.parameters()):
        raise ValueError("the base model has no floating-point parameters, so there is nothing to adapt")


def check_coverage(layers: Sequence[DiffPruningLayer], adapter_name: str, config: DiffPruningConfig) -> None:
    """Raise ValueError unless the layers that hold an adapter cover what its config promises."""
    found = {layer.parameter_key(name) for layer in layers for name in layer.shapes}
    lost = sorted((config.nnz_pattern or {}).keys() - found)
    if lost:
        raise ValueError(f"the adapter has nonzeros in {lost[:5]}, which the model lacks or its config leaves alone")
    for layer in layers:
        for name, (owner, owner_name) in layer.ties.items():
            if not owner.has_adapter(adapter_name):
                raise ValueError(
                    f"{layer.parameter_key(name)} is the same parameter as {owner.parameter_key(owner_name)}, which "
                    f"holds its diff and is not among the target_modules of adapter {adapter_name!r}; name both modules"
                )


def known_parameters(layers: Sequence[DiffPruningLayer]) -> dict[str, nn.Parameter]:
    """The base parameters of layers by which the base model is known again, by name."""
    return {
        layer.parameter_key(name): parameter
        for layer in layers
        if not layer.merged
        for name, parameter in layer.own_parameters().items()
        if parameter.is_floating_point() and not parameter.is_meta
    }


def _with_rows_of_words(layers: Sequence[DiffPruningLayer]) -> list[str]:
    """Names of the parameters with a row for each word: embeddings, and output layers of as many rows."""
    embeddings = [layer for layer in layers if isinstance(layer.base_layer, nn.Embedding)]
    sizes = {layer.shapes["weight"][:1] for layer in embeddings if "weight" in layer.shapes}
    return [layer.parameter_key(n) for layer in layers for n, shape in layer.shapes.items() if shape[:1] in sizes]


def check_base(layers: Sequence[DiffPruningLayer], adapter_name: str, config: DiffPruningConfig) -> None:
    """Note the base model's fingerprint in the config, or warn if the diff was made from another base."""
    parameters = known_parameters(layers)
    if config.base_fingerprint is None:
        config.base_fingerprint = fingerprint.take(parameters, parameters.__getitem__)
        return
    rows = _with_rows_of_words(layers)
    other = fingerprint.differing(config.base_fingerprint, parameters, parameters.__getitem__, rows)
    if other:
        warnings.warn(
            f"adapter {adapter_name!r} was made from other base weights: {len(other)} of {len(parameters)} parameters "
            f"differ, {other[:3]}; load {config.base_model_name_or_path or 'its base'} as it was",
            stacklevel=2,
        )


def note_sharing(model: nn.Module, layers: Sequence[DiffPruningLayer]) -> None:
    """Tell layers which other modules have their parameters too, and whether gates are worth compiling."""
    wrapped = {id(layer.base_layer) for layer in layers}
    plain: dict[int, list[str]] = {}
    for name, module in outer_modules(model):
        if module._parameters and id(module) not in wrapped and not isinstance(module, DiffPruningLayer):
            for parameter in module.parameters(recurse=False):
                plain.setdefault(id(parameter), []).append(name)
    size = sum(shape.numel() for layer in layers for shape in layer.shapes.values())
    for layer in layers:
        layer.fused = size >= MIN_COMPILED_GATES
        layer.shared_with = {n: plain[id(p)] for n, p in layer.own_parameters().items() if id(p) in plain}
        layer.tied_layers = {}
    for layer in layers:
        for owner, name in layer.ties.values():
            owner.tied_layers.setdefault(name, []).append(layer)
