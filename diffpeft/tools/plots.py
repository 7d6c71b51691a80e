"""Pictures of a diff. matplotlib is imported when one is drawn."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTuner

from diffpeft.sparse.diff import Diff, count_nonzeros


def plot_density(model: BaseTuner, path: str | Path, adapter_name: str | None = None) -> None:
    """Save a picture of the density of a tuner's diff (`peft_model.base_model`) per layer, and per layer and parameter.

    The ending of `path` tells the format; the adapter is by default the active one.
    """
    draw(model.get_diff(adapter_name), model.adapted_parameters(adapter_name), path)


def draw(diff: Diff, numel: Mapping[str, int], path: str | Path) -> None:
    """Save [`plot_density`]'s picture of a diff, given the elements of each parameter that the adapter covers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows: dict[str, dict[str, tuple[int, int]]] = {}
    nonzeros = count_nonzeros(diff)
    for name, size in numel.items():
        row, column = _cell_of(name)
        cells = rows.setdefault(row, {})
        kept, elements = cells.get(column, (0, 0))  # an encoder's and a decoder's layers share their numbers
        cells[column] = kept + nonzeros.get(name, 0), elements + size
    layers = sorted((row for row in rows if row.isdigit()), key=int)
    names = [row for row in rows if not row.isdigit()] + layers
    totals = [[sum(counts) for counts in zip(*rows[row].values(), strict=True)] for row in names]
    figure = Figure(figsize=(13, 1.8 + 0.42 * max(6, len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.2))
    left.barh(names, [100 * kept / max(1, size) for kept, size in totals], color="#3b6ea5")
    left.invert_yaxis()
    left.set(xlabel="density of the diff, %", title="by layer")
    _draw_cells(figure, right, {layer: rows[layer] for layer in layers})
    right.set_title("by layer and parameter")
    figure.savefig(path, dpi=130)


def _cell_of(name: str) -> tuple[str, str]:
    """Row and column of a parameter: its layer, or its module outside the layers, and its name there."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    if match:
        return match.group(1), match.group(2)
    *path, last = name.split(".")
    return ".".join(path[:-1][-1:]) or "model", ".".join([*path[-1:], last])


def _draw_cells(figure: Any, axes: Any, layers: Mapping[str, Mapping[str, tuple[int, int]]]) -> None:
    """Draw the density of each parameter in each layer, on a logarithmic scale."""
    import numpy as np
    from matplotlib.colors import LogNorm

    columns = list(dict.fromkeys(column for row in layers.values() for column in row))
    if not columns:
        return
    counts = np.array([[row.get(column, (0, 1)) for column in columns] for row in layers.values()])
    density = counts[..., 0] / np.maximum(1, counts[..., 1])
    cells = np.where(density > 0, density, np.nan)
    lowest = max(1e-6, float(np.nanmin(cells))) if (density > 0).any() else 1e-6
    image = axes.imshow(cells, aspect="auto", norm=LogNorm(lowest, max(float(density.max()), 2 * lowest)))
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(layers)), layers)
    figure.colorbar(image, ax=axes, label="density (white: none)")
