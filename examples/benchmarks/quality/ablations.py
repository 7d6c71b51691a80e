"""Takes Diff Pruning apart on held-out training rows: one change at a time to the way that glue.py trains "gates".

    python examples/benchmarks/quality/ablations.py run --data_dir <glue>     # all variants, cheap tasks first
    python examples/benchmarks/quality/ablations.py table

Runs append to results/glue/ablations.jsonl and are skipped once they are there, as glue.py's. `VARIANTS` says what each
one changes; `--variants` and `--tasks` choose some of them.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
from benchmarks.quality.glue import METRIC, STEPS, Setting, is_done, load, run
from benchmarks.shared.report import markdown
from transformers import TrainerCallback

from diffpeft import DiffPruningModel
from diffpeft.gates.update import rules
from diffpeft.sparse.top_k import global_top_k
from diffpeft.trainer.learning_rate import RateSchedule
from diffpeft.tuner import pruning

RESULTS = Path(__file__).parent / "results" / "glue"
FILE = RESULTS / "ablations.jsonl"
TASKS = ("cola", "stsb")
LEARNING_RATE = 2e-4


class Variant(NamedTuple):
    """One way to train that differs from the base variant in what its name says."""

    about: str
    changes: dict[str, Any] = {}
    """Arguments of the config and the callback; `rules.*` are constants; `prepared` explains others."""
    learning_rate: float = LEARNING_RATE
    method: str = "gates"
    gating_ratio: float = 0.5


VARIANTS = {
    "base": Variant("glue.py's way: gating takes half of the run"),
    "share 0.25": Variant("gating takes a quarter of the run", gating_ratio=0.25),
    "share 0.1": Variant("gating takes a tenth of the run", gating_ratio=0.1),
    "share 0.7": Variant("gating takes 70% of the run", gating_ratio=0.7),
    "rate 4e-4": Variant("twice the learning rate, in both phases", learning_rate=4e-4),
    "rate 8e-4": Variant("four times the learning rate, in both phases", learning_rate=8e-4),
    "fixmask 4e-3": Variant("twice the rate in fixmask", {"fixmask_learning_rate": 4e-3}),
    "fixmask 8e-3": Variant("four times the rate in fixmask", {"fixmask_learning_rate": 8e-3}),
    "fixmask 1e-3": Variant("half the rate in fixmask", {"fixmask_learning_rate": 1e-3}),
    "warm-up": Variant("fixmask's rate rises over its first 6%", {"fixmask_warmup_steps": 0.06}),
    "scheduled": Variant("gating keeps the scheduled rate as gates close", {"rate_in_gating": "scheduled"}),
    "rewind": Variant("kept values begin at zero", {"values": "zero"}),
    "unstructured": Variant("no group gates", {"structured": False}),
    "hold 0.6": Variant("gates move from 60% of gating on", {"rules.HOLD_SHARE": 0.6}),
    "hold 0": Variant("gates move from the first step", {"rules.HOLD_SHARE": 0.0}),
    "no embeddings": Variant("embeddings are not adapted", {"exclude_modules": ".*embeddings.*"}),
    "no gates": Variant("selection by magnitude", method="magnitude"),
    "prefilter": Variant("only the tenth that gradients point at is gated", {"prefilter": 0.1}),
    "positions": Variant("base, which keeps its positions for the next", {"positions": "keep"}),
    "from the start": Variant("base's positions, trained for the whole run", {"positions": "take"}, 2e-3),
    "random, linear": Variant(
        "random positions in linear layers alone", {"target_modules": "all-linear"}, 2e-3, "random"
    ),
    "gradient, linear": Variant(
        "largest gradients in linear layers", {"target_modules": "all-linear"}, 2e-3, "gradient"
    ),
    "from the start, fast": Variant("the same at 8e-3", {"positions": "take"}, 8e-3),
}


class AtTransition(TrainerCallback):
    """Changes the diff right after pruning."""

    def __init__(self, change: Callable[[DiffPruningModel], None]) -> None:
        self.change, self.gating = change, True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call `change` before the first step of fixmask."""
        tuner = DiffPruningModel.of(kwargs["model"])
        if self.gating and tuner.phase() == "fixmask":
            self.gating = False
            self.change(tuner)


class AtStart(TrainerCallback):
    """Changes the adapter before there is an optimizer."""

    def __init__(self, change: Callable[[DiffPruningModel], None]) -> None:
        self.change = change

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call `change` at the end of the Trainer's constructor."""
        self.change(DiffPruningModel.of(kwargs["model"]))


