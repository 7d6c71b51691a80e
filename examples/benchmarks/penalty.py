"""What of the L0 penalty reaches the gates, however the loss is scaled, averaged or replaced?

    python examples/benchmarks/penalty.py --json examples/benchmarks/results/penalty.json \\
        > examples/benchmarks/results/penalty.md                                             # a minute, two cores

A small random BERT makes its first update of the gates in the stock Trainer, once with a fixed lambda and once with none. The
difference of the gradients that reached the gates' moments, over lambda times the gradient of `l0_penalty()` by autograd,
must be 1 for each gate, or the exit code is 1. Beside it stands the same for a penalty that the tuner's forward adds to
`outputs.loss`, as AdaLoRA does (where clipping scales it, it scales the task's gradient with it, and the difference shows both);
and for the automatic lambda the expected density after 20 updates over its target.

Accelerate has no fp16 on CPUs (the Trainer's `fp16=True` trains in fp32 there), so that row is a loop with a GradScaler.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import peft
import torch
import transformers
from peft import get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from diffpeft import DiffPruningCallback, DiffPruningConfig

LAMBDA, TARGET, STEPS, BATCH = 1e-3, 0.02, 20, 16
SIZES = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
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
# No clipping but where a row is about it: it would scale a penalty in the loss together with the rest.
ARGUMENTS = {"learning_rate": 1e-3, "max_grad_norm": 1e6, "save_strategy": "no", "report_to": "none", "use_cpu": True}


def make_rows(count: int) -> list[dict[str, Any]]:
    """Fifteen tokens each."""
    ids = torch.randint(200, (count, 15), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": int((row >= 100).sum() > 7)} for row in ids]


def make_model(l0_lambda: float | str, task_type: str | None) -> Any:
    """The same at each call. The diff starts at random, so that the task pulls on the gates from the first update on."""
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=128, max_position_embeddings=32))
    settings = {"task_type": task_type, "l0_lambda": l0_lambda, "init_weights": False}
    return get_peft_model(base, DiffPruningConfig(target_density=TARGET, **settings))


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The Trainer's hook."""
    return 100 * torch.nn.functional.cross_entropy(outputs["logits"], labels)


def add_to_loss(model: Any) -> None:
    """AdaLoRA's way: the tuner's forward adds the penalty to the loss of the outputs, where there is one."""

    def add(tuner: Any, inputs: Any, outputs: Any) -> Any:
        if outputs.get("loss") is not None:
            outputs["loss"] = outputs["loss"] + LAMBDA * tuner.l0_penalty()
        return outputs

    model.base_model.register_forward_hook(add)


def closed_form(model: Any) -> dict[str, Tensor]:
    """The gradient of the penalty by autograd, by the names of the moments."""
    gates = {name: p for name, p in model.named_parameters() if "log_alpha" in name}
    gradients = torch.autograd.grad(model.base_model.l0_penalty(), list(gates.values()))
    return {name.replace("log_alpha", "exp_avg"): g for name, g in zip(gates, gradients, strict=True)}


def moments(model: Any) -> dict[str, Tensor]:
    """What the first update made of the gradients: Adam's first moment is a tenth of them."""
    return {name: 10 * b.double() for name, b in model.named_buffers() if "exp_avg." in name}


class Note(TrainerCallback):
    """Notes the moments after the first update, and the expected density before pruning."""

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}
        self.density = 0.0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After DiffPruningCallback has moved the gates; pruning comes later."""
        model = kwargs["model"]
        self.moments = self.moments or moments(model)
        self.density = model.base_model.expected_density()


def with_trainer(model: Any, steps: int, options: dict[str, Any]) -> Note:
    """All of it gating."""
    note, length = Note(), {"max_steps": steps, "disable_tqdm": True, "logging_strategy": "no"}
    parts = options.get(PROCESSES, 1) * options.get("gradient_accumulation_steps", 1)
    given = {name: value for name, value in options.items() if name not in (PROCESSES, OWN_LOSS, TASK_TYPE)}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, per_device_train_batch_size=BATCH // parts, **{**ARGUMENTS, **given}, **length)
        callbacks = [DiffPruningCallback(gating_ratio=1.0), note]
        loss = own_loss if options.get(OWN_LOSS) else None
        trainer = Trainer(model, args, None, make_rows(640), compute_loss_func=loss, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return note


def with_scaler(model: Any, steps: int) -> Note:
    """The same in a loop of one's own, forward in fp16, by the public methods."""
    note, rows = Note(), make_rows(640)
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
    """Of one setting, in one of its processes."""
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
    """What the processes of a setting found; an error unless all found the same."""
    count = SETTINGS[name][PROCESSES]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *launcher, __file__, "--worker", name, folder], check=True)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
    if any(other != found[0] for other in found):
        raise SystemExit(f"{name}: the processes differ: {found}")
    return dict(found[0])


def interval(bounds: list[float]) -> str:
    """Least and most of all gates, once where they are the same."""
    least, most = (f"{bound:.3f}" for bound in bounds)
    return least if least == most else f"{least} to {most}"


def report(found: dict[str, dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}", ""]
    lines += [
        "| setting | norm of the task's gradient on the gates | the penalty's part of the gates' gradient, over lambda "
        "times its closed form | the same if it is added to `outputs.loss` | automatic: expected density over target |"
    ]
    lines += ["|---|---:|---:|---:|---:|"]
    for name, run in found.items():
        cells = f"{run['task']:.2e} | {interval(run['gates'])} | {interval(run['loss'])} | {run['density']:.3f}"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all settings, show and keep what was found."""
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
