"""Memory of a training step: gating, full fine-tuning, fixmask, LoRA, SHiRA, Super-Tuning.

    python examples/benchmarks/speed/memory.py --json memory.json                   # the sizes of MiniLM and BERT-large
    python examples/benchmarks/speed/memory.py --sizes --tensors --batch_size 2 --length 64 \
        --methods full gating lora fixmask-linear fixmask --json memory_sizes.json     # six sizes, for scaling.py
    python examples/benchmarks/speed/memory.py --model small --tensors --batch_size 4 --length 64 \
        --densities 0.001 0.005 0.01 0.05 --methods lora shira fixmask-linear fixmask \
        --json memory_densities.json                                                   # four densities, for scaling.py
    python examples/benchmarks/speed/memory.py --device cuda --autocast --batch_size 32

Methods and steps are those of step_cost.py. Each method runs in a fresh process that counts what PyTorch's allocator
hands out, which is exact and the same in every run. On a CPU a second process asks the operating system, and subtracts
the level before the model is built.

- state: base, adapter and optimizer between two steps; also in bytes for each parameter of the model;
- for backward: memory that the forward pass leaves for the backward pass;
- peak: the most at any time of a step, the state included;
- peak of the process: the system's figure, which includes what torch.compile keeps. The first step, in which it
  compiles, has a column of its own.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
from benchmarks.shared.memory import allocations, forget_peak, in_fresh_process, resident
from benchmarks.shared.models import count_parameters
from benchmarks.shared.options import add_options, add_training_options, begin
from benchmarks.shared.report import show, table
from benchmarks.shared.training import GATING, Training

STEPS = 3
MB = "{:,.1f}"
COLUMNS = {
    "model": ("model", "{}"),
    "parameters": ("parameters", "{:,}"),
    "density": ("density", "{:.1%}"),
    "method": ("method", "{}"),
    "trainable": ("trainable", "{:,}"),
    "state_mb": ("state, MB", MB),
    "state_bytes_per_parameter": ("bytes a parameter", "{:.2f}"),
    "backward_mb": ("for backward, MB", MB),
    "peak_mb": ("peak, MB", MB),
    "ratio": ("ratio", "{:.2f}x"),
    "beside": ("to", "{}"),
    "resident_mb": ("peak of the process, MB", MB),
    "first_mb": ("in the first step, MB", MB),
}


def tensors(size: str, method: str, density: float, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes by the allocator: state, memory kept for backward, peak."""
    with allocations(options.device) as state:
        training = Training(size, method, density, options, STEPS)
        training.step()
    with allocations(options.device) as forward:
        loss = training.forward()
    with allocations(options.device):
        del loss
    with allocations(options.device) as step:
        training.step()
    return {
        "trainable": training.trainable,
        "state": state.left,
        "backward": forward.left,
        "peak": state.left + step.peak,
    }


def process(size: str, method: str, density: float, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes by the system, above the level before the model is built: peak of the first step and of the other steps."""
    eager = argparse.Namespace(**{**vars(options), "eager": True})
    Training(
        "tiny", method, density, eager, STEPS
    ).step()  # late imports are no part of the figure, except the compiler
    forget_peak()
    level = resident()
    training = Training(size, method, density, options, STEPS)
    forget_peak()
    training.step()
    first = resident("VmHWM") - level
    forget_peak()
    for _ in range(STEPS - 1):
        training.step()
    return {"first": first, "resident": resident("VmHWM") - level}


COUNTS = {"tensors": tensors, "process": process}


def row(size: str, method: str, density: float | None, found: dict[str, Any]) -> dict[str, Any]:
    """A row of the table, from the counted bytes."""
    parameters = count_parameters(size)
    megabytes = {
        f"{key}_mb": found[key] / 1e6 for key in ("state", "backward", "peak", "resident", "first") if key in found
    }
    return {
        "model": size,
        "parameters": parameters,
        "density": density,
        "method": method,
        "trainable": found["trainable"],
        **megabytes,
        "state_bytes_per_parameter": found["state"] / parameters,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Add each peak's ratio to full fine-tuning's (gating) or LoRA's (all others), where that was measured."""
    peaks = {(row["model"], row["density"], row["method"]): row["peak_mb"] for row in rows}
    for row in rows:
        reference = "full" if row["density"] is None else "lora"
        peak = peaks.get((row["model"], row["density"], reference))
        if peak is not None:
            row.update(ratio=row["peak_mb"] / peak, beside=reference)


def main(words: list[str] | None = None) -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ["minilm", "large"])
    add_training_options(parser)
    parser.add_argument("--tensors", action="store_true", help="only what the allocator says, in half the time")
    parser.add_argument("--run", choices=COUNTS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    begin(options)
    if options.run:
        print(json.dumps(COUNTS[options.run](options.model[0], options.methods[0], options.densities[0], options)))
        return
    same = ["--device", options.device, "--dtype", options.dtype, "--threads", str(options.threads)]
    same += ["--batch_size", str(options.batch_size), "--length", str(options.length)]
    same += [f"--{name}" for name in ("autocast", "eager") if getattr(options, name)]
    alone = options.tensors or torch.device(options.device).type == "cuda"
    rows = []
    for size in options.model:
        for method in options.methods:
            for density in [None] if method in ("full", *GATING) else options.densities:
                case = ["--model", size, "--methods", method, "--densities", str(density or 0.005)]
                found: dict[str, Any] = {}
                for count in ["tensors"] if alone else COUNTS:
                    found |= in_fresh_process(__file__, *same, *case, "--run", count)
                rows.append(row(size, method, density, found))
    compare(rows)
    show(options, rows, table(rows, COLUMNS))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
