"""Draw a healthy run and three unhealthy ones, for docs/tuning.md.

    python docs/pictures/runs.py

The task, encoder and data are those of examples/quickstart.py; only the settings in RUNS differ. What was logged is
kept in runs.json, from which `--draw` makes the picture again.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib.pyplot as plt  # noqa: E402 - quickstart, too, asks for no hub before it imports

RUNS: dict[str, dict[str, Any]] = {
    "healthy": {},
    "gating too short": {"gating_steps": 10},
    "learning rate too low": {"learning_rate": 2e-6},
    "learning rate too high": {"learning_rate": 2e-4, "fixmask_learning_rate": 5e-2},
}
"""What differs from a healthy run: arguments of the callback, and the learning rate."""
BLUE, RED, GREY = "#3b6ea5", "#b5443a", "#eeeeee"


def train(steps: int, learning_rate: float = 2e-4, **settings: Any) -> dict[str, Any]:
    """Train the quickstart's task; return what was logged, when gating ended, and the held-out accuracy."""
    from peft import get_peft_model
    from quickstart import make_data, make_model, make_trainer

    from diffpeft import DiffPruningCallback, DiffPruningConfig

    data, pruning = make_data(), DiffPruningCallback(**settings)
    model = get_peft_model(make_model(), DiffPruningConfig(task_type="SEQ_CLS"))
    trainer = make_trainer(model, data, [pruning], max_steps=steps, learning_rate=learning_rate)
    trainer.args.logging_steps = trainer.state.logging_steps = 5
    trainer.train()
    names = ("step", "loss", "learning_rate", "diffpruning/expected_density")
    log = [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history]
    accuracy = trainer.evaluate()["eval_accuracy"]
    return {"accuracy": accuracy, "gating_steps": pruning.transition_step, "log": [e for e in log if "loss" in e]}


def draw(runs: dict[str, Any], path: Path) -> None:
    """Draw density, loss and learning rate of each run, a column each."""
    rows = {
        "diffpruning/expected_density": "expected density, %",
        "loss": "training loss",
        "learning_rate": "rate used",
    }
    figure, axes = plt.subplots(3, len(runs), figsize=(3.2 * len(runs), 6.6), sharex=True, sharey="row", squeeze=False)
    for column, (name, run) in enumerate(runs.items()):
        for row, (entry, label) in enumerate(rows.items()):
            one = axes[row, column]
            points = [(e["step"], e[entry] * (100 if row == 0 else 1)) for e in run["log"] if entry in e]
            one.axvspan(0, run["gating_steps"], color=GREY, zorder=0)
            one.plot(*zip(*points, strict=True), color=RED if column else BLUE, marker="." if row == 0 else None)
            one.grid(alpha=0.25)
            one.set_yscale("linear" if row == 1 else "log")
            if row == 0:
                one.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
                one.set_title(f"{name}\naccuracy {run['accuracy']:.1%}", fontsize=11)
            if row == 1:
                one.set_ylim(0, 1.1)
            if column == 0:
                one.set_ylabel(label)
            if row == 2:
                one.set_xlabel("step (grey: gating)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train what is asked for, keep it, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--output_dir", type=Path, default=HERE, help="where runs.json and runs.png go")
    parser.add_argument("--draw", action="store_true", help="draw what is kept in runs.json")
    options = parser.parse_args()
    kept = options.output_dir / "runs.json"
    if options.draw:
        runs = json.loads(kept.read_text())
    else:
        runs = {name: train(options.steps, **settings) for name, settings in RUNS.items()}
        kept.write_text(json.dumps(runs, indent=1) + "\n")
    draw(runs, options.output_dir / "runs.png")


if __name__ == "__main__":
    main()
