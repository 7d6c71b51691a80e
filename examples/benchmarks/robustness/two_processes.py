"""Training in two processes beside one: is it the same on both ranks, and as good?

    python examples/benchmarks/robustness/two_processes.py --output runs/two_processes    # four minutes, two cores

The stock Trainer with DiffPruningCallback teaches a small random BERT whether most of a row's tokens come from the
upper half of the vocabulary: in one process with batches of 16, and in two under DistributedDataParallel (torchrun,
gloo) with 8 each. The two processes must hold the same bits at the end of each phase, in the diff and in the head, or
the exit code is 1. They sample gates and dropout differently from one process, so that results can only be equal
within noise. As a measure of noise, the positions that one process and two have in common stand beside those of two
seeds of one process.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
from benchmarks.shared.processes import read_ranks, run_in_processes
from benchmarks.shared.report import markdown, versions
from benchmarks.shared.small_task import make_base, make_rows
from common import AtTransition
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from diffpeft import DiffPruningCallback, DiffPruningConfig

SEEDS, BATCH = (0, 1, 2), 16
PHASES = ("gating", "pruning", "fixmask")
ONE, FIRST, SECOND = ("one process", "two processes", "two processes, the other")
ARGUMENTS = {"learning_rate": 1e-3, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers; the Trainer's `compute_metrics`."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of all bits of the tensors."""
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def describe(trainer: Any) -> dict[str, Any]:
    """Expected density, hashes of diff and head in this process, and accuracy over all processes."""
    tuner = trainer.model.base_model
    diff = digest(part for pair in tuner.get_diff().values() for part in pair)
    head = digest(p for name, p in tuner.named_parameters() if ".modules_to_save." in name)
    right = trainer.evaluate()["eval_accuracy"]
    return {"density": tuner.expected_density(), "accuracy": right, "diff": diff, "head": head}


def train(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train in all phases, in one of the processes; describe the model after each phase."""
    model = get_peft_model(make_base(), DiffPruningConfig(task_type="SEQ_CLS", target_density=0.02))
    length = {"max_steps": options.steps, "per_device_train_batch_size": BATCH // int(os.environ["WORLD_SIZE"])}
    args = TrainingArguments(options.train, seed=seed, **length, **ARGUMENTS)
    found: dict[str, Any] = {}
    pruning = DiffPruningCallback()
    callbacks = [
        AtTransition(pruning, lambda model: found.update(gating=describe(trainer))),
        pruning,
        AtTransition(pruning, lambda model: found.update(pruning=describe(trainer))),
    ]
    data = make_rows(2000, 1), make_rows(1000, 2)
    trainer = Trainer(model, args, None, *data, compute_metrics=accuracy, callbacks=callbacks)
    trainer.train()
    found["fixmask"] = describe(trainer)
    diff = model.base_model.get_diff().items()
    return {**found, "positions": [f"{name} {at}" for name, (positions, _) in diff for at in positions.tolist()]}


def launch(processes: int, steps: int) -> list[list[dict[str, Any]]]:
    """Train in so many processes; what each found, by seed."""
    with tempfile.TemporaryDirectory() as folder:
        run_in_processes(processes, __file__, "--steps", str(steps), "--train", folder)
        return read_ranks(Path(folder), processes)


def overlap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Share of the positions of one diff that the other has, too."""
    return len({*one["positions"]} & {*other["positions"]}) / len(one["positions"])


def report(found: dict[str, list[Any]]) -> str:
    """All results in Markdown."""
    runs = []
    for kind in (ONE, FIRST):
        for seed, run in zip(SEEDS, found[kind], strict=True):
            right = (f"{run[phase]['accuracy']:.1%}" for phase in PHASES)
            runs.append([kind, str(seed), f"{run['gating']['density']:.3%}", *right])
    header = ("processes", "seed", "density before pruning", "after gating", "after pruning", "after fixmask")
    pairs = {"one process and two, the same seed": [*zip(found[ONE], found[FIRST], strict=True)]}
    pairs |= {f"{kind}, two seeds": [*combinations(found[kind], 2)] for kind in (ONE, FIRST)}
    common = []
    for name, some in pairs.items():
        shares = [overlap(*pair) for pair in some]
        common.append([name, *(f"{share:.1%}" for share in (sum(shares) / len(shares), min(shares), max(shares)))])
    tables = [
        markdown(header, runs),
        markdown(("runs", "positions in common, mean of three pairs", "least", "most"), common),
    ]
    same = found[FIRST] == found[SECOND]
    last = f"the same bits on both ranks, in all phases: {'yes' if same else 'no'}\n"
    return "\n\n".join([versions(), *tables, last])


def main() -> None:
    """Train in one process and in two, compare, show and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="half of them gating")
    parser.add_argument("--output", type=Path, help="where two_processes.md and .json go")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        (options.train / f"{os.environ['RANK']}.json").write_text(json.dumps([train(seed, options) for seed in SEEDS]))
        return
    found = dict(zip((ONE, FIRST, SECOND), launch(1, options.steps) + launch(2, options.steps), strict=True))
    print(text := report(found))
    if options.output:
        kept = {kind: [{phase: run[phase] for phase in PHASES} for run in runs] for kind, runs in found.items()}
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "two_processes.md").write_text(text)
        (options.output / "two_processes.json").write_text(json.dumps(kept, indent=1) + "\n")
    if found[FIRST] != found[SECOND]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
