"""Gradient of the L0 penalty on the gates: is it complete, however the loss is scaled, averaged or replaced?

    python examples/benchmarks/robustness/penalty.py --json penalty.json > penalty.md      # a minute, two cores

A small random BERT makes its first update of the gates in the stock Trainer, with a fixed lambda and with lambda 0.
The difference between the gradients in the gates' moments, over lambda times the gradient of `l0_penalty()` by
autograd, must be 1 for each gate, or the exit code is 1. For comparison there is the same ratio for a penalty that the
tuner's forward adds to `outputs.loss`, as AdaLoRA does; clipping scales it together with the gradient of the task, and
the ratio shows both. The last column is the expected density after 20 updates with the automatic lambda, over its
target.

Accelerate has no fp16 on CPUs (the Trainer's `fp16=True` trains in fp32 there), so that row is a loop with a
GradScaler.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
import transformers
from benchmarks.shared.processes import read_ranks, run_in_processes
from benchmarks.shared.report import markdown, versions
from benchmarks.shared.small_task import make_base, make_rows
from peft import get_peft_model
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from diffpeft import DiffPruningCallback, DiffPruningConfig

LAMBDA, TARGET, STEPS, BATCH = 1e-3, 0.02, 20, 16
LOOP, PROCESSES, OWN_LOSS, TASK_TYPE = "loop", "processes", "compute_loss_func", "task_type"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient accumulation, 4 parts": {"gradient_accumulation_steps": 4},
    "gradients clipped to a norm of 0.01": {"max_grad_norm": 0.01},
    "label smoothing of 0.1": {"label_smoothing_factor": 0.1},
    "a loss of one's own, times 100": {OWN_LOSS: True},
    "no task_type": {TASK_TYPE: None},
    "bf16": {"bf16": True},
    "fp16, a GradScaler of 65,536": {LOOP: True},
    "two processes, DistributedDataParallel": {PROCESSES: 2},
}
# No clipping, except in its own row: it would scale a penalty in the loss together with the rest.
ARGUMENTS = {"learning_rate": 1e-3, "max_grad_norm": 1e6, "save_strategy": "no", "report_to": "none", "use_cpu": True}


def make_model(l0_lambda: float | str, task_type: str | None) -> Any:
    """The same small BERT at each call, with a random diff, so that the task's gradient reaches the gates at once."""
    base = make_base(max_position_embeddings=32)
    settings = {"task_type": task_type, "l0_lambda": l0_lambda, "init_weights": False}
    return get_peft_model(base, DiffPruningConfig(target_density=TARGET, **settings))


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross entropy times 100; the Trainer's `compute_loss_func`."""
    return 100 * torch.nn.functional.cross_entropy(outputs["logits"], labels)


def add_to_loss(model: Any) -> None:
    """Have the tuner's forward add the penalty to the loss of the outputs, as AdaLoRA's does."""

    def add(tuner: Any, inputs: Any, outputs: Any) -> Any:
        if outputs.get("loss") is not None:
            outputs["loss"] = outputs["loss"] + LAMBDA * tuner.l0_penalty()
        return outputs

    model.base_model.register_forward_hook(add)


def closed_form(model: Any) -> dict[str, Tensor]:
    """Gradients of the penalty by autograd, under the names of the gates' moments."""
    gates = {name: p for name, p in model.named_parameters() if "log_alpha" in name}
    gradients = torch.autograd.grad(model.base_model.l0_penalty(), list(gates.values()))
    return {name.replace("log_alpha", "exp_avg"): g for name, g in zip(gates, gradients, strict=True)}


def moments(model: Any) -> dict[str, Tensor]:
    """Gradients of the first update, from Adam's first moments, which are a tenth of them."""
    return {name: 10 * b.double() for name, b in model.named_buffers() if "exp_avg." in name}


