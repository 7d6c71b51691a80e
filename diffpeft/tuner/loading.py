"""Bring an adapter that exists into the phase and the shapes of a file, and see that the two fit."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffpeft.config import DiffPruningConfig
from diffpeft.files import seal
from diffpeft.files.seal import PART, canonical
from diffpeft.files.values import dtype_name, from_file
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.layer.tensors import POSITIONS, VALUES


def adopt(
    layers: Sequence[DiffPruningLayer], config: DiffPruningConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Give the layers of an adapter, and its config, the phase and the shapes of a file.

    Args:
        layers: all layers that hold the adapter.
        config: the adapter's; its `nnz_pattern` becomes the file's.
        adapter_name: the adapter.
        state_dict: the file's tensors, without the adapter's name in their keys.

    Returns:
        The file's tensors as they are in memory: values fp32, those of int8 times their scale.

    Raises:
        ValueError: there is no diff in the file, or half of one; the adapter is merged.
    """
    mine = {canonical(key): tensor for key, tensor in state_dict.items() if PART in key}
    if not mine:
        raise ValueError(f"there are no diff-pruning tensors in what is to be loaded into adapter {adapter_name!r}")
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"adapter {adapter_name!r} is merged into the base model; unmerge it before loading over it")
    if config.heads_checksum is not None:
        expected, config.heads_checksum = config.heads_checksum, None  # the file's, not of what is trained from here on
        if seal.checksum_of_heads(state_dict) != expected:
            raise ValueError(f"the checksum of the heads of adapter {adapter_name!r} is wrong: the file is damaged")
    if config.diff_checksum is not None:
        expected, config.diff_checksum = config.diff_checksum, None
        if seal.checksum_of_diff(mine) != expected:
            _check_each(layers, mine)
            raise ValueError(
                f"the diff of adapter {adapter_name!r} is not that of its config: the file is damaged, or of another adapter"
            )
    for key, head in state_dict.items():
        if PART not in key and not bool(head.isfinite().all()):
            raise ValueError(f"{key} of adapter {adapter_name!r} is NaN or infinite: its training has diverged")
    if any(f".{VALUES}." in key for key in mine):
        # All checks come first: a file that is refused leaves the adapter as it was.
        found = {layer: _open(layer, mine) for layer in layers}
        pattern = {layer.parameter_key(name): count for layer in layers for name, (count, _) in found[layer].items()}
        dtypes = {dtype for layer in layers for _, dtype in found[layer].values()} or {config.value_dtype}
        if len(dtypes) > 1:
            raise ValueError(
                f"the diff of adapter {adapter_name!r} has values of {sorted(dtypes)}; the file is damaged"
            )
        _check_counts(layers, config, adapter_name, pattern)
        config.nnz_pattern, (config.value_dtype,) = pattern, dtypes
        for layer in layers:
            layer.configs[adapter_name] = config
            layer.make_room(adapter_name, {name: count for name, (count, _) in found[layer].items()})
    else:
        config.nnz_pattern = None
        for layer in layers:
            if not layer.is_gating(adapter_name):
                layer.start_gating(adapter_name)
    return {key: mine[canonical(key)] if PART in key else tensor for key, tensor in state_dict.items()}


def _check_each(layers: Sequence[DiffPruningLayer], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for the first parameter that is damaged, if one is."""
    for layer in layers:
        _open(layer, dict(tensors))


def _check_counts(
    layers: Sequence[DiffPruningLayer], config: DiffPruningConfig, adapter_name: str, pattern: dict[str, int]
) -> None:
    """Raise ValueError where a file's counts are not those of its config. An adapter that was in use before has a config of
    its own, which takes on the file's."""
    before = config.nnz_pattern
    if before is None or any(diff.is_filled for layer in layers for diff in layer.sparse_diffs(adapter_name).values()):
        return
    wrong = sorted(name for name in before.keys() | pattern.keys() if before.get(name, 0) != pattern.get(name, 0))
    if wrong:
        told, found = before.get(wrong[0], 0), pattern.get(wrong[0], 0)
        raise ValueError(
            f"the counts of {len(wrong)} parameters are not those of the config: {wrong[0]} has {found} values, the config "
            f"says {told}; nothing may be missing, so one of the two files is damaged or of another adapter"
        )


def _open(layer: DiffPruningLayer, tensors: dict[str, Tensor]) -> dict[str, tuple[int, str]]:
    """Check a layer's values in a file's tensors and put those in memory in their place. Returns how many values each
    parameter has, and in which dtype they were."""
    found = {}
    for parameter, shape in layer.shapes.items():
        what = layer.parameter_key(parameter)
        values, positions = (f"{layer.module_key}.{kind}.{parameter}" for kind in (VALUES, POSITIONS))
        if (values in tensors) != (positions in tensors):
            raise ValueError(f"{what} has values or positions, but not both")
        if values in tensors:
            stored, packed = tensors[values], tensors[positions]
            found[parameter] = stored.numel(), dtype_name(stored.dtype)
            try:
                tensors[values] = from_file(stored, packed, shape.numel(), what)
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from None
            if stored.dtype == torch.int8:  # with a seal they would be taken for values without their scale
                tensors[positions] = seal.unseal(packed)
    return found


def rename(state_dict: dict[str, Tensor], keys: set[str]) -> dict[str, Tensor]:
    """Give the tensors of a file those of `keys` that mean the same: what else is wrapped differs between models."""
    by_name = {canonical(key): key for key in keys if PART in key}
    return {by_name.get(canonical(key), key) if PART in key else key: tensor for key, tensor in state_dict.items()}


def check_modules(layers: Iterable[DiffPruningLayer], adapter_name: str, keys: Iterable[str]) -> None:
    """Raise ValueError unless all of a file's tensors belong to modules that the adapter covers."""
    covered = {layer.module_key for layer in layers if layer.has_adapter(adapter_name)}
    unknown = sorted({canonical(key).split(PART)[0] for key in keys if PART in key} - covered)
    if unknown:
        raise ValueError(
            f"the tensors belong to {len(unknown)} modules that adapter {adapter_name!r} does not cover, {unknown[:3]}; "
            "they are of another model or config"
        )


def check_complete(model: dict[str, Tensor], adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Raise ValueError unless the file holds every tensor of the adapter in its shape, and none besides."""
    expected = {key: tensor for key, tensor in model.items() if PART in key and key.rsplit(".", 2)[1] == adapter_name}
    given = {key: tensor for key, tensor in state_dict.items() if PART in key}
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"the file does not fit the adapter {adapter_name!r}: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unknown)} belong to no adapted parameter {unknown[:3]}; it is damaged or of another model or config"
        )
    for key, tensor in given.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{key} is {tuple(tensor.shape)} in the file and {tuple(expected[key].shape)} in the model; the file is "
                "damaged or belongs to another model"
            )
