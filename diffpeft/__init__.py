"""Diff Pruning (Guo, Rush, Kim 2021, arXiv 2012.07463) as a PEFT tuner.

The main path: [`DiffPruningConfig`] says what to learn, `peft.get_peft_model` builds a [`DiffPruningModel`] of
[`DiffPruningLayer`]s around a frozen base model, and [`DiffPruningCallback`] takes the stock Trainer through the three
phases: gating, magnitude pruning, fixmask.
"""

from diffpeft.config import DiffPruningConfig
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.model import DiffPruningModel
from diffpeft.tools.extract import extract_diff
from diffpeft.tools.hub import push_to_hub
from diffpeft.trainer import log as _log
from diffpeft.trainer.callback import DiffPruningCallback
from diffpeft.trainer.resume import last_checkpoint
from diffpeft.tuner.registration import register

__version__ = "0.1.0"
__all__ = [
    "DiffPruningCallback",
    "DiffPruningConfig",
    "DiffPruningLayer",
    "DiffPruningModel",
    "__version__",
    "extract_diff",
    "last_checkpoint",
    "push_to_hub",
]

_log.configure()
register()
