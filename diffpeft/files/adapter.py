"""Finished adapters as files, written and read without a model: PEFT's directory of weights and config."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffpeft.config import DiffPruningConfig
from diffpeft.files import seal
from diffpeft.files.atomic import replace_adapter
from diffpeft.files.checkpoint import parameter_shapes
from diffpeft.files.seal import PART, canonical
from diffpeft.files.values import VALUE_DTYPES, dtype_name, from_file, rounded, to_file
from diffpeft.layer.layer import RootParameters
from diffpeft.layer.tensors import POSITIONS, VALUES
from diffpeft.peft_type import DIFFPRUNING

PREFIX = "base_model.model."
Diff = dict[str, tuple[Tensor, Tensor]]
"""(positions, values) of each parameter with nonzeros, by its name in the base model."""

# Keys


def owners(names: Iterable[str]) -> set[str]:
    """The modules that own parameters of these names; "" is the model itself."""
    return {name.rpartition(".")[0] for name in names}


def _path(name: str, wrapped: Collection[str]) -> str:
    """The name of a module or parameter in a model whose `wrapped` modules are: `.base_layer` leads into each."""
    parts = name.split(".")
    path = []
    for index, part in enumerate(parts, start=1):
        path.append(part)
        if index < len(parts) and ".".join(parts[:index]) in wrapped:
            path.append("base_layer")
    return PREFIX + ".".join(path)


def _keys(name: str, wrapped: Collection[str]) -> tuple[str, str]:
    """The keys of a parameter's values and positions."""
    module, _, parameter = name.rpartition(".")
    path = _path(module or RootParameters.NAME, wrapped)
    return f"{path}.{VALUES}.{parameter}", f"{path}.{POSITIONS}.{parameter}"


# Writing


def write_adapter(
    directory: str | os.PathLike[str],
    config: DiffPruningConfig,
    diff: Mapping[str, tuple[Tensor, Tensor]],
    shapes: Mapping[str, torch.Size],
    heads: Mapping[str, Tensor] | None = None,
    wrapped: Collection[str] | None = None,
) -> None:
    """Write what `save_pretrained` writes for a pruned adapter.

    The old adapter of the directory is replaced whole: if writing is cut off, the directory holds the old adapter, the new
    one, or none that loads. Two processes must not write into one directory at once.

    Args:
        directory: made if it is not there.
        config: the adapter's. The file's says `inference_mode` and gets its counts and checksums from what is written; this
            one is left alone.
        diff: (positions, values) by the parameters' names in the base model: flat, int64, sorted; floating; shape (k,)
            both. Parameters with k = 0 take no tensors. Values are stored in the config's `value_dtype`.
        shapes: shapes of all parameters that the adapter covers, by name, those without nonzeros too.
        heads: the tensors of the modules of `modules_to_save`, by name in the base model.
        wrapped: modules that the tuner wraps, by default those that own one of `shapes`.

    Raises:
        ValueError: a parameter that `shapes` lacks; positions out of order or range, or of another number than the values;
            values or heads that are not finite; an empty diff.
        OSError: the file system's.
    """
    wrapped = owners(shapes) if wrapped is None else wrapped
    tensors = _packed(diff, shapes, wrapped, config.value_dtype)
    for name, head in (heads or {}).items():
        _check_finite(f"head {name}", head)
        tensors[_path(name, wrapped)] = head.detach().to("cpu", copy=True).contiguous()
    config = copy.copy(config)
    config.inference_mode = True
    config.nnz_pattern = {name: values.numel() for name, (_, values) in diff.items() if values.numel()}
    config.heads_checksum, config.diff_checksum = seal.checksum_of_heads(tensors), seal.checksum_of_diff(tensors)
    replace_adapter(Path(directory), tensors, json.dumps(config.to_dict(), indent=2, sort_keys=True))


def _packed(
    diff: Mapping[str, tuple[Tensor, Tensor]],
    shapes: Mapping[str, torch.Size],
    wrapped: Collection[str],
    dtype: str,
) -> dict[str, Tensor]:
    tensors = {}
    for name, (where, values) in diff.items():
        if name not in shapes:
            raise ValueError(f"the diff has {name}, which is none of the {len(shapes)} parameters in shapes")
        if where.shape != values.shape or where.dim() != 1:
            raise ValueError(
                f"{name}: positions are {tuple(where.shape)}, values {tuple(values.shape)}; use (k,) for both"
            )
        if values.numel():
            key, partner = _keys(name, wrapped)
            values = values.detach().to("cpu", copy=True).contiguous()
            _check_finite(f"{name} in {dtype}", rounded(values, dtype))
            try:
                tensors[key], tensors[partner] = to_file(where.cpu(), values, shapes[name].numel(), dtype, name)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    if not tensors:
        raise ValueError("the diff has no nonzeros, so there is nothing to write")
    return tensors


def _check_finite(what: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} has NaN or infinite values; what it was made of is damaged, make it anew")


# Reading


