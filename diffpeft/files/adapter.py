"""Pruned adapters as files, written and read without a model: PEFT's directory of weights and config."""

import copy
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffpeft.files import keys
from diffpeft.files.atomic import making, replace_config, stage_weights
from diffpeft.files.checkpoint import parameter_shapes
from diffpeft.files.encoding import (
    VALUE_DTYPES,
    buffer_size,
    check_checksum,
    checksums_of,
    decode,
    dtype_name,
    encode,
    has_checksum,
    unpack,
)
from diffpeft.files.skeleton import adapted_model, floating_shapes
from diffpeft.sparse.diff import Diff, check_diff, count_nonzeros


class Decoded(NamedTuple):
    """The diff, values fp32; the heads by their names in the base model; the dtype of the values in the file."""

    diff: Diff
    heads: dict[str, Tensor]
    value_dtype: str


def write_adapter(
    directory: str | os.PathLike[str],
    config: PeftConfig,
    diff: Diff,
    shapes: Mapping[str, torch.Size],
    heads: Mapping[str, Tensor] | None = None,
    wrapped: Collection[str] | None = None,
) -> None:
    """Write what `save_pretrained` writes for a pruned adapter.

    If writing is cut off, the directory holds the old adapter, the new one, or none that loads. Two processes must not
    write into one directory at once.

    Args:
        directory: made if it is not there.
        config: the adapter's [`DiffPruningConfig`], which is left alone: the file's gets counts and checksums.
        diff: by the parameters' names in the base model. Values are stored in the config's `value_dtype`.
        shapes: shapes of all parameters that the adapter covers, by name, those without nonzeros too.
        heads: the tensors of the modules of `modules_to_save`, by name in the base model.
        wrapped: modules that the tuner wraps, by default those that own one of `shapes`.

    Raises:
        ValueError: a parameter that `shapes` lacks; positions out of order or range, or of another number than the
            values; values or heads that are not finite; an empty diff.
    """
    wrapped = keys.owners(shapes) if wrapped is None else wrapped
    check_diff(diff, shapes)
    tensors = dict[str, Tensor]()
    for name, (positions, values) in diff.items():
        if values.numel():
            numel, values = shapes[name].numel(), values.detach().to("cpu", copy=True).contiguous()
            encoded = encode(positions.cpu(), values, numel, config.value_dtype, name)
            tensors.update(zip(keys.diff_keys(name, wrapped), encoded, strict=True))
    if not tensors:
        raise ValueError("the diff has no nonzeros, so there is nothing to write")
    for name, head in (heads or {}).items():
        tensors[keys.file_key(name, wrapped)] = head.detach().to("cpu", copy=True).contiguous()
    config = copy.copy(config)
    config.inference_mode = True
    config.nnz_pattern = {name: count for name, count in count_nonzeros(diff).items() if count}
    config.heads_checksum = config.diff_checksum = None
    verify(tensors, config, shapes)
    with making(Path(directory)):
        config.heads_checksum, config.diff_checksum = stage_weights(Path(directory), tensors)
        replace_config(Path(directory), json.dumps(config.to_dict(), indent=2, sort_keys=True))


def read_adapter(
    directory: str | os.PathLike[str], shapes: Mapping[str, torch.Size] | None = None
) -> tuple[PeftConfig, Diff, dict[str, Tensor]]:
    """Read a pruned adapter, whether [`write_adapter`] or PEFT wrote it.

    Args:
        shapes: shapes of the base model's parameters by name, as of `parameter_shapes(...)`. None takes them from the
            base model that the config names, if that is a directory.

    Returns:
        The config, a `DiffPruningConfig`; the diff, values fp32; and the tensors of the heads, by names in the base.

    Raises:
        ValueError: a file is missing; and what [`read_config`] and [`verify`] refuse.
    """
    directory = Path(directory)
    config, file = read_config(directory), directory / SAFETENSORS_WEIGHTS_NAME
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; an adapter is a config and {file.name}") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); save or download it again") from None
    try:
        base = config.base_model_name_or_path
        if shapes is None and (base is None or not Path(base).is_dir()):
            raise ValueError(f"the base model {base!r} is no directory here; pass shapes=, by which positions decode")
        if shapes is None:
            heads = {name: head.shape for name, head in keys.heads_of(tensors).items()}
            model = adapted_model(Path(base), config, config.nnz_pattern, heads)
            shapes = parameter_shapes(base) if model is None else floating_shapes(model, config.nnz_pattern)
        decoded = verify(tensors, config, shapes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config, decoded.diff, decoded.heads


def read_config(directory: Path) -> PeftConfig:
    """The config of a pruned adapter. ValueError where it is missing, damaged, in gating, or of another method."""
    file = directory / CONFIG_NAME
    try:
        kind = json.loads(file.read_text()).get("peft_type")
    except FileNotFoundError:
        raise ValueError(f"{file} is missing, so this is no adapter, or one that was not written to the end") from None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); save or download it again") from None
    if kind != keys.PEFT_TYPE:
        raise ValueError(f"{file}: peft_type is {kind!r}, not 'DIFFPRUNING'; load it with PeftModel.from_pretrained")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[keys.PEFT_TYPE].from_pretrained(str(directory))
    if config.nnz_pattern is None:
        raise ValueError(f"{file}: the adapter is still in gating; load it with PEFT and call magnitude_prune() first")
    return config


