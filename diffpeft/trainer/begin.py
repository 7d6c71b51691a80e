"""Steps at the beginning of a run: choose positions by gradients, and check that gating fits the run."""

import itertools
import warnings
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

MIN_GATING_STEPS = 8
"""Fewer steps of gating are too few for gates to end near the target density."""
SELECTION_BATCHES = 8
"""Batches that `selection="gradient"` takes gradients of."""


def choose_positions(tuner: BaseTuner, model: nn.Module, args: TrainingArguments, batches: Any, optimizer: Any) -> str:
    """Choose the adapter's positions by the gradients of the first batches; the line that says so.

    Raises:
        ValueError: several processes; a model without a loss of its own.
    """
    remedy = "before the Trainer is made, call model.base_model.select_positions(batches, loss)"
    if args.world_size > 1:
        raise ValueError(f"selection='gradient' cannot choose positions in {args.world_size} processes; {remedy}")

    def loss_of(batch: Any) -> Tensor:
        output = model(**batch)
        loss: Tensor | None = output.get("loss") if isinstance(output, Mapping) else None
        if loss is None:
            raise ValueError(f"the model returns no loss of its own to take gradients of; {remedy}")
        return loss

    first = list(itertools.islice(batches, SELECTION_BATCHES))
    summary = tuner.select_positions(first, loss_of, optimizer=optimizer)
    optimizer.zero_grad()  # parameters outside of the tuner have gradients too
    return f"{summary.kept} of {summary.total} parameters chosen by the gradients of {len(first)} batches"


def check_gating(tuner: BaseTuner, steps: int, state: TrainerState) -> None:
    """Raise ValueError where gating of so many steps does not fit run and adapter; warn where it is too short."""
    gating = tuner.phase() == "gating"
    if steps > state.max_steps:
        raise ValueError(f"gating_steps={steps} is more than the {state.max_steps} steps of the run; lower it")
    if gating and state.global_step >= steps:
        raise ValueError(
            f"the adapter is in gating, but the run is at step {state.global_step} and gating ends after {steps}; "
            "use gating_steps > 0, and resume from a checkpoint that holds the adapter"
        )
    if not gating and state.global_step < steps:
        raise ValueError("the adapter is pruned already; to go on in fixmask use DiffPruningCallback(gating_steps=0)")
    automatic = tuner.is_gated() and tuner.peft_config[tuner.resolve(None)].l0_lambda == "auto"
    if automatic and steps < MIN_GATING_STEPS:
        warnings.warn(
            f"gating lasts {steps} steps, in which gates cannot come near target_density; use at least "
            f"{MIN_GATING_STEPS}, better some hundreds",
            stacklevel=3,
        )