class Note(TrainerCallback):
    """Records the gradients of the first update, and the expected density after each update."""

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}
        self.density = 0.0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record them after DiffPruningCallback has moved the gates; pruning comes later."""
        model = kwargs["model"]
        self.moments = self.moments or moments(model)
        self.density = model.base_model.expected_density()


def with_trainer(model: Any, steps: int, options: dict[str, Any]) -> Note:
    """Gate in the stock Trainer, for all of the steps."""
    note, length = Note(), {"max_steps": steps, "disable_tqdm": True, "logging_strategy": "no"}
    parts = options.get(PROCESSES, 1) * options.get("gradient_accumulation_steps", 1)
    given = {name: value for name, value in options.items() if name not in (PROCESSES, OWN_LOSS, TASK_TYPE)}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, per_device_train_batch_size=BATCH // parts, **{**ARGUMENTS, **given}, **length)
        callbacks = [DiffPruningCallback(gating_ratio=1.0), note]
        loss = own_loss if options.get(OWN_LOSS) else None
        trainer = Trainer(model, args, None, make_rows(640, 1), compute_loss_func=loss, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return note


def with_scaler(model: Any, steps: int) -> Note:
    """Gate in a loop of one's own with the forward pass in fp16 and a GradScaler."""
    note, rows = Note(), make_rows(640, 1)
    torch.manual_seed(42)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    model.train()
    for step in range(steps):
        part = rows[step * BATCH : (step + 1) * BATCH]
        batch = {key: torch.stack([torch.as_tensor(row[key]) for row in part]) for key in part[0]}
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        model.base_model.gate_step(step, steps)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        note.on_optimizer_step(None, None, None, model=model)
    return note


def measure(name: str) -> dict[str, Any]:
    """Measure a setting, in one of its processes."""
    options = SETTINGS[name]

    def run(l0_lambda: float | str, steps: int = 1, in_loss: bool = False) -> Note:
        model = make_model(l0_lambda, options.get(TASK_TYPE, "SEQ_CLS"))
        if in_loss:
            add_to_loss(model)
        return with_scaler(model, steps) if LOOP in options else with_trainer(model, steps, options)

    without = run(0.0).moments
    wanted = {key: LAMBDA * g.double() for key, g in closed_form(make_model(0.0, "SEQ_CLS")).items()}

    def share(found: dict[str, Tensor]) -> list[float]:
        ratios = torch.cat([((found[key] - without[key]) / wanted[key]).reshape(-1) for key in wanted])
        return [float(ratios.min()), float(ratios.max())]

    norm = float(torch.stack([g.norm() for g in without.values()]).norm())
    with_penalty = run(LAMBDA).moments
    if max(norm, float(torch.stack([g.norm() for g in with_penalty.values()]).norm())) >= 1:
        raise SystemExit(f"{name}: the gates' gradients are clipped at a norm of 1; lower LAMBDA")
    result = {"task": norm, "gates": share(with_penalty), "loss": share(run(0.0, in_loss=True).moments)}
    return {**result, "density": run("auto", STEPS).density / TARGET}


def in_processes(name: str) -> dict[str, Any]:
    """Measure a setting in several processes, which must all find the same."""
    count = SETTINGS[name][PROCESSES]
    with tempfile.TemporaryDirectory() as folder:
        run_in_processes(count, __file__, "--worker", name, folder)
        found = read_ranks(Path(folder), count)
    if any(other != found[0] for other in found):
        raise SystemExit(f"{name}: the processes differ: {found}")
    return dict(found[0])


def interval(bounds: list[float]) -> str:
    """The least and the most of all gates, or one figure if they are the same."""
    least, most = (f"{bound:.3f}" for bound in bounds)
    return least if least == most else f"{least} to {most}"


def report(found: dict[str, dict[str, Any]]) -> str:
    """All results in Markdown."""
    header = (
        "setting",
        "norm of the task's gradient on the gates",
        "the penalty's part of the gates' gradient, over lambda times its closed form",
        "the same if it is added to `outputs.loss`",
        "automatic: expected density over target",
    )
    rows = [
        [name, f"{run['task']:.2e}", interval(run["gates"]), interval(run["loss"]), f"{run['density']:.3f}"]
        for name, run in found.items()
    ]
    return f"{versions()}\n\n{markdown(header, rows)}"


def main() -> None:
    """Measure all settings, show and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    if options.worker:
        name, folder = options.worker
        (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(measure(name)))
        return
    found = {name: (in_processes if PROCESSES in SETTINGS[name] else measure)(name) for name in SETTINGS}
    print(report(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if any(abs(bound - 1) > 1e-3 for run in found.values() for bound in run["gates"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
