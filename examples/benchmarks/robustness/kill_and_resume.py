"""Training that is killed with `kill -9` again and again: does it end bit for bit where the unbroken run does?

    python examples/benchmarks/robustness/kill_and_resume.py --output runs/kill_and_resume    # two minutes, one core
    python examples/benchmarks/robustness/kill_and_resume.py --kills 200 --seed 1

The stock Trainer with DiffPruningCallback trains a small BERT and saves every third step. A process trains until it is
killed, and the next one resumes from `diffpeft.last_checkpoint`. A third of the kills come at any time; the others aim
at rare moments: starting up, saving, which deletes old checkpoints too, and the transition from gating to fixmask. The
exit code is 1 if the last checkpoint differs from the unbroken run's, or if a kill cost more than the steps since the
last save.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # a process with several threads cannot be forked safely
sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
from benchmarks.shared.report import markdown, versions
from peft import get_peft_model
from rich.progress import track
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from diffpeft import DiffPruningCallback, DiffPruningConfig, last_checkpoint

STEPS, SAVE_STEPS = 96, 3
RUN, LAST, LOG = "run", f"run/checkpoint-{STEPS}", "log.txt"
STARTING, GATING, SAVING, TRANSITION, FIXMASK = MOMENTS = ("starting up", "gating", "saving", "transition", "fixmask")
AIMS = (None, SAVING, None, STARTING, SAVING, TRANSITION)
"""Moments that the kills aim at, in turn; None is any moment."""
SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SAVES = {"save_strategy": "steps", "save_steps": SAVE_STEPS, "save_total_limit": 2, "logging_steps": 1}
ARGUMENTS = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, **SAVES}
IDS = torch.randint(100, (512, 8), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": ids, "labels": int(ids[0] >= 50)} for ids in IDS]
processes = multiprocessing.get_context("fork")  # a forked process has all imports already, which take seconds


def note(board: Any, step: int, moment: str) -> None:
    """Write the number of steps done and the present moment to the board, as one number, which no kill can tear."""
    board.value = step * len(MOMENTS) + MOMENTS.index(moment)


def read(board: Any) -> tuple[int, str]:
    """The steps and the moment that were written last."""
    return board.value // len(MOMENTS), MOMENTS[board.value % len(MOMENTS)]


class Notes(TrainerCallback):
    """Writes every moment of a training to the board; stands behind DiffPruningCallback."""

    def __init__(self, board: Any, pruning: DiffPruningCallback) -> None:
        self.board, self.pruning = board, pruning

    def say(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the phase, or that saving comes next."""
        phase = kwargs["model"].base_model.phase()
        note(self.board, state.global_step, SAVING if control.should_save else phase)

    on_step_begin = on_step_end = on_save = say

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write that the last update of gating is done, which pruning follows."""
        if state.global_step + 1 == self.pruning.transition_step:
            note(self.board, state.global_step + 1, TRANSITION)


def train(folder: Path, board: Any) -> None:
    """Begin or resume training, in a process of its own."""
    os.chdir(folder)
    checkpoint = last_checkpoint(RUN)
    with open(LOG, "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        torch.manual_seed(0)
        base = BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=64))
        model = get_peft_model(base, DiffPruningConfig(task_type="SEQ_CLS", target_density=0.02))
        args = TrainingArguments(RUN, max_steps=STEPS, learning_rate=1e-3, **ARGUMENTS)
        pruning = DiffPruningCallback(fixmask_warmup_steps=6)
        trainer = Trainer(model, args, train_dataset=ROWS, callbacks=[pruning, Notes(board, pruning)])
        trainer.train(resume_from_checkpoint=checkpoint)


def step_of(checkpoint: Path | str | None) -> int:
    """The number in a checkpoint's name; 0 where there is none."""
    return int(str(checkpoint).rpartition("-")[2]) if checkpoint else 0


class Aim(NamedTuple):
    """A kill some seconds after the first such moment at which `step` steps are done."""

    step: int
    moment: str | None
    seconds: float

    def is_met(self, step: int, moment: str) -> bool:
        """Whether the moment has come."""
        if STARTING in (moment, self.moment):
            return moment == self.moment
        behind = self.moment == TRANSITION and step > STEPS // 2  # it does not come again
        return step >= self.step and (behind or self.moment in (None, moment))


