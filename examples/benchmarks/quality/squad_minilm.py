"""SQuAD v1.1 with all-MiniLM-L6-v2: Diff Pruning phase by phase, beside full fine-tuning and the head alone.

    python examples/benchmarks/quality/squad_minilm.py --data_dir <squad>      # most of an hour on two cores
    python examples/benchmarks/quality/squad_minilm.py --table                 # from the kept results

Runs examples/run_squad.py once for each method on the same data and steps. Keeps each run's all_results.json in
results/squad_minilm/, with the scores of the untrained head, and writes the table there.
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
from common import minilm

EXAMPLES = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "squad_minilm"
LEARNING_RATE = {"diff_pruning": 2e-4, "full": 2e-4, "head": 1e-3}
SETTINGS = {
    "max_steps": 300,
    "gating_ratio": 0.5,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "max_seq_length": 192,
    "doc_stride": 64,
    "max_eval_samples": 500,
    "warmup_steps": 20,
    "seed": 42,
}
"""Settings of all methods, kept with their results."""


def run(method: str, data_dir: str, work: Path) -> None:
    """Run one method, and keep its results."""
    output = work / method
    settings = {**SETTINGS, "learning_rate": LEARNING_RATE[method]}
    others = {
        "method": method,
        "data_dir": data_dir,
        "model_name_or_path": minilm(),
        "output_dir": output,
        "train_sampling_strategy": "group_by_length",
        "bf16": True,
        "use_cpu": True,
        "eval_on_start": True,
        "overwrite": True,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": "none",
    }
    words = [word for name, value in {**settings, **others}.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(EXAMPLES / "run_squad.py"), *words]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    first = next(entry for entry in history if entry["step"] == 0 and "eval_f1" in entry)
    untrained = {"untrained": {name: first[f"eval_{name}"] for name in ("loss", "exact_match", "f1")}}
    kept = {**untrained, **json.loads((output / "all_results.json").read_text()), "settings": settings}
    del kept["seconds"]  # the machine had other work to do
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{method}.json").write_text(json.dumps(kept, indent=1) + "\n")


HEADER = (
    "method (exact match / F1)",
    "untrained head",
    "after gating",
    "pruned to 0.5%",
    "after fixmask / at the end",
    "nonzeros",
    "adapter bytes",
)


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of exact match and F1 by phase, with a row for each run."""
    rows = []
    for result in results:
        method = result["method"]
        phases = ("untrained", "gated", "pruned", "fixmask" if "fixmask" in result else method)
        scores = [f"{result[p]['exact_match']:.1f} / {result[p]['f1']:.1f}" if p in result else "" for p in phases]
        nonzeros = f"{result['nnz']:,}" if "nnz" in result else {"full": "all", "head": "0"}[method]
        size = f"{result['adapter_bytes']:,}" if "adapter_bytes" in result else ""
        rows.append([method, *scores, nonzeros, size])
    return markdown(HEADER, rows) + "\n"


def main() -> None:
    """Run the given methods, then write the table of all kept results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="holds train*.parquet and validation*.parquet")
    parser.add_argument("--methods", nargs="+", default=list(LEARNING_RATE), choices=list(LEARNING_RATE))
    parser.add_argument("--work_dir", type=Path, default=Path("runs/squad_minilm"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.table:
        if options.data_dir is None:
            parser.error("--data_dir is needed, unless --table only shows the kept results")
        for method in options.methods:
            run(method, options.data_dir, options.work_dir)
    kept = [RESULTS / f"{method}.json" for method in LEARNING_RATE]
    text = table([json.loads(file.read_text()) for file in kept if file.exists()])
    (RESULTS / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