def verify(tensors: Mapping[str, Tensor], config: PeftConfig, shapes: Mapping[str, torch.Size]) -> Decoded:
    """Check the tensors of a pruned adapter's file, given the shapes of the base's parameters, and decode them.

    The config's `nnz_pattern`, `heads_checksum` and `diff_checksum` are compared where they are set.

    Raises:
        ValueError: values or positions alone; a dtype or shape that no diff has; a wrong checksum; positions out of
            order or range; values or heads that are NaN or infinite; values of several dtypes; a parameter that
            `shapes` lacks; counts that the config contradicts; tensors of an adapter in gating.
    """
    heads = verify_heads(tensors, config.heads_checksum)
    pairs = _pairs(tensors)
    if config.nnz_pattern is not None:
        counts = {name: stored.numel() for name, (stored, _) in pairs.items()}
        for name in sorted(counts.keys() | config.nnz_pattern.keys()):
            found, told = counts.get(name, 0), config.nnz_pattern.get(name, 0)
            if found != told:
                other = "the files do not belong together"
                raise ValueError(f"{name} has {found} values, but {CONFIG_NAME} says {told}; {other}")
    diff, dtypes = {}, set()
    for name, (stored, buffer) in pairs.items():
        if name not in shapes:
            what = "no parameter of the base model that the adapter covers"
            raise ValueError(f"{name} is {what}; use the adapter's own model and config")
        numel = shapes[name].numel()
        try:
            if name in heads and not has_checksum(buffer):  # PEFT has added it as it is in memory, with its embedding
                stored, buffer = encode(unpack(buffer, stored.numel(), numel), stored, numel, config.value_dtype, name)
            diff[name] = decode(stored, buffer, numel, name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}{_other_rows(shapes[name], stored, buffer, name)}") from None
        dtypes.add(dtype_name(stored.dtype))
    if len(dtypes) > 1:
        raise ValueError(f"the diff has values of {sorted(dtypes)}; the file is damaged")
    if config.diff_checksum is not None and checksums_of(tensors).diff != config.diff_checksum:
        raise ValueError(f"the diff is not that of {CONFIG_NAME}: the file is damaged, or of another adapter")
    return Decoded(diff, heads, dtypes.pop() if dtypes else config.value_dtype)


def _other_rows(shape: torch.Size, stored: Tensor, buffer: Tensor, name: str) -> str:
    """The hint that a parameter had another number of rows, as embeddings have with another vocabulary, or ""."""
    try:
        check_checksum(buffer, stored, name)
    except ValueError:
        return ""  # damaged
    row, dtype = shape.numel() // max(1, shape[0]), dtype_name(stored.dtype)
    candidates = range(-(-stored.numel() // row), 2 * shape[0])
    rows = [n for n in candidates if n != shape[0] and buffer_size(stored.numel(), n * row, dtype) == len(buffer)]
    return (
        ""
        if not rows
        else (
            f". Its checksum is right, so it was made for {rows[0]} to {rows[-1]} rows, the model has {shape[0]}: if "
            "the vocabulary was padded or resized since, load and merge the adapter at the old size, and resize then"
        )
    )


def verify_heads(tensors: Mapping[str, Tensor], checksum: int | None) -> dict[str, Tensor]:
    """The heads among the tensors of a file, by their names in the base model.

    Raises ValueError for another checksum than the given one, where it is set, and a head that is NaN or infinite.
    """
    heads = keys.heads_of(tensors)
    for name, head in heads.items():
        if not bool(head.isfinite().all()):
            raise ValueError(f"head {name} has NaN or infinite values; it is damaged, or its training has diverged")
    if checksum is not None and checksums_of(tensors).heads != checksum:
        raise ValueError(f"the checksum of the heads, {sorted(heads)[:3]}, is wrong: the file is damaged")
    return heads


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Stored values and buffer of positions by the parameter's name in the base model."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if keys.KEY_MARKER not in key:
            continue
        name, kind = keys.parameter_and_kind(key)
        if kind not in (keys.VALUES, keys.POSITIONS):
            raise ValueError(f"{key} is of an adapter in gating; load it with PEFT and call magnitude_prune() first")
        wanted = ("uint8",) if kind == keys.POSITIONS else VALUE_DTYPES
        if tensor.dim() != 1 or dtype_name(tensor.dtype) not in wanted:
            has, should = f"{tensor.dtype} of {tuple(tensor.shape)}", " or ".join(wanted)
            raise ValueError(f"{key} is {has}, not {should} of (k,); it is damaged")
        found.setdefault(name, {})[kind] = tensor
    for name, parts in found.items():
        if len(parts) == 1:
            lost = "values" if keys.POSITIONS in parts else "positions"
            raise ValueError(f"{name} has no {lost}; the file is damaged")
    return {name: (parts[keys.VALUES], parts[keys.POSITIONS]) for name, parts in found.items()}
