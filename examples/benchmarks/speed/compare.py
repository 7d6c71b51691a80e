"""Time of the same work by several checkouts of the package, in turn: what a change costs.

    git worktree add ../before <commit>
    python examples/benchmarks/speed/compare.py ../before . --json compare.json

Each checkout has a process of its own, in which its package is imported; one of them works at a time, and they take
turns for every repetition. A ratio is that of the medians, to the first checkout's. The model is a random BERT of
MiniLM's size (`--model`), in fp32; a training step is forward, backward, clipping, the gates' step, fused AdamW and
zero_grad, without dropout, on batches of 16 x 64.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

from benchmarks.shared.report import show, table

ACTIONS = (
    *("gating", "fixmask", "switch"),
    *("unmerged_1", "unmerged_32", "merged_1", "merged_32", "mixed_8x1", "mixed_8x4"),
)
"""Training steps; a switch between two merged adapters; passes of so many rows, or of so many adapters x rows."""
TASKS = 8
COLUMNS = {
    "action": ("action", "{}"),
    "checkout": ("checkout", "{}"),
    "ms": ("ms", "{:.2f}"),
    "ratio": ("ratio", "{:.2f}x"),
}


def prepare(action: str, size: str) -> Callable[[], Any]:
    """A function that does the work once; called in a worker, with a checkout's package."""
    import torch
    from benchmarks.shared.models import bert_config, make_batches
    from peft import get_peft_model
    from transformers import BertForSequenceClassification

    from diffpeft import DiffPruningConfig

    torch.manual_seed(0)
    config = bert_config(size)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    base = BertForSequenceClassification(config)
    if action in ("gating", "fixmask"):
        model = get_peft_model(base, DiffPruningConfig(task_type="SEQ_CLS", init_weights=action == "gating")).train()
        tuner = model.base_model
        if action == "fixmask":
            tuner.magnitude_prune()
        elif hasattr(tuner, "defer_gate_gradients"):
            tuner.defer_gate_gradients()  # as the callback of older checkouts does
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        batches, steps = make_batches(16, 64, torch.device("cpu")), iter(range(1 << 20))

        def step() -> None:
            number = next(steps)
            model(**batches[number % len(batches)]).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            if action == "gating":
                tuner.gate_step(min(600 + number, 999), 1000)
            optimizer.step()
            optimizer.zero_grad()

        return step
    names = [f"task{index}" for index in range(TASKS if action.startswith("mixed") else 2)]
    settings = DiffPruningConfig(task_type="SEQ_CLS", init_weights=False)
    model = get_peft_model(base, settings, adapter_name=names[0])
    model.base_model.magnitude_prune(adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
        model.base_model.magnitude_prune(adapter_name=name)
    model.eval()
    if action == "switch":
        turns = iter(range(1 << 20))
        return lambda: model.base_model.switch_adapter(names[next(turns) % 2])
    if action.startswith("merged"):
        model.merge_adapter()
    rows = int(action.rpartition("_")[2].rpartition("x")[2])
    count = rows * len(names) if action.startswith("mixed") else rows
    batch = {key: value for key, value in make_batches(count, 64, torch.device("cpu"))[0].items() if key != "labels"}
    if action.startswith("mixed"):
        batch["adapter_names"] = names * rows

    @torch.no_grad()
    def run() -> None:
        model(**batch)

    return run


def work(action: str, size: str) -> None:
    """Do the work as often as each line of the standard input says, and print the seconds of each time."""
    run = prepare(action, size)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def compare(action: str, checkouts: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each checkout."""
    command = [sys.executable, __file__, "--worker", action, "--model", options.model]
    workers = []
    for checkout in checkouts:
        environment = {**os.environ, "PYTHONPATH": str(Path(checkout).resolve())}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        workers.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    seconds: list[list[float]] = [[] for _ in workers]
    for turn in range(options.repeats + 1):
        for worker, found in zip(workers, seconds, strict=True):
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(f"{options.times if turn else 6}\n")
            worker.stdin.flush()
            part = json.loads(worker.stdout.readline())
            found += part if turn else []  # the first turn compiles and warms up
    for worker in workers:
        worker.communicate()
    medians = [statistics.median(found) for found in seconds]
    return [
        {"action": action, "checkout": Path(checkout).resolve().name, "ms": 1e3 * median, "ratio": median / medians[0]}
        for checkout, median in zip(checkouts, medians, strict=True)
    ]


def main(words: list[str] | None = None) -> None:
    """Compare the checkouts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", help="directories that hold the package, the one to compare with first")
    parser.add_argument("--actions", nargs="+", default=list(ACTIONS), choices=ACTIONS)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--repeats", type=int, default=12, help="turns of each checkout")
    parser.add_argument("--times", type=int, default=5, help="repetitions in a turn")
    parser.set_defaults(device="cpu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", choices=ACTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.worker:
        work(options.worker, options.model)
        return
    rows = [row for action in options.actions for row in compare(action, options.checkouts, options)]
    show(options, rows, table(rows, COLUMNS))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
