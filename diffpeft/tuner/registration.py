"""Make PEFT know the tuner: entries in its mappings, and weights of ours that wait for their config."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from diffpeft.files.adapter import verify_heads
from diffpeft.files.atomic import stage_weights
from diffpeft.files.keys import KEY_MARKER, PEFT_TYPE


def _save_or_stage(tensors: dict[str, Tensor], filename: str, *args: Any, **kwargs: Any) -> None:
    """Save an adapter's weights (in place of PEFT's function): ours are staged for their config."""
    path = Path(filename)
    if path.name == SAFETENSORS_WEIGHTS_NAME and any(KEY_MARKER in key for key in tensors):
        verify_heads(tensors, None)
        stage_weights(path.parent, tensors)
    else:
        save_file(tensors, filename, *args, **kwargs)


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register the tuner's config and model with PEFT. Idempotent."""
    if PEFT_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=config_cls, model_cls=model_cls)
    # PEFT would truncate the old weights first: a kill would leave neither adapter.
    peft_model.safe_save_file = _save_or_stage
