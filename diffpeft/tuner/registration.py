"""Make PEFT and transformers know the tuner: entries in PEFT's mappings and in the Trainer's default callbacks, and weights
of ours that PEFT saves are staged for their config rather than written over the old ones."""

from pathlib import Path
from typing import Any

from peft import peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import trainer

from diffpeft.config import DiffPruningConfig
from diffpeft.files.atomic import stage_weights
from diffpeft.files.seal import PART
from diffpeft.model import DiffPruningModel
from diffpeft.peft_type import DIFFPRUNING
from diffpeft.trainer.logs import DiffPruningLogCallback, DiffPruningProgressCallback


def _save_or_stage(tensors: dict[str, Tensor], filename: str, *args: Any, **kwargs: Any) -> None:
    """What PEFT saves an adapter's weights with."""
    path = Path(filename)
    if path.name == SAFETENSORS_WEIGHTS_NAME and any(PART in key for key in tensors):
        stage_weights(path.parent, tensors)
    else:
        save_file(tensors, filename, *args, **kwargs)


def register() -> None:
    """Register the tuner with PEFT and its log entries with the Trainer. Idempotent."""
    if DIFFPRUNING not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=DIFFPRUNING.lower(), config_cls=DiffPruningConfig, model_cls=DiffPruningModel)
    # PEFT would truncate the old weights first: a kill would leave neither adapter.
    peft_model.safe_save_file = _save_or_stage
    # Reporters are called before a user's callbacks, so what these add to the logs never reaches tensorboard and its
    # like. Default callbacks come before reporters.
    if DiffPruningLogCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(DiffPruningLogCallback)
    if trainer.DEFAULT_PROGRESS_CALLBACK is trainer.ProgressCallback:  # and not the one for notebooks
        trainer.DEFAULT_PROGRESS_CALLBACK = DiffPruningProgressCallback
