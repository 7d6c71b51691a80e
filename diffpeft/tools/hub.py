"""Share an adapter on the Hub with its model card."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from torch import nn

from diffpeft.files.card import update_card
from diffpeft.model import DiffPruningModel


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
        model: with a diff-pruning adapter, as of `get_peft_model` or `model.add_adapter`; else ValueError.
        repo_id: "user/name"; made if it is not there.
        metrics: results for the card, by name.
        private, token, commit_message: as `HfApi` takes them.
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
