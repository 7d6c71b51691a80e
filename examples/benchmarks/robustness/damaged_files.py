"""Loading damaged adapters: is damage refused, or does it make a wrong model in silence?

    python examples/benchmarks/robustness/damaged_files.py --output runs/damaged_files    # three minutes, one core
    python examples/benchmarks/robustness/damaged_files.py --trials 100 --only "a bit of"

Each way of loading gets the same damaged files of a small adapter with heads. The outcome of an attempt is

- refused: an error while loading or in the first forward pass;
- told: a warning that the undamaged adapter does not give;
- harmless: logits, diff and heads are those of the undamaged adapter, to the bit;
- silent: anything else, which makes the exit code 1.

"Seals" are the checksums of the diff. "Sealed" damage has right checksums, as if the adapter had been written that
way, so that another check must find it.
"""

import argparse
import contextlib
import copy
import json
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a missing file must not be looked for elsewhere
sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
import transformers
from benchmarks.robustness.adapters import CONFIG, HEADS, PREFIX, WEIGHTS, Base, Files, make_adapter, make_base
from benchmarks.robustness.damage import BASES, Tensors, damages
from benchmarks.shared.report import markdown, versions
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from typer.testing import CliRunner

from diffpeft.files.adapter import read_adapter
from diffpeft.model import DiffPruningModel
from diffpeft.tools.cli import app

COLUMNS = ("tried", "refused", "harmless", "told", "silent")
NOTES = """Read without a model, an adapter means the same beside any base of its shape. `load_adapter over one` is what
resuming a Trainer does: PEFT does not look at the config then. The encoding of positions keeps all but their low bits
sorted, so that only positions with the same high bits can stand out of order.
"""


def flat(diff: dict[str, tuple[Tensor, Tensor]]) -> Tensors:
    """Positions and values of a diff as one dictionary of tensors."""
    return {f"{name}, {part}": tensor for name, pair in diff.items() for part, tensor in enumerate(pair)}


@torch.no_grad()
def outcome(model: nn.Module, adapter: str = "default") -> Tensors:
    """A model's logits for every token, position and type, its diff and its heads."""
    ids = torch.arange(99).reshape(3, 33)
    found = {"logits": model.eval()(input_ids=ids, token_type_ids=ids % 2).logits}
    for name, head in model.named_modules():
        if isinstance(head, ModulesToSaveWrapper):
            own = head.modules_to_save[adapter].state_dict()
            found |= {f"{name.removeprefix(PREFIX)}.{key}": tensor for key, tensor in own.items()}
    return found | flat(DiffPruningModel.of(model).get_diff(adapter))


def load_into(model: nn.Module, path: Path, name: str = "default", **settings: bool) -> nn.Module:
    """A copy of a model, PEFT's or transformers', with the adapter loaded and active."""
    model = copy.deepcopy(model)
    model.load_adapter(str(path), name, **settings)
    model.set_adapter(name)
    return model


def as_files(directory: Path, base: Base) -> Tensors:
    """The diff and the heads, read without a model."""
    _, diff, heads = read_adapter(directory, {name: p.shape for name, p in base.bare.named_parameters()})
    return flat(diff) | heads


