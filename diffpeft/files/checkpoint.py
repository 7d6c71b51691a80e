"""Which tensors of a model's files are which of its parameters, as `from_pretrained` answers it; read one at a time."""

import json
import os
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffpeft.files.skeleton import adapted_model, check_unquantized, model_config, skeleton, untie

Source: TypeAlias = "PreTrainedModel | str | os.PathLike[str]"
"""A model in memory, or its directory."""

WEIGHT_FILES = [f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
"""The first of these that is there has a directory's weights, or names the files that have them."""
STATISTICS_SUFFIXES = ("running_mean", "running_var", "num_batches_tracked")


class StoredTensor(NamedTuple):
    """A tensor in a file, which is not read before it is asked for, or in memory."""

    file: Path | None
    key: str
    like: Tensor
    """Tells dtype and shape; the tensor itself in memory, without data of a file."""

    def load(self) -> Tensor:
        """The tensor itself. The file is opened each time: an open one keeps in memory every page that was read."""
        if self.file is None:
            return self.like.detach()
        if self.file.suffix != ".safetensors":
            return load_file(self.file)[self.key].contiguous()
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.key)
        return tensor


@dataclass
class Unit:
    """Tensors of a file that become parameters together: mostly one and one; experts may be put together on loading."""

    name: str
    """The first parameter that they become."""
    converter: Any
    """transformers' `WeightConverter`; None where nothing is converted."""
    model: Any
    sources: list[tuple[str, str, StoredTensor]]
    """One entry for each tensor: the converter's pattern that matches its key, its key in a new file, the tensor."""

    def convert(self, load: Callable[[StoredTensor], Tensor] = StoredTensor.load) -> dict[str, Tensor]:
        """The tensors by the names of parameters. `load` gives those of the file."""
        if self.converter is None:
            return {self.name: load(self.sources[0][2])}
        converter = deepcopy(self.converter)
        for pattern, key, stored in self.sources:
            converter.add_tensor(self.name, key, pattern, partial(load, stored))
        converted = converter.convert(self.name, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def revert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of this unit as they go into a file, by key: as the base's files have them, if they can be."""
        if self.converter is None:
            return {self.sources[0][1]: tensors[self.name]}
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, Tensor] = revert_weight_conversion(self.model, dict(tensors))
        return reverted if reverted.keys() == {key for _, key, _ in self.sources} else tensors


