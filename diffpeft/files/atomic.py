"""An adapter's two files replaced together: whoever reads them finds the old adapter or the new one.

Both new files are written beside the old ones; then the weights are renamed, and then the config. While the renaming has
begun and not ended, the new config is still beside the old one and the new weights are not: [`pending_config`]
tells readers, and the next that writes ends it.
"""

import os
from pathlib import Path

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

_NEW = ".new"
_staged: set[Path] = set()
"""Directories for which this process has written new weights, whose config is still to come."""


def staged_weights(directory: Path) -> Path | None:
    """The new weights that this process has written for the directory's next config."""
    return directory / (SAFETENSORS_WEIGHTS_NAME + _NEW) if directory.resolve() in _staged else None


def stage_weights(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write weights beside those of the directory's adapter, to take their place when [`replace_config`] is called.

    Args:
        directory: made if it is not there.
        tensors: of the weights file, by key.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pending = pending_config(directory)
    if pending is not None:
        os.replace(pending, directory / CONFIG_NAME)
        _sync(directory)
    _staged.discard(directory.resolve())
    new = directory / (SAFETENSORS_WEIGHTS_NAME + _NEW)
    try:
        save_file(tensors, new, metadata={"format": "pt"})
        _sync(new)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _staged.add(directory.resolve())


def replace_config(directory: Path, config: str) -> None:
    """Replace the directory's config, and its weights by those that were staged for it, if there are any.

    Args:
        directory: made if it is not there.
        config: the text of the config file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    new_weights, new_config = staged_weights(directory), directory / (CONFIG_NAME + _NEW)
    try:
        new_config.write_text(config)
        _sync(new_config)
        _sync(directory)
        if new_weights:
            os.replace(new_weights, directory / SAFETENSORS_WEIGHTS_NAME)
    except BaseException:
        new_config.unlink(missing_ok=True)  # first: alone it would be taken for that of the weights that are there
        if new_weights:
            new_weights.unlink(missing_ok=True)
        raise
    finally:
        _staged.discard(directory.resolve())
    _sync(directory)
    os.replace(new_config, directory / CONFIG_NAME)
    _sync(directory)


def replace_adapter(directory: Path, tensors: dict[str, Tensor], config: str) -> None:
    """Replace an adapter by these weights and this config. An error while they are written leaves the old one."""
    stage_weights(directory, tensors)
    replace_config(directory, config)


def pending_config(directory: Path) -> Path | None:
    """The config that belongs to the directory's weights, if the process that replaced them ended too early."""
    new_config, new_weights = (directory / (name + _NEW) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
    return new_config if new_config.exists() and not new_weights.exists() else None


def _sync(path: Path) -> None:
    """Have what was written reach the disk before what comes next."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
