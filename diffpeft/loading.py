"""Bring an adapter that exists into the phase and the shapes of a file, and see that the two fit."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from diffpeft import seal
from diffpeft.adapter import POSITIONS, VALUES
from diffpeft.config import DiffPruningConfig
from diffpeft.layer import DiffPruningLayer
from diffpeft.seal import PART


def adopt(
    layers: Sequence[DiffPruningLayer], config: DiffPruningConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> None:
    """Give the layers of an adapter, and its config, the phase and the shapes of a file.

    Args:
        layers: all layers that hold the adapter.
        config: the adapter's; its `nnz_pattern` becomes the file's.
        adapter_name: the adapter.
        state_dict: the file's tensors, without the adapter's name in their keys.

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
    if any(f".{VALUES}." in key for key in mine):
        # All checks come first: a file that is refused leaves the adapter as it was.
        counts: dict[DiffPruningLayer, dict[str, int]] = {}
        pattern, dtype = {}, config.value_dtype
        for layer in layers:
            counts[layer] = {}
            for parameter in layer.shapes:
                value = mine.get(f"{layer.module_key}.{VALUES}.{parameter}")
                packed = mine.get(f"{layer.module_key}.{POSITIONS}.{parameter}")
                if (value is None) != (packed is None):
                    raise ValueError(f"{layer.parameter_key(parameter)} has values or positions, but not both")
                if value is not None and packed is not None:
                    _check_seal(packed, value, layer.parameter_key(parameter))
                    dtype = str(value.dtype).removeprefix("torch.")
                    counts[layer][parameter] = pattern[layer.parameter_key(parameter)] = value.numel()
        before = config.nnz_pattern
        missing = sorted((before or {}).keys() - pattern.keys())
        if missing and before is not None and pattern.items() < before.items():
            raise ValueError(
                f"the diffs of {len(missing)} parameters that the config tells of are missing, {missing[:3]}; the file is "
                "damaged"
            )
        config.nnz_pattern, config.value_dtype = pattern, dtype
        for layer in layers:
            layer.configs[adapter_name] = config
            layer.forget_positions(adapter_name)
            if layer.nnz(adapter_name) != counts[layer]:
                layer.start_fixmask(adapter_name, counts[layer])
    else:
        config.nnz_pattern = None
        for layer in layers:
            if not layer.is_gating(adapter_name):
                layer.start_gating(adapter_name)


def _check_seal(packed: Tensor, values: Tensor, what: str) -> None:
    try:
        seal.check(packed, values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if not bool(values.isfinite().all()):
        raise ValueError(f"{what}: its values are NaN or infinite: the file is damaged, or its training has diverged")


def canonical(key: str) -> str:
    """A tensor's key by the names of the base model: without PEFT's prefix, and without `.base_layer`, which stands in
    it where a module inside of it is wrapped too."""
    return key.replace(".base_layer", "").removeprefix("base_model.model.")


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