class Checkpoint:
    """The tensors of a model by their names in it.

    Attributes:
        label: the model's name in messages; its path where it is a directory.
        model: the model, in memory or without weights; None for no class of transformers: names are the files' then.
        units: the files' tensors that the model uses, by each of the names.
        parameters: shapes of the floating parameters, tied ones once.
        tied: shapes of parameters that are the same tensor as one of `parameters`, under their other names.
        others: shapes of all other floating tensors, which are buffers.
        missing: names of floating parameters that the files lack, or have in another shape.
        unused: keys of floating tensors that the model has no use for.
        aliases: from each name of a parameter to the list of all its names; tied parameters have several.
    """

    def __init__(self, label: str, stored: dict[str, StoredTensor], model: nn.Module | None, own: bool) -> None:
        self.label, self.model = label, model
        if own or not isinstance(model, PreTrainedModel):
            self.units = {key: Unit(key, None, model, [(key, key, one)]) for key, one in stored.items()}
        else:
            self.units = _units(stored, model)
            own_parameters = dict(model.named_parameters(remove_duplicate=False))
            for pair in [pair for pair in model.all_tied_weights_keys.items() if set(pair) <= own_parameters.keys()]:
                there = [name for name in pair if name in self.units]
                if own_parameters[pair[0]] is not own_parameters[pair[1]]:
                    for name in set(pair).difference(there) if there else ():  # untied: begins as the other
                        sources = [(name, name, stored) for *_, stored in self.units[there[0]].sources[:1]]
                        self.units[name] = Unit(name, None, model, sources)
                elif len(there) == 2 and not torch.equal(*(self.units[name].convert()[name] for name in pair)):
                    untie(model, pair[0])
        likes = {name: unit.convert(attrgetter("like"))[name] for name, unit in self.units.items()}
        floating = {name: like.shape for name, like in likes.items() if like.is_floating_point()}
        used = {one.key for unit in self.units.values() for _, _, one in unit.sources}
        self.unused = [key for key, one in stored.items() if key not in used and one.like.is_floating_point()]
        named = likes if model is None else dict(model.named_parameters(remove_duplicate=False))
        groups: dict[int, list[str]] = {}
        for name, parameter in named.items():
            if parameter.is_floating_point() and not (model is None and name.endswith(STATISTICS_SUFFIXES)):
                groups.setdefault(id(parameter), []).append(name)
        self.aliases = {name: group for group in groups.values() for name in group}
        self.parameters = {group[0]: floating[name] for group in groups.values() for name in group if name in floating}
        self.tied = {name: shape for first, shape in self.parameters.items() for name in self.aliases[first][1:]}
        self.others = {name: shape for name, shape in floating.items() if name not in self.aliases}
        ignored = "|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or ["(?!)"])
        lost = [group[0] for group in groups.values() if group[0] not in self.parameters]
        self.missing = [name for name in lost if not re.search(ignored, name)]

    @property
    def model_class(self) -> type[PreTrainedModel] | None:
        """The class of the model in transformers; None where it has none."""
        return type(self.model) if isinstance(self.model, PreTrainedModel) else None

    @property
    def backbone(self) -> str | None:
        """The name of the backbone in a task model; None where it is not known or where the model is one."""
        prefix = self.model.base_model_prefix if isinstance(self.model, PreTrainedModel) else ""
        return prefix if self.model is not None and prefix in dict(self.model.named_children()) else None

    def units_of(self, name: str) -> list[Unit]:
        """Where a parameter is in the files: a tied one may be there under each name."""
        return [self.units[one] for one in self.aliases.get(name, [name]) if one in self.units]

    def load(self, name: str) -> Tensor:
        """The tensor of any of the names; it is not kept."""
        unit = self.units.get(name) or self.units_of(name)[0]
        tensors = unit.convert()
        return tensors[next(one for one in (name, *self.aliases.get(name, ())) if one in tensors)]

    def check_whole(self, replaced: Sequence[str] = ()) -> None:
        """Raise ValueError for parameters that the files lack and that are not `replaced`."""
        lost = [name for name in self.missing if not set(self.aliases[name]) & set(replaced)]
        if lost:
            raise ValueError(
                f"{self.label} lacks {len(lost)} parameters of {type(self.model).__name__}, {lost[:3]}, or has them in "
                "another shape, and from_pretrained draws them at random; load it, save it and use what was saved"
            )


def open_checkpoint(source: Source, model: PreTrainedModel | None = None) -> Checkpoint:
    """The tensors of a model or of a directory's files, without reading them.

    Args:
        source: a model, or a directory with safetensors or pickled weights, in one file or in shards with an index.
        model: names the tensors, and is untied where the files are; by default that of the source itself.

    Raises:
        ValueError: no directory, or no weights in it; a file that is missing or damaged; a quantised model.
    """
    if isinstance(source, (str, os.PathLike)):
        directory = Path(source)
        stored = {one.key: one for file in _weight_files(directory) for one in stored_tensors(file)}
        return Checkpoint(str(source), stored, model or adapted_model(directory), own=False)
    label = type(source).__name__
    if not isinstance(source, nn.Module):
        raise ValueError(f"{label} is no model; pass a directory or a PreTrainedModel")
    tensors = {**source.state_dict(keep_vars=True), **dict(source.named_parameters(remove_duplicate=False))}
    offloaded = [name for name, tensor in tensors.items() if tensor.is_meta]
    if offloaded:
        raise ValueError(f"{label}: {offloaded[0]} is offloaded; pass the directory of the model instead")
    check_unquantized(label, getattr(getattr(source, "config", None), "quantization_config", None))
    stored = {name: StoredTensor(None, name, tensor) for name, tensor in tensors.items()}
    return Checkpoint(label, stored, model or source, own=model is None)


