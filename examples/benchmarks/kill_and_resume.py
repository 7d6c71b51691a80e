"""What `kill -9` costs: a run that is killed again and again, and ends bit for bit where the unbroken one does.

    python examples/benchmarks/kill_and_resume.py --output examples/benchmarks/results   # two minutes, one core
    python examples/benchmarks/kill_and_resume.py --kills 200 --seed 1

The stock Trainer with DiffPruningCallback trains a small BERT and saves every third step. A process trains until it is
killed, the next goes on from `diffpeft.last_checkpoint`. A third of the kills come at any time; the others are aimed at what
is rare: starting up, saving, which deletes old checkpoints too, and the transition from gating to fixmask. The exit code is
1 if the last checkpoint is not the unbroken run's, or a kill cost more than the steps since the last save.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # one thread, because it is forked

import peft
import torch
import transformers
from peft import get_peft_model
from rich.progress import track
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from diffpeft import DiffPruningCallback, DiffPruningConfig, last_checkpoint

STEPS, SAVE_STEPS = 96, 3
RUN, LAST, LOG = "run", f"run/checkpoint-{STEPS}", "log.txt"
STARTING, GATING, SAVING, TRANSITION, FIXMASK = MOMENTS = ("starting up", "gating", "saving", "transition", "fixmask")
AIMS = (None, SAVING, None, STARTING, SAVING, TRANSITION)
"""What kills are aimed at, in turn; None is any moment."""
SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SAVES = {"save_strategy": "steps", "save_steps": SAVE_STEPS, "save_total_limit": 2, "logging_steps": 1}
ARGUMENTS = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, **SAVES}
IDS = torch.randint(100, (512, 8), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": ids, "labels": int(ids[0] >= 50)} for ids in IDS]
processes = multiprocessing.get_context("fork")  # what takes seconds to import is there at once


def note(board: Any, step: int, moment: str) -> None:
    """Say how many steps are done, and what is being done: in one number, so that no kill comes in between."""
    board.value = step * len(MOMENTS) + MOMENTS.index(moment)


def read(board: Any) -> tuple[int, str]:
    """What was said last, even if who said it is dead."""
    return board.value // len(MOMENTS), MOMENTS[board.value % len(MOMENTS)]


class Notes(TrainerCallback):
    """Says every moment of a training. It stands behind DiffPruningCallback."""

    def __init__(self, board: Any, pruning: DiffPruningCallback) -> None:
        self.board, self.pruning = board, pruning

    def say(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins; it has ended, and saving may come next; a checkpoint is there, and the one too many is gone."""
        phase = kwargs["model"].base_model.phase()
        note(self.board, state.global_step, SAVING if control.should_save else phase)

    on_step_begin = on_step_end = on_save = say

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update is made; gating's last is followed by pruning, in DiffPruningCallback.on_step_end."""
        if state.global_step + 1 == self.pruning.transition_step:
            note(self.board, state.global_step + 1, TRANSITION)


def train(folder: Path, board: Any) -> None:
    """Begin or go on, in a process of its own."""
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
    """Kill a process some seconds after a moment has come: its first one once `step` steps are done."""

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
    """As many as asked for, in an order in which one run can meet them all."""
    rng, aims = random.Random(seed), []
    for index in range(kills):
        moment, step = AIMS[index % len(AIMS)], index * (STEPS - 4 * SAVE_STEPS) // kills
        if moment == TRANSITION:  # the only one that a run can be led past
            step = STEPS // 2 - 4 * SAVE_STEPS
        longest = 20 if moment == TRANSITION else 100
        aims.append(Aim(step, moment, 0.001 * longest ** rng.random()))  # moments last 1 ms here, 100 ms there
    return sorted(aims, key=lambda aim: aim.step)


def live(folder: Path, board: Any, aim: Aim | None = None) -> bool:
    """Train until the aim is met, or to the end; whether the process was killed."""
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
    """One run in many lives; what each kill met and cost."""
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
    """The bytes; of the optimizer's state the numbers, since two pickles of the same may differ in what refers to what."""
    if file.name == "optimizer.pt":
        return json.dumps(torch.load(file), default=torch.Tensor.tolist)
    return file.read_bytes()


def report(kills: list[dict[str, Any]], same: bool) -> str:
    """In Markdown."""
    lines = [f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}", ""]
    lines += [f"{len(kills)} kills in {STEPS} steps, the transition after {STEPS // 2}, saved every {SAVE_STEPS}", ""]
    lines += ["| moment | kills | most steps lost | half-written checkpoints passed over |", "|---|---:|---:|---:|"]
    for moment in MOMENTS:
        those = [kill for kill in kills if kill["moment"] == moment]
        most, half = max((kill["lost"] for kill in those), default=0), sum(kill["half_written"] for kill in those)
        lines.append(f"| {moment} | {len(those)} | {most} | {half} |")
    lines += ["", "A half-written checkpoint is passed over until the run has come so far again.", ""]
    return "\n".join([*lines, f"ended bit for bit where the unbroken run did: {'yes' if same else 'no'}", ""])


def main() -> None:
    """Train unbroken and killed, compare, show and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of when they come")
    parser.add_argument("--output", type=Path, help="where kill_and_resume.md and .json go")
    options = parser.parse_args()
    logging.getLogger("diffpeft").setLevel(logging.ERROR)  # it warns of what is passed over
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
        (options.output / "kill_and_resume.md").write_text(text)
        (options.output / "kill_and_resume.json").write_text(json.dumps(results, indent=1) + "\n")
    if differing or any(kill["lost"] > SAVE_STEPS for kill in kills):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
