"""Checks that a run goes on exactly from a Trainer's checkpoint, and which checkpoint to go on from."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from diffpeft.sparse.sharded import is_sharded

logger = logging.getLogger(__name__)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The latest checkpoint of a Trainer's `output_dir` that was written to its end; None if there is none.

    transformers' `get_last_checkpoint`, and `resume_from_checkpoint=True`, take the one with the highest number, though
    a kill may have left it half written. The Trainer writes its state last, so a checkpoint that has it is complete.
    """
    paths = [(path.name.rpartition("-")[2], path) for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for _, path in sorted(((int(step), path) for step, path in paths if step.isdigit()), reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("%s was not written to its end; it is passed over", path)
        else:
            return str(path)
    return None


def checksum(tuner: BaseTuner, adapter_name: str) -> int | None:
    """The sum of the bytes, taken as integers, of all tensors of an adapter and its heads; None where they are sharded.

    Saving and loading leave it as it is: of positions, which files encode by their dtype, the decoded ones count.
    """
    if _any_sharded(tuner):
        return None
    tensors: list[Tensor] = []
    if tuner.phase(adapter_name) == "gating":
        tensors += [tensor for layer in tuner.all_layers() for tensor in layer.tensors(adapter_name).values()]
    else:
        tensors += [tensor for pair in tuner.get_diff(adapter_name).values() for tensor in pair]
    for module in tuner.model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            tensors += module.modules_to_save[adapter_name].state_dict().values()
    return sum(map(_sum, tensors)) % (1 << 53)  # integers that JSON readers keep


def _any_sharded(tuner: BaseTuner) -> bool:
    return any(is_sharded(parameter) for parameter in tuner.parameters())


def _sum(tensor: Tensor) -> int:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().reshape(-1).view(integers).sum(dtype=torch.int64))


def settings(tuner: BaseTuner, adapter_name: str) -> dict[str, Any]:
    """The config's fields that decide where a run ends, as JSON has them, and the fingerprint of the base model."""
    deciding = [one.name for one in fields(tuner.peft_config[adapter_name]) if one.metadata.get("decides_run")]
    config = tuner.peft_config[adapter_name].to_dict()
    config["modules_to_save"] = sorted(set(config["modules_to_save"] or ()))  # PEFT adds heads that are there already
    noted = {"config": {name: config[name] for name in deciding}, "base": config["base_fingerprint"]}
    return json.loads(json.dumps(noted, default=sorted))  # type: ignore[no-any-return] # sets as lists


def saved_state(state: TrainerState, callback: Any) -> Mapping[str, Any]:
    """The entries that a `DiffPruningCallback` left in a checkpoint's `trainer_state.json`, loaded as `state`.

    Raises:
        ValueError: the checkpoint was made without this run's `callback`, or with other arguments of it.
    """
    name = type(callback).__name__
    entry: Any = state.stateful_callbacks.get(name)
    if not isinstance(entry, dict) or "saved" not in entry:
        raise ValueError(f"the checkpoint of step {state.global_step} has no state of one {name}; begin a new run")
    steps, now = entry["attributes"]["transition_step"], callback.transition_step
    if steps != now:
        raise ValueError(
            f"the checkpoint was made with {steps} gating steps, this run has {now}; resume with gating_steps={steps}"
        )
    for name in ("fixmask_learning_rate", "fixmask_warmup_steps"):
        _check_same(name, entry["args"].get(name), getattr(callback, name))
    return entry["saved"]  # type: ignore[no-any-return]


def _check_same(name: str, before: object, now: object) -> None:
    if before != now:
        raise ValueError(f"the checkpoint was made with {name}={before!r}, this run has {now!r}; resume with the same")


def check(tuner: BaseTuner, adapter_name: str, saved: Mapping[str, Any]) -> None:
    """Raise ValueError unless the adapter, as it was loaded, its config and its base are those of a checkpoint.

    `saved` is [`settings`] and, as "adapter", the [`checksum`] from when the checkpoint was written.
    """
    now = settings(tuner, adapter_name)
    for name, before in saved["config"].items():
        if name == "gated":  # in earlier checkpoints
            name, before = "selection", "gates" if before else "magnitude"
        before = sorted(before or ()) if name == "modules_to_save" else before  # in earlier checkpoints as given
        _check_same(name, before, now["config"].get(name))
    base, whole = saved["base"] or {}, not _any_sharded(tuner)
    if whole:
        other = tuner.differing_base(adapter_name, base)
    else:  # what was noted when the adapter was made, before the base was sharded
        other = [name for name, bits in base.items() if (now["base"] or {}).get(name) != bits]
    if other:
        raise ValueError(f"the checkpoint was made on another base model: {other[:3]} differ; resume on its own")
    if whole and saved.get("adapter") != checksum(tuner, adapter_name):
        raise ValueError("the adapter is not that of the checkpoint, or damaged; resume from an earlier checkpoint")
