"""Pictures of a diff. matplotlib is imported when one is drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffpeft.model import DiffPruningModel

Table = dict[str, dict[str, float]]


def density_table(model: DiffPruningModel, adapter_name: str | None = None) -> Table:
    """Density of the diff by layer ("0", "1", ..., or the module's name outside the layers), then by parameter."""
    return table_of(counts(model.get_diff(adapter_name)), model.adapted_parameters(adapter_name))


def counts(diff: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Nonzeros of each parameter of a diff."""
    return {name: where.numel() for name, (where, _) in diff.items()}


def table_of(nnz: Mapping[str, int], elements: Mapping[str, int]) -> Table:
    """[`density_table`] from the nonzeros and elements of each parameter, by its name in the base model."""
    table: Table = {}
    for name, numel in elements.items():
        match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
        if match:
            row, column = match.groups()
        else:
            *path, last = name.split(".")
            row, column = ".".join(path[:-1][-1:]) or "model", ".".join([*path[-1:], last])
        table.setdefault(row, {})[column] = nnz.get(name, 0) / numel
    return table


def plot_density(model: DiffPruningModel, path: str | Path, adapter_name: str | None = None) -> None:
    """Save a picture of where the diff lives: density per layer, and per layer and parameter.

    Args:
        model: the tuner (`peft_model.base_model`).
        path: of the picture; the ending tells the format.
        adapter_name: the adapter, by default the active one.
    """
    draw(counts(model.get_diff(adapter_name)), model.adapted_parameters(adapter_name), path)


def draw(nnz: Mapping[str, int], numel: Mapping[str, int], path: str | Path) -> None:
    """[`plot_density`] from the nonzeros and elements of each parameter."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    table = table_of(nnz, numel)
    layers = sorted((row for row in table if row.isdigit()), key=int)
    rows = [row for row in table if not row.isdigit()] + layers
    shares = []
    for row in rows:
        names = [n for n in numel if (_layer(n) == row if row.isdigit() else _layer(n) is None and f"{row}." in n)]
        kept = sum(nnz.get(n, 0) for n in names)
        shares.append(kept / max(1, sum(numel[n] for n in names)))
    columns = list(dict.fromkeys(column for row in layers for column in table[row]))
    cells = np.array([[table[row].get(column, np.nan) for column in columns] for row in layers]).reshape(
        len(layers), len(columns)
    )

    figure = Figure(figsize=(13, 1.8 + 0.42 * max(6, len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.2))
    left.barh(rows, [100 * share for share in shares], color="#3b6ea5")
    left.invert_yaxis()
    left.set_xlabel("density of the diff, %")
    left.set_title("by layer")
    if cells.size:
        lowest = max(1e-6, float(np.nanmin(np.where(cells > 0, cells, np.nan)))) if (cells > 0).any() else 1e-6
        image = right.imshow(
            np.where(cells > 0, cells, np.nan),
            aspect="auto",
            norm=LogNorm(lowest, max(float(np.nanmax(cells)), 2 * lowest)),
        )
        right.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
        right.set_yticks(range(len(layers)), layers)
        figure.colorbar(image, ax=right, label="density (white: none)")
    right.set_title("by layer and parameter")
    figure.savefig(path, dpi=130)


def _layer(name: str) -> str | None:
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return match.group(1) if match else None
