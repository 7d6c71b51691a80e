"""Time of a training step: gating beside full fine-tuning, fixmask beside LoRA, SHiRA and Super-Tuning.

    python examples/benchmarks/speed/step_cost.py --json step_cost.json             # the sizes of MiniLM and BERT-large
    python examples/benchmarks/speed/step_cost.py --sizes --json sizes.json                  # six sizes, for scaling.py
    python examples/benchmarks/speed/step_cost.py --model base --densities 0.001 0.005 0.01 0.05 \
        --methods lora fixmask-linear fixmask --json densities.json                    # four densities, for scaling.py
    python examples/benchmarks/speed/step_cost.py --device cuda --autocast --batch_size 32

A step is forward, backward, clipping, the work of DiffPruningCallback, fused AdamW and zero_grad, with dropout. Gating
is measured from 60% of the phase on, where the gates move. With `--dtype bfloat16` full fine-tuning trains bfloat16
weights.

The methods of a group are timed in turn, in one process, and the median counts. Full fine-tuning and a variant of
gating are a group. The other group is LoRA, SHiRA, Super-Tuning and `fixmask-linear`, which train the encoder's linear
layers with as many parameters as LoRA has at the rank that comes nearest to the density, and `fixmask`, with this
density of all parameters.
"""

import argparse
import gc
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

from benchmarks.shared.models import count_parameters
from benchmarks.shared.options import add_options, add_repeats, add_training_options, begin
from benchmarks.shared.report import show, table
from benchmarks.shared.timing import interleaved
from benchmarks.shared.training import GATING, Training

BESIDE_LORA = ("lora", "shira", "supertuning", "fixmask-linear", "fixmask")
COLUMNS = {
    "model": ("model", "{}"),
    "parameters": ("parameters", "{:,}"),
    "density": ("density", "{:.1%}"),
    "method": ("method", "{}"),
    "trainable": ("trainable", "{:,}"),
    "step_ms": ("one step, ms", "{:.1f}"),
    "ratio": ("ratio", "{:.2f}x"),
    "beside": ("to", "{}"),
}

PARTS = {key: COLUMNS[key] for key in ("model", "density", "method")} | {
    part: (f"{part}, ms", "{:.1f}") for part in ("forward", "backward", "clipping", "callback", "optimizer", "the rest")
}
"""Columns of the second table: the median time of each part of a step."""


def measure(size: str, methods: list[str], density: float | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the methods of a group; one row for each, compared with the first."""
    steps = options.warmup + options.repeats
    trainings = {method: Training(size, method, density or 0.0, options, steps) for method in methods}
    actions = {method: training.step for method, training in trainings.items()}
    seconds = interleaved(actions, options.repeats, options.warmup, options.device)
    medians = {method: statistics.median(seconds[method]) for method in methods}
    return [
        {
            "model": size,
            "parameters": count_parameters(size),
            "density": density,
            "method": method,
            "trainable": trainings[method].trainable,
            "step_ms": 1e3 * medians[method],
            "ratio": medians[method] / medians[methods[0]],
            "beside": methods[0],
            "seconds": seconds[method],
            "parts_ms": {
                part: 1e3 * statistics.median(found[options.warmup :])
                for part, found in trainings[method].parts.items()
            },
        }
        for method in methods
    ]


def main(words: list[str] | None = None) -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ["minilm", "large"])
    add_training_options(parser)
    add_repeats(parser)
    options = parser.parse_args(words)
    begin(options)
    rows = []
    for size in options.model:
        beside_full = [(("full", variant), None) for variant in GATING if variant in options.methods]
        groups = [*beside_full, *((BESIDE_LORA, density) for density in options.densities)]
        for group, density in groups:
            methods = [method for method in group if method in options.methods]
            if methods:
                rows += measure(size, methods, density, options)
                gc.collect()
    tables = [table(rows, COLUMNS)]
    if options.device == "cpu":  # a GPU works on while Python goes ahead
        tables.append(table([{**row, **row["parts_ms"]} for row in rows], PARTS))
    show(options, rows, *tables)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
