"""An adapter's tensors on their way into a file and out of one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from diffpeft.config import DiffPruningConfig
from diffpeft.files.adapter import verify, verify_heads
from diffpeft.files.encoding import checksums_of, encode, fits, has_checksum, strip_checksum
from diffpeft.files.keys import KEY_MARKER, POSITIONS, VALUES, base_model_key, diff_keys, parameter_and_kind
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.sparse.sharded import is_sharded

# Saving


class EncodedTensors(dict[str, Tensor]):
    """An adapter's tensors on their way into a file, to which PEFT adds those of heads and embeddings by `update`.

    Embeddings come with all that is under their module: the diffs there as they are in memory, those of other adapters
    too, and a base weight that holds the diffs while they are merged.
    """

    def __init__(self, tensors: Mapping[str, Tensor], merged: bool) -> None:
        super().__init__(tensors)
        self._merged = merged

    def update(self, added: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        """Add tensors that are no diff. Raises ValueError for base weights that hold a diff."""
        others = {key: tensor for key, tensor in added.items() if KEY_MARKER not in key}
        held = [key for key in others if ".base_layer." in key]
        if held and self._merged:
            raise ValueError(f"PEFT saves {held[:2]} too, which hold a merged diff; call unmerge_adapter() first")
        super().update(others)


def tensors_to_save(
    model: nn.Module, config: DiffPruningConfig, adapter_name: str, tensors: dict[str, Tensor]
) -> EncodedTensors:
    """The tensors of an adapter as they go into its file: values in the config's dtype, positions with their checksum.

    Args:
        model: holds the adapter.
        config: the adapter's. Its `value_dtype` becomes "float32" where values have trained since they were cast.
        adapter_name: the adapter.
        tensors: the adapter's, by their keys in the state dict.

    Raises:
        ValueError: values that are NaN, infinite, damaged or were never loaded.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DiffPruningLayer) and m.has_adapter(adapter_name)}
    if any(map(is_sharded, tensors.values())):
        return EncodedTensors(tensors, False)  # for a checkpoint of shards; they are no file
    found = {}
    for module, layer in layers.items():
        for name in layer.nnz(adapter_name) or {}:
            keys = tuple(f"{module}.{kind}.{adapter_name}.{name}" for kind in (VALUES, POSITIONS))
            if all(key in tensors for key in keys):
                # The state dict may have been made before values were decoded; a sharded tensor is whole there alone.
                values = layer.sparse(adapter_name, name).values
                found[layer, name, keys] = tensors[keys[0]] if is_sharded(values) else values
    if any(layer.is_gating(adapter_name) and layer.noise.idle_passes for layer in layers.values()):
        warnings.warn(
            f"adapter {adapter_name!r} was trained and is saved in gating, dense, without a step of its gates; add "
            "DiffPruningCallback() to the Trainer's callbacks, or call gate_step and magnitude_prune in your own loop",
            stacklevel=2,
        )
    if not all(fits(values, config.value_dtype) for values in found.values()):
        config.value_dtype = "float32"  # they have trained since they were cast
        for layer in layers.values():
            layer.configs[adapter_name] = config
    saved, stored, shapes = dict(tensors), dict[str, Tensor](), dict[str, torch.Size]()
    for (layer, name, keys), values in found.items():
        encoded, what = layer.sparse(adapter_name, name).encoded(values), layer.parameter_key(name)
        saved.update(zip(keys, encoded, strict=True))
        stored.update(zip(diff_keys(what), encoded, strict=True))
        shapes[what] = layer.shapes[name]
    bare = copy.copy(config)  # without what it says of a file
    bare.heads_checksum = bare.diff_checksum = bare.nnz_pattern = None
    verify(stored, bare, shapes)
    return EncodedTensors(saved, any(isinstance(m, DiffPruningLayer) and m.merged for m in model.modules()))


# Loading


