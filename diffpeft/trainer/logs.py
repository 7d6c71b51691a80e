"""What a long run shows of itself: entries in the Trainer's logs, and the phase on its progress bar."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffpeft.model import DiffPruningModel

LEARNING_RATE = "diffpruning_learning_rate"
"""Attribute of the Trainer's state: the learning rate of the last update, which the scheduler does not know."""


class DiffPruningLogCallback(TrainerCallback):
    """Adds the adapter's state to every training log, and the learning rate that was really used. Registered for all
    Trainers, ahead of the reporters; does nothing for a model without a diff-pruning adapter."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add `diffpruning/*` to the log entry and to its copy in `log_history`."""
        tuner = DiffPruningModel.of(kwargs.get("model"))
        logs = kwargs.get("logs")
        if tuner is None or len(tuner.active_adapters) != 1 or logs is None or "loss" not in logs:
            return
        expected = penalty = tuner.expected_nonzeros()
        if tuner.is_gated() and tuner.peft_config[tuner.active_adapters[0]].group_penalty != "product":
            with torch.no_grad():
                penalty = float(tuner.l0_penalty())
        entry = {
            "diffpruning/phase": tuner.phase(),
            "diffpruning/expected_density": expected / tuner.num_base_parameters(),
            "diffpruning/nnz": tuner.num_nonzeros(),
            "diffpruning/l0_penalty": penalty,
            "diffpruning/adapter_bytes": tuner.adapter_bytes(),
        }
        if "learning_rate" in logs:
            entry["learning_rate"] = getattr(state, LEARNING_RATE, logs["learning_rate"])
        logs.update(entry)
        if state.log_history:
            state.log_history[-1].update(entry)


class DiffPruningProgressCallback(ProgressCallback):
    """transformers' progress bar; for a model with a diff-pruning adapter one a phase, with the density on it."""

    training_bar: Any

    def __init__(self, max_str_len: int = 100) -> None:
        super().__init__(max_str_len)
        self._phase: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        self._name_phase(kwargs.get("model"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar; where another phase has begun, leave it as it is and open the next."""
        super().on_step_end(args, state, control, **kwargs)
        tuner = DiffPruningModel.of(kwargs.get("model"))
        if self.training_bar is None or tuner is None or len(tuner.active_adapters) != 1:
            return
        if tuner.phase() != self._phase:
            self.training_bar.close()
            self.training_bar = type(self.training_bar)(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True
            )
            self._name_phase(tuner)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show density and size on the bar."""
        super().on_log(args, state, control, **kwargs)
        logs = kwargs.get("logs") or {}
        if self.training_bar is not None and "diffpruning/expected_density" in logs:
            density, size = logs["diffpruning/expected_density"], logs["diffpruning/adapter_bytes"]
            self.training_bar.set_postfix_str(f"density {density:.2%}, {size / 1e6:,.1f} MB")

    def _name_phase(self, model: Any) -> None:
        tuner = DiffPruningModel.of(model)
        if self.training_bar is not None and tuner is not None and len(tuner.active_adapters) == 1:
            self._phase = tuner.phase()
            self.training_bar.set_description(self._phase)
