"""One process with batches of 16, and two under DistributedDataParallel with 8 each: is what they learn the same?

    python examples/benchmarks/two_processes.py --output examples/benchmarks/results   # three minutes, two cores

The stock Trainer with DiffPruningCallback teaches a small random BERT whether most of a row's tokens come from the upper half
of the vocabulary. The two processes (torchrun, gloo) must hold the same bits wherever a phase ends, in the diff and in the
head, or the exit code is 1. They sample gates and dropout otherwise than one process does, so that their results can only be
the same within noise: beside the positions that one process and two have in common stand those of two seeds of one process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import peft
import torch
import transformers
from peft import get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from diffpeft import DiffPruningCallback, DiffPruningConfig

SEEDS, BATCH = (0, 1, 2), 16
PHASES = ("gating", "pruning", "fixmask")
SIZES = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARGUMENTS = {
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Fifteen tokens each."""
    ids = torch.randint(200, (count, 15), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": int((row >= 100).sum() > 7)} for row in ids]


def accuracy(prediction: Any) -> dict[str, float]:
    """The Trainer's hook."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Ends(TrainerCallback):
    """Notes the model where a phase ends. One stands before DiffPruningCallback, one after it."""

    def __init__(self, pruning: DiffPruningCallback) -> None:
        self.pruning, self.trainer, self.found = pruning, None, dict[str, Any]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the transition note the model."""
        if state.global_step == self.pruning.transition_step:
            self.found = describe(self.trainer)


def describe(trainer: Any) -> dict[str, Any]:
    """What the model is like in this process, and its accuracy."""
    tuner = trainer.model.base_model
    diff = {f"{name}, {part}": pair[part] for name, pair in tuner.get_diff().items() for part in (0, 1)}
    head = {name: p.detach().clone() for name, p in tuner.named_parameters() if ".modules_to_save." in name}
    found = {"density": tuner.expected_density(), "accuracy": trainer.evaluate()["eval_accuracy"]}
    return {**found, "diff": diff, "head": head}


def train(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """All phases, in one of the processes."""
    torch.manual_seed(0)  # the base is the same whatever the seed
    base = BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=128))
    model = get_peft_model(base, DiffPruningConfig(task_type="SEQ_CLS", target_density=0.02))
    length = {"max_steps": options.steps, "per_device_train_batch_size": BATCH // int(os.environ["WORLD_SIZE"])}
    args = TrainingArguments(options.train, seed=seed, learning_rate=1e-3, **length, **ARGUMENTS)
    pruning = DiffPruningCallback()
    before, after = Ends(pruning), Ends(pruning)
    data = make_rows(2000, 1), make_rows(1000, 2)
    trainer = Trainer(model, args, None, *data, compute_metrics=accuracy, callbacks=[before, pruning, after])
    before.trainer = after.trainer = trainer
    trainer.train()
    return dict(zip(PHASES, (before.found, after.found, describe(trainer)), strict=True))


def launch(processes: int, steps: int) -> list[tuple[dict[str, Any], ...]]:
    """What was found, by seed and process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        words = [__file__, "--steps", str(steps), "--train", folder]
        subprocess.run([sys.executable, *launcher, *words], check=True, stdout=subprocess.DEVNULL)
        return list(zip(*(torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)), strict=True))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def overlap(*runs: dict[str, Any]) -> float:
    """The share of a diff's positions that the other has too."""
    places = [
        {(name, at) for name, where in run["fixmask"]["diff"].items() if name.endswith(" 0") for at in where.tolist()}
        for run in runs
    ]
    return len(places[0] & places[1]) / len(places[0])


def summary(alone: list[dict[str, Any]], both: list[tuple[dict[str, Any], ...]]) -> dict[str, Any]:
    """The numbers that are kept."""
    first = [one for one, _ in both]
    pairs = {
        "one process and two, the same seed": [*zip(alone, first, strict=True)],
        "one process, two seeds": [*combinations(alone, 2)],
        "two processes, two seeds": [*combinations(first, 2)],
    }
    parts = [(part, phase) for phase in PHASES for part in ("diff", "head")]
    return {
        "runs": [
            {"processes": n, "seed": seed, "density": run["gating"]["density"]}
            | {f"after {phase}": run[phase]["accuracy"] for phase in PHASES}
            for n, runs in ((1, alone), (2, first))
            for seed, run in zip(SEEDS, runs, strict=True)
        ],
        "overlaps": {name: [overlap(*pair) for pair in some] for name, some in pairs.items()},
        "same": {
            f"{part} after {phase}": all(equal(a[phase][part], b[phase][part]) for a, b in both)
            for part, phase in parts
        },
    }


def report(found: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}", ""]
    lines += [
        "| processes | seed | expected density before pruning | " + " | ".join(f"after {p}" for p in PHASES) + " |"
    ]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for run in found["runs"]:
        cells = [f"{run['density']:.3%}", *(f"{run[f'after {phase}']:.1%}" for phase in PHASES)]
        lines.append(f"| {run['processes']} | {run['seed']} | {' | '.join(cells)} |")
    lines += ["", "| runs | positions in common, mean of three pairs | least | most |", "|---|---:|---:|---:|"]
    for name, shares in found["overlaps"].items():
        lines.append(f"| {name} | {sum(shares) / len(shares):.1%} | {min(shares):.1%} | {max(shares):.1%} |")
    differing = [name for name, same in found["same"].items() if not same]
    verdict = f"no: {', '.join(differing)}" if differing else f"yes: {', '.join(found['same'])}"
    return "\n".join([*lines, "", f"both processes hold the same bits: {verdict}", ""])


def main() -> None:
    """Train both ways, compare, show and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="half of them gating")
    parser.add_argument("--output", type=Path, help="where two_processes.md and .json go")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        torch.save([train(seed, options) for seed in SEEDS], options.train / f"{os.environ['RANK']}.pt")
        return
    alone, both = launch(1, options.steps), launch(2, options.steps)
    found = {"steps": options.steps, **summary([run for (run,) in alone], both)}
    print(report(found))
    if options.output:
        (options.output / "two_processes.md").write_text(report(found))
        (options.output / "two_processes.json").write_text(json.dumps(found, indent=1) + "\n")
    if not all(found["same"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
