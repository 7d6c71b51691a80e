"""Diff Pruning (Guo, Rush, Kim 2021, arXiv 2012.07463) as a PEFT tuner.

The main path: [`DiffPruningConfig`] says what to learn, `peft.get_peft_model` builds a [`DiffPruningModel`] of
[`DiffPruningLayer`]s around a frozen base model, and [`DiffPruningCallback`] takes the stock Trainer through the three
phases: gating, magnitude pruning, fixmask.

To read the code, begin with `config`, `model` and `layer/layer`; then `gates/hard_concrete` for gating or
`sparse/functions` for fixmask; then `trainer/callback` for the three phases.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffpeft.config import DiffPruningConfig
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.model import DiffPruningModel
from diffpeft.tuner.registration import register

if TYPE_CHECKING:
    from diffpeft.tools.extract import extract_diff
    from diffpeft.tools.hub import push_to_hub
    from diffpeft.trainer.callback import DiffPruningCallback
    from diffpeft.trainer.resume import last_checkpoint

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

_MODULE_OF = {
    "DiffPruningCallback": "diffpeft.trainer.callback",
    "extract_diff": "diffpeft.tools.extract",
    "last_checkpoint": "diffpeft.trainer.resume",
    "push_to_hub": "diffpeft.tools.hub",
}
"""Modules that are imported when a name is first asked for: transformers' Trainer takes over half a second."""

register(DiffPruningConfig, DiffPruningModel)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
