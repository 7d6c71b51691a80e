"""Draw step time and memory against the model's size and against density, from the JSON of step_cost.py and memory.py.

    python examples/benchmarks/speed/scaling.py --output scaling.png \
        --step sizes.json --memory memory_sizes.json \
        --step_densities densities.json --memory_densities memory_densities.json

The docstrings of the two scripts say how to get the four files.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

NAMES = {
    "full": "full fine-tuning",
    "gating": "gating",
    "fixmask": "fixmask",
    "fixmask-linear": "fixmask, linear layers",
    "lora": "LoRA",
    "shira": "SHiRA",
    "supertuning": "Super-Tuning",
}
STYLES = dict(zip(NAMES, ("C7o-", "C3s-", "C0D-", "C0d--", "C1^-", "C2v-", "C4x-"), strict=True))
PANELS = {
    "step": ("parameters", "step_ms", "parameters of the model", "one training step, ms"),
    "memory": ("parameters", "peak_mb", "parameters of the model", "peak memory of a step, MB"),
    "step_densities": ("density", "step_ms", "density, %", "one training step, ms"),
    "memory_densities": ("density", "peak_mb", "density, %", "peak memory of a step, MB"),
}
"""Keys of x and y in the rows of each file, and their labels."""


def draw(panel: Axes, rows: Sequence[dict[str, Any]], x: str, y: str) -> None:
    """Draw a line for each method."""
    for method, name in NAMES.items():
        points = sorted((row[x], row[y]) for row in rows if row["method"] == method and row.get(x) is not None)
        if points:
            scale = 100 if x == "density" else 1
            panel.plot([scale * at for at, _ in points], [value for _, value in points], STYLES[method], label=name)


def title(found: dict[str, Any], x: str) -> str:
    """The title of a panel: batch, model and machine."""
    settings, machine = found["settings"], found["machine"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    where = machine["gpu"] or f"{machine['cpu']}, {threads}"
    model = f", BERT-{found['rows'][0]['model']}" if x == "density" else ""
    return f"batch {settings['batch_size']} x {settings['length']}{model}\n{where}"


def draw_panel(panel: Axes, found: dict[str, Any], labels: tuple[str, str, str, str]) -> None:
    """Draw one file's rows with axes, title and legend."""
    x, y, x_label, y_label = labels
    draw(panel, found["rows"], x, y)
    panel.set(xscale="log", xlabel=x_label, ylabel=y_label)
    if x == "density":
        percent = sorted({100 * row[x] for row in found["rows"] if row.get(x) is not None})
        panel.set_xticks(percent, [f"{tick:g}" for tick in percent], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_ylim(bottom=0)
    else:
        panel.set_yscale("log")
    panel.set_title(title(found, x), fontsize=9)
    panel.grid(which="both", alpha=0.2)
    panel.legend(fontsize=7)


def main(words: list[str] | None = None) -> None:
    """Draw the files that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (x, _, _, label) in PANELS.items():
        parser.add_argument(f"--{name}", type=Path, help=f"JSON: {label.split(',')[0]} against {x}")
    parser.add_argument("--output", type=Path, default=Path("scaling.png"))
    options = parser.parse_args(words)
    files = {name: path for name in PANELS if (path := getattr(options, name)) is not None}
    if not files:
        parser.error("name at least one file")
    across = min(2, len(files))
    down = -(-len(files) // across)
    figure = Figure(figsize=(5.6 * across, 4.2 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel, (name, path) in zip(panels, files.items(), strict=False):
        draw_panel(panel, json.loads(path.read_text()), PANELS[name])
    for panel in panels[len(files) :]:
        panel.remove()
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
