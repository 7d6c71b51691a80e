"""A sparse diff added to its base model's tensors: a merged checkpoint, and patches for a running engine."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype

from diffpeft.files.atomic import making
from diffpeft.files.checkpoint import WEIGHT_FILES, Checkpoint, StoredTensor, Unit, open_checkpoint
from diffpeft.files.skeleton import adapted_model
from diffpeft.sparse.diff import Diff, check_diff
from diffpeft.sparse.inplace import Entry, InplaceUpdate, read_at
from diffpeft.tools.export.coo import check_int32

OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.index.json")
OTHER_FILES = (*OTHER_WEIGHTS, ".git", ".cache")
"""Files in a base model's directory that are not copied: they are, or may hold, its old weights."""


class WeightPatch(NamedTuple):
    """New values at flat positions of one checkpoint tensor: the fields of vLLM's `SparseWeightPatch`."""

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


def to_weight_patches(diff: Diff, directory: str | os.PathLike[str]) -> Iterator[WeightPatch]:
    """Yield the changed entries as patches for vLLM's sparse weight transfer: `SparseWeightPatch(*patch)`.

    A trainer sends them to a running engine with the backend "sparse_nccl". Each has a tensor's name in the checkpoint,
    int32 indices into all of it, flat and each once, and the values that replace the old ones: base + delta in the
    checkpoint's dtype; NaN is reserved (https://github.com/vllm-project/vllm/pull/53751, applied by
    https://github.com/vllm-project/vllm/pull/50723). Releases before these take no `full_shape`.

    Args:
        diff: positions and values of shape (k,) by parameter name.
        directory: of the base model that the engine has loaded, with safetensors.

    Yields:
        Patches on the CPU, contiguous, indices and values of shape (k,); a tied tensor under each name in the files.

    Raises:
        ValueError: a diff that does not fit; a tensor of more than 2^31 elements; a sum that is not finite.
    """
    checkpoint = open_checkpoint(directory, adapted_model(Path(directory), names=diff))
    check_diff(diff, {**checkpoint.parameters, **checkpoint.tied})
    for name, (positions, values) in diff.items():
        for unit in checkpoint.units_of(name) if positions.numel() else []:
            tensors = unit.convert()
            changed = {key: torch.zeros(tensor.shape, dtype=torch.bool) for key, tensor in tensors.items()}
            own = next(one for one in checkpoint.aliases[name] if one in tensors)
            changed[own].view(-1)[positions.cpu()] = True
            InplaceUpdate([Entry(tensors[own], positions.cpu(), values.cpu())]).apply()
            stored = {key: (one.key, one.like.shape) for _, key, one in unit.sources}
            summed = unit.revert(tensors)
            for key, where in unit.revert(changed).items():
                label, shape = stored.get(key, (key, where.shape))
                check_int32(label, where.numel())
                places = where.reshape(-1).nonzero().squeeze(1)
                new = _finite(name, summed[key].reshape(-1)[places])
                yield WeightPatch(label, places.to(torch.int32), new, tuple(shape))


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: base + delta is not finite in {tensor.dtype}; use a base of a wider dtype")
    return tensor


