"""Directories, or what a repository on the Hub has, as directories."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG_FILES = ("config.json",)
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def fetch(source: str | os.PathLike[str], files: Sequence[str]) -> Path:
    """The directory `source`, or one with the files of the Hub's repository of that name, from the cache or downloaded.

    Args:
        source: a directory, or a repository such as "user/name".
        files: patterns of the files to fetch; a repository without the first is refused.

    Raises:
        ValueError: neither.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        directory = Path(snapshot_download(os.fspath(source), allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{os.fspath(source)} is no directory, and not to be had from the Hub: {reason}") from None
    if not any(directory.glob(files[0])):
        raise ValueError(f"the repository {os.fspath(source)} has no {files[0]}; give one that has, or a directory")
    return directory
