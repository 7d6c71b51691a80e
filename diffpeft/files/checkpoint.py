"""The tensors of a base model, one at a time: from a directory of safetensors, or from a model in memory."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

Source: TypeAlias = "PreTrainedModel | str | os.PathLike[str]"
"""A model in memory, or its directory."""

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
STATISTICS_SUFFIXES = ("running_mean", "running_var", "num_batches_tracked")
FLOATING_PREFIXES = ("F", "BF")
"""How safetensors' names of floating dtypes begin."""


class StoredTensor(NamedTuple):
    """A tensor in a file, which is not read before it is asked for."""

    file: Path
    key: str
    shape: torch.Size
    floating: bool

    def load(self) -> Tensor:
        """The tensor itself. The file is opened each time: an open one keeps in memory every page that was read."""
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.key)
        return tensor


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model: their shapes, and how to get them. Names are those of the model in memory.

    Attributes:
        label: the model's name in messages.
        parameters: shapes of the floating parameters, tied ones once.
        tied: shapes of parameters that are the same tensor as one of `parameters`, under their other names.
        others: shapes of all other floating tensors: buffers, and what the model has no use for.
        load: gives the tensor of any of these names; it is not kept.
        backbone: the name of the backbone in a task model; None where it is not known or where the model is one.
        heads: the modules of a fresh task head.
        model_class: None where it is not known.
    """

    label: str
    parameters: dict[str, torch.Size]
    tied: dict[str, torch.Size]
    others: dict[str, torch.Size]
    load: Callable[[str], Tensor]
    backbone: str | None
    heads: list[str]
    model_class: type[PreTrainedModel] | None


class LazyTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors, each read when it is asked for; `names` has their names in it by those here."""

    def __init__(self, checkpoint: Checkpoint, names: dict[str, str]) -> None:
        self.checkpoint, self.names = checkpoint, names

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint.load(self.names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def open_checkpoint(source: Source) -> Checkpoint:
    """The tensors of a model or a directory of safetensors (one file, or shards with an index), without reading them.

    Where config.json names an architecture of transformers, the names are those of the model that `from_pretrained`
    makes, else those of the file.

    Raises:
        ValueError: no directory, or no safetensors in it; a shard or a parameter is missing; parameters that are put
            together from several tensors on loading.
    """
    if isinstance(source, (str, os.PathLike)):
        stored, skeleton = _stored(Path(source))
        shapes = {name: tensor.shape for name, tensor in stored.items() if tensor.floating}
        return _checkpoint(str(source), shapes, skeleton, lambda name: stored[name].load())
    label = type(source).__name__
    if not isinstance(source, nn.Module):
        raise ValueError(f"{label} is no model; pass a directory or a PreTrainedModel")
    tensors = {**source.state_dict(keep_vars=True), **dict(source.named_parameters(remove_duplicate=False))}
    floating = {name: tensor.shape for name, tensor in tensors.items() if tensor.is_floating_point()}
    offloaded = [name for name, tensor in tensors.items() if tensor.is_meta]
    if offloaded:
        raise ValueError(f"{label}: {offloaded[0]} is offloaded; pass the directory of the model instead")
    _check_unquantized(label, getattr(getattr(source, "config", None), "quantization_config", None))
    return _checkpoint(label, floating, source, lambda name: tensors[name].detach())


def parameter_shapes(source: Source) -> dict[str, torch.Size]:
    """Shapes of all floating parameters of a model or of a directory, by their names in the model, tied ones once.

    Raises ValueError as [`open_checkpoint`] does.
    """
    return open_checkpoint(source).parameters


def _check_unquantized(label: str, quantization: object) -> None:
    if quantization is not None:
        raise ValueError(f"{label} is quantised, and differences of quantised weights mean nothing; use it unquantised")


def _checkpoint(
    label: str, floating: dict[str, torch.Size], model: nn.Module | None, load: Callable[[str], Tensor]
) -> Checkpoint:
    """Sort the floating tensors by their role in the model; without a model, by their names."""
    if model is None:
        parameters, every = [name for name in floating if not name.endswith(STATISTICS_SUFFIXES)], set[str]()
    else:
        parameters = [name for name, _ in model.named_parameters() if name in floating]
        every = {name for name, _ in model.named_parameters(remove_duplicate=False)} & floating.keys()
    tied = every - set(parameters)
    known = tied.union(parameters)
    prefix = model.base_model_prefix if isinstance(model, PreTrainedModel) else ""
    return Checkpoint(
        label=label,
        parameters={name: floating[name] for name in parameters},
        tied={name: floating[name] for name in tied},
        others={name: shape for name, shape in floating.items() if name not in known},
        load=load,
        backbone=prefix if model is not None and prefix in dict(model.named_children()) else None,
        heads=[] if model is None else fresh_head(model),
        model_class=type(model) if isinstance(model, PreTrainedModel) else None,
    )


def locate(directory: Path) -> dict[str, list[StoredTensor]]:
    """Every place in a directory's files of each tensor by its name in the model; a tied one may have several.

    Raises ValueError as [`open_checkpoint`] does.
    """
    stored, skeleton = _stored(directory)
    every = skeleton.named_parameters(remove_duplicate=False) if skeleton is not None else ()
    identities = {name: id(parameter) for name, parameter in every}
    tied: dict[int, list[StoredTensor]] = {}
    for name, identity in identities.items():
        if name in stored and stored[name] not in tied.setdefault(identity, []):
            tied[identity].append(stored[name])
    return {name: tied[identities[name]] if name in identities else [tensor] for name, tensor in stored.items()}


def fresh_head(model: nn.Module) -> list[str]:
    """Names of the modules beside the pretrained backbone of a task model, e.g. ["classifier"].

    A model that generates has none, as its output layer is pretrained, nor has one that does not tell its backbone.
    """
    if not isinstance(model, PreTrainedModel) or model.can_generate() or model.get_output_embeddings() is not None:
        return []
    children, prefix = dict(model.named_children()), model.base_model_prefix
    fresh = [name for name, child in children.items() if name != prefix and any(True for _ in child.parameters())]
    return fresh if prefix in children else []


def _stored(directory: Path) -> tuple[dict[str, StoredTensor], PreTrainedModel | None]:
    """Every tensor of a directory by its name in the model, and the directory's [`skeleton_of`]."""
    shards = {WEIGHTS}
    if (directory / INDEX).is_file():
        shards = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    files = [directory / shard for shard in sorted(shards)]
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        found = sorted(file.name for file in directory.glob("*.bin")) if directory.is_dir() else []
        remedy = f"{found[:3]} are pickled; convert them with" if found else "write it with"
        remedy = f"{remedy} from_pretrained and save_pretrained, which store safetensors"
        raise ValueError(f"{directory} has no {lost[0]}; {remedy}")
    stored = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(key)
                    floating = tensor.get_dtype().startswith(FLOATING_PREFIXES)
                    stored[key] = StoredTensor(path, key, torch.Size(tensor.get_shape()), floating)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); download or save it again") from None
    skeleton = skeleton_of(directory)
    return stored if skeleton is None else _renamed(stored, skeleton, directory), skeleton