def to_checkpoint(
    base: PreTrainedModel | str | os.PathLike[str] | Checkpoint,
    diff: Diff,
    output: str | os.PathLike[str],
    heads: Mapping[str, Tensor] | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write the base model with the diff added: the tensors of `merge_and_unload().save_pretrained()`, to the bit.

    The tensors of a directory are written one at a time, under the keys that they have there, with what else is in the
    directory. A model is changed, saved with `save_pretrained` and restored to the bit.

    Args:
        base: a directory, whose model is the one that has the diff's and the heads' names; or a model without adapters.
        diff: positions and values of shape (k,) by parameter name.
        output: must not be there yet, unless empty.
        heads: tensors that replace those of their names, in the dtype of the base; a diff is added to them.
        progress: called with the share of a directory's tensors that are written.

    Raises:
        ValueError: a diff or heads that do not fit; a sum that is not finite; an `output` with files in it; parameters
            that the directory lacks.
    """
    target, heads = Path(output), heads or {}
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already; choose another output or empty it first")
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    if isinstance(base, (str, os.PathLike)):
        shapes = {name: head.shape for name, head in heads.items()}
        base = open_checkpoint(base, adapted_model(Path(base), names=diff, heads=shapes))
    with making(target.parent), making(scratch):
        try:
            if isinstance(base, Checkpoint):
                _write_files(base, diff, scratch, heads, progress or (lambda share: None))
            else:
                _write_model(base, diff, scratch, heads)
            if target.exists():
                target.rmdir()
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _check(diff: Diff, heads: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    check_diff(diff, shapes)
    for name, head in heads.items():
        base = shapes.get(name)
        if base != head.shape:
            raise ValueError(f"head {name} is {tuple(head.shape)}, the base has {base}; use its own base model")


def _write_files(
    checkpoint: Checkpoint, diff: Diff, scratch: Path, heads: Mapping[str, Tensor], progress: Callable[[float], None]
) -> None:
    directory, model = Path(checkpoint.label), checkpoint.model
    checkpoint.check_whole([*heads])
    shapes = {**checkpoint.parameters, **checkpoint.tied, **checkpoint.others}
    shapes |= {} if model is None else {name: tensor.shape for name, tensor in model.state_dict().items()}
    _check(diff, heads, shapes)
    # The contents alone: a cache's files may be links, and read-only.
    shutil.copytree(directory, scratch, ignore=_old_weights, copy_function=shutil.copyfile, dirs_exist_ok=True)
    units = list({id(unit): unit for unit in checkpoint.units.values()}.values())
    last = units[-1].sources[0][2]
    for name in (name for name in heads if not checkpoint.units_of(name)):
        empty = torch.empty(shapes[name], dtype=last.like.dtype)
        units.append(Unit(name, None, model, [(name, name, StoredTensor(None, name, empty))]))
    changed = _Changed(checkpoint, diff, heads)
    files: dict[Path, dict[str, Tensor]] = {}
    for unit in units:
        for key, like in changed.outputs(unit, attrgetter("like")):
            source = next((one for _, new, one in unit.sources if new == key), unit.sources[0][2])
            files.setdefault(source.file or last.file or directory, {})[key] = like
    places = dict[str, tuple[Path, int]]()
    for number, file in enumerate(sorted(files), start=1):
        name = WEIGHT_FILES[0] if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        places |= _allocate(scratch / name, files[file])
    for done, unit in enumerate(units, start=1):
        for key, tensor in changed.outputs(unit):
            file, offset = places[key]
            with file.open("r+b") as opened:
                opened.seek(offset)
                opened.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        progress(done / len(units))
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": {key: file.name for key, (file, _) in places.items()}}
        (scratch / WEIGHT_FILES[1]).write_text(json.dumps(index, indent=2, sort_keys=True))
    if isinstance(model, PreTrainedModel):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(scratch)


class _Changed:
    """The tensors of a base with what an adapter makes of them."""

    def __init__(self, checkpoint: Checkpoint, diff: Diff, heads: Mapping[str, Tensor]) -> None:
        groups = {name: checkpoint.aliases.get(name, [name]) for name in (*diff, *heads)}
        self.diff = {alias: diff[name] for name in diff for alias in groups[name]}
        self.heads = {alias: heads[name] for name in heads for alias in groups[name]}

    def outputs(
        self, unit: Unit, load: Callable[[StoredTensor], Tensor] = StoredTensor.load
    ) -> Iterator[tuple[str, Tensor]]:
        """Key and tensor of all that is written of a unit; `load` gives the tensors of the files, with data or none."""
        likes = unit.convert(attrgetter("like"))
        if not (self.diff.keys() | self.heads.keys()) & likes.keys():
            for _, key, stored in unit.sources if unit.converter else unit.sources[:1]:
                yield key, load(stored)
            return
        tensors = {name: tensor.contiguous() for name, tensor in unit.convert(load).items()}
        for name, tensor in tensors.items():
            if not tensor.is_meta and name in self.heads:
                tensor.copy_(self.heads[name])
            if not tensor.is_meta and name in self.diff:
                positions, values = (one.cpu() for one in self.diff[name])
                InplaceUpdate([Entry(tensor, positions, values)]).apply()
                _finite(name, read_at(tensor, positions))
        yield from ((key, tensor.contiguous()) for key, tensor in unit.revert(tensors).items())


def _old_weights(directory: str, names: list[str]) -> set[str]:
    """Files not to copy; the weights in directories of sentence-transformers' further modules, "2_Dense", stay."""
    kept = re.match(r"\d+_", Path(directory).name)
    return set() if kept else {name for name in names if any(fnmatch(name, pattern) for pattern in OTHER_FILES)}


def _allocate(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Path, int]]:
    """Make a file for tensors of these dtypes and shapes, and tell where in it the data of each key begins.

    The format is that of https://github.com/huggingface/safetensors#format, the widest dtypes first.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    dtypes, end = {dtype: name for name, dtype in str_to_torch_dtype.items()}, 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
    return {key: (file, 8 + len(text) + header[key]["data_offsets"][0]) for key in tensors}


@torch.no_grad()
def _write_model(model: PreTrainedModel, diff: Diff, scratch: Path, heads: Mapping[str, Tensor]) -> None:
    tensors = {**model.state_dict(keep_vars=True), **dict(model.named_parameters(remove_duplicate=False))}
    _check(diff, heads, {name: tensor.shape for name, tensor in tensors.items()})
    whole = {name: tensors[name].detach().clone() for name in heads}
    entries = {name: Entry(tensors[name], *(one.to(tensors[name].device) for one in diff[name])) for name in diff}
    try:
        for name, head in heads.items():
            tensors[name].data.copy_(head)
        with InplaceUpdate(entries.values()):
            for name, (tensor, positions, _) in entries.items():
                _finite(name, read_at(tensor.data, positions))
            model.save_pretrained(scratch)
    finally:
        for name, head in whole.items():
            tensors[name].data.copy_(head)
