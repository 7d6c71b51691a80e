"""Replace an adapter's two files together, so that whoever reads them finds the old adapter or the new one.

Both new files are written beside the old ones; then the weights are renamed, and then the config. In between, the new
config stands there without new weights: [`pending_config`] finds it for readers, and the next that writes renames it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diffpeft.files.encoding import Checksums, checksums_of

_staged: dict[Path, Checksums] = {}
"""Checksums of the weights that this process has staged, by the directory whose config is still to come."""


@contextmanager
def making(directory: Path) -> Iterator[None]:
    """Make a directory for what a block writes, and remove it where the block fails, unless it holds something."""
    new = [one for one in (directory, *directory.parents) if not one.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for one in new:
            with suppress(OSError):
                one.rmdir()
        raise


def staged_checksums(directory: Path) -> Checksums | None:
    """The checksums of the weights that this process has staged for the directory's next config; None without any."""
    return _staged.get(directory.resolve())


def stage_weights(directory: Path, tensors: dict[str, Tensor]) -> Checksums:
    """The checksums of weights, which are written beside the directory's, to take their place with the next config."""
    directory.mkdir(parents=True, exist_ok=True)
    pending = pending_config(directory)
    if pending is not None:
        os.replace(pending, directory / CONFIG_NAME)
        _sync(directory)
    _staged.pop(directory.resolve(), None)
    new, _ = _new_files(directory)
    try:
        save_tensors(tensors, new, {"format": "pt"})
        _sync(new)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _staged[directory.resolve()] = checksums = checksums_of(tensors)
    return checksums


def replace_config(directory: Path, config: str) -> None:
    """Replace the text of the directory's config, and its weights by those that were staged for it, if any."""
    directory.mkdir(parents=True, exist_ok=True)
    new_weights, new_config = _new_files(directory)
    staged = directory.resolve() in _staged
    try:
        new_config.write_text(config)
        _sync(new_config)
        _sync(directory)
        if staged:
            os.replace(new_weights, directory / SAFETENSORS_WEIGHTS_NAME)
    except BaseException:
        new_config.unlink(missing_ok=True)  # first: alone it would be taken for that of the weights that are there
        if staged:
            new_weights.unlink(missing_ok=True)
        raise
    finally:
        _staged.pop(directory.resolve(), None)
    _sync(directory)
    os.replace(new_config, directory / CONFIG_NAME)
    _sync(directory)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the permissions of any new file; safetensors alone makes it private (0600)."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=dict(metadata))
    except SafetensorError as error:
        path.unlink()
        raise OSError(f"{path} could not be written ({error}); is there room on the disk?") from None
    path.chmod(mode)


def pending_config(directory: Path) -> Path | None:
    """The config that belongs to the directory's weights, if the process that replaced them ended too early."""
    new_weights, new_config = _new_files(directory)
    return new_config if new_config.exists() and not new_weights.exists() else None


def _new_files(directory: Path) -> tuple[Path, Path]:
    return directory / f"{SAFETENSORS_WEIGHTS_NAME}.new", directory / f"{CONFIG_NAME}.new"


def _sync(path: Path) -> None:
    """Have what was written reach the disk before what comes next."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