class PruningCost(TrainerCallback):
    """Notes the loss on the held-out rows at the end of gating, and after pruning."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate with deterministic gates; this callback comes before the one that prunes."""
        if state.global_step == round(state.max_steps / 2):
            self.found["gated_loss"] = self.trainer.evaluate(self.trainer.held_out)["eval_loss"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the pruned model, before it trains on."""
        if "gated_loss" in self.found and "pruned_loss" not in self.found:
            self.found["pruned_loss"] = self.trainer.evaluate(self.trainer.held_out)["eval_loss"]


class Prefilter(TrainerCallback):
    """Closes the gates of all entries except a share with the largest squared gradients of eight batches."""

    def __init__(self, share: float) -> None:
        self.share = share

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the gradients of w, which is zero, so that they are those of the base's parameters."""
        model, tuner = kwargs["model"], DiffPruningModel.of(kwargs["model"])
        gates = [layer.gates_of_parameter("default", name)[:2] for layer in tuner.all_layers() for name in layer.shapes]
        squares = [torch.zeros(w.numel()) for w, _ in gates]
        for batch, _ in zip(kwargs["train_dataloader"], range(8), strict=False):
            model.zero_grad()
            model(**batch).loss.backward()
            for square, (w, _) in zip(squares, gates, strict=True):
                square.add_(w.grad.reshape(-1).square())
        model.zero_grad()
        kept, _ = global_top_k(
            [partial(list, [square]) for square in squares], int(self.share * sum(map(len, squares)))
        )
        for positions, (_, log_alpha) in zip(kept, gates, strict=True):
            flat = log_alpha.data.view(-1)
            opened = flat[positions].clone()
            flat.fill_(-20.0)
            flat[positions] = opened


def rewind(tuner: DiffPruningModel) -> None:
    """Set the kept values to zero."""
    for layer in tuner.all_layers():
        for diff in layer.sparse_diffs("default").values():
            diff.parameter.data.zero_()


def save(path: Path, tuner: DiffPruningModel) -> None:
    """Write the positions that gating chose."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: positions for name, (positions, _) in tuner.get_diff().items()}, path)


def take(path: Path, tuner: DiffPruningModel) -> None:
    """Keep the positions that another run chose, with values of zero."""
    chosen = torch.load(path)

    def choice(layer: Any, name: str) -> Any:
        scores = torch.zeros(layer.shapes[name].numel())
        scores[chosen.get(layer.parameter_key(name), torch.zeros(0, dtype=torch.long))] = 1.0
        return partial(list, [scores]), partial(torch.zeros_like, dtype=torch.float32)

    pruning.keep_largest(tuner, "default", None, choice, None)


@contextmanager
def prepared(setting: Setting, work_dir: Path) -> Iterator[list[TrainerCallback]]:
    """The callbacks and constants of a variant, for a block.

    Its changes that are no arguments: `values` of "zero" rewinds at pruning; with `positions`, "keep" writes them and
    "take" trains them from the start; `rate_in_gating` of "scheduled" does not raise it; `prefilter` is a share.
    """
    changes, callbacks = setting.changes, []
    where = work_dir / "positions" / f"{setting.task}-{setting.seed}.pt"
    with ExitStack() as stack:
        for name, value in changes.items():
            if name.startswith("rules."):
                stack.enter_context(mock.patch.object(rules, name.removeprefix("rules."), value))
        if changes.get("rate_in_gating") == "scheduled":
            stack.enter_context(mock.patch.object(RateSchedule, "gating_factor", return_value=1.0))
        if changes.get("values") == "zero":
            callbacks.append(AtTransition(rewind))
        if changes.get("positions") == "keep":
            callbacks.append(AtTransition(partial(save, where)))
            callbacks.append(PruningCost())
        if changes.get("positions") == "take":
            callbacks.append(AtStart(partial(take, where)))
        if "prefilter" in changes:
            callbacks.append(Prefilter(changes["prefilter"]))
        yield callbacks


def setting_of(name: str, task: str, seed: int = 1) -> Setting:
    """The run of a variant."""
    _, changes, rate, method, ratio = VARIANTS[name]
    if changes.get("positions") == "take":
        changes = {**changes, "gating_steps": 0, "fixmask_learning_rate": rate}
    return Setting(task, method, rate, seed, True, STEPS[task], gating_ratio=ratio, changes=changes)


def show(lines: list[dict[str, Any]], seeds: list[int]) -> str:
    """A Markdown table: each variant's metric and loss by task, mean over seeds."""
    rows = []
    for name, variant in VARIANTS.items():
        row = [name, variant.about]
        for task in TASKS:
            wanted = [setting_of(name, task, seed) for seed in seeds]
            found = [line for line in lines if any(is_done(setting, [line]) for setting in wanted)]
            row.append(
                f"{statistics.mean(100 * line[METRIC[task]] for line in found):.1f} ({len(found)})" if found else ""
            )
            row.append(f"{statistics.mean(line['loss'] for line in found):.3f}" if found else "")
        rows.append(row)
    return markdown(
        ["variant", "change", *(f"{task} {what}" for task in TASKS for what in (METRIC[task], "loss"))], rows
    )


def main() -> None:
    """Run what is missing, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("run", "table"))
    parser.add_argument("--data_dir", help="holds <task>/{train,validation}.parquet; default: the hub's nyu-mll/glue")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--tasks", nargs="+", choices=list(STEPS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--work_dir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--save_steps", type=int, default=1000)
    parser.add_argument("--lane", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
    if options.stage == "run":
        wanted = [
            setting_of(n, task, seed) for seed in options.seeds for n in options.variants for task in options.tasks
        ]
        for index, setting in enumerate(wanted):
            if index % options.lanes == options.lane and not is_done(setting, load(FILE)):
                with prepared(setting, options.work_dir) as callbacks:
                    line = run(setting, options, callbacks)
                for callback in callbacks:
                    line.update(getattr(callback, "found", {}))
                with open(FILE, "a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    text = show(load(FILE), [1, 2, 3])
    (RESULTS / "ablations.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
