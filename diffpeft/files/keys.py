"""Names of tensors in an adapter's file, and what they say of the base model's parameters.

The diff of `encoder.dense.weight` has the keys `base_model.model.encoder.dense.diffpruning_values.weight` and
`base_model.model.encoder.dense.diffpruning_positions.weight`. Where a module inside of a wrapped one is wrapped too,
PEFT has `.base_layer` behind the outer one's name. Every other tensor of a file belongs to a head, which is trained
whole.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

PEFT_TYPE = "DIFFPRUNING"
"""The method's name in configs."""
PREFIX = "base_model.model."
"""PEFT's prefix of every key."""
KEY_MARKER = ".diffpruning_"
"""Part of every key of a diff-pruning tensor, and of no other."""
VALUES = "diffpruning_values"
POSITIONS = "diffpruning_positions"
ROOT = "root_parameters"
"""Name of the child that holds the diffs of parameters that the model itself owns."""


def base_model_key(key: str) -> str:
    """A key as the base model names its modules: without PEFT's prefix and `.base_layer`."""
    return key.replace(".base_layer", "").removeprefix(PREFIX)


def heads_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the heads among those of a file, by their names in the base model, without PEFT's wrapper."""
    heads = {base_model_key(key): tensor for key, tensor in tensors.items() if KEY_MARKER not in key}
    return {re.sub(r"\.modules_to_save\.[^.]+", "", name): tensor for name, tensor in heads.items()}


def owners(names: Iterable[str]) -> set[str]:
    """The modules that own parameters of these names; "" is the model itself."""
    return {name.rpartition(".")[0] for name in names}


def file_key(name: str, wrapped: Collection[str]) -> str:
    """The key of a module or a tensor of the base model in an adapter's file, given the modules that are wrapped."""
    parts = name.split(".")
    path = []
    for index, part in enumerate(parts, start=1):
        path.append(part)
        if index < len(parts) and ".".join(parts[:index]) in wrapped:
            path.append("base_layer")
    return PREFIX + ".".join(path)


def diff_keys(name: str, wrapped: Collection[str] = ()) -> tuple[str, str]:
    """The keys of the values and of the positions of the parameter `name`; `wrapped` is that of [`file_key`]."""
    module, _, parameter = name.rpartition(".")
    path = file_key(module or ROOT, wrapped)
    return f"{path}.{VALUES}.{parameter}", f"{path}.{POSITIONS}.{parameter}"


def parameter_and_kind(key: str) -> tuple[str, str]:
    """Split the key of a diff-pruning tensor: the parameter's name in the base model, and the kind, e.g. VALUES."""
    module, _, rest = base_model_key(key).rpartition(KEY_MARKER)
    kind, _, parameter = (KEY_MARKER[1:] + rest).partition(".")
    return (parameter if module == ROOT else f"{module}.{parameter}"), kind
