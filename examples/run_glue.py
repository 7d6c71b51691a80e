"""Fine-tune a pretrained model on a GLUE task with Diff Pruning: gating, magnitude pruning, fixmask, one adapter.

    python examples/run_glue.py --task_name mrpc --model_name_or_path bert-large-cased-whole-word-masking \\
        --output_dir runs/mrpc --learning_rate 1e-5 --per_device_train_batch_size 8 --num_train_epochs 6
    python examples/run_glue.py examples/configs/mrpc.yaml                 # the same from one file
    torchrun --nproc_per_node 2 examples/run_glue.py ...                   # several processes
    accelerate launch examples/run_glue.py ...

The data come from the hub (nyu-mll/glue), or with --data_dir from <data_dir>/<task>/{train,validation}.parquet. --method
trains a baseline on the same data and steps instead: "full" fine-tuning, "head" alone, or "magnitude": full fine-tuning,
then the same pruning and fixmask, without gates. Results go to <output_dir>/all_results.json.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from peft import get_peft_model
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from diffpeft import DiffPruningCallback, DiffPruningConfig
from diffpeft.head import fresh_head

SENTENCES = {
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
METHODS = ("diff_pruning", "magnitude", "full", "head")


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str = field(metadata={"help": "A model on the hub or in a directory."})
    method: str = field(default="diff_pruning", metadata={"help": f"One of {METHODS}."})


@dataclass
class DataArguments:
    """Which data."""

    task_name: str = field(metadata={"help": f"One of {', '.join(SENTENCES)}."})
    data_dir: str | None = field(default=None, metadata={"help": "Holds <task>/{train,validation}.parquet."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are truncated, in tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many examples to evaluate."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an adapter that output_dir already holds."})


@dataclass
class DiffPruningArguments:
    """What to learn; see DiffPruningConfig and DiffPruningCallback."""

    target_density: float = field(default=0.005, metadata={"help": "Nonzeros as a share of the base parameters."})
    structured: bool = field(default=True, metadata={"help": "One more gate per parameter tensor."})
    group_penalty: str = field(default="product", metadata={"help": "'product' (paper) or 'additive' (released code)."})
    l0_lambda: str = field(default="auto", metadata={"help": "'auto' or a number, 1.25e-7 in the paper."})
    gate_learning_rate: float | None = field(default=None, metadata={"help": "Pace of the gates."})
    concrete_lower: float = field(default=-1.5, metadata={"help": "l of the stretch."})
    concrete_upper: float = field(default=1.5, metadata={"help": "r of the stretch."})
    init_log_alpha: float = field(default=5.0, metadata={"help": "Where the gates start."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Default: everything but the head."})
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Modules to leave as pretrained."})
    gating_ratio: float = field(default=0.5, metadata={"help": "Gating's share of the steps."})
    gating_steps: int | None = field(default=None, metadata={"help": "Gating's length, instead of a share."})
    fixmask_learning_rate: float | None = field(default=None, metadata={"help": "Default: 10 times learning_rate."})


def parse_arguments() -> tuple[ModelArguments, DataArguments, DiffPruningArguments, TrainingArguments]:
    """From the command line, or from the one YAML file named there."""
    parser = HfArgumentParser((ModelArguments, DataArguments, DiffPruningArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        parsed = parser.parse_yaml_file(os.path.abspath(sys.argv[1]))
    else:
        parsed = parser.parse_args_into_dataclasses()
    model_args, data_args, _, training_args = parsed
    if data_args.task_name not in SENTENCES:
        raise SystemExit(f"task_name={data_args.task_name!r} is no GLUE task; use one of {', '.join(SENTENCES)}")
    if model_args.method not in METHODS:
        raise SystemExit(f"method={model_args.method!r} is not known; use one of {', '.join(METHODS)}")
    held = [
        name for name in ("adapter_config.json", "all_results.json") if (Path(training_args.output_dir) / name).exists()
    ]
    if held and not data_args.overwrite and training_args.resume_from_checkpoint is None:
        raise SystemExit(
            f"{training_args.output_dir} already holds {' and '.join(held)}; choose another --output_dir, or pass "
            "--overwrite to replace it"
        )
    return parsed


def load_data(args: DataArguments) -> DatasetDict:
    """The task's splits with labels: "train" and one or, for MNLI, two for validation."""
    task = args.task_name
    validation = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
    if args.data_dir is None:
        data = load_dataset("nyu-mll/glue", task)
    else:
        folder = Path(args.data_dir) / task
        files = {split: str(folder / f"{split}.parquet") for split in ["train", *validation]}
        missing = [file for file in files.values() if not os.path.exists(file)]
        if missing:
            raise SystemExit(f"--data_dir lacks {', '.join(missing)}; it must hold <task>/<split>.parquet")
        data = load_dataset("parquet", data_files=files)
    needed = {column for column in (*SENTENCES[task], "label") if column}
    for split in ("train", *validation):
        if not needed <= set(data[split].column_names):
            raise SystemExit(
                f"the {split} split of {task} has the columns {data[split].column_names}, but needs {sorted(needed)}"
            )
    limits = {"train": args.max_train_samples, **dict.fromkeys(validation, args.max_eval_samples)}
    return DatasetDict({s: data[s].select(range(min(len(data[s]), n or len(data[s])))) for s, n in limits.items()})