def verify(directory: Path, base: Base) -> Tensors:
    """The command line's verdict, as an error; what it accepts is then read."""
    result = CliRunner().invoke(app, ["verify", str(directory), "--base", str(base.directory), "--json"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        raise ValueError(json.loads(result.stdout)["rows"][0]["found"])
    with contextlib.suppress(Exception):
        return as_files(directory, base)
    return {}


WAYS: dict[str, Callable[[Path, Base], Tensors]] = {
    "from_pretrained": lambda d, base: outcome(PeftModel.from_pretrained(copy.deepcopy(base.bare), d)),
    "transformers": lambda d, base: outcome(load_into(base.bare, d)),
    "load_adapter": lambda d, base: outcome(load_into(base.occupied, d, "new"), "new"),
    "load_adapter to train": lambda d, base: outcome(load_into(base.occupied, d, "new", is_trainable=True), "new"),
    "load_adapter over one": lambda d, base: outcome(load_into(base.occupied, d, is_trainable=True)),
    "read_adapter": as_files,
    "diffpeft verify": verify,
}


def attempt(way: str, directory: str, base: Base, logged: list[str]) -> tuple[Any, set[str]]:
    """The result of a way of loading or its error, and the warnings."""
    logged.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = WAYS[way](Path(directory), base)
        except Exception as error:
            result = error
    return result, {text.replace(directory, "<adapter>") for text in [*(str(w.message) for w in caught), *logged]}


def judge(row: dict[str, Any], result: Any, whole: Tensors, told: set[str], directory: str) -> None:
    """Count an attempt, and keep one example of each message.

    A message helps if it is an expected exception, and names a file, an adapter or a parameter.
    """
    row["tried"] += 1
    if isinstance(result, Exception):
        verdict, kind, text = "refused", type(result).__name__, str(result).replace(directory, "<adapter>")
    elif told:
        verdict, kind, text = "told", "warning", min(told)
    else:
        same = result.keys() == whole.keys() and all(torch.equal(result[key], whole[key]) for key in whole)
        verdict, kind, text = "harmless" if same else "silent", "", ""
    row[verdict] += 1
    if kind:
        names = (WEIGHTS, CONFIG, "adapter ", "bert.", "heads", *HEADS)
        helps = kind in ("ValueError", "FileNotFoundError", "warning") and any(name in text for name in names)
        said = row["said"].setdefault(f"{kind}{'' if helps else ', no help'}", {"times": 0, "example": text})
        said["times"] += 1


def measure(trials: int, seed: int, only: str, root: Path, logged: list[str]) -> list[dict[str, Any]]:
    """Load files with all kinds of damage in all ways; one row for each kind and way."""
    base = make_base(root / "base", 0)
    bases = {name: make_base(root / name, *how) for name, how in BASES.items()}
    own = make_adapter(root / "own", base, seed + 1)
    adapters = own, make_adapter(root / "twin", base, seed + 2), make_adapter(root / "other", base, seed + 3, 0.2, 1)
    whole = {way: attempt(way, str(root / "own"), base, logged) for way in WAYS}
    rows: dict[str, dict[str, Any]] = {}
    seen: dict[str, list[Files]] = {}
    for kind, change in track([damage for damage in damages(*adapters) if only in damage[0]], "damaging"):
        for trial in range(trials):
            files = {name: data.copy() for name, data in own.items()}
            change(files, random.Random(f"{seed} {kind} {trial}"))
            if files in seen.setdefault(kind, []):  # damage without chance is tried once
                continue
            seen[kind].append(files)
            with tempfile.TemporaryDirectory(dir=root) as directory:
                for name, data in files.items():
                    (Path(directory) / name).write_bytes(data)
                for way in WAYS:
                    row = {"kind": kind, "way": way, **dict.fromkeys(COLUMNS, 0), "said": {}}
                    result, told = attempt(way, directory, bases.get(kind, base), logged)
                    judge(rows.setdefault(f"{kind} {way}", row), result, whole[way][0], told - whole[way][1], directory)
    return list(rows.values())


def grouped(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Cells of the table; ways of loading with the same counts share a row."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        groups.setdefault((row["kind"], *(row[column] for column in COLUMNS)), []).append(row["way"])
    for (kind, *counts), ways in groups.items():
        yield kind, "all" if len(ways) == len(WAYS) else ", ".join(ways), *map(str, counts)


def record_warnings() -> list[str]:
    """Collect the warnings of all loggers in a list, and show none."""
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.root.addHandler(handler)
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    return logged


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Show the table; write it and the rows where the options say so."""
    header = ("damage", "loading", *COLUMNS)
    table = Table(*header)
    for cells in grouped(rows):
        table.add_row(*cells, style="red" if cells[-1] != "0" else None)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        first = f"{versions()}; {options.trials} trials, seed {options.seed}"
        text = f"{first}\n\n{markdown(header, grouped(rows))}\n\n{NOTES}"
        (options.output / "damaged_files.md").write_text(text)
        (options.output / "damaged_files.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    """Try all damage in all ways; exit with 1 if any of it is silent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="of what chance decides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds of damage that have this in their name")
    parser.add_argument("--output", type=Path, help="directory for damaged_files.md and damaged_files.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(options.trials, options.seed, options.only, Path(scratch), record_warnings())
    report(rows, options)
    sys.exit(any(row["silent"] for row in rows))


if __name__ == "__main__":
    main()
