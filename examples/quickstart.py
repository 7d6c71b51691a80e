"""Diff Pruning in three minutes on two cores: a real pretrained encoder learns to judge whether a sentence is English.

    pip install -e ".[examples]" && python examples/quickstart.py

Trains the head alone, then a diff: gates choose its parameters (gating), 0.5% of all parameters are kept (pruning) and
trained further (fixmask); all three phases are one `trainer.train()`. Prints the accuracy after each phase, saves the
adapter and a picture of where its nonzeros are, and loads the adapter in a fresh process, which must find the same
accuracy.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model comes from a package, nothing is downloaded

import numpy as np
from acceptability import make_split
from common import AtTransition, minilm
from datasets import Dataset
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from diffpeft import DiffPruningCallback, DiffPruningConfig
from diffpeft.tools.plots import plot_density

MODEL = minilm()
SEED = 0
PHENOMENA = ("inversion", "word_order", "pronoun_case", "polarity", "argument_structure", "verb_form")
LEARNING_RATE = 2e-4
logging.set_verbosity_error()  # transformers would warn of the fresh head
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def make_model() -> Any:
    """The pretrained encoder with a fresh head, the same at each call."""
    set_seed(SEED)
    return AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)


def make_data() -> tuple[Dataset, Dataset, Any]:
    """The tokenized training and held-out rows, and the collator that pads batches of them."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def tokenized(rows: list[dict[str, Any]]) -> Dataset:
        return Dataset.from_list(
            [{**tokenizer(row["sentence"], truncation=True, max_length=32), "label": row["label"]} for row in rows]
        )

    train, held_out = make_split(SEED, phenomena=PHENOMENA)
    return tokenized(train), tokenized(held_out), DataCollatorWithPadding(tokenizer)


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers; the Trainer's `compute_metrics`."""
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def make_trainer(model: Any, data: tuple[Dataset, Dataset, Any], callbacks: list[Any], **arguments: Any) -> Trainer:
    """A stock Trainer that trains on the first and evaluates on the second part of the data."""
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


def head_only(data: tuple[Dataset, Dataset, Any], steps: int) -> float:
    """Held-out accuracy of a head trained on the frozen encoder."""
    model = make_model()
    model.bert.requires_grad_(False)
    trainer = make_trainer(model, data, [], max_steps=steps, learning_rate=3e-3)
    trainer.train()
    return float(trainer.evaluate()["eval_accuracy"])


def verify(folder: Path) -> float:
    """Held-out accuracy of a saved adapter on the pretrained encoder."""
    model = PeftModel.from_pretrained(make_model(), folder)
    trainer = make_trainer(model, make_data(), [], disable_tqdm=True)
    return float(trainer.evaluate()["eval_accuracy"])


def train(data: tuple[Dataset, Dataset, Any], steps: int) -> tuple[Any, dict[str, float]]:
    """Train a diff in all three phases; return the model, and the held-out accuracy after each phase."""
    model = get_peft_model(make_model(), DiffPruningConfig(task_type="SEQ_CLS"))
    model.print_trainable_parameters()
    found: dict[str, float] = {}

    def evaluate(phase: str) -> None:
        found[phase] = trainer.evaluate()["eval_accuracy"]

    pruning = DiffPruningCallback(gating_ratio=0.6)
    callbacks = [
        AtTransition(pruning, lambda model: evaluate("gating")),
        pruning,
        AtTransition(pruning, lambda model: evaluate("pruning")),
    ]
    trainer = make_trainer(model, data, callbacks, max_steps=steps, learning_rate=LEARNING_RATE)
    trainer.train()
    evaluate("fixmask")
    return model, found


def show(console: Console, head: float, found: dict[str, float], tuner: Any, folder: Path) -> None:
    """Print accuracies, nonzeros and sizes on disk."""
    size = os.path.getsize(folder / "adapter_model.safetensors")
    base_size = os.path.getsize(Path(MODEL) / "model.safetensors")
    total, nonzeros = tuner.num_base_parameters(), tuner.num_nonzeros()
    kept = f"{nonzeros:,} ({nonzeros / total:.2%})"
    table = Table(title="acceptability, held-out accuracy")
    for column in ("", "accuracy", "nonzeros of the diff", "bytes on disk"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("head only", f"{head:.1%}", "0", "")
    table.add_row("after gating", f"{found['gating']:.1%}", "", "")
    table.add_row("after pruning", f"{found['pruning']:.1%}", kept, "")
    table.add_row("after fixmask", f"{found['fixmask']:.1%}", kept, f"{size:,}")
    table.add_row("the base model", "", f"of {total:,}", f"{base_size:,}")
    console.print(table)
    console.print(
        f"adapter in {folder}, {base_size / size:.0f} times smaller than the base; picture: {folder / 'density.png'}"
    )


def parse_options() -> argparse.Namespace:
    """The command line; exits if the output directory holds an adapter that may not be replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=200, help="training steps, 60%% of them gating")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter that output_dir holds")
    parser.add_argument("--verify", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.verify and not options.overwrite and (options.output_dir / "adapter_config.json").exists():
        raise SystemExit(
            f"{options.output_dir} already holds an adapter; choose another --output_dir, or pass --overwrite "
            "to replace it"
        )
    return options


def main() -> None:
    """Train, save, show, and load in a fresh process."""
    options = parse_options()
    if options.verify:
        print(json.dumps(verify(options.verify)))
        return
    start = time.perf_counter()
    console = Console(width=100)
    data = make_data()
    console.print(f"{len(data[0])} sentences to learn from, {len(data[1])} held out, no word of content in common\n")
    console.rule("head only")
    head = head_only(data, 100)
    console.rule("gating, pruning, fixmask")
    model, found = train(data, options.steps)
    model.save_pretrained(options.output_dir)
    plot_density(model.base_model, options.output_dir / "density.png")
    show(console, head, found, model.base_model, options.output_dir)

    command = [sys.executable, __file__, "--verify", str(options.output_dir)]
    fresh = subprocess.run(command, check=True, capture_output=True, text=True)
    reloaded, trained = json.loads(fresh.stdout.strip().splitlines()[-1]), found["fixmask"]
    console.print(f"loaded in a fresh process: {reloaded:.1%}, {'the same' if reloaded == trained else 'DIFFERENT'}")
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    if reloaded != trained:
        raise SystemExit("the loaded adapter does not compute what the trained one did")


if __name__ == "__main__":
    main()
