"""A sparse diff added to its base model's tensors: a merged checkpoint, and patches for a running engine."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from diffpeft.files.atomic import making, save_tensors
from diffpeft.files.checkpoint import WEIGHT_FILES, Checkpoint, StoredTensor, Unit, open_checkpoint
from diffpeft.files.skeleton import adapted_model
from diffpeft.sparse.diff import Diff, check_diff
from diffpeft.sparse.inplace import Entry, InplaceUpdate, read_at
from diffpeft.tools.export.coo import check_int32

OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.index.json")
OTHER_FILES = (*OTHER_WEIGHTS, ".git", ".cache")
"""Files in a base model's directory that are not copied: they are, or may hold, its old weights."""
MAX_SHARD_BYTES = 2 << 30
"""Bytes of tensors that go into one file, and are held in memory until then."""


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
    base: str | os.PathLike[str] | Checkpoint,
    diff: Diff,
    output: str | os.PathLike[str],
    heads: Mapping[str, Tensor] | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write the base model with the diff added: the tensors of `merge_and_unload().save_pretrained()`, to the bit.

    The tensors of a directory are written file by file, under the keys that they have there, with what else is in the
    directory.

    Args:
        base: a directory, whose model is the one that has the diff's and the heads' names; or its tensors, opened.
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
    if not isinstance(base, Checkpoint):
        shapes = {name: head.shape for name, head in heads.items()}
        base = open_checkpoint(base, adapted_model(Path(base), names=diff, heads=shapes))
    with making(target.parent), making(scratch):
        try:
            _write_files(base, diff, scratch, heads, progress or (lambda share: None))
            if target.exists():
                target.rmdir()
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _write_files(
    checkpoint: Checkpoint, diff: Diff, scratch: Path, heads: Mapping[str, Tensor], progress: Callable[[float], None]
) -> None:
    directory, model = Path(checkpoint.label), checkpoint.model
    checkpoint.check_whole([*heads])
    shapes = {**checkpoint.parameters, **checkpoint.tied, **checkpoint.others}
    shapes |= {} if model is None else {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_diff(diff, shapes)
    for name, head in heads.items():
        if shapes.get(name) != head.shape:
            told = f"head {name} is {tuple(head.shape)}, the base has {shapes.get(name)}"
            raise ValueError(f"{told}; use its own base model")
    # The contents alone: a cache's files may be links, and read-only.
    shutil.copytree(directory, scratch, ignore=_old_weights, copy_function=shutil.copyfile, dirs_exist_ok=True)
    units = list({id(unit): unit for unit in checkpoint.units.values()}.values())
    last = units[-1].sources[0][2]
    for name in (name for name in heads if not checkpoint.units_of(name)):
        empty = torch.empty(shapes[name], dtype=last.like.dtype)
        units.append(Unit(name, None, model, [(name, name, StoredTensor(None, name, empty))]))
    diff = {alias: diff[name] for name in diff for alias in checkpoint.aliases.get(name, [name])}
    heads = {alias: heads[name] for name in heads for alias in checkpoint.aliases.get(name, [name])}
    shard, places, name = dict[str, Tensor](), dict[str, str](), ""
    for done, unit in enumerate(units, start=1):
        shard |= _changed(unit, diff, heads)
        if done == len(units) or sum(tensor.nbytes for tensor in shard.values()) >= MAX_SHARD_BYTES:
            name = f"model-{len({*places.values()}) + 1:05}.safetensors"
            save_tensors(shard, scratch / name, {"format": "pt"})
            places |= dict.fromkeys(shard, name)
            shard = {}
        progress(done / len(units))
    if len({*places.values()}) == 1:
        (scratch / name).rename(scratch / WEIGHT_FILES[0])
    else:
        (scratch / WEIGHT_FILES[1]).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=2))
    if isinstance(model, PreTrainedModel):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(scratch)


def _changed(unit: Unit, diff: Diff, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is written of a unit, by key: its tensors as the files have them, or with what the adapter makes of them."""
    if not (diff.keys() | heads.keys()) & unit.convert(attrgetter("like")).keys():
        return {key: stored.load() for _, key, stored in (unit.sources if unit.converter else unit.sources[:1])}
    tensors = {name: tensor.contiguous() for name, tensor in unit.convert().items()}
    for name, tensor in tensors.items():
        if name in heads:
            tensor.copy_(heads[name])
        if name in diff:
            positions, values = (one.cpu() for one in diff[name])
            InplaceUpdate([Entry(tensor, positions, values)]).apply()
            _finite(name, read_at(tensor, positions))
    return {key: tensor.contiguous() for key, tensor in unit.revert(tensors).items()}


def _old_weights(directory: str, names: list[str]) -> set[str]:
    """Files not to copy; the weights in directories of sentence-transformers' further modules, "2_Dense", stay."""
    kept = re.match(r"\d+_", Path(directory).name)
    return set() if kept else {name for name in names if any(fnmatch(name, pattern) for pattern in OTHER_FILES)}
