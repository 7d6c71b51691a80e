"""Share an adapter on the Hub with its model card, and fetch adapters and models from there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from torch import nn

from diffpeft.files.card import update_card
from diffpeft.model import DiffPruningModel

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


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    metrics: Mapping[str, float] | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload adapter",
) -> CommitInfo:
    """Save the model's adapter and upload it with its card, in one commit.

    `model.push_to_hub` uploads the same adapter, but under a blank card: it writes its own over the one that was saved.

    Args:
        model: with a diff-pruning adapter, as of `get_peft_model` or `model.add_adapter`.
        repo_id: "user/name"; made if it is not there.
        metrics: results for the card, by name.
        private: of a new repository.
        token: by default the one that is logged in.
        commit_message: of the commit.

    Raises:
        ValueError: a model without a diff-pruning adapter.
    """
    tuner = DiffPruningModel.of(model)
    if tuner is None:
        raise ValueError(f"{type(model).__name__} has no diff-pruning adapter to upload; wrap it with get_peft_model")
    saving: Any = model
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as scratch:
        saving.save_pretrained(scratch)
        update_card(Path(scratch), tuner.peft_config[tuner.active_adapters[0]].to_dict(), metrics, repo)
        return api.upload_folder(repo_id=repo, folder_path=scratch, commit_message=commit_message)
