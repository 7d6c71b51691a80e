"""Expected density at the end of gating: does the automatic penalty meet its target, whatever task, length and rate?

    python examples/benchmarks/quality/density_curves.py --data_dir <glue>          # about twenty minutes on one core
    python examples/benchmarks/quality/density_curves.py --table                    # from the kept results

Four GLUE tasks, three lengths of gating and three learning rates make 36 runs with the default penalty. They adapt all
of all-MiniLM-L6-v2 except its word embeddings, which would take half of the time. Each run records the expected
density after every update; the last one, right before pruning, must be within 10% of the target. Curves, table and
picture go to results/density_curves/.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import matplotlib.pyplot as plt
from benchmarks.shared.report import markdown
from common import minilm
from peft import get_peft_model
from run_glue import SENTENCES, DataArguments, load_data
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from diffpeft import DiffPruningCallback, DiffPruningConfig

RESULTS = Path(__file__).parent / "results" / "density_curves"
TASKS, STEPS, RATES = ("cola", "mrpc", "rte", "sst2"), (15, 30, 60), (3e-5, 1e-4, 3e-4)
TARGET, TOLERANCE = 0.005, 0.1
Run = tuple[str, int, float]
"""Task, steps of gating and learning rate of a run."""


class Curve(TrainerCallback):
    """Records the expected density after each update of gating."""

    def __init__(self) -> None:
        self.densities: list[float] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record it after the gates have moved."""
        self.densities.append(model.base_model.expected_density())


def tokenized(task: str, data_dir: str, model: str, rows: int, split: str = "train") -> tuple[Any, Any]:
    """Tokenized rows of a split in random order, and the collator that pads batches of them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = load_data(DataArguments(task, data_dir=data_dir))[split].shuffle(seed=0)
    columns = [column for column in SENTENCES[task] if column]
    data = data.select(range(min(rows, len(data)))).map(
        lambda row: tokenizer(*(row[column] for column in columns), truncation=True, max_length=48)
    )
    return data, DataCollatorWithPadding(tokenizer)


def run(data: Any, collator: Any, model: str, steps: int, rate: float, batch: int) -> list[float]:
    """Gate for `steps` updates; return the expected density after each."""
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    curve = Curve()
    args = TrainingArguments(
        output_dir="runs/density_curves",
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        save_strategy="no",
        report_to="none",
        logging_steps=1000,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    config = DiffPruningConfig(task_type="SEQ_CLS", target_density=TARGET, exclude_modules=["word_embeddings"])
    adapted = get_peft_model(base, config)
    callbacks = [curve, DiffPruningCallback(gating_steps=steps)]
    Trainer(adapted, args, collator, data, callbacks=callbacks).train()
    return curve.densities


def table(found: dict[Run, list[float]]) -> str:
    """A Markdown table of the last expected densities, and the largest distance from the target."""
    rows = []
    for task in TASKS:
        for steps in STEPS:
            ends = [found.get((task, steps, rate)) for rate in RATES]
            rows.append([task, str(steps), *(f"{end[-1]:.3%}" if end else "" for end in ends)])
    header = ["task", "steps of gating", *(f"lr {rate:.0e}" for rate in RATES)]
    off = f"{farthest(found):.2%} of it"
    last = f"{len(found)} runs, target {TARGET:.1%}; the farthest from it before pruning is off by {off}"
    return f"{markdown(header, rows)}\n\n{last}\n"


def farthest(found: dict[Run, list[float]]) -> float:
    """The largest distance of a run's last density from the target, relative to the target."""
    return max(abs(density[-1] / TARGET - 1) for density in found.values())


def plot(found: dict[Run, list[float]], path: Path) -> None:
    """Draw the curves, with a panel for each task."""
    figure, panels = plt.subplots(1, len(TASKS), figsize=(14, 3.2), sharey=True)
    styles = dict(zip(RATES, ("-", "--", ":"), strict=True))
    colours = dict(zip(STEPS, ("C0", "C1", "C2"), strict=True))
    for panel, task in zip(panels, TASKS, strict=True):
        for (name, steps, rate), density in found.items():
            if name == task:
                label = f"{steps} steps, lr {rate:.0e}"
                panel.plot(range(1, steps + 1), density, styles[rate], color=colours[steps], label=label)
        panel.axhline(TARGET, color="grey", linewidth=0.5)
        panel.set(yscale="log", title=task, xlabel="step")
    panels[0].set_ylabel("expected density")
    panels[-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what no kept result has, then write table and picture of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="holds <task>/{train,validation}.parquet; default: the hub's nyu-mll/glue")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--table", action="store_true", help="only write table and picture from what was kept")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / "density_curves.json"
    results = json.loads(kept.read_text()) if kept.exists() else []
    done = {(r["task"], r["steps"], r["learning_rate"]) for r in results}
    model = minilm()
    for task in () if options.table else TASKS:
        data, collator = tokenized(task, options.data_dir, model, max(STEPS) * options.batch_size)
        for steps, rate in ((steps, rate) for steps in STEPS for rate in RATES if (task, steps, rate) not in done):
            density = run(data, collator, model, steps, rate, options.batch_size)
            results.append({"task": task, "steps": steps, "learning_rate": rate, "density": density})
            kept.write_text(json.dumps(results) + "\n")
            print(task, steps, rate, f"{density[-1]:.4%}", flush=True)
    found = {(r["task"], r["steps"], r["learning_rate"]): r["density"] for r in results}
    print(text := table(found))
    (RESULTS / "density_curves.md").write_text(text)
    plot(found, RESULTS / "density_curves.png")
    if farthest(found) > TOLERANCE:
        raise SystemExit(f"a run is more than {TOLERANCE:.0%} off its target")


if __name__ == "__main__":
    main()
