"""Entries of the Trainer's logs: phase, expected density, nonzeros, and the learning rate that was used."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, trainer

from diffpeft.model import DiffPruningModel
from diffpeft.trainer.learning_rate import USED_RATE_ATTRIBUTE


class DiffPruningLogCallback(TrainerCallback):
    """Adds the adapter's state and the learning rate that was used to each training log.

    Does nothing for a model without a diff-pruning adapter.
    """

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add `diffpruning/*` to the log entry and to its copy in `log_history`."""
        tuner = DiffPruningModel.of(kwargs.get("model"))
        logs = kwargs.get("logs")
        if tuner is None or len(tuner.active_adapters) != 1 or logs is None or "loss" not in logs:
            return
        entry: dict[str, Any] = {"diffpruning/phase": tuner.phase()}
        if tuner.phase() == "gating":
            entry["diffpruning/expected_density"] = tuner.expected_density()
        entry["diffpruning/nnz"] = tuner.num_nonzeros()
        if "learning_rate" in logs:
            entry["learning_rate"] = getattr(state, USED_RATE_ATTRIBUTE, logs["learning_rate"])
        logs.update(entry)
        if state.log_history:
            state.log_history[-1].update(entry)


def install() -> None:
    """Register the log entries with all Trainers that are made from now on. Idempotent.

    Default callbacks come before the reporters, and these before a user's callbacks, whose entries reporters never see.
    """
    if DiffPruningLogCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(DiffPruningLogCallback)