def make_aims(kills: int, seed: int) -> list[Aim]:
    """So many aims, in an order in which one run can meet them all."""
    rng, aims = random.Random(seed), []
    for index in range(kills):
        moment, step = AIMS[index % len(AIMS)], index * (STEPS - 4 * SAVE_STEPS) // kills
        if moment == TRANSITION:  # comes once, so that the aim must be set before it
            step = STEPS // 2 - 4 * SAVE_STEPS
        longest = 20 if moment == TRANSITION else 100
        aims.append(Aim(step, moment, 0.001 * longest ** rng.random()))  # moments last 1 ms here, 100 ms there
    return sorted(aims, key=lambda aim: aim.step)


def live(folder: Path, board: Any, aim: Aim | None = None) -> bool:
    """Train until the aim is met, or to the end; return whether the process was killed."""
    note(board, step_of(last_checkpoint(folder / RUN)), STARTING)
    process = processes.Process(target=train, args=(folder, board))
    process.start()
    while aim and process.is_alive() and not aim.is_met(*read(board)):
        time.sleep(0.0005)
    if aim:
        time.sleep(aim.seconds)
        process.kill()
    process.join()
    if process.exitcode not in (0, -9):
        raise SystemExit(f"training failed:\n{(folder / LOG).read_text()[-3000:]}")
    return process.exitcode != 0


def kill_and_resume(folder: Path, aims: list[Aim]) -> list[dict[str, Any]]:
    """Kill and resume one run by all aims; return the moment and the cost of each kill."""
    board, found = processes.RawValue("l"), []
    for aim in track([*aims, None], "killing", transient=True):
        if not live(folder, board, aim):
            break
        step, moment = read(board)
        checkpoint = step_of(last_checkpoint(folder / RUN))
        half = sum(step_of(path) > checkpoint for path in (folder / RUN).glob("checkpoint-*"))
        found.append({"moment": moment, "step": step, "lost": step - checkpoint, "half_written": half})
    return found


def contents(file: Path) -> bytes | str:
    """The contents of a file, to compare."""
    # Two pickles of equal optimizer states may differ in their references, so numbers are compared.
    if file.name == "optimizer.pt":
        return json.dumps(torch.load(file), default=torch.Tensor.tolist)
    return file.read_bytes()


def report(kills: list[dict[str, Any]], same: bool) -> str:
    """All results in Markdown."""
    rows = []
    for moment in MOMENTS:
        those = [kill for kill in kills if kill["moment"] == moment]
        most, half = max((kill["lost"] for kill in those), default=0), sum(kill["half_written"] for kill in those)
        rows.append([moment, str(len(those)), str(most), str(half)])
    parts = [
        versions(),
        f"{len(kills)} kills in {STEPS} steps, the transition after {STEPS // 2}, saved every {SAVE_STEPS}",
        markdown(("moment", "kills", "most steps lost", "half-written checkpoints passed over"), rows),
        "A half-written checkpoint is passed over until the run has come so far again.",
        f"ended bit for bit where the unbroken run did: {'yes' if same else 'no'}\n",
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Train unbroken and killed, compare, show and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of when they come")
    parser.add_argument("--output", type=Path, help="where kill_and_resume.md and .json go")
    options = parser.parse_args()
    logging.getLogger("diffpeft").setLevel(logging.ERROR)  # it warns of each checkpoint that is passed over
    with tempfile.TemporaryDirectory() as scratch:
        unbroken, killed = (Path(tempfile.mkdtemp(dir=scratch)) for _ in range(2))
        live(unbroken, processes.RawValue("l"))
        kills = kill_and_resume(killed, make_aims(options.kills, options.seed))
        ends = [{file.name: contents(file) for file in (folder / LAST).iterdir()} for folder in (unbroken, killed)]
    differing = sorted(name for name in {**ends[0], **ends[1]} if ends[0].get(name) != ends[1].get(name))
    text = report(kills, not differing)
    print(text)
    if options.output:
        results = {"seed": options.seed, "kills": kills, "files": sorted(ends[0]), "differing": differing}
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "kill_and_resume.md").write_text(text)
        (options.output / "kill_and_resume.json").write_text(json.dumps(results, indent=1) + "\n")
    if differing or any(kill["lost"] > SAVE_STEPS for kill in kills):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
