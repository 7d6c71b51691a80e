# ruff: noqa: RUF009 - `_field` makes fields of a dataclass
"""The configuration of a diff-pruning adapter."""

import copy
import inspect
import math
import tempfile
import textwrap
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType
from peft.utils.constants import CONFIG_NAME

from diffpeft.files.atomic import pending_config, replace_config, staged_checksums
from diffpeft.files.card import update_card
from diffpeft.files.encoding import check_dtype
from diffpeft.files.keys import PEFT_TYPE

GATING, FIXMASK = "gating", "fixmask"
"""The phases of an adapter."""
GROUP_PENALTIES = ("product", "additive")
SELECTIONS = ("gates", "magnitude", "gradient", "random")
MAX_FP16_LOG_ALPHA = 1e3
"""Largest magnitude of init_log_alpha where gates are fp16: farther from 0 they could hardly move."""
FORMAT_VERSION = 2
"""Version of the adapter files that are written (docs/format.md), and the only one that is read."""


def _peft_type() -> PeftType:
    """`PeftType.DIFFPRUNING`, added on the first call: PEFT registers members alone."""
    if PEFT_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_ = member._value_ = PEFT_TYPE
        member.__objclass__, member._sort_order_ = PeftType, len(PeftType.__members__)
        type.__setattr__(PeftType, PEFT_TYPE, member)
        PeftType._member_names_.append(PEFT_TYPE)
        PeftType._member_map_[PEFT_TYPE] = member
        PeftType._value2member_map_[PEFT_TYPE] = member
    return PeftType[PEFT_TYPE]


DIFFPRUNING = _peft_type()


def _field(default: Any, about: str, decides_run: bool = True) -> Any:
    """A field with its help text. One that `decides_run` must be as it was when a run is resumed."""
    return field(default=default, metadata={"help": about, "decides_run": decides_run})


