"""A sparse diff added to its base model's tensors: a merged checkpoint, and patches for a running engine."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from diffpeft.files.checkpoint import locate
from diffpeft.sparse.diff import Diff, check_diff
from diffpeft.sparse.inplace import Entry, InplaceUpdate, read_at
from diffpeft.tools.export.coo import check_int32

OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", ".git", ".cache")
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
    tensors = locate(Path(directory))
    check_diff(diff, {name: found[0].shape for name, found in tensors.items()})
    for name, (positions, values) in diff.items():
        positions, values = positions.cpu(), values.cpu()
        for stored in tensors[name] if positions.numel() else []:
            check_int32(stored.key, stored.shape.numel())
            flat = stored.load().reshape(-1)
            InplaceUpdate([Entry(flat, positions, values)]).apply()
            summed = _finite(name, flat[positions])
            yield WeightPatch(stored.key, positions.to(torch.int32), summed, tuple(stored.shape))


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

    A directory is copied, without weights other than safetensors, and the changed tensors are written into the copy one
    at a time. A model is changed, saved with `save_pretrained` and restored to the bit.

    Args:
        base: a directory with safetensors, one file or shards; or a model without adapters.
        diff: positions and values of shape (k,) by parameter name.
        output: must not be there yet, unless empty.
        heads: tensors that replace those of their names, in the dtype of the base.
        progress: called with the share of a directory's tensors that are written.

    Raises:
        ValueError: a diff or heads that do not fit; a sum that is not finite; an `output` with files in it; parameters
            that are put together from several tensors of the directory: pass the model then.
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


def _check(diff: Diff, heads: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    check_diff(diff, shapes)
    for name, head in heads.items():
        base = shapes.get(name)
        if base != head.shape:
            raise ValueError(f"head {name} is {tuple(head.shape)}, the base has {base}; use its own base model")


def _write_directory(
    directory: Path, diff: Diff, scratch: Path, heads: Mapping[str, Tensor], progress: Callable[[float], None]
) -> None:
    tensors = locate(directory)
    _check(diff, heads, {name: found[0].shape for name, found in tensors.items()})
    # The contents alone: a cache's files may be links, and read-only.
    shutil.copytree(directory, scratch, ignore=shutil.ignore_patterns(*OTHER_WEIGHTS), copy_function=shutil.copyfile)
    for file in {stored.file for found in tensors.values() for stored in found}:
        shutil.copyfile(file, scratch / file.name)
    changed = {**diff, **heads}
    for done, name in enumerate(changed, start=1):
        for stored in tensors[name]:
            tensor = stored.load()
            if name in diff:
                positions, values = (one.cpu() for one in diff[name])
                InplaceUpdate([Entry(tensor, positions, values)]).apply()
                _finite(name, read_at(tensor, positions))
            if name in heads:
                tensor.copy_(heads[name])
            _overwrite(scratch / stored.file.name, stored.key, tensor)
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
    _check(diff, heads, {name: tensor.shape for name, tensor in tensors.items()})
    whole = {name: tensors[name].detach().clone() for name in heads}
    entries = {name: Entry(tensors[name], *(one.to(tensors[name].device) for one in diff[name])) for name in diff}
    with InplaceUpdate(entries.values()):
        for name, (tensor, positions, _) in entries.items():
            _finite(name, read_at(tensor.data, positions))
        try:
            for name, head in heads.items():
                tensors[name].data.copy_(head)
            model.save_pretrained(scratch)
        finally:
            for name, head in whole.items():
                tensors[name].data.copy_(head)