def read_adapter(
    directory: str | os.PathLike[str], shapes: Mapping[str, torch.Size] | None = None
) -> tuple[DiffPruningConfig, Diff, dict[str, Tensor]]:
    """Read a finished adapter, whether [`write_adapter`] or PEFT wrote it.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.
        shapes: shapes of the base model's parameters by name, without which positions cannot be decoded: those of
            `named_parameters()`, or `diffpeft.files.checkpoint.parameter_shapes(...)`. None takes them from the base model that
            the config names, if that is a directory.

    Returns:
        The config; the diff, as `DiffPruningModel.get_diff` gives it, values fp32; and the tensors of the
        heads by name in the base model.

    Raises:
        ValueError: a file is missing or damaged; the adapter is not finished, or of another method or model; what does
            not fit together: values without positions, sizes, positions that are none, values that are not finite,
            numbers that the config's `nnz_pattern` contradicts.
    """
    directory = Path(directory)
    config, file = read_config(directory), directory / SAFETENSORS_WEIGHTS_NAME
    try:
        tensors = {canonical(key): tensor for key, tensor in load_file(file).items()}
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; an adapter is a config and {file.name}") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); save or download it anew") from None
    heads = {key: tensor for key, tensor in tensors.items() if PART not in key}
    for name, head in heads.items():
        _check_finite(f"{file}: head {name}", head)
    if config.heads_checksum is not None and seal.checksum_of_heads(tensors) != config.heads_checksum:
        raise ValueError(f"{file}: the checksum of the heads, {sorted(heads)[:3]}, is wrong: the file is damaged")
    pairs = _pairs(file, {key: tensor for key, tensor in tensors.items() if PART in key})
    counts = {name: values.numel() for name, (_, values) in pairs.items()}
    _check_counts(file, counts, config.nnz_pattern or {})
    if shapes is None:
        shapes = _base_shapes(directory, config)
    diff = {}
    for name, (packed, values) in pairs.items():
        if name not in shapes:
            raise ValueError(
                f"{file}: {name} is no parameter of the base model; pass the shapes of the adapter's own model"
            )
        numel = shapes[name].numel()
        try:
            diff[name] = seal.unpack(packed, values.numel(), numel), from_file(values, packed, numel, name)
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}") from None
    if config.diff_checksum is not None and seal.checksum_of_diff(tensors) != config.diff_checksum:
        raise ValueError(f"{file}: the diff is not that of {CONFIG_NAME}: the file is damaged, or of another adapter")
    return config, diff, heads


def read_config(directory: Path) -> DiffPruningConfig:
    """The config of a finished adapter. Raises ValueError where it is missing or damaged, or of an adapter that is not
    finished, or of another method."""
    file = directory / CONFIG_NAME
    try:
        kind = json.loads(file.read_text()).get("peft_type")
    except FileNotFoundError:
        raise ValueError(f"{file} is missing, so this is no adapter, or one that was not written to the end") from None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); save or download it anew") from None
    if kind != DIFFPRUNING.value:
        raise ValueError(
            f"{file}: peft_type is {kind!r}, not {DIFFPRUNING.value!r}; load it with PeftModel.from_pretrained"
        )
    config: DiffPruningConfig = DiffPruningConfig.from_pretrained(str(directory))
    if config.nnz_pattern is None:
        raise ValueError(f"{file}: the adapter is still in gating; load it with PEFT and call magnitude_prune() first")
    return config


def _pairs(file: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Packed positions and values by the parameter's name in the base model."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, rest = key.rpartition(PART)
        kind, _, parameter = (PART[1:] + rest).partition(".")
        if kind not in (VALUES, POSITIONS):
            raise ValueError(
                f"{file}: {key} is of an adapter in gating; load it with PEFT and call magnitude_prune() first"
            )
        wanted = ("uint8",) if kind == POSITIONS else VALUE_DTYPES
        if tensor.dim() != 1 or dtype_name(tensor.dtype) not in wanted:
            raise ValueError(
                f"{file}: {key} is {tensor.dtype} of {tuple(tensor.shape)}, not {' or '.join(wanted)} of (k,); it is damaged"
            )
        name = parameter if module == RootParameters.NAME else f"{module}.{parameter}"
        parts.setdefault(name, {})[kind] = tensor
    for name, found in parts.items():
        if len(found) == 1:
            lost = "values" if POSITIONS in found else "positions"
            raise ValueError(f"{file}: {name} has no {lost}; the file is damaged")
    return {name: (found[POSITIONS], found[VALUES]) for name, found in parts.items()}


def _check_counts(file: Path, counts: dict[str, int], expected: dict[str, int]) -> None:
    for name in sorted(counts.keys() | expected.keys()):
        found, told = counts.get(name, 0), expected.get(name, 0)
        if found != told:
            raise ValueError(
                f"{file}: {name} has {found} values, but {CONFIG_NAME} says {told}; the files do not belong together"
            )


def _base_shapes(directory: Path, config: DiffPruningConfig) -> dict[str, torch.Size]:
    base = config.base_model_name_or_path
    if base is None or not Path(base).is_dir():
        raise ValueError(
            f"{directory}: the base model {base!r} is no directory here; pass shapes=, by which positions decode"
        )
    return parameter_shapes(base)