def compute_metrics(task: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """GLUE's metrics of the task (Wang et al. 2019), computed offline; equal to evaluate.load("glue", task)."""
    if task == "stsb":
        scores = predictions.reshape(-1)
        return {"pearson": float(pearsonr(scores, labels)[0]), "spearmanr": float(spearmanr(scores, labels)[0])}
    classes = predictions.argmax(-1)
    if task == "cola":
        return {"matthews_correlation": float(matthews_corrcoef(labels, classes))}
    metrics = {"accuracy": float((classes == labels).mean())}
    if task in ("mrpc", "qqp"):
        metrics["f1"] = float(f1_score(labels, classes))
    return metrics


class PhaseEvaluation(TrainerCallback):
    """Evaluates when a phase ends. One stands before DiffPruningCallback, one after it: they see the model before and
    after pruning."""

    def __init__(self, run: "Run", name: str) -> None:
        self.run, self.name = run, name

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate at the transition."""
        if state.global_step == self.run.pruning.transition_step < state.max_steps:
            self.run.evaluate(self.name)


class Run:
    """One training run: the trainer, and the results as they come in."""

    def __init__(
        self,
        model_args: ModelArguments,
        data_args: DataArguments,
        diff_args: DiffPruningArguments,
        args: TrainingArguments,
    ) -> None:
        self.task, self.method, self.args = data_args.task_name, model_args.method, args
        data = load_data(data_args)
        regression = self.task == "stsb"
        labels = 1 if regression else len(data["train"].unique("label"))
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=labels)
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, config=config)

        self.pruning = DiffPruningCallback(
            diff_args.gating_ratio, diff_args.gating_steps, diff_args.fixmask_learning_rate
        )
        callbacks: list[TrainerCallback] = []
        if self.method in ("diff_pruning", "magnitude"):
            model = get_peft_model(model, diff_config(diff_args, gated=self.method == "diff_pruning"))
            callbacks = [PhaseEvaluation(self, "gated"), self.pruning, PhaseEvaluation(self, "pruned")]
        elif self.method == "head":
            head = tuple(fresh_head(model))
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(head))

        first, second = SENTENCES[self.task]

        def tokenize(rows: dict[str, Any]) -> dict[str, Any]:
            texts = (rows[first],) if second is None else (rows[first], rows[second])
            return tokenizer(*texts, truncation=True, max_length=data_args.max_seq_length)

        with args.main_process_first(desc="tokenizing"):
            data = data.map(tokenize, batched=True, desc="tokenizing")
        self.evaluation: dict[str, Dataset] = {name: split for name, split in data.items() if name != "train"}
        self.trainer = Trainer(
            model=model,
            args=args,
            train_dataset=data["train"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=self.metrics,
            callbacks=callbacks,
        )
        self.results: dict[str, Any] = {}
        self.clock: dict[str, float] = {}

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The Trainer's hook."""
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return compute_metrics(self.task, logits, prediction.label_ids)

    def evaluate(self, phase: str) -> None:
        """Note the metrics on every validation split, and the time."""
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
        """Train, evaluate, save; the results."""
        start = time.perf_counter()
        self.trainer.train(resume_from_checkpoint=self.args.resume_from_checkpoint)
        end = time.perf_counter()
        sparse = self.method in ("diff_pruning", "magnitude")
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
            (Path(self.args.output_dir) / "all_results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        return self.results


def diff_config(args: DiffPruningArguments, gated: bool) -> DiffPruningConfig:
    """The adapter's config from the command line's arguments."""
    return DiffPruningConfig(
        task_type="SEQ_CLS",
        target_modules=args.target_modules,
        exclude_modules=args.exclude_modules,
        target_density=args.target_density,
        gated=gated,
        structured=args.structured,
        group_penalty=args.group_penalty,
        l0_lambda="auto" if args.l0_lambda == "auto" else float(args.l0_lambda),
        gate_learning_rate=args.gate_learning_rate,
        stretch=(args.concrete_lower, args.concrete_upper),
        init_log_alpha=args.init_log_alpha,
    )


def main() -> None:
    """Run what the command line asks for."""
    arguments = parse_arguments()
    set_seed(arguments[-1].seed)
    run = Run(*arguments)
    results = run.train()
    if run.trainer.is_world_process_zero():
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
