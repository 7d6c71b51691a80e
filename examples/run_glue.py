"""Fine-tune a pretrained model on a GLUE task with Diff Pruning: gating, magnitude pruning, fixmask, one adapter.

    python examples/run_glue.py --task_name mrpc --model_name_or_path bert-large-cased-whole-word-masking \\
        --output_dir runs/mrpc --learning_rate 1e-5 --per_device_train_batch_size 8 --num_train_epochs 6
    python examples/run_glue.py examples/configs/mrpc.yaml                 # the same from one file
    torchrun --nproc_per_node 2 examples/run_glue.py ...                   # several processes
    accelerate launch examples/run_glue.py ...

The data come from the hub (nyu-mll/glue), or with --data_dir from <data_dir>/<task>/{train,validation}.parquet.
--method trains a baseline on the same data and steps instead: "full" fine-tuning, "head" alone, or "magnitude": full
fine-tuning, then the same pruning and fixmask, without gates. Results go to <output_dir>/all_results.json.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import DiffPruningArguments, ModelArguments, Run, parse_arguments
from datasets import DatasetDict, load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

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


@dataclass
class DataArguments:
    """Task and data."""

    task_name: str = field(metadata={"help": f"One of {', '.join(SENTENCES)}."})
    data_dir: str | None = field(default=None, metadata={"help": "Holds <task>/{train,validation}.parquet."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are truncated, in tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many examples to evaluate."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an adapter that output_dir already holds."})


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


class GlueRun(Run):
    """One training run on a GLUE task."""

    def __init__(
        self,
        model_args: ModelArguments,
        data_args: DataArguments,
        diff_args: DiffPruningArguments,
        args: TrainingArguments,
    ) -> None:
        data = load_data(data_args)
        first, second = SENTENCES[data_args.task_name]
        labels = 1 if data_args.task_name == "stsb" else len(data["train"].unique("label"))
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=labels)
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, config=config)
        super().__init__(model, data_args.task_name, "SEQ_CLS", model_args, diff_args, args)

        def tokenize(rows: dict[str, Any]) -> dict[str, Any]:
            texts = (rows[first],) if second is None else (rows[first], rows[second])
            return tokenizer(*texts, truncation=True, max_length=data_args.max_seq_length)

        with args.main_process_first(desc="tokenizing"):
            data = data.map(tokenize, batched=True, desc="tokenizing")
        self.evaluation = {name: split for name, split in data.items() if name != "train"}
        self.trainer = Trainer(
            model=self.model,
            args=args,
            train_dataset=data["train"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=self.metrics,
            callbacks=self.callbacks,
        )

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """GLUE's metrics; the Trainer's `compute_metrics`."""
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return compute_metrics(self.task, logits, prediction.label_ids)


def main() -> None:
    """Train and evaluate as the command line says."""
    arguments = parse_arguments(DataArguments)
    task = arguments[1].task_name
    if task not in SENTENCES:
        raise SystemExit(f"task_name={task!r} is no GLUE task; use one of {', '.join(SENTENCES)}")
    set_seed(arguments[-1].seed)
    GlueRun(*arguments).train()


if __name__ == "__main__":
    main()
