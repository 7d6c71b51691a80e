"""Convert diffs to and from the adapters of PEFT's other sparse methods, Super-Tuning and SHiRA."""

import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from diffpeft.files.atomic import making, replace_config, stage_weights
from diffpeft.files.keys import KEY_MARKER, PREFIX, base_model_key
from diffpeft.sparse.diff import Diff, check_diff, count_nonzeros, flatten_indices
from diffpeft.tools.export.coo import check_int32


class SuperTuningExport(NamedTuple):
    """Entries that were written, zeros beside them, and nonzeros of each parameter that the format cannot hold."""

    nonzeros: int
    padding: int
    left_out: dict[str, int]


class Imported(NamedTuple):
    """The diff of another method's adapter, and the tensors of its `modules_to_save` by name in the base model."""

    diff: Diff
    heads: dict[str, Tensor]


def to_super_tuning(
    diff: Diff,
    model: nn.Module,
    directory: str | os.PathLike[str],
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    leave_out: bool = False,
    *,
    heads: Mapping[str, Tensor] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> SuperTuningExport:
    """Write a diff as an adapter of PEFT's Super-Tuning, which PEFT loads without diffpeft.

    It holds `X.supertuning_indices` (int32, flat) and `X.supertuning_values` (fp32), both of shape (k,), of weights of
    modules X that are `nn.Linear` (peft 0.21, `tuners/supertuning/layer.py`). As k must be int(numel * (1 - sparsity))
    in each with one `sparsity` for all, sparser weights are padded with zeros. PEFT rounds values to the weight's dtype
    before it adds them: on a base of two bytes the sum is ours to the bit only after `cast_values` to that dtype.

    Args:
        diff: positions and values of shape (k,) by parameter name, as of `get_diff()`.
        model: the base model, plain or with adapters, on any device, meta too.
        directory: made if it is not there; an adapter in it is replaced.
        base_model_name_or_path: for the config, as is `task_type`.
        leave_out: leave out what cannot be held instead of raising.
        heads: tensors of the modules that are trained whole, by name in the base model.
        modules_to_save: these modules, as the config of the diff's adapter names them; required with `heads`.

    Raises:
        ValueError: nonzeros elsewhere than in weights of `nn.Linear` that one module alone has; no nonzeros; a weight
            of more than 2^31 elements; a diff that does not fit the model.
    """
    from peft import SupertuningConfig

    if heads and not modules_to_save:
        raise ValueError(f"{len(heads)} tensors of heads came without modules_to_save; pass that of the adapter")
    sizes, left_out = _held(diff, model, leave_out)
    sparsity = _sparsity([(diff[name][0].numel(), numel) for name, numel in sizes.items()])
    padded = {name: _padded(*diff[name], int(numel * (1 - sparsity))) for name, numel in sizes.items()}
    tensors = {PREFIX + name: head.detach().to("cpu", copy=True).contiguous() for name, head in (heads or {}).items()}
    for name, pair in padded.items():
        key = PREFIX + name.removesuffix("weight")
        tensors[f"{key}supertuning_indices"], tensors[f"{key}supertuning_values"] = pair
    config = SupertuningConfig(
        # A pattern, not a list, whose names would also match the ends of longer ones.
        target_modules="|".join(re.escape(name.removesuffix(".weight")) for name in sizes),
        modules_to_save=list(modules_to_save) if modules_to_save else None,
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
        sparsity=sparsity,
        inference_mode=True,
    ).to_dict()
    with making(Path(directory)):
        stage_weights(Path(directory), tensors)
        replace_config(Path(directory), json.dumps(config, indent=2, sort_keys=True))
    nonzeros = sum(diff[name][0].numel() for name in sizes)
    return SuperTuningExport(nonzeros, sum(values.numel() for _, values in padded.values()) - nonzeros, left_out)


def _held(diff: Diff, model: nn.Module, leave_out: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Elements of each weight whose nonzeros Super-Tuning can hold, and nonzeros of each parameter that it cannot."""
    parameters, linear = _parameters(model)
    check_diff(diff, {name: parameter.shape for name, parameter in parameters.items()})
    counts = {name: count for name, count in count_nonzeros(diff).items() if count}
    left_out = {name: count for name, count in counts.items() if name not in linear}
    if left_out and not leave_out:
        examples = ", ".join(f"{count} in {name}" for name, count in list(left_out.items())[:3])
        raise ValueError(
            f"Super-Tuning holds weights of nn.Linear only, but {sum(left_out.values())} of {sum(counts.values())} "
            f"nonzeros are elsewhere ({examples}); use leave_out=True, or train with target_modules='all-linear'"
        )
    sizes = {name: parameters[name].numel() for name in counts if name in linear}
    if not sizes:
        raise ValueError("0 nonzeros are in weights of nn.Linear, so there is nothing to write; use another format")
    for name, numel in sizes.items():
        check_int32(name, numel)
    return sizes, left_out


def _parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], set[str]]:
    """All parameters by their names in the base model, and the names of those that Super-Tuning can hold."""
    owners: dict[int, int] = {}
    parameters, linear = {}, set()
    for path, module in model.named_modules():
        if KEY_MARKER in f".{path}":
            continue
        key = base_model_key(f"{path}.")
        for name, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
            parameters[key + name] = parameter
            if isinstance(module, nn.Linear) and name == "weight" and parameter.is_floating_point():
                linear.add(key + name)
    return parameters, {name for name in linear if owners[id(parameters[name])] == 1}


def _sparsity(counts: Collection[tuple[int, int]]) -> float:
    """The largest sparsity at which PEFT's int(numel * (1 - sparsity)) is at least k for each (k, numel)."""
    sparsity = 1 - max(k / numel for k, numel in counts)
    while any(int(numel * (1 - sparsity)) < k for k, numel in counts):
        sparsity = math.nextafter(sparsity, 0.0)
    return sparsity


def _padded(positions: Tensor, values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The entries, and zeros at the first free positions, `size` in all: int32 and fp32, shape (size,), on the CPU."""
    positions, values = positions.cpu(), values.float().cpu()
    free = torch.ones(size, dtype=torch.bool)
    free[positions[positions < size]] = False
    extra = free.nonzero().squeeze(1)[: size - positions.numel()]
    positions, order = torch.cat([positions, extra]).sort()
    return positions.to(torch.int32), torch.cat([values, values.new_zeros(extra.shape)])[order]


def _read(directory: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    files = directory / CONFIG_NAME, directory / SAFETENSORS_WEIGHTS_NAME
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing; save the adapter with PEFT's save_pretrained, as safetensors")
    config = json.loads(files[0].read_text())
    if config.get("peft_type") != kind:
        raise ValueError(f"{files[0]}: peft_type is {config.get('peft_type')!r}, not {kind!r}; use a {kind} adapter")
    return config, {base_model_key(key): tensor for key, tensor in load_file(files[1]).items()}


def _imported(file: Path, tensors: dict[str, Tensor], kind: str, keys: tuple[str, str], remedy: str) -> Iterator[Any]:
    """Yield each weight's name, indices and values, and take them out of `tensors`, so that the heads remain."""
    for module in dict.fromkeys(key.rpartition(".")[0] for key in tensors if key.endswith(keys)):
        pair = [tensors.pop(f"{module}.{part}", None) for part in keys]
        if pair[0] is None or pair[1] is None:
            lost = f"{module} has no {keys[0] if pair[0] is None else keys[1]}"
            raise ValueError(f"{file}: {lost}, and without them a {kind} adapter says nothing; {remedy}")
        indices, values = pair[0].shape[-1], pair[1].numel()
        if indices != values:
            what = f"{module} has {indices} indices and {values} values"
            raise ValueError(f"{file}: {what}; it is damaged, save it again")
        yield f"{module}.weight", pair[0].long(), pair[1].float()


def _summed(positions: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the values at each position; positions come out sorted, without those whose value is 0."""
    unique, inverse = torch.unique(positions, return_inverse=True)
    total = values.new_zeros(unique.shape).index_add_(0, inverse, values)
    return unique[total != 0], total[total != 0]


def from_super_tuning(directory: str | os.PathLike[str]) -> Imported:
    """Read an adapter of PEFT's Super-Tuning: the delta is its values at its indices, with no scaling.

    Raises ValueError for a LoRA part (`r`), whose delta is dense; indices that were not saved; a file that is missing,
    damaged or of another method.
    """
    directory = Path(directory)
    config, tensors = _read(directory, "SUPERTUNING")
    if config.get("r") is not None:
        raise ValueError(f"{directory} has r={config['r']}: LoRA's part is dense, no diff; merge it with PEFT")
    remedy = "load it with PEFT on its base model and save it with save_precomputed_indices=True"
    pairs = _imported(directory, tensors, "Super-Tuning", ("supertuning_indices", "supertuning_values"), remedy)
    return Imported({name: _summed(positions, values) for name, positions, values in pairs}, tensors)


def from_shira(directory: str | os.PathLike[str], shapes: Mapping[str, torch.Size]) -> Imported:
    """Read an adapter of PEFT's SHiRA: values at (row, column) indices of shape (2, k), at the scaling 1.0 of loading.

    PEFT always stores the indices; another scaling is set in memory only. `shapes` has those of the base model's
    parameters by name, as of `parameter_shapes`. Raises ValueError for no indices; a weight that `shapes` lacks or that
    has fewer rows or columns; a file that is missing, damaged or of another method.
    """
    directory = Path(directory)
    _, tensors = _read(directory, "SHIRA")
    remedy = "a seed gives the mask back only on the torch that drew it: save the adapter again where it was trained"
    diff: Diff = {}
    for name, indices, values in _imported(directory, tensors, "SHiRA", ("shira_indices", "shira_weight"), remedy):
        if name not in shapes:
            raise ValueError(f"{directory}: {name} is no parameter of the base model; pass the shapes of its own")
        diff[name] = _summed(flatten_indices(name, indices, shapes[name]), values)
    return Imported(diff, tensors)
