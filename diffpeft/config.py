"""What to learn: the configuration of a diff-pruning adapter."""

from __future__ import annotations

import copy
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils.constants import CONFIG_NAME
from safetensors.torch import load_file

from diffpeft.files import atomic, seal
from diffpeft.files.card import update_card
from diffpeft.files.values import check_dtype
from diffpeft.peft_type import DIFFPRUNING

GROUP_PENALTIES = ("product", "additive")
FARTHEST = 1e3
"""From nought, where gates in fp16 begin: beyond they could hardly move."""
FORMAT_VERSION = 2
"""Of the adapter files that this version writes (docs/format.md), and the only one that it reads."""


@dataclass
class DiffPruningConfig(PeftConfig):
    """Configuration of [`DiffPruningModel`] (arXiv 2012.07463). `DiffPruningConfig(task_type=...)` is all that a
    fine-tuning run needs; `docs/flags.md` relates the fields to the flags of the authors' released scripts."""

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt: a list of names or suffixes, a regex, or 'all-linear', as in PEFT. None adapts "
            "every module that owns a parameter, except the task head, which is trained whole."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt: a list of names or suffixes, or a regex."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules trained whole and saved with the diff. With the default target_modules the fresh head of "
            "a task model is found and added."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only adapt modules of the layers with these indices."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "The name before the layer index, where layers_to_transform cannot tell it, e.g. 'layer'."},
    )
    target_density: float = field(
        default=0.005,
        metadata={
            "help": "Nonzeros of the diff as a share of all parameters of the base model, adapted or not; the task "
            "head does not count. In (0, 1]."
        },
    )
    gated: bool = field(
        default=True,
        metadata={"help": "False trains without gates before magnitude pruning: the paper's non-adaptive baseline."},
    )
    structured: bool = field(
        default=True, metadata={"help": "One more gate per parameter tensor (the paper's structured diff pruning)."}
    )
    group_penalty: str = field(
        default="product",
        metadata={
            "help": "How a group gate enters the L0 penalty of a fixed l0_lambda: 'product', the paper's equation, or "
            "'additive', what the released code computes. They are not interchangeable at one l0_lambda."
        },
    )
    l0_lambda: float | str = field(
        default="auto",
        metadata={
            "help": "Weight of the L0 penalty. 'auto' finds in every step the weight that brings the expected density "
            "to target_density by the end of gating; a number is the paper's fixed weight (1.25e-7 there)."
        },
    )
    gate_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Pace of the gates: how far Adam moves log_alpha a step at most. None: 0.1 as in the paper with a "
            "fixed l0_lambda, and set by the number of gating steps with 'auto'."
        },
    )
    stretch: tuple[float, float] = field(
        default=(-1.5, 1.5), metadata={"help": "(l, r) of the hard-concrete distribution, l < 0 and r > 1."}
    )
    init_log_alpha: float = field(default=5.0, metadata={"help": "Where the locations of the gates start."})
    low_memory: bool = field(
        default=False,
        metadata={
            "help": "Gating in the memory of full fine-tuning with AdamW, by coarser moments and by updates of the diff "
            "within the backward pass (docs/performance.md, 'Low memory'). One process, no fp16 gradient scaling, an "
            "optimizer of Adam's family."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True starts the diff at zero. False starts it at random, which only tests want."},
    )
    nnz_pattern: dict[str, int] | None = field(
        default=None,
        metadata={"help": "Nonzeros of each parameter, set by pruning. None until then. Not meant to be set by hand."},
    )

    value_dtype: str = field(
        default="float32",
        metadata={"help": "dtype of the pruned diff's values, set by `cast_values` for a smaller file."},
    )
    base_fingerprint: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Some weights of the base model, by which it is known again. Not meant to be set by hand."},
    )
    heads_checksum: int | None = field(
        default=None, metadata={"help": "Of what is saved beside the diff. Not meant to be set by hand."}
    )
    diff_checksum: int | None = field(
        default=None, metadata={"help": "Of the diff that belongs to the config. Not meant to be set by hand."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Of the file. Not meant to be set by hand."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DIFFPRUNING
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        self.stretch = _stretch(self.stretch, needed=self.gated and self.nnz_pattern is None)
        check_density(self.target_density)
        if not isinstance(self.init_log_alpha, (int, float)) or not math.isfinite(self.init_log_alpha):
            raise ValueError(
                f"init_log_alpha={self.init_log_alpha!r} is no location; use a finite number, 5.0 in the paper"
            )
        if self.group_penalty not in GROUP_PENALTIES:
            raise ValueError(f"group_penalty={self.group_penalty!r} is not known; use one of {GROUP_PENALTIES}")
        if self.l0_lambda != "auto" and not (
            isinstance(self.l0_lambda, (int, float)) and 0 <= self.l0_lambda < float("inf")
        ):
            raise ValueError(
                f"l0_lambda={self.l0_lambda!r} is no penalty; use 'auto' or a finite number of at least 0, e.g. 1.25e-7"
            )
        if self.low_memory and not (self.gated and self.l0_lambda == "auto"):
            raise ValueError(
                f"low_memory=True is for gates under the automatic penalty, not for gated={self.gated} and "
                f"l0_lambda={self.l0_lambda!r}; use gated=True and l0_lambda='auto', or low_memory=False"
            )
        if self.low_memory and abs(self.init_log_alpha) > FARTHEST:
            raise ValueError(
                f"init_log_alpha={self.init_log_alpha} is farther than what low_memory=True can hold in fp16; use at most "
                f"{FARTHEST:g}, 5.0 in the paper"
            )
        if self.gate_learning_rate is not None and not 0 < self.gate_learning_rate < float("inf"):
            raise ValueError(
                f"gate_learning_rate={self.gate_learning_rate} cannot move the gates; use a positive number or None"
            )
        check_dtype(self.value_dtype)
        if not isinstance(self.format_version, int) or self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"the adapter has format version {self.format_version!r}, this diffpeft reads {FORMAT_VERSION}; "
                "install a newer one, or for an older file the one that wrote it, and extract or save the diff anew"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} does nothing without layers_to_transform; set both or neither"
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, together with the weights that PEFT has just written or not at all, with the
        checksum of the heads in these; and the adapter's part of README.md. PEFT calls this last when it saves."""
        directory = Path(save_directory)
        saved = copy.copy(self)
        weights = atomic.staged_weights(directory)
        # Without new weights nobody knows whether those that are there will stay: transformers writes them afterwards.
        tensors = load_file(weights) if weights else {}
        saved.heads_checksum = seal.checksum_of_heads(tensors)
        saved.diff_checksum = seal.checksum_of_diff(tensors) if weights and self.nnz_pattern is not None else None
        with tempfile.TemporaryDirectory() as scratch:
            super(DiffPruningConfig, saved).save_pretrained(scratch, **kwargs)
            atomic.replace_config(directory, (Path(scratch) / CONFIG_NAME).read_text())
        update_card(directory, saved.to_dict())

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The config file's contents (PEFT's hook); where a kill left the weights' own config beside it, that one's."""
        pending = atomic.pending_config(Path(path_json_file).parent)
        contents: dict[str, Any] = super().from_json_file(str(pending or path_json_file), **kwargs)
        return contents


def check_density(density: float) -> None:
    """Raise ValueError unless `density` is in (0, 1]."""
    if not isinstance(density, (int, float)):
        raise ValueError(f"target_density={density!r} is no number; use 0 < target_density <= 1")
    if not 0 < density <= 1:
        reason = "leaves nothing to train" if density <= 0 else "is no share of the parameters"
        raise ValueError(f"target_density={density} {reason}; use 0 < target_density <= 1")


def _stretch(stretch: Any, needed: bool) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in stretch)  # a list when the config comes from JSON
    except (TypeError, ValueError):
        raise ValueError(f"stretch={stretch!r} is no pair of numbers; use l < 0 and r > 1, e.g. (-1.5, 1.5)") from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"stretch=({low}, {high}) is not finite; use l < 0 and r > 1, e.g. (-1.5, 1.5)")
    if needed and not (low < 0 and high > 1):
        raise ValueError(
            f"stretch=({low}, {high}) never closes or never opens a gate for good; use l < 0 and r > 1, e.g. (-1.5, 1.5)"
        )
    return low, high
