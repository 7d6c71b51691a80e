"""An adapter's two files replaced so that no moment shows a mixture of the old and the new."""

import os
from pathlib import Path

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor


def _sync(path: Path) -> None:
    """Have what was written reach the disk before what comes next."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_adapter(directory: Path, tensors: dict[str, Tensor], config: str) -> None:
    """Write weights and config into a directory, over what it has.

    If that is cut off, the directory holds the old adapter, the new one, or no config, which PEFT refuses to load. An
    error before the new weights are in place leaves the old adapter as it was.

    Args:
        directory: made if it is not there.
        tensors: of the weights file, by key.
        config: the text of the config file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights_file, config_file = directory / SAFETENSORS_WEIGHTS_NAME, directory / CONFIG_NAME
    new_weights, new_config, old_config = (
        directory / f".{name}.{os.getpid()}" for name in ("weights.new", "config.new", "config.old")
    )
    try:
        save_file(tensors, new_weights, metadata={"format": "pt"})
        new_config.write_text(config)
        _sync(new_weights)
        _sync(new_config)
        # Without a config nothing loads: neither of the configs must ever stand beside the other's weights.
        try:
            if config_file.exists():
                os.replace(config_file, old_config)
                _sync(directory)
            os.replace(new_weights, weights_file)
        except BaseException:
            if old_config.exists():
                os.replace(old_config, config_file)
            raise
        _sync(directory)
        os.replace(new_config, config_file)
        _sync(directory)
    finally:
        for file in (new_weights, new_config, old_config):
            file.unlink(missing_ok=True)