def skeleton_of(directory: Path) -> PreTrainedModel | None:
    """The model of a directory, without weights, from config.json alone; None for no architecture of transformers."""
    try:
        config = json.loads((directory / CONFIG).read_text())
    except FileNotFoundError:
        return None
    _check_unquantized(str(directory), config.get("quantization_config"))
    kind: Any = getattr(transformers, (config.get("architectures") or [""])[0], None)
    if kind is None:
        return None
    with torch.device("meta"):
        model: PreTrainedModel = kind(kind.config_class.from_pretrained(directory))
    return model


def _renamed(stored: dict[str, StoredTensor], skeleton: PreTrainedModel, directory: Path) -> dict[str, StoredTensor]:
    """The tensors by the names that `from_pretrained` gives them; a tied one by its first name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [change for change in mapping if isinstance(change, WeightRenaming)]
    converters = [change for change in mapping if isinstance(change, WeightConverter)]
    wanted = dict(skeleton.named_parameters(remove_duplicate=False))
    renamed: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        name, converter = (key, None) if key in wanted else rename_source_key(key, renamings, converters)
        if converter is not None and name in wanted:
            raise ValueError(
                f"{directory}: {name} is put together from several tensors of the file, {key} among them; load the "
                "model with from_pretrained and pass it instead of the directory"
            )
        renamed[name] = tensor
    by_identity = {id(parameter): renamed[name] for name, parameter in wanted.items() if name in renamed}
    for name, parameter in wanted.items():
        if id(parameter) in by_identity:
            renamed.setdefault(name, by_identity[id(parameter)])
    lost = [name for name, p in skeleton.named_parameters() if name not in renamed and p.is_floating_point()]
    if lost:
        raise ValueError(
            f"{directory} lacks {len(lost)} parameters of {type(skeleton).__name__}, {lost[:3]}; load it with "
            "from_pretrained, which initialises them, and pass the model instead of the directory"
        )
    return renamed