def open_as(source: Source, kind: type[PreTrainedModel] | None) -> Checkpoint:
    """The tensors of a source by their names in another class of model, as `from_pretrained` of that class names them.

    They keep their own names where there is no such class or where it is of another kind of model.
    """
    config: Any = getattr(source, "config", None)
    if isinstance(source, (str, os.PathLike)):
        config = model_config(Path(source))
    fits = kind is not None and config is not None and type(source) is not kind
    return open_checkpoint(source, skeleton(config, kind) if fits else None)


def parameter_shapes(source: Source) -> dict[str, torch.Size]:
    """Shapes of all floating parameters of a model or of a directory, by their names in the model, tied ones once.

    Raises ValueError as [`open_checkpoint`] does, and for parameters that the files lack.
    """
    checkpoint = open_checkpoint(source)
    checkpoint.check_whole()
    return checkpoint.parameters


def fresh_head(model: nn.Module) -> list[str]:
    """Names of the modules beside the pretrained backbone of a task model, e.g. ["classifier"].

    A model that generates has none, as its output layer is pretrained, nor has one that does not tell its backbone.
    """
    if not isinstance(model, PreTrainedModel) or model.can_generate() or model.get_output_embeddings() is not None:
        return []
    children, prefix = dict(model.named_children()), model.base_model_prefix
    fresh = [name for name, child in children.items() if name != prefix and any(True for _ in child.parameters())]
    return fresh if prefix in children else []


def load_file(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file of weights, on the CPU or, without data, on "meta". ValueError where it is damaged."""
    from transformers.modeling_utils import load_state_dict

    try:
        tensors: dict[str, Tensor] = load_state_dict(file, map_location=device)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); download or save it again") from None
    return tensors


def stored_tensors(file: Path) -> list[StoredTensor]:
    """Every tensor of a file of weights, unread. ValueError where the file is damaged."""
    return [StoredTensor(file, key, like) for key, like in load_file(file, "meta").items() if isinstance(like, Tensor)]


def _weight_files(directory: Path) -> list[Path]:
    found = next(
        (directory / name for name in WEIGHT_FILES if (directory / name).is_file()), directory / WEIGHT_FILES[0]
    )
    files = [found]
    if found.suffix == ".json":
        try:
            files = [directory / name for name in sorted(set(json.loads(found.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{found} is damaged ({error!r}); download or save it again") from None
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise ValueError(f"{directory} has no {lost[0]}; write it with from_pretrained and save_pretrained")
    return files


def _units(stored: dict[str, StoredTensor], model: PreTrainedModel) -> dict[str, Unit]:
    """The tensors that `from_pretrained` gives to the model, by its names of what they become."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    in_memory = all(one.file is None for one in stored.values())  # then they were renamed already
    mapping = [] if in_memory else get_model_conversion_mapping(model)
    renamings = [change for change in mapping if isinstance(change, WeightRenaming)]
    converters = [change for change in mapping if isinstance(change, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, wanted = model.base_model_prefix, model.state_dict()
    units: dict[str, Unit] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        bare = rename_source_key(key, renamings, converters)[0]
        if name not in wanted and key in wanted:
            (name, pattern), bare = rename_source_key(key, [], [], prefix, wanted), key
        if name in wanted:
            new_key = f"{prefix}.{key}" if name == f"{prefix}.{bare}" else key
            new_key = key.removeprefix(f"{prefix}.") if bare == f"{prefix}.{name}" else new_key
            unit = units.setdefault(name, Unit(name, by_pattern[pattern] if pattern else None, model, []))
            unit.sources.append((pattern or key, new_key, stored[key]))
    model._weight_conversions = [change for change in mapping if change.was_used()]  # `Unit.revert` goes by them
    found = ((name, like, unit) for unit in units.values() for name, like in unit.convert(attrgetter("like")).items())
    return {name: unit for name, like, unit in found if name in wanted and like.shape == wanted[name].shape}
