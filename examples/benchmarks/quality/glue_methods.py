"""Diff Pruning beside full fine-tuning, the head alone, and pruning without gates: same script, data and steps.

    python examples/benchmarks/quality/glue_methods.py --data_dir <glue> --tasks mrpc rte stsb   # hours on two cores
    python examples/benchmarks/quality/glue_methods.py --table                                   # from the kept results

Runs examples/run_glue.py once for each task and method with all-MiniLM-L6-v2 from its package. Keeps each run's
all_results.json and its expected density by step in results/glue_minilm/, and writes the table and the plot there.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

from benchmarks.shared.report import markdown
from common import METHODS, minilm
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

EXAMPLES = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "glue_minilm"
STEPS = {"mrpc": (460, 240), "rte": (390, 234), "stsb": (480, 300), "cola": (804, 402)}
"""Steps in all and steps of gating by task, in batches of 32."""
METRIC = {
    "mrpc": ("accuracy", "f1"),
    "rte": ("accuracy",),
    "stsb": ("pearson", "spearmanr"),
    "cola": ("matthews_correlation",),
}
LEARNING_RATE = {"diff_pruning": 1e-4, "magnitude": 1e-4, "full": 1e-4, "head": 1e-3}


def run(task: str, method: str, seed: int, data_dir: str, work: Path) -> None:
    """Run one task with one method; keep its results and its curve."""
    steps, gating_steps = STEPS[task]
    output = work / f"{task}-{method}-{seed}"
    settings = {
        "task_name": task,
        "data_dir": data_dir,
        "model_name_or_path": minilm(),
        "output_dir": output,
        "method": method,
        "max_steps": steps,
        "gating_steps": gating_steps,
        "learning_rate": LEARNING_RATE[method],
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "seed": seed,
        "train_sampling_strategy": "group_by_length",
        "overwrite": True,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(EXAMPLES / "run_glue.py"), *words]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    kept = json.loads((output / "all_results.json").read_text())
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    kept["seed"], kept["learning_rate"] = seed, LEARNING_RATE[method]
    kept["expected_density"] = [
        (entry["step"], entry["diffpruning/expected_density"]) for entry in history if "diffpruning/phase" in entry
    ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{task}-{method}-{seed}.json").write_text(json.dumps(kept, indent=1) + "\n")


def load() -> dict[tuple[str, str, int], dict[str, Any]]:
    """Kept results by task, method and seed."""
    found = (json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json")))
    return {(result["task"], result["method"], result["seed"]): result for result in found}


HEADER = (
    "task",
    "metric",
    "method",
    "seed",
    "after gating",
    "pruned to 0.5%",
    "after fixmask / at the end",
    "nonzeros",
)


def cells(task: str, method: str, seed: int, result: dict[str, Any]) -> list[str]:
    """The row of one run."""

    def metrics(phase: str) -> str:
        return " / ".join(f"{100 * result[phase][name]:.1f}" for name in METRIC[task]) if phase in result else ""

    phases = ("gated", "pruned", "fixmask" if "fixmask" in result else method)
    nonzeros = f"{result['nnz']:,}" if "nnz" in result else {"full": "all", "head": "0"}[method]
    return [task, " / ".join(METRIC[task]), method, str(seed), *map(metrics, phases), nonzeros]


def table(results: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """A Markdown table of metrics by phase, with a row for each run."""
    order = sorted(results, key=lambda key: (key[0], key[2], METHODS.index(key[1])))
    return markdown(HEADER, (cells(*key, results[key]) for key in order)) + "\n"


def plot(results: dict[tuple[str, str, int], dict[str, Any]], path: Path) -> None:
    """Draw expected density against step, with a line for each gated run."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (task, method, seed), result in results.items():
        if method == "diff_pruning":
            axes.plot(*zip(*result["expected_density"], strict=True), label=f"{task}, seed {seed}")
    axes.axhline(0.005, color="grey", linewidth=0.8, linestyle="--")
    axes.set(yscale="log", xlabel="step", ylabel="expected density", title="all-MiniLM-L6-v2, target 0.5%")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the given tasks and methods, then write table and plot of all kept results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="holds <task>/{train,validation}.parquet")
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "rte", "stsb"], choices=sorted(STEPS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--work_dir", type=Path, default=Path("runs/glue_methods"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.table:
        if options.data_dir is None:
            parser.error("--data_dir is needed, unless --table only shows the kept results")
        for task in options.tasks:
            for seed in options.seeds:
                for method in options.methods:
                    run(task, method, seed, options.data_dir, options.work_dir)
    results = load()
    text = table(results)
    (RESULTS / "table.md").write_text(text)
    plot(results, RESULTS / "density.png")
    print(text)


if __name__ == "__main__":
    main()
