"""Models without weights, from a base model's config.json: which class an adapter is of, and what it names."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from diffpeft.files.card import AUTO_CLASS_SUFFIXES


def model_config(directory: Path) -> PreTrainedConfig | None:
    """The config of a directory's model; None for no architecture of transformers. ValueError for a quantised model."""
    file = directory / "config.json"
    if not file.is_file():
        return None
    try:
        told = dict(json.loads(file.read_text()))
        kind: Any = getattr(transformers, (told.get("architectures") or [""])[0], None)
        source: Any = kind and kind.config_class
        if told.get("model_type") and not (told.get("architectures") or "auto_map" in told):
            source = AutoConfig
        config: PreTrainedConfig | None = source and source.from_pretrained(directory)
    except Exception as error:  # transformers' checks of a config raise errors of many kinds
        raise ValueError(f"{file} is damaged, or no config of transformers ({error})") from None
    check_unquantized(str(directory), told.get("quantization_config"))
    return config


def check_unquantized(label: str, quantization: object) -> None:
    """Raise ValueError for the name of a model that has a quantisation."""
    if quantization is not None:
        raise ValueError(f"{label} is quantised, and differences of quantised weights mean nothing; use it unquantised")


def skeleton(config: Any, kind: Any) -> PreTrainedModel | None:
    """The model of a class, or of an auto class, without weights; None where it is not made of such a config."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        if isinstance(config, getattr(kind, "config_class", ())):
            model: PreTrainedModel | None = kind(config)
            return model
        try:
            return kind.from_config(config) if hasattr(kind, "from_config") else None
        except ValueError:  # an auto class without one for this kind of model
            return None


def adapted_model(
    directory: Path,
    adapter: PeftConfig | None = None,
    names: Iterable[str] = (),
    heads: Mapping[str, torch.Size] | None = None,
) -> PreTrainedModel | None:
    """The model, without weights, that an adapter was trained on, as `from_pretrained` would make it of a directory.

    Its class is the one that the adapter's config tells, else that of the directory, else any auto class's, whichever
    has all that the adapter changes.

    Args:
        directory: of the base model; of its files only config.json is read.
        adapter: the adapter's config.
        names: parameters that its diff changes, tied ones under one name.
        heads: shapes of the tensors that replace the base's. The model has as many labels and words as these.

    Returns:
        The model; None for no architecture of transformers.
    """
    config, heads = model_config(directory), heads or {}
    if config is None:
        return None
    wanted, whole, first = {*names, *heads}, {*true_heads(heads, adapter)}, None
    for kind in _classes(config, adapter):
        model = skeleton(config, kind)
        if model is not None and wanted <= model.state_dict().keys():
            model = _resized(model, config, heads)
            for target, source in model.all_tied_weights_keys.items():
                if {target, source} & whole or {target, source} <= {*names}:  # a head of its own, or a diff of either
                    untie(model, target)
            return model
        first = first or model
    return first


def true_heads(names: Iterable[str], adapter: PeftConfig | None) -> list[str]:
    """The names that belong to heads trained as a whole (`modules_to_save`); others are PEFT's copies of embeddings."""
    modules = None if adapter is None else adapter.modules_to_save or ()
    return [name for name in names if modules is None or any(f"{module}." in name for module in modules)]


def _classes(config: PreTrainedConfig, adapter: PeftConfig | None) -> Iterator[Any]:
    told = (getattr(adapter, "auto_mapping", None) or {}).get("base_model_class")
    task = AUTO_CLASS_SUFFIXES.get(str(getattr(adapter, "task_type", None)))
    names = [told, f"AutoModel{task}", *(config.architectures or []), "AutoModel"]
    names += [f"AutoModel{suffix}" for suffix in AUTO_CLASS_SUFFIXES.values()]
    found = (getattr(transformers, str(name), None) for name in dict.fromkeys(names))
    return (kind for kind in found if kind is not None)


def _resized(model: PreTrainedModel, config: PreTrainedConfig, heads: Mapping[str, torch.Size]) -> PreTrainedModel:
    """The model with as many labels and words as its heads have."""
    own = model.state_dict()
    sizes = {own[head].shape[0]: shape[0] for head, shape in heads.items() if own[head].shape != shape and shape}
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if getattr(text, "vocab_size", None) in sizes:
        text.vocab_size = sizes[text.vocab_size]
    if config.num_labels in sizes:
        config.num_labels = sizes[config.num_labels]
    return (sizes and skeleton(config, type(model))) or model


def untie(model: PreTrainedModel, name: str) -> None:
    """Make the parameter `name` one of its own, which was the same as another."""
    path, _, own = name.rpartition(".")
    module, parameter = model.get_submodule(path), model.get_parameter(name)
    setattr(module, own, nn.Parameter(torch.empty_like(parameter), requires_grad=False))
    if module in (model.get_output_embeddings(), model.get_input_embeddings()):
        model.config.tie_word_embeddings = False  # as PEFT notes it when it merges


def floating_shapes(model: nn.Module, preferred: Iterable[str] = ()) -> dict[str, torch.Size]:
    """Shapes of a model's floating parameters by name, tied ones once, under their `preferred` name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in reversed(parameters.items())}
    names |= {id(parameters[name]): name for name in preferred if name in parameters}
    return {names[id(p)]: p.shape for p in model.parameters() if p.is_floating_point()}