@dataclass
class DiffPruningConfig(PeftConfig):
    """Settings of a diff-pruning adapter: its budget, its parameters, how positions are chosen (arXiv 2012.07463).

    `DiffPruningConfig(task_type=...)` is all that a run needs: "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM",
    "SEQ_2_SEQ_LM" or "FEATURE_EXTRACTION"; for other tasks leave it out. PEFT's own fields are as in every config.

    Args:
    """

    target_modules: list[str] | set[str] | str | None = _field(
        None,
        "Modules to adapt: a list of names or suffixes, a regex, or 'all-linear', as in PEFT. None adapts every module "
        "that owns a parameter, except the task head, which is trained whole.",
    )
    exclude_modules: list[str] | str | None = _field(
        None, "Modules not to adapt: a list of names or suffixes, or a regex."
    )
    modules_to_save: list[str] | None = _field(
        None,
        "Modules that are trained whole and saved with the diff. With the default target_modules the fresh head of a "
        "task model is found and added.",
    )
    layers_to_transform: list[int] | int | None = _field(None, "Adapt only modules of the layers with these indices.")
    layers_pattern: list[str] | str | None = _field(
        None, "The name before the layer index, where layers_to_transform cannot find it, e.g. 'layer'."
    )
    target_density: float = _field(
        0.005,
        "Nonzeros of the diff as a share of all parameters of the base model, adapted or not; the task head does not "
        "count. In (0, 1].",
    )
    selection: str = _field(
        "gates",
        "How positions are chosen. 'gates': learned with the diff, as in the paper. 'magnitude': where weights moved "
        "most in training without gates, the paper's non-adaptive baseline. 'gradient': at the largest squared "
        "gradients of a few batches, and 'random': by chance; both before training, without a dense phase.",
    )
    structured: bool = _field(True, "Add a gate for each parameter tensor (the paper's structured diff pruning).")
    group_penalty: str = _field(
        "product",
        "How the gate of a parameter tensor enters the L0 penalty of a fixed l0_lambda, whose strength differs between "
        "the two: 'product' is the paper's equation, 'additive' the formula of the released code.",
    )
    l0_lambda: float | str = _field(
        "auto",
        "Weight of the L0 penalty. 'auto' finds in every step the weight that brings the expected density to "
        "target_density by the end of gating; a number is the paper's fixed weight (1.25e-7 there).",
    )
    gate_learning_rate: float | None = _field(
        None,
        "Adam's learning rate for log_alpha, which is the most that it moves in a step. None means 0.1, as in the "
        "paper, with a fixed l0_lambda; with 'auto' it follows from the number of gating steps.",
    )
    stretch: tuple[float, float] = _field((-1.5, 1.5), "(l, r) of the hard-concrete distribution, l < 0 and r > 1.")
    init_log_alpha: float = _field(5.0, "Initial log_alpha of all gates.")
    low_memory: bool = _field(
        False,
        "Gating in the memory of full fine-tuning with AdamW, by coarser moments and updates within the backward pass "
        "(docs/performance.md, 'Low memory'). One process, no fp16 gradient scaling, an optimizer of Adam's family.",
    )
    init_weights: bool = _field(True, "True starts the diff at zero. False starts it at random, for tests.", False)
    nnz_pattern: dict[str, int] | None = _field(
        None, "Nonzeros of each parameter, set by pruning; None until then. Not meant to be set by hand.", False
    )
    value_dtype: str = _field(
        "float32", "dtype of a pruned diff's values in the file. `cast_values` sets it, for a smaller file.", False
    )
    base_fingerprint: dict[str, str] | None = _field(
        None, "A few weights of the base model, by which another one is noticed. Not meant to be set by hand.", False
    )
    heads_checksum: int | None = _field(
        None, "Checksum of the tensors of modules_to_save in the file. Not meant to be set by hand.", False
    )
    diff_checksum: int | None = _field(None, "Checksum of the diff in the file. Not meant to be set by hand.", False)
    format_version: int = _field(FORMAT_VERSION, "Version of the file format. Not meant to be set by hand.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DIFFPRUNING
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # as PEFT's own configs have it
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection={self.selection!r} is not known; use one of {SELECTIONS}")
        self.stretch = _stretch(self.stretch, needed=self.gated and self.nnz_pattern is None)
        check_density(self.target_density)
        alpha, penalty, rate = self.init_log_alpha, self.l0_lambda, self.gate_learning_rate
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"init_log_alpha={alpha!r} is no log_alpha; use a finite number, 5.0 in the paper")
        if self.group_penalty not in GROUP_PENALTIES:
            raise ValueError(f"group_penalty={self.group_penalty!r} is not known; use one of {GROUP_PENALTIES}")
        if penalty != "auto" and not (isinstance(penalty, (int, float)) and 0 <= penalty < math.inf):
            remedy = "use 'auto' or a finite number of at least 0, e.g. 1.25e-7"
            raise ValueError(f"l0_lambda={penalty!r} is no penalty; {remedy}")
        if self.low_memory and not (self.gated and penalty == "auto"):
            raise ValueError(
                f"low_memory=True is for gates under the automatic penalty, not for selection={self.selection!r} and "
                f"l0_lambda={penalty!r}; use selection='gates' and l0_lambda='auto', or low_memory=False"
            )
        if self.low_memory and abs(alpha) > MAX_FP16_LOG_ALPHA:
            raise ValueError(
                f"init_log_alpha={alpha} is farther than what low_memory=True can hold in fp16; use at most "
                f"{MAX_FP16_LOG_ALPHA:g}, 5.0 in the paper"
            )
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"gate_learning_rate={rate} cannot move the gates; use a positive number or None")
        check_dtype(self.value_dtype)
        if not isinstance(self.format_version, int) or self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"the adapter has format version {self.format_version!r}, this diffpeft reads {FORMAT_VERSION}; "
                "install a newer one, or for an older file the one that wrote it, and extract or save the diff again"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} does nothing without layers_to_transform; set both or neither"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a file has them, in an order that does not change."""
        fields: dict[str, Any] = super().to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}

    @property
    def gated(self) -> bool:
        """Whether gates choose the positions."""
        return self.selection == "gates"

    @property
    def chosen_in_training(self) -> bool:
        """Whether training has a gating phase, with a dense diff, from which pruning chooses the positions."""
        return self.selection in ("gates", "magnitude")

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The fields of a file (PEFT's hook); older files say `gated` in place of `selection`."""
        if "gated" in kwargs:
            kwargs["selection"] = "gates" if kwargs.pop("gated") else "magnitude"
        return kwargs

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, with the weights staged for it, and the adapter's part of README.md.

        PEFT calls this last when it saves.
        """
        directory = Path(save_directory)
        saved = copy.copy(self)
        # Without new weights nobody knows whether those that are there will stay: transformers writes them afterwards.
        checksums = staged_checksums(directory)
        saved.heads_checksum = checksums.heads if checksums else None
        saved.diff_checksum = checksums.diff if checksums and self.nnz_pattern is not None else None
        with tempfile.TemporaryDirectory() as scratch:
            super(DiffPruningConfig, saved).save_pretrained(scratch, **kwargs)
            replace_config(directory, (Path(scratch) / CONFIG_NAME).read_text())
        update_card(directory, saved.to_dict())

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The contents of the config that belongs to the weights, even where a kill left it under another name."""
        pending = pending_config(Path(path_json_file).parent)
        contents: dict[str, Any] = super().from_json_file(str(pending or path_json_file), **kwargs)
        if isinstance(contents.get("stretch"), list):
            contents["stretch"] = tuple(contents["stretch"])
        return contents


_FIELDS = (f"{one.name}: {one.metadata['help']}" for one in fields(DiffPruningConfig) if "decides_run" in one.metadata)
_LINES = (textwrap.indent(textwrap.fill(text, 112, subsequent_indent="    "), "    ") for text in _FIELDS)
DiffPruningConfig.__doc__ = "\n".join([inspect.cleandoc(DiffPruningConfig.__doc__ or ""), *_LINES])  # for help()


def check_density(density: float) -> None:
    """Raise ValueError unless `density` is in (0, 1]."""
    if not isinstance(density, (int, float)):
        raise ValueError(f"target_density={density!r} is no number; use 0 < target_density <= 1")
    if not 0 < density <= 1:
        reason = "leaves nothing to train" if density <= 0 else "is no share of the parameters"
        raise ValueError(f"target_density={density} {reason}; use 0 < target_density <= 1")


def _stretch(stretch: Any, needed: bool) -> tuple[float, float]:
    """The bounds as a tuple. Raises ValueError unless they are finite and, where `needed`, on both sides of [0, 1]."""
    try:
        low, high = (float(bound) for bound in stretch)  # a list when the config comes from JSON
    except (TypeError, ValueError):
        raise ValueError(f"stretch={stretch!r} is no pair of numbers; use l < 0 and r > 1, e.g. (-1.5, 1.5)") from None
    finite = math.isfinite(low) and math.isfinite(high)
    if not finite or (needed and not (low < 0 and high > 1)):
        reason = "never closes or never opens a gate for good" if finite else "is not finite"
        raise ValueError(f"stretch=({low}, {high}) {reason}; use l < 0 and r > 1, e.g. (-1.5, 1.5)")
    return low, high
