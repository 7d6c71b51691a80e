"""Adapters on disk, and damage to them."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpeft.files import encoding

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
POOLER = "base_model.model.bert.pooler.dense.diffpruning_{}.weight"
"""Keys of the diff of a BERT's pooler."""


def copy_of(directory: Path, to: Path) -> Path:
    """Copies an adapter, and gives the file of its weights."""
    for file in directory.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to / WEIGHTS


def put(file: Path, buffer: Tensor, values: Tensor) -> None:
    """Gives the pooler's weight in a file other tensors, and the config the checksum that belongs to them."""
    tensors = {**load_file(file), POOLER.format("positions"): buffer, POOLER.format("values"): values}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((file.parent / CONFIG).read_text())
    config["diff_checksum"] = encoding.checksums_of(tensors).diff
    (file.parent / CONFIG).write_text(json.dumps(config))


def native(make: Callable, directory: Path, **options: bool):
    """A model with an adapter that transformers has loaded."""
    model = make()
    model.load_adapter(str(directory), **options)
    return model.eval()


def values_of(model) -> dict[str, Tensor]:
    """The values of diffs that a model holds, by name."""
    return {name: p for name, p in model.named_parameters() if "diffpruning_values" in name}
