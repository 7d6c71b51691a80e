"""The command line: `diffpeft --help`."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from diffpeft.files.adapter import write_adapter
from diffpeft.files.encoding import stored_size
from diffpeft.files.keys import owners
from diffpeft.sparse.combine import combine as combine_diffs
from diffpeft.sparse.diff import count_nonzeros, overlap
from diffpeft.tools.export.checkpoint import to_checkpoint
from diffpeft.tools.export.coo import to_coo
from diffpeft.tools.export.peft import to_super_tuning
from diffpeft.tools.extract import extract_diff
from diffpeft.tools.opened import ADAPTER_FILES, OpenedAdapter, fetch_model
from diffpeft.tools.plots import draw
from diffpeft.tuner.combining import common_targets

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Look at diffs, and make others from them.")
# A pipe has no width; names must not be cut there, nor brackets and colons in them be taken for markup.
console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)
problems = Console(stderr=True, markup=False, emoji=False)

Base = Annotated[str | None, typer.Option("--base", help="A directory or on the Hub; default: what the config names.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Go on though the base has other weights than the diff's own.")]
Adapters = Annotated[list[str], typer.Argument(help="Pruned adapters: directories, or on the Hub.")]
Adapter = Annotated[str, typer.Argument(help="A pruned adapter: a directory, or on the Hub.")]


@contextmanager
def _working(text: str) -> Iterator[Callable[[float], None]]:
    """Show a progress bar. Gives a function that takes the share of the work that is done."""
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()
    with Progress(*columns, TimeElapsedColumn(), console=problems, transient=True) as progress:
        task = progress.add_task(text, total=1.0)
        yield lambda share: progress.update(task, completed=share)


def _show(rows: list[dict[str, Any]], title: str, as_json: bool, total: dict[str, Any] | None = None) -> None:
    if as_json:
        print(json.dumps({"rows": rows, **({"total": total} if total else {})}, indent=1))
        return
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else (total or {}):
        table.add_column(column, justify="left" if column in ("parameter", "adapter") else "right")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    if total:
        table.add_section()
        table.add_row(*map(_cell, total.values()), style="bold")
    console.print(table)


def _open(adapter: str, base: str | None, force: bool = False) -> OpenedAdapter:
    opened = OpenedAdapter(adapter, base)
    if not force:
        opened.check_base()
    return opened


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@app.command()
def inspect(adapter: Adapter, base: Base = None, as_json: AsJSON = False) -> None:
    """Show nonzeros, density, norm and bytes of every parameter, and of the whole diff."""
    opened = OpenedAdapter(adapter, base)
    rows = []
    for name, (positions, values) in opened.diff.items():
        numel, k = opened.shapes[name].numel(), positions.numel()
        row: dict[str, Any] = {"parameter": name, "nonzeros": k, "density": k / numel, "norm": float(values.norm())}
        rows.append({**row, "bytes": stored_size(k, numel, opened.config.value_dtype)})
    parameters = sum(shape.numel() for shape in opened.shapes.values())
    nonzeros = sum(row["nonzeros"] for row in rows)
    norm = sum(row["norm"] ** 2 for row in rows) ** 0.5
    total = {"parameter": "all", "nonzeros": nonzeros, "density": nonzeros / parameters, "norm": norm}
    _show(rows, str(adapter), as_json, {**total, "bytes": (opened.directory / ADAPTER_FILES[1]).stat().st_size})
    if not as_json:
        heads = f", heads {sorted(opened.heads)}" if opened.heads else ""
        console.print(f"base {opened.base}: {parameters:,} parameters{heads}")


@app.command()
def plot(adapter: Adapter, picture: Path, base: Base = None) -> None:
    """Draw the density of the diff by layer and by parameter."""
    opened = OpenedAdapter(adapter, base)
    draw(opened.diff, {name: shape.numel() for name, shape in opened.shapes.items()}, picture)
    console.print(f"wrote {picture}")


@app.command()
def verify(adapters: Adapters, base: Base = None, as_json: AsJSON = False) -> None:
    """Read and check adapters, and that a base in a directory is theirs; exit code 1 if one is damaged."""
    rows = []
    for directory in adapters:
        try:
            opened = _open(directory, base)
            verdict = f"{sum(count_nonzeros(opened.diff).values())} nonzeros, whole"
            rows.append({"adapter": directory, "whole": True, "found": verdict})
        except (ValueError, OSError) as error:
            rows.append({"adapter": directory, "whole": False, "found": str(error)})
    _show(rows, "", as_json)
    raise typer.Exit(0 if all(row["whole"] for row in rows) else 1)


@app.command()
def diff(first: Adapter, second: Adapter, base: Base = None, as_json: AsJSON = False) -> None:
    """Compare two adapters of one base: shared positions, signs, direction."""
    a, b = OpenedAdapter(first, base), OpenedAdapter(second, base)
    whole, parameters = overlap(a.diff, b.diff)
    rows = []
    for name, part in {**parameters, "all": whole}.items():
        row = {"parameter": name, "first": part.nonzeros_a, "second": part.nonzeros_b, "shared": part.shared}
        same_sign = part.same_sign / max(1, part.shared)
        rows.append({**row, "jaccard": part.jaccard, "same sign": same_sign, "cosine": part.cosine})
    _show(rows[:-1], f"{first} and {second}", as_json, rows[-1])


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="The base model: a directory, or on the Hub.")],
    finetuned: Annotated[str, typer.Argument(help="A full fine-tune of it: a directory, or on the Hub.")],
    output: Annotated[Path, typer.Argument(help="The directory to write the adapter into.")],
    density: Annotated[float, typer.Option(help="Nonzeros as a share of the parameters.")] = 0.005,
    task_type: Annotated[str | None, typer.Option(help="For the adapter's config, e.g. SEQ_CLS.")] = None,
    value_dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or int8.")] = "float32",
) -> None:
    """Turn a fully fine-tuned checkpoint into an adapter, tensor by tensor."""
    old, new = fetch_model(base), fetch_model(finetuned)
    named = None if Path(base).is_dir() else base
    with _working(f"extracting {finetuned}") as progress:
        found = extract_diff(
            old, new, density, output, task_type=task_type, value_dtype=value_dtype, base_name=named, progress=progress
        )
    console.print(f"kept {found.kept:,} of {found.total:,} ({found.density:.4%}) in {output}")
    for what, names in (("only in the base", found.only_in_base), ("buffers that differ", found.differing_buffers)):
        if names:
            console.print(f"{what}, not in the adapter: {', '.join(names)}")


@app.command()
def merge(adapter: Adapter, output: Path, base: Base = None, force: Force = False) -> None:
    """Write the base model with the diff merged, as a checkpoint of its own."""
    opened = OpenedAdapter(adapter, base)
    opened.check_mergeable()
    if not force:
        opened.check_base()
    with _working(f"merging {adapter}") as progress:
        to_checkpoint(opened.checkpoint, opened.diff, output, opened.whole, progress)
    console.print(f"wrote {output}")


@app.command()
def export(
    adapter: Adapter,
    output: Path,
    to: Annotated[str, typer.Option(help="super-tuning, which PEFT loads without diffpeft, or coo.")],
    base: Base = None,
    leave_out: Annotated[bool, typer.Option(help="Leave out what the format cannot hold.")] = False,
    force: Force = False,
) -> None:
    """Write the diff in another format."""
    opened = _open(adapter, base, force)
    if to == "coo":
        to_coo(opened.diff, opened.shapes, output)
    elif to == "super-tuning":
        if opened.model is None:
            raise ValueError(f"{opened.base} does not tell its model's class, which says where its linear layers are")
        config, whole = opened.config, {"heads": opened.heads, "modules_to_save": opened.config.modules_to_save}
        names = config.base_model_name_or_path, config.task_type
        found = to_super_tuning(opened.diff, opened.model, output, *names, leave_out, **whole)
        console.print(f"{found.nonzeros:,} nonzeros, {found.padding:,} zeros of padding, left out: {found.left_out}")
    else:
        raise ValueError(f"--to {to} is not known; use super-tuning or coo")
    console.print(f"wrote {output}")


@app.command()
def combine(
    adapters: Adapters,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write it into.")],
    weights: Annotated[list[float] | None, typer.Option("--weight", "-w", help="One an adapter; default 1.")] = None,
    combination_type: Annotated[str, typer.Option("--type", help="linear, ties, dare_linear, ...")] = "linear",
    density: Annotated[float | None, typer.Option(help="Share of each diff's nonzeros; not for linear.")] = None,
    target_density: Annotated[float | None, typer.Option(help="Nonzeros of the result at most, as a share.")] = None,
    heads_from: Annotated[str | None, typer.Option(help="Whose heads to take, if several have some.")] = None,
    base: Base = None,
    force: Force = False,
) -> None:
    """Make one adapter of several."""
    opened = [_open(adapter, base, force) for adapter in adapters]
    with_heads = {one.directory.resolve(): one for one in opened if one.heads}
    place = Path(heads_from).resolve() if heads_from else None
    chosen = [one for key, one in with_heads.items() if heads_from in (None, one.name) or place == key]
    if len(chosen) != 1 and (with_heads or heads_from):
        names = [one.name for one in with_heads.values()]
        raise ValueError(f"heads are in {names} and cannot be summed; use --heads-from with one of these")
    shapes = {name: shape for one in opened for name, shape in one.shapes.items()}
    total = sum(shape.numel() for shape in shapes.values())
    budget = max(1, round(target_density * total)) if target_density is not None else None
    diffs, weights = [one.diff for one in opened], weights or [1.0] * len(opened)
    merged = combine_diffs(diffs, weights, combination_type, density=density, max_nonzeros=budget)
    source = chosen[0] if chosen else opened[0]
    config = source.config
    config.value_dtype = "float32"
    for field, value in common_targets([one.config for one in opened], owners(merged)).items():
        setattr(config, field, value)
    wrapped = owners(shapes if config.target_modules is None else merged)
    copies = {name: copy for one in opened for name, copy in one.whole.items() if name not in one.heads}
    if any(
        not torch.equal(copies[name], one.whole[name]) for one in opened for name in copies.keys() & one.whole.keys()
    ):
        raise ValueError(f"the adapters bring different {sorted(copies)}; combine adapters of one vocabulary")
    write_adapter(output, config, merged, shapes, {**copies, **source.heads}, wrapped)
    console.print(f"{sum(count_nonzeros(merged).values()):,} nonzeros in {output}")


def main() -> None:
    """Run the command line; errors are one line and exit code 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        problems.print(Text.assemble(("error:", "red"), f" {error}"), soft_wrap=True)
        sys.exit(1)
