"""Whether a damaged adapter is refused, or makes a model that is wrong in silence: kinds of damage, ways of loading.

    python examples/benchmarks/damaged_files.py --output examples/benchmarks/results   # three minutes, one core
    python examples/benchmarks/damaged_files.py --trials 100 --only "a bit of"

Each way of loading gets the same damaged files of a small adapter with heads. Refused: an error while loading or in the
first forward. Told: a warning that the whole adapter does not give. Harmless: logits, diff and heads are those of the whole
adapter, to the bit. Silent is all else, and makes the exit code 1. "Sealed" is damage whose checksums were made anew, as if
the adapter had been written so: what must catch it is another check.
"""

import argparse
import contextlib
import copy
import json
import logging
import math
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # files that are missing must not be looked for elsewhere

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from diffpeft import DiffPruningConfig, positions, seal
from diffpeft.cli import app
from diffpeft.files import read_adapter, write_adapter
from diffpeft.model import DiffPruningModel

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
VALUES, POSITIONS = ".diffpruning_values.", ".diffpruning_positions."
WORDS, NUMEL = f"{PREFIX}bert.embeddings.word_embeddings{VALUES}weight", 99 * 12
HEADS, HEAD, POOLER = ["classifier", "pooler"], f"{PREFIX}classifier.weight", f"{PREFIX}bert.pooler.dense.weight"
COLUMNS = ("tried", "refused", "harmless", "told", "silent")
BASES = {"a base of other weights": (7, 12), "a base of another shape": (0, 16)}
NOTES = """Read without a model, an adapter means the same beside any base of its shape. `load_adapter over one` is what
resuming a Trainer does: PEFT does not look at the config then. The code of positions keeps all but their low bits sorted,
so that only positions with the same high bits can stand out of order.
"""
Files = dict[str, bytearray]
Tensors = dict[str, Tensor]
Change = Callable[[Files, random.Random], object]


class Base(NamedTuple):
    """A base model: bare, with an adapter "default" in it, and as files."""

    bare: nn.Module
    occupied: PeftModel
    directory: Path


