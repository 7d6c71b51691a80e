"""Make PEFT and transformers know the tuner: entries in PEFT's mappings and in the Trainer's default callbacks."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from transformers import trainer

from diffpeft.callback import DiffPruningLogCallback
from diffpeft.config import DiffPruningConfig
from diffpeft.model import DiffPruningModel
from diffpeft.peft_type import DIFFPRUNING


def register() -> None:
    """Register the tuner with PEFT and its log entries with the Trainer. Idempotent."""
    if DIFFPRUNING not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=DIFFPRUNING.lower(), config_cls=DiffPruningConfig, model_cls=DiffPruningModel)
    # Reporters are called before a user's callbacks, so what these add to the logs never reaches tensorboard and its
    # like. Default callbacks come before reporters.
    if DiffPruningLogCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(DiffPruningLogCallback)
