"""Pruned adapters as files, written and read without a model: PEFT's directory of weights and config."""

from __future__ import annotations

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

from diffpeft.files.atomic import replace_config, stage_weights
from diffpeft.files.checkpoint import parameter_shapes
from diffpeft.files.encoding import VALUE_DTYPES, checksums_of, decode, dtype_name, encode
from diffpeft.files.keys import (
    KEY_MARKER,
    PEFT_TYPE,
    POSITIONS,
    VALUES,
    diff_keys,
    file_key,
    heads_of,
    owners,
    parameter_and_kind,
)
from diffpeft.sparse.diff import Diff, check_diff, count_nonzeros


class Decoded(NamedTuple):
    """What an adapter's tensors mean."""

    diff: Diff
    """Values in fp32."""
    heads: dict[str, Tensor]
    """The tensors of `modules_to_save` by their names in the base model."""
    value_dtype: str
    """The dtype that the values have in the file."""


# Writing


def write_adapter(
    directory: str | os.PathLike[str],
    config: PeftConfig,
    diff: Diff,
    shapes: Mapping[str, torch.Size],
    heads: Mapping[str, Tensor] | None = None,
    wrapped: Collection[str] | None = None,
) -> None:
    """Write what `save_pretrained` writes for a pruned adapter.

    The old adapter of the directory is replaced whole: if writing is cut off, the directory holds the old adapter, the
    new one, or none that loads. Two processes must not write into one directory at once.

    Args:
        directory: made if it is not there.
        config: the adapter's [`DiffPruningConfig`]. The file's says `inference_mode` and gets its counts and checksums
            from what is written; this one is left alone.
        diff: by the parameters' names in the base model. Parameters without nonzeros take no tensors. Values are stored
            in the config's `value_dtype`.
        shapes: shapes of all parameters that the adapter covers, by name, those without nonzeros too.
        heads: the tensors of the modules of `modules_to_save`, by name in the base model.
        wrapped: modules that the tuner wraps, by default those that own one of `shapes`.

    Raises:
        ValueError: a parameter that `shapes` lacks; positions out of order or range, or of another number than the
            values; values or heads that are not finite; an empty diff.
        OSError: the file system's.
    """
    wrapped = owners(shapes) if wrapped is None else wrapped
    check_diff(diff, shapes)
    tensors = dict[str, Tensor]()
    for name, (positions, values) in diff.items():
        if values.numel():
            numel, values = shapes[name].numel(), values.detach().to("cpu", copy=True).contiguous()
            encoded = encode(positions.cpu(), values, numel, config.value_dtype, name)
            tensors.update(zip(diff_keys(name, wrapped), encoded, strict=True))
    if not tensors:
        raise ValueError("the diff has no nonzeros, so there is nothing to write")
    for name, head in (heads or {}).items():
        tensors[file_key(name, wrapped)] = head.detach().to("cpu", copy=True).contiguous()
    config = copy.copy(config)
    config.inference_mode = True
    config.nnz_pattern = {name: count for name, count in count_nonzeros(diff).items() if count}
    config.heads_checksum = config.diff_checksum = None
    verify(tensors, config, shapes)
    config.heads_checksum, config.diff_checksum = stage_weights(Path(directory), tensors)
    replace_config(Path(directory), json.dumps(config.to_dict(), indent=2, sort_keys=True))


# Reading


