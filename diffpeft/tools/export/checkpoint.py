"""A finished diff in its base model's own tensors: a merged checkpoint, and patches for a running engine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from diffpeft.files import checkpoint
from diffpeft.sparse.combine import Diff
from diffpeft.sparse.inplace import Entry, InplaceUpdate, read_at
from diffpeft.tools.export.coo import check_diff, check_int32

OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", ".git", ".cache")
"""What of a base model's directory would be its old weights beside the merged ones."""


class WeightPatch(NamedTuple):
    """New values at flat positions of one checkpoint tensor: the fields of vLLM's `SparseWeightPatch`."""

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


def _places(directory: Path) -> dict[str, list[Any]]:
    """Where each parameter is in the files, by its name in the model: a tied one may be there under each of its names."""
    stored, skeleton = checkpoint._stored(directory), checkpoint.skeleton_of(directory)
    if skeleton is None:
        return {name: [place] for name, place in stored.items()}
    stored = checkpoint._renamed(stored, skeleton, directory)
    named = {n: id(p) for n, p in skeleton.named_parameters(remove_duplicate=False)}
    tied: dict[int, list[Any]] = {}
    for name, identity in named.items():
        if name in stored and stored[name] not in tied.setdefault(identity, []):
            tied[identity].append(stored[name])
    return {name: tied[named[name]] if name in named else [place] for name, place in stored.items()}


def _load(place: Any) -> Tensor:
    with safe_open(place.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(place.key)
    return tensor


def to_weight_patches(diff: Diff, directory: str | os.PathLike[str]) -> Iterator[WeightPatch]:
    """The tensors that a diff changes, as patches for vLLM's sparse weight transfer: `SparseWeightPatch(*patch)`.

    vLLM has no file for them: a trainer sends them to a running engine with the backend "sparse_nccl". Each names a tensor
    as the checkpoint does, with int32 indices into all of it, flat and each once, and the values that replace the old
    ones, so they are base + delta in the checkpoint's dtype; NaN is reserved
    (https://github.com/vllm-project/vllm/pull/53751, `vllm/distributed/weight_transfer/sparse_nccl_engine.py`; applied
    by https://github.com/vllm-project/vllm/pull/50723, `vllm/model_executor/model_loader/checkpoint_weight_patch.py`).
    Releases before these take names and positions of vLLM's own parameters and no `full_shape`.

    Args:
        diff: positions and values of shape (k,) by parameter name.
        directory: of the base model that the engine has loaded, with safetensors.

    Yields:
        Patches on the CPU, contiguous; indices and values of shape (k,). A tied tensor is patched under each of its names
        in the files.

    Raises:
        ValueError: a diff that does not fit the checkpoint; a tensor of more than 2^31 elements; a sum that is not finite.
    """
    places = _places(Path(directory))
    check_diff(diff, {name: found[0].shape for name, found in places.items()})
    for name, (where, values) in diff.items():
        for place in places[name] if where.numel() else []:
            check_int32(place.key, place.shape.numel())
            flat = _load(place).reshape(-1)
            InplaceUpdate([Entry(flat, where.cpu(), values.cpu())]).apply()
            yield WeightPatch(
                place.key, where.cpu().to(torch.int32), _finite(name, flat[where.cpu()]), tuple(place.shape)
            )


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: base + delta is not finite in {tensor.dtype}; use a base of a wider dtype")
    return tensor


def to_checkpoint(
    base: PreTrainedModel | str | os.PathLike[str],
    diff: Diff,
    output: str | os.PathLike[str],
    heads: Mapping[str, Tensor] | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write the base model with the diff added: the tensors of `merge_and_unload().save_pretrained()`, to the bit.

    A directory is copied, all but other weights than its safetensors, and the changed tensors are written into the copy
    one at a time. A model is changed, saved with `save_pretrained` and restored to the bit.

    Args:
        base: a directory with safetensors, one file or shards; or a model without adapters.
        diff: positions and values of shape (k,) by parameter name.
        output: must not be there yet, unless empty.
        heads: tensors that replace those of their names, in the dtype of the base.
        progress: called with the share of a directory's tensors that are written.

    Raises:
        ValueError: a diff or heads that do not fit the base; a sum that is not finite; an `output` with files in it;
            parameters that are put together from several tensors of the directory: pass the model then.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already; choose another output or empty it first")
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if isinstance(base, (str, os.PathLike)):
            _write_directory(Path(base), diff, scratch, heads or {}, progress or (lambda share: None))
        else:
            _write_model(base, diff, scratch, heads or {})
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_heads(heads: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    for name, head in heads.items():
        if shapes.get(name) != head.shape:
            raise ValueError(
                f"head {name} is {tuple(head.shape)}, the base has {shapes.get(name)}; use its own base model"
            )


def _write_directory(
    directory: Path, diff: Diff, scratch: Path, heads: Mapping[str, Tensor], progress: Callable[[float], None]
) -> None:
    places = _places(directory)
    shapes = {name: found[0].shape for name, found in places.items()}
    check_diff(diff, shapes)
    _check_heads(heads, shapes)
    # The contents alone: a cache's files may be links, and read-only.
    shutil.copytree(directory, scratch, ignore=shutil.ignore_patterns(*OTHER_WEIGHTS), copy_function=shutil.copyfile)
    for file in {place.file for found in places.values() for place in found}:
        shutil.copyfile(file, scratch / file.name)
    changed = {**diff, **heads}
    for done, name in enumerate(changed, start=1):
        for place in places[name]:
            tensor = _load(place)
            if name in diff:
                where, values = (one.cpu() for one in diff[name])
                InplaceUpdate([Entry(tensor, where, values)]).apply()
                _finite(name, read_at(tensor, where))
            if name in heads:
                tensor.copy_(heads[name])
            _overwrite(scratch / place.file.name, place.key, tensor)
        progress(done / len(changed))


def _overwrite(file: Path, key: str, tensor: Tensor) -> None:
    """Write a tensor over the one of this key, shape and dtype (https://github.com/huggingface/safetensors#format)."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        begin = json.loads(opened.read(size))[key]["data_offsets"][0]
        opened.seek(8 + size + begin)
        opened.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


@torch.no_grad()
def _write_model(model: PreTrainedModel, diff: Diff, scratch: Path, heads: Mapping[str, Tensor]) -> None:
    tensors = {**model.state_dict(keep_vars=True), **dict(model.named_parameters(remove_duplicate=False))}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_diff(diff, shapes)
    _check_heads(heads, shapes)
    whole = {name: tensors[name].detach().clone() for name in heads}
    entries = {name: Entry(tensors[name], *(one.to(tensors[name].device) for one in diff[name])) for name in diff}
    with InplaceUpdate(entries.values()):
        for name, (tensor, where, _) in entries.items():
            _finite(name, read_at(tensor.data, where))
        try:
            for name, head in heads.items():
                tensors[name].data.copy_(head)
            model.save_pretrained(scratch)
        finally:
            for name, head in whole.items():
                tensors[name].data.copy_(head)