def match_file(
    layers: Iterable[DiffPruningLayer],
    config: DiffPruningConfig,
    adapter_name: str,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Give the layers of an adapter, and its config, the phase and the shapes of a file, unless it is refused.

    Args:
        layers: all layers that hold the adapter.
        config: the adapter's; its `nnz_pattern` and `value_dtype` become the file's, its checksums None.
        adapter_name: the adapter.
        tensors: the file's, without the adapter's name in their keys.

    Returns:
        The file's tensors as they are in memory: values fp32, those of int8 times their scale.

    Raises:
        ValueError: no diff-pruning tensors in the file; the adapter is merged; what [`verify`] refuses.
    """
    layers = list(layers)
    if config.nnz_pattern != {} and not any(KEY_MARKER in key for key in tensors):
        raise ValueError(f"there are no diff-pruning tensors in what is to be loaded into adapter {adapter_name!r}")
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"adapter {adapter_name!r} is merged into the base model; unmerge it before loading over it")
    before = copy.copy(config)
    config.heads_checksum = config.diff_checksum = None  # the file's, not of what is trained from here on
    if any(diff.is_filled for layer in layers for diff in layer.sparse_diffs(adapter_name).values()):
        before.nnz_pattern = None  # an adapter that was in use takes on the file's counts
    pruned = config.nnz_pattern == {} or any(f".{kind}." in key for key in tensors for kind in (VALUES, POSITIONS))
    shapes = {layer.parameter_key(name): shape for layer in layers for name, shape in layer.shapes.items()}
    try:
        if not pruned and before.diff_checksum is None:
            verify_heads(tensors, before.heads_checksum)
        else:
            decoded = verify(tensors, before, shapes)
    except ValueError as error:
        raise ValueError(f"adapter {adapter_name!r}: {error}") from None
    if not pruned:
        config.nnz_pattern = None
        for layer in layers:
            if not layer.is_gating(adapter_name):
                layer.start_gating(adapter_name)
        return dict(tensors)
    counts = {name: decoded.diff[name][0].numel() for name in shapes if name in decoded.diff}
    config.nnz_pattern, config.value_dtype = counts, decoded.value_dtype
    for layer in layers:
        own = {name: counts.get(layer.parameter_key(name), 0) for name in layer.shapes}
        layer.configs[adapter_name] = config
        layer.make_room(adapter_name, {name: count for name, count in own.items() if count})
    loaded = dict(tensors)
    for key in tensors:
        if KEY_MARKER in key:
            name, kind = parameter_and_kind(key)
            if kind == VALUES:
                loaded[key] = decoded.diff[name][1]
            elif decoded.value_dtype == "int8":  # with a checksum they would be taken for values without their scale
                loaded[key] = strip_checksum(encode(*decoded.diff[name], shapes[name].numel(), "int8")[1])
    return loaded


def rename(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Give the tensors of a file the keys of the model, which differ where other modules are wrapped."""
    by_name = {base_model_key(key): key for key in keys if KEY_MARKER in key}
    return {
        by_name.get(base_model_key(key), key) if KEY_MARKER in key else key: tensor for key, tensor in tensors.items()
    }


def check_complete(expected: Mapping[str, Tensor], adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a file holds the adapter's `expected` tensors, and no others of ours."""
    given = {key for key in tensors if KEY_MARKER in key}
    missing, unknown = sorted(expected.keys() - given), sorted(given - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"the file does not fit the adapter {adapter_name!r}: it lacks {missing[:3]} and has {unknown[:3]}"
        )


class FirstPassCheck:
    """Compare an adapter with the checksums of its config in the next forward pass of the model, once.

    PEFT's loading compares the file itself. transformers' `load_adapter` shows nobody the file, and casts heads to the
    dtype of the model: of heads that it has rounded nothing can be said.

    Args:
        model: holds the adapter.
        config: the adapter's. Its `heads_checksum` and `diff_checksum` are None once they were compared.
        adapter_name: the adapter.
    """

    def __init__(self, model: nn.Module, config: DiffPruningConfig, adapter_name: str) -> None:
        self.config, self.adapter_name = config, adapter_name
        model.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Raise ValueError if the adapter is not that of the file."""
        if torch.compiler.is_compiling():
            return
        for key in [key for key, hook in model._forward_pre_hooks.items() if hook is self]:
            model._forward_pre_hooks.pop(key)
        heads_checksum, diff_checksum = self.config.heads_checksum, self.config.diff_checksum
        self.config.heads_checksum = self.config.diff_checksum = None
        layers = [module for module in model.modules() if isinstance(module, DiffPruningLayer)]
        if not any(layer.configs.get(self.adapter_name) is self.config for layer in layers):
            return  # it was deleted, or pruned or loaded over since
        buffers = {n: b for n, b in model.named_buffers() if f".{POSITIONS}.{self.adapter_name}." in n}
        # Those that were used before, or that are on a device only while they run, are checked one by one.
        as_loaded = bool(buffers) and not any(buffer.is_meta or not has_checksum(buffer) for buffer in buffers.values())
        if diff_checksum is not None and as_loaded and checksums_of(buffers).diff != diff_checksum:
            raise ValueError(
                f"the diff of adapter {self.adapter_name!r} is damaged or of another one; load it with PEFT"
            )
        if heads_checksum is None:  # asking for states would shard them again, under FSDP
            return
        heads = {
            f"{name}.{key}": tensor
            for name, wrapper in model.named_modules()
            if isinstance(wrapper, ModulesToSaveWrapper) and self.adapter_name in wrapper.modules_to_save
            for key, tensor in wrapper.modules_to_save[self.adapter_name].state_dict().items()
        }
        dtypes = {head.dtype for head in heads.values() if head.is_floating_point()}
        if any(head.is_meta for head in heads.values()):  # offloaded since they were loaded
            return
        if not all(bool(head.isfinite().all()) for head in heads.values()):
            raise ValueError(f"{sorted(heads)[:3]} of adapter {self.adapter_name!r} are NaN or infinite")
        if dtypes != {torch.float32}:  # rounded
            return
        as_stored = [
            {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in heads.items()}
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ]
        if heads_checksum not in (checksums_of(tensors).heads for tensors in as_stored):
            raise ValueError(
                f"the heads of adapter {self.adapter_name!r}, {sorted(heads)[:3]}, are damaged or were changed; load "
                f"them with PeftModel.from_pretrained, or set peft_config[{self.adapter_name!r}].heads_checksum = None"
            )