def make_base(directory: Path, seed: int, width: int = 12) -> Base:
    """A small BERT of random weights. In the code of 99 x 12 positions there is room for some out of range."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 99, "hidden_size": width, "num_labels": width, "intermediate_size": 20}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 33}
    bare = BertForSequenceClassification(BertConfig(**sizes)).eval()
    bare.save_pretrained(directory)
    config = DiffPruningConfig(task_type="SEQ_CLS", target_density=0.05, init_weights=False, modules_to_save=HEADS)
    occupied = get_peft_model(copy.deepcopy(bare), config).eval()
    occupied.base_model.magnitude_prune()
    return Base(bare, occupied, directory)


def make_adapter(directory: Path, base: Base, seed: int, density: float = 0.1, heads_seed: int = 0) -> Files:
    """The files of an adapter of random values, with as many nonzeros in both layers."""
    heads = {name: t for name, t in base.bare.state_dict().items() if any(head in name for head in HEADS)}
    shapes = {name: p.shape for name, p in base.bare.named_parameters() if name not in heads}
    diff = {}
    torch.manual_seed(seed)
    for name in (name for name in shapes if name.endswith("weight")):
        where = torch.randperm(shapes[name].numel())[: round(density * shapes[name].numel())].sort().values
        diff[name] = where, 0.1 * torch.randn(len(where))
    torch.manual_seed(heads_seed)
    heads = {name: head + 0.1 * torch.randn_like(head) for name, head in heads.items()}
    write_adapter(directory, base.occupied.peft_config["default"], diff, shapes, heads)
    PeftModel.from_pretrained(copy.deepcopy(base.bare), directory).save_pretrained(directory)
    return {file.name: bytearray(file.read_bytes()) for file in directory.iterdir()}


# Ways of loading


def flat(diff: dict[str, tuple[Tensor, Tensor]]) -> Tensors:
    """Positions and values by names of their own."""
    return {f"{name}, {part}": tensor for name, pair in diff.items() for part, tensor in enumerate(pair)}


@torch.no_grad()
def outcome(model: nn.Module, adapter: str = "default") -> Tensors:
    """What a model says to every token, position and type, and its diff and heads."""
    ids = torch.arange(99).reshape(3, 33)
    found = {"logits": model.eval()(input_ids=ids, token_type_ids=ids % 2).logits}
    for name, head in model.named_modules():
        if isinstance(head, ModulesToSaveWrapper):
            own = head.modules_to_save[adapter].state_dict()
            found |= {f"{name.removeprefix(PREFIX)}.{key}": tensor for key, tensor in own.items()}
    return found | flat(DiffPruningModel.of(model).get_diff(adapter))


def load_into(model: nn.Module, path: Path, name: str = "default", **settings: bool) -> nn.Module:
    """A copy of a model, PEFT's or transformers', with the adapter in it and active."""
    model = copy.deepcopy(model)
    model.load_adapter(str(path), name, **settings)
    model.set_adapter(name)
    return model


def as_files(directory: Path, base: Base) -> Tensors:
    """Without a model."""
    _, diff, heads = read_adapter(directory, {name: p.shape for name, p in base.bare.named_parameters()})
    return flat(diff) | heads


def verify(directory: Path, base: Base) -> Tensors:
    """The command line. What it calls whole is then read."""
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


# Kinds of damage


def regions(data: bytearray) -> dict[str, list[int]]:
    """Which bytes of a weights file are what."""
    start = 8 + int.from_bytes(data[:8], "little")
    found = {"header": [*range(start)], "values": [], "seals": [], "positions": [], "heads": []}
    for key, entry in json.loads(data[8:start]).items():
        if key != "__metadata__":
            own = [start + offset for offset in range(*entry["data_offsets"])]
            size = seal.SEAL if POSITIONS in key else 0
            found["seals"] += own[:size]
            found["positions" if size else "values" if VALUES in key else "heads"] += own[size:]
    return found


def flip(data: bytearray, rng: random.Random, where: Sequence[int] = (), bits: int = 1) -> None:
    """Flip bits at some of these bytes, by default of all."""
    for byte in rng.choices(where or range(len(data)), k=bits):
        data[byte] ^= 1 << rng.randrange(8)


def zero(data: bytearray, start: int, size: int) -> None:
    """Zero a block."""
    data[start : start + size] = bytes(len(data[start : start + size]))


def swap(tensors: Tensors, rng: random.Random, *parts: str) -> None:
    """Exchange parts of the diffs of a parameter in both layers."""
    first = rng.choice([key for key in tensors if "layer.0." in key and VALUES in key])
    for key in (first.replace(VALUES, part) for part in parts):
        other = key.replace("layer.0.", "layer.1.")
        tensors[key], tensors[other] = tensors[other], tensors[key]


def recount(counts: dict[str, int], rng: random.Random) -> None:
    """Add one to a count, or take one away."""
    counts[rng.choice([*counts])] += rng.choice((-1, 1))


def spoil_head(tensors: Tensors, fields: dict[str, Any], rng: random.Random) -> None:
    """A number that is none, under a checksum made anew."""
    tensors[HEAD][0, rng.randrange(12)] = rng.choice((math.nan, math.inf))
    fields["heads_checksum"] = seal.checksum_of_heads(tensors)


def reseal(tensors: Tensors, rng: random.Random, change: Callable[..., Any]) -> None:
    """Give the words' embeddings other positions and values. `change` is told where two positions have the same high bits:
    only of such can the code say that they are out of order."""
    values, packed = tensors[WORDS], WORDS.replace(VALUES, POSITIONS)
    where = seal.unpack(tensors[packed], len(values), NUMEL)
    high = where >> positions.low_bits(len(where), NUMEL)
    at = rng.choice((high[1:] == high[:-1]).nonzero().flatten().tolist())
    where, values = change(where.tolist(), values.tolist(), at, rng)
    tensors[WORDS] = torch.tensor(values)
    with mock.patch.object(positions, "check"):
        tensors[packed] = seal.seal(seal.pack(torch.tensor(where), NUMEL), tensors[WORDS])


# Of positions w and values v, at a place i.
SEALED: dict[str, Callable[..., Any]] = {
    "positions out of range": lambda w, v, i, rng: ([*w[:-1], NUMEL + rng.randrange(4)], v),
    "positions out of order": lambda w, v, i, rng: ([*w[:i], w[i + 1], w[i], *w[i + 2 :]], v),
    "a position twice": lambda w, v, i, rng: ([*w[: i + 1], w[i], *w[i + 2 :]], v),
    "a nonzero fewer than the config counts": lambda w, v, i, rng: (w[1:], v[1:]),
    "a nonzero more than the config counts": lambda w, v, i, rng: (
        sorted([*w, min({*range(NUMEL)} - {*w})]),
        [*v, 0.1],
    ),
    "a NaN among the values": lambda w, v, i, rng: (w, [*v[:i], math.nan, *v[i + 1 :]]),
    "an infinite value": lambda w, v, i, rng: (w, [*v[:i], math.inf, *v[i + 1 :]]),
}
# Of tensors t and the config's fields c.
REWRITTEN: dict[str, Callable[..., Any]] = {
    **{f"{kind}, sealed": lambda t, c, rng, f=change: reseal(t, rng, f) for kind, change in SEALED.items()},
    "a head NaN or infinite, sealed": spoil_head,
    "a tensor of an unknown parameter": lambda t, c, rng: t.update({WORDS.replace("weight", "new"): torch.ones(3)}),
    "a tensor of an unknown head": lambda t, c, rng: t.update({HEAD.replace("weight", "new"): torch.ones(3)}),
    "two layers' values swapped": lambda t, c, rng: swap(t, rng, VALUES),
    "two layers' values, positions and seals swapped": lambda t, c, rng: swap(t, rng, VALUES, POSITIONS),
    "two heads' tensors swapped": lambda t, c, rng: t.update({HEAD: t[POOLER], POOLER: t[HEAD]}),
    "a count in the config one off": lambda t, c, rng: recount(c["nnz_pattern"], rng),
    "a count in the config missing": lambda t, c, rng: c["nnz_pattern"].pop(rng.choice([*c["nnz_pattern"]])),
    "a count in the config too many": lambda t, c, rng: c["nnz_pattern"].update({"bert.embeddings.LayerNorm.bias": 1}),
    "a newer format_version": lambda t, c, rng: c.update(format_version=3),
}


def rewrite(files: Files, rng: random.Random, change: Callable[..., Any]) -> None:
    """Change tensors and config."""
    tensors, fields = load(bytes(files[WEIGHTS])), json.loads(files[CONFIG])
    change(tensors, fields, rng)
    files[WEIGHTS] = bytearray(save(tensors, {"format": "pt"}))
    files[CONFIG] = bytearray(json.dumps(fields, indent=2).encode())


def damages(own: Files, twin: Files, other: Files) -> Iterator[tuple[str, Change]]:
    """Kinds of damage, by changes of the files. `twin` is an adapter of the same heads and counts, `other` has neither."""
    where, start = regions(own[WEIGHTS]), own[CONFIG].index(b'"base_fingerprint"')
    stop = own[CONFIG].index(b"}", start)
    body, seals = range(len(where["header"]), len(own[WEIGHTS])), where["seals"][:: seal.SEAL]
    tensors, theirs = load(bytes(own[WEIGHTS])), load(bytes(twin[WEIGHTS]))
    for region, places in where.items():
        yield f"a bit of the {region}", lambda f, rng, places=places: flip(f[WEIGHTS], rng, places)
    yield "a bit of the config's fingerprint", lambda f, rng: flip(f[CONFIG], rng, range(start, stop))
    rest = [*range(start), *range(stop, len(own[CONFIG]))]
    yield "a bit of the config elsewhere", lambda f, rng: flip(f[CONFIG], rng, rest)
    yield "a bit of README.md", lambda f, rng: flip(f["README.md"], rng)
    yield "eight bits behind the header", lambda f, rng: flip(f[WEIGHTS], rng, body, 8)
    yield "zeros in the weights", lambda f, rng: zero(f[WEIGHTS], rng.choice(body), rng.randint(1, 256))
    yield "zeros from a seal on", lambda f, rng: zero(f[WEIGHTS], rng.choice(seals), rng.randint(4, 12))
    for name, label in ((WEIGHTS, "weights"), (CONFIG, "config")):
        yield f"{label} truncated", lambda f, rng, n=name: f.update({n: f[n][: rng.randrange(1, len(f[n]))]})
        yield f"{label} empty", lambda f, rng, n=name: f[n].clear()
        yield f"{label} missing", lambda f, rng, n=name: f.pop(n)
    for key in tensors:
        yield "a tensor missing", lambda f, rng, k=key: rewrite(f, rng, lambda t, c, rng: t.pop(k))
    for kind, change in REWRITTEN.items():
        yield kind, lambda f, rng, change=change: rewrite(f, rng, change)
    for key in (key for key in tensors if VALUES in key):
        yield (
            "another adapter's values",
            lambda f, rng, k=key: rewrite(f, rng, lambda t, c, rng: t.update({k: theirs[k]})),
        )
    yield "another adapter's weights", lambda f, rng: f.update({WEIGHTS: other[WEIGHTS]})
    yield "another's weights, same heads and counts", lambda f, rng: f.update({WEIGHTS: twin[WEIGHTS]})
    for kind in BASES:
        yield kind, lambda f, rng: None


# Measuring


def attempt(way: str, directory: str, base: Base, logged: list[str]) -> tuple[Any, set[str]]:
    """What a way of loading makes of the files, or its error; and what it warns of."""
    logged.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = WAYS[way](Path(directory), base)
        except Exception as error:
            result = error
    return result, {text.replace(directory, "<adapter>") for text in [*(str(w.message) for w in caught), *logged]}


def judge(row: dict[str, Any], result: Any, whole: Tensors, told: set[str], directory: str) -> None:
    """Count an attempt, and keep one example of all that was said. A message helps if it is no stray exception, and names
    a file, an adapter or a parameter."""
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
    """One row for each kind of damage and way of loading."""
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
            if files in seen.setdefault(kind, []):  # what chance does not change is tried once
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
    """Cells of the table, in which ways with the same counts share a row."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        groups.setdefault((row["kind"], *(row[column] for column in COLUMNS)), []).append(row["way"])
    for (kind, *counts), ways in groups.items():
        yield kind, "all" if len(ways) == len(WAYS) else ", ".join(ways), *map(str, counts)


def listen() -> list[str]:
    """Keep the warnings of loggers, and show none."""
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.root.addHandler(handler)
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    return logged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="of what chance decides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds of damage that have this in their name")
    parser.add_argument("--output", type=Path, help="directory for damaged_files.md and damaged_files.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(arguments.trials, arguments.seed, arguments.only, Path(scratch), listen())
    header = ("damage", "loading", *COLUMNS)
    table = Table(*header)
    for cells in grouped(rows):
        table.add_row(*cells, style="red" if cells[-1] != "0" else None)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
        lines = "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *grouped(rows)])
        text = f"{versions}; {arguments.trials} trials, seed {arguments.seed}\n\n{lines}\n{NOTES}"
        (arguments.output / "damaged_files.md").write_text(text)
        (arguments.output / "damaged_files.json").write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row["silent"] for row in rows))
