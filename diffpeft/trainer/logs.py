"""Entries of the Trainer's logs: phase, expected density, nonzeros, and the learning rate that was used."""

from typing import Any

from transformers import TrainerCallback, TrainerState, trainer

from diffpeft.model import DiffPruningModel
from diffpeft.trainer.learning_rate import USED_RATE_ATTRIBUTE


class DiffPruningLogCallback(TrainerCallback):
    """Adds the state of a diff-pruning adapter and the learning rate that was used to each training log."""

    def on_log(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Add `diffpruning/*` to the log entry and to its copy in `log_history`."""
        logs = kwargs.get("logs")
        try:
            tuner = DiffPruningModel.of(kwargs.get("model"))
            if tuner is None or logs is None or "loss" not in logs:
                return
            tuner.resolve(None)
        except ValueError:  # several adapters, of which none is the one that trains
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
