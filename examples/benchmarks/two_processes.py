"""One process with batches of 16, and two under DistributedDataParallel with 8 each: is what they learn the same?

    python examples/benchmarks/two_processes.py --output examples/benchmarks/results   # four minutes, two cores

The stock Trainer with DiffPruningCallback teaches a small random BERT whether most of a row's tokens come from the upper half
of the vocabulary. The two processes (torchrun, gloo) must hold the same bits wherever a phase ends, in the diff and in the
head, or the exit code is 1. They sample gates and dropout otherwise than one process does, so that their results can only be
the same within noise: beside the positions that one process and two have in common stand those of two seeds of one process.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import peft
import torch
import transformers
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from diffpeft import DiffPruningCallback, DiffPruningConfig

SEEDS, BATCH = (0, 1, 2), 16
PHASES = ("gating", "pruning", "fixmask")
ONE, FIRST, SECOND = ("one process", "two processes", "two processes, the other")
SIZES = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARGUMENTS = {"learning_rate": 1e-3, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Fifteen tokens each."""
    ids = torch.randint(200, (count, 15), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": int((row >= 100).sum() > 7)} for row in ids]


def accuracy(prediction: Any) -> dict[str, float]:
    """The Trainer's hook."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Of all their bits."""
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def describe(trainer: Any) -> dict[str, Any]:
    """What the model is like in this process, and how good all are."""
    tuner = trainer.model.base_model
    diff = digest(part for pair in tuner.get_diff().values() for part in pair)
    head = digest(p for name, p in tuner.named_parameters() if ".modules_to_save." in name)
    right = trainer.evaluate()["eval_accuracy"]
    return {"density": tuner.expected_density(), "accuracy": right, "diff": diff, "head": head}


class Ends(TrainerCallback):
    """Describes the model where gating ends. One stands before DiffPruningCallback, one after it."""

    def __init__(self, pruning: DiffPruningCallback) -> None:
        self.pruning, self.trainer, self.found = pruning, None, dict[str, Any]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the transition describe it."""
        if state.global_step == self.pruning.transition_step:
            self.found = describe(self.trainer)


def train(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """All phases, in one of the processes."""
    torch.manual_seed(0)  # the base is the same whatever the seed
    base = BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=128))
    model = get_peft_model(base, DiffPruningConfig(task_type="SEQ_CLS", target_density=0.02))
    length = {"max_steps": options.steps, "per_device_train_batch_size": BATCH // int(os.environ["WORLD_SIZE"])}
    args = TrainingArguments(options.train, seed=seed, **length, **ARGUMENTS)
    pruning = DiffPruningCallback()
    before, after = Ends(pruning), Ends(pruning)
    data = make_rows(2000, 1), make_rows(1000, 2)
    trainer = Trainer(model, args, None, *data, compute_metrics=accuracy, callbacks=[before, pruning, after])
    before.trainer = after.trainer = trainer
    trainer.train()
    found = dict(zip(PHASES, (before.found, after.found, describe(trainer)), strict=True))
    diff = model.base_model.get_diff().items()
    return {**found, "positions": [f"{name} {at}" for name, (where, _) in diff for at in where.tolist()]}


def launch(processes: int, steps: int) -> list[list[dict[str, Any]]]:
    """What was found, by process and seed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        words = [__file__, "--steps", str(steps), "--train", folder]
        subprocess.run([sys.executable, *launcher, *words], check=True, stdout=subprocess.DEVNULL)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def overlap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The share of a diff's positions that the other has too."""
    return len({*one["positions"]} & {*other["positions"]}) / len(one["positions"])


def report(found: dict[str, list[Any]]) -> str:
    """In Markdown."""
    lines = [f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}", ""]
    lines += ["| processes | seed | density before pruning | after gating | after pruning | after fixmask |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for kind in (ONE, FIRST):
        for seed, run in zip(SEEDS, found[kind], strict=True):
            cells = [f"{run['gating']['density']:.3%}", *(f"{run[phase]['accuracy']:.1%}" for phase in PHASES)]
            lines.append(f"| {kind} | {seed} | {' | '.join(cells)} |")
    lines += ["", "| runs | positions in common, mean of three pairs | least | most |", "|---|---:|---:|---:|"]
    pairs = {"one process and two, the same seed": [*zip(found[ONE], found[FIRST], strict=True)]}
    pairs |= {f"{kind}, two seeds": [*combinations(found[kind], 2)] for kind in (ONE, FIRST)}
    for name, some in pairs.items():
        shares = [overlap(*pair) for pair in some]
        lines.append(f"| {name} | {sum(shares) / len(shares):.1%} | {min(shares):.1%} | {max(shares):.1%} |")
    same = found[FIRST] == found[SECOND]
    return "\n".join([*lines, "", f"the same bits on both ranks, in all phases: {'yes' if same else 'no'}", ""])


def main() -> None:
    """Train both ways, compare, show and keep what was found."""
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
        (options.output / "two_processes.md").write_text(text)
        (options.output / "two_processes.json").write_text(json.dumps(kept, indent=1) + "\n")
    if found[FIRST] != found[SECOND]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
