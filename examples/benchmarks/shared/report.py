"""Tables and files of results, with the machine and the versions that they were measured with."""

import argparse
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

SHOWN = ("device", "dtype", "autocast", "eager", "batch_size", "length", "repeats")
"""Options that are printed above the tables."""


def machine(device: str) -> dict[str, Any]:
    """Processor, threads and versions that the figures were measured with."""
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def versions() -> str:
    """One line with the versions of torch, transformers and peft."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of ready cells."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """A Markdown table of values.

    Args:
        rows: values by key; a missing one leaves its cell empty.
        columns: title and format by key; a column without any value is left out.
    """
    columns = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}

    def cell(value: Any, form: str) -> str:
        return "" if value is None else form.format(value)

    cells = ([cell(row.get(key), form) for key, (_, form) in columns.items()] for row in rows)
    return markdown([title for title, _ in columns.values()], cells)


def show(options: argparse.Namespace, rows: list[dict[str, Any]], *tables: str) -> None:
    """Print the machine and the tables; write machine, options and rows to the file that `--json` names."""
    found = machine(options.device)
    settings = {key: value for key, value in vars(options).items() if key not in ("json", "run", "sizes")}
    print(", ".join([found["gpu"] or found["cpu"], f"{found['threads']} threads", f"torch {found['torch']}"]))
    print(", ".join(f"{key} {value}" for key, value in settings.items() if key in SHOWN), end="\n\n")
    print("\n\n".join(tables))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": found, "settings": settings, "rows": rows}, indent=1) + "\n")