def read_adapter(
    directory: str | os.PathLike[str], shapes: Mapping[str, torch.Size] | None = None
) -> tuple[PeftConfig, Diff, dict[str, Tensor]]:
    """Read a pruned adapter, whether [`write_adapter`] or PEFT wrote it.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.
        shapes: shapes of the base model's parameters by name, without which positions cannot be decoded: those of
            `named_parameters()`, or of `parameter_shapes(...)`. None takes them from the base model that the config
            names, if that is a directory.

    Returns:
        The config, a `DiffPruningConfig`; the diff, as `DiffPruningModel.get_diff` gives it, values fp32; and the
        tensors of the heads by name in the base model.

    Raises:
        ValueError: a file is missing or damaged; the adapter is not pruned, or of another method or model; and what
            [`verify`] refuses.
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
        decoded = verify(tensors, config, _base_shapes(config) if shapes is None else shapes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config, decoded.diff, decoded.heads


def read_config(directory: Path) -> PeftConfig:
    """The config of a pruned adapter.

    Raises:
        ValueError: it is missing or damaged, of an adapter in gating, or of another method.
    """
    file = directory / CONFIG_NAME
    try:
        kind = json.loads(file.read_text()).get("peft_type")
    except FileNotFoundError:
        raise ValueError(f"{file} is missing, so this is no adapter, or one that was not written to the end") from None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); save or download it again") from None
    if kind != PEFT_TYPE:
        raise ValueError(f"{file}: peft_type is {kind!r}, not {PEFT_TYPE!r}; load it with PeftModel.from_pretrained")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE].from_pretrained(str(directory))
    if config.nnz_pattern is None:
        raise ValueError(f"{file}: the adapter is still in gating; load it with PEFT and call magnitude_prune() first")
    return config


def _base_shapes(config: PeftConfig) -> dict[str, torch.Size]:
    base = config.base_model_name_or_path
    if base is None or not Path(base).is_dir():
        raise ValueError(f"the base model {base!r} is no directory here; pass shapes=, by which positions decode")
    return parameter_shapes(base)


# Verification


def verify(tensors: Mapping[str, Tensor], config: PeftConfig, shapes: Mapping[str, torch.Size]) -> Decoded:
    """Check the tensors of a pruned adapter's file, and decode them.

    Args:
        tensors: of the file, by key.
        config: the file's; its `nnz_pattern`, `heads_checksum` and `diff_checksum` are compared where they are not
            None.
        shapes: shapes of the base model's parameters by name.

    Raises:
        ValueError: values without positions, or positions without values; a dtype or shape that no diff has; a checksum
            that is wrong; positions out of order or range; values or heads that are NaN or infinite; values of several
            dtypes; a parameter that `shapes` lacks; counts that the config contradicts; tensors of an adapter in
            gating.
    """
    heads = verify_heads(tensors, config.heads_checksum)
    pairs = _pairs(tensors)
    if config.nnz_pattern is not None:
        _check_counts({name: stored.numel() for name, (stored, _) in pairs.items()}, config.nnz_pattern)
    diff = {}
    for name, (stored, buffer) in pairs.items():
        if name not in shapes:
            raise ValueError(
                f"{name} is no parameter of the base model that the adapter covers; "
                "use the adapter's own model and config"
            )
        try:
            diff[name] = decode(stored, buffer, shapes[name].numel(), name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    dtypes = {dtype_name(stored.dtype) for stored, _ in pairs.values()} or {config.value_dtype}
    if len(dtypes) > 1:
        raise ValueError(f"the diff has values of {sorted(dtypes)}; the file is damaged")
    if config.diff_checksum is not None and checksums_of(tensors).diff != config.diff_checksum:
        raise ValueError(f"the diff is not that of {CONFIG_NAME}: the file is damaged, or of another adapter")
    return Decoded(diff, heads, dtypes.pop())


def verify_heads(tensors: Mapping[str, Tensor], checksum: int | None) -> dict[str, Tensor]:
    """The heads among the tensors of a file, by their names in the base model.

    Raises:
        ValueError: another checksum than the given one, where it is not None; a head that is NaN or infinite.
    """
    heads = heads_of(tensors)
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
        if KEY_MARKER not in key:
            continue
        name, kind = parameter_and_kind(key)
        if kind not in (VALUES, POSITIONS):
            raise ValueError(f"{key} is of an adapter in gating; load it with PEFT and call magnitude_prune() first")
        wanted = ("uint8",) if kind == POSITIONS else VALUE_DTYPES
        if tensor.dim() != 1 or dtype_name(tensor.dtype) not in wanted:
            raise ValueError(
                f"{key} is {tensor.dtype} of {tuple(tensor.shape)}, not {' or '.join(wanted)} of (k,); it is damaged"
            )
        found.setdefault(name, {})[kind] = tensor
    for name, parts in found.items():
        if len(parts) == 1:
            lost = "values" if POSITIONS in parts else "positions"
            raise ValueError(f"{name} has no {lost}; the file is damaged")
    return {name: (parts[VALUES], parts[POSITIONS]) for name, parts in found.items()}


def _check_counts(counts: Mapping[str, int], expected: Mapping[str, int]) -> None:
    for name in sorted(counts.keys() | expected.keys()):
        found, told = counts.get(name, 0), expected.get(name, 0)
        if found != told:
            raise ValueError(
                f"{name} has {found} values, but {CONFIG_NAME} says {told}; the files do not belong together"
            )
