"""Accuracy with the low-memory mode of gating, beside the same runs without it, on SST-2.

    python examples/benchmarks/quality/low_memory.py --data_dir <glue>          # half an hour on a core with other work
    python examples/benchmarks/quality/low_memory.py --table                    # from the kept results

all-MiniLM-L6-v2 trains on the same rows with the same learning rate, steps and seeds. The table has the accuracy on
SST-2's validation set after gating, pruning and fixmask, and the expected density right before pruning. Results go to
results/low_memory/.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
from benchmarks.quality.density_curves import tokenized
from benchmarks.shared.report import table
from common import AtTransition, minilm
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from diffpeft import DiffPruningCallback, DiffPruningConfig

RESULTS = Path(__file__).parent / "results" / "low_memory"
STEPS, GATING_STEPS, BATCH, RATE, TARGET = 200, 120, 16, 2e-4, 0.005
COLUMNS = {
    "seed": ("seed", "{}"),
    "low_memory": ("low_memory", "{}"),
    "expected_density": ("expected_density", "{:.3%}"),
    "gating": ("gating", "{:.1%}"),
    "pruned": ("pruned", "{:.1%}"),
    "fixmask": ("fixmask", "{:.1%}"),
}


@torch.no_grad()
def accuracy(model: Any, batches: DataLoader) -> float:
    """Share of right answers."""
    model.eval()
    right = []
    for batch in batches:
        labels = batch.pop("labels")
        right.append(model(**batch).logits.argmax(-1) == labels)
    model.train()
    return torch.cat(right).float().mean().item()


def held_out_batches(data_dir: str, model: str) -> DataLoader:
    """SST-2's validation set."""
    rows, collator = tokenized("sst2", data_dir, model, 872, split="validation")
    names = [name for name in AutoTokenizer.from_pretrained(model).model_input_names if name in rows.column_names]
    rows = rows.rename_column("label", "labels").select_columns([*names, "labels"])
    return DataLoader(rows, 109, collate_fn=collator)


def run(seed: int, low_memory: bool, data_dir: str, model: str) -> dict[str, Any]:
    """Train in all three phases; return a row of the table."""
    data, collator = tokenized("sst2", data_dir, model, STEPS * BATCH)
    batches = held_out_batches(data_dir, model)
    set_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    adapted = get_peft_model(base, DiffPruningConfig(task_type="SEQ_CLS", target_density=TARGET, low_memory=low_memory))
    args = TrainingArguments(
        output_dir="runs/low_memory",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_steps=1000,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    found: dict[str, Any] = {"seed": seed, "low_memory": low_memory}

    def before_pruning(model: Any) -> None:
        found.update(gating=accuracy(model, batches), expected_density=model.base_model.expected_density())

    def after_pruning(model: Any) -> None:
        found.update(pruned=accuracy(model, batches))

    pruning = DiffPruningCallback(gating_steps=GATING_STEPS)
    callbacks = [AtTransition(pruning, before_pruning), pruning, AtTransition(pruning, after_pruning)]
    Trainer(adapted, args, collator, data, callbacks=callbacks).train()
    return {**found, "fixmask": accuracy(adapted, batches)}


def main(words: list[str] | None = None) -> None:
    """Run all seeds with the mode and without it, then write the table of all kept results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="of GLUE's tasks, as for run_glue.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--table", action="store_true", help="only show the kept results")
    options = parser.parse_args(words)
    if not options.table:
        model = minilm()
        RESULTS.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for low_memory in (False, True):
                result = run(seed, low_memory, options.data_dir, model)
                print(result, flush=True)
                name = f"seed-{seed}-{'low' if low_memory else 'plain'}.json"
                (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    results = [json.loads(file.read_text()) for file in RESULTS.glob("seed-*.json")]
    shown = table(sorted(results, key=lambda result: (result["seed"], result["low_memory"])), COLUMNS)
    (RESULTS / "quality.md").write_text(shown + "\n")
    print(shown)


if __name__ == "__main__":
    main()
