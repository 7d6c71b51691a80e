"""Serving with one adapter and with many: unmerged, merged, switched, mixed in a batch, loaded; diffs beside LoRA.

    python examples/benchmarks/speed/serving.py --json serving.json              # the sizes of MiniLM and BERT-large
    python examples/benchmarks/speed/serving.py --model large --parts loading
    python examples/benchmarks/speed/serving.py --device cuda --dtype bfloat16

LoRA has rank 8 on all linear layers of the encoder, a diff 0.5% of all parameters; their values are random. Compared
actions are timed in turn, in one process, and the median counts.

- inference: one adapter, unmerged and merged, beside the base alone;
- switching: merge another task instead, as in task_switch.py;
- mixing: 64 rows of 8 tasks in one forward pass (`adapter_names=`), beside a pass of 8 rows for each task; also on the
  base alone, which shows how much a single pass can save;
- loading: `PeftModel.from_pretrained` onto a base in memory, without and with a first forward pass of one row, in
  which a diff is decoded and checked. LoRA has the rank whose file is nearest in size. Files are in the page cache.

The script exits with an error unless a diff's outputs are the same bits unmerged, merged and loaded, and the rows of a
mixed batch are to rounding what their own adapter computes alone. LoRA is checked to rounding.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
from benchmarks.shared.models import bert_config, linear_shapes, make_batches
from benchmarks.shared.options import add_options, add_repeats, begin
from benchmarks.shared.report import show, table
from benchmarks.shared.timing import interleaved, wait
from benchmarks.speed.task_switch import switch, switch_at_once, with_tasks
from peft import PeftModel
from torch import Tensor, nn
from transformers import BertModel

METHODS = ("lora", "diff_pruning")
TASKS = [f"task{number}" for number in range(8)]
COLUMNS = {
    "model": ("model", "{}"),
    "case": ("case", "{}"),
    "method": ("method", "{}"),
    "ms": ("median, ms", "{:.2f}"),
    "best_ms": ("best, ms", "{:.2f}"),
    "ratio": ("ratio", "{:.3f}x"),
    "beside": ("to", "{}"),
    "bytes": ("file, bytes", "{:,}"),
}
Rows = list[dict[str, Any]]


def make_base(size: str, options: argparse.Namespace) -> BertModel:
    """A random BERT without a head, for evaluation."""
    torch.manual_seed(0)
    model: Any = BertModel(bert_config(size)).eval()
    return model.to(options.device, getattr(torch, options.dtype))


def make_batch(rows: int, options: argparse.Namespace) -> dict[str, Tensor]:
    """A batch of random tokens."""
    (batch,) = make_batches(rows, options.length, torch.device(options.device), count=1)
    del batch["labels"]
    return batch


@torch.inference_mode()
def run(model: nn.Module, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """The last hidden states of a forward pass."""
    states: Tensor = model(**batch, **kwargs).last_hidden_state
    return states


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def rounding(output: Tensor) -> float:
    """Largest distance at which outputs of this dtype count as equal: half of its digits."""
    return float(torch.finfo(output.dtype).eps ** 0.5)


def check(found: Tensor, expected: Tensor, what: str, exactly: bool = False) -> None:
    """Exit with an error unless the outputs are equal, to rounding or exactly."""
    if not torch.equal(found, expected) if exactly else distance(found, expected) > rounding(found):
        raise SystemExit(f"wrong output, off by {distance(found, expected):.1e}: {what}")


def rows_of(
    size: str, case: str, actions: dict[str, Callable[[], Any]], beside: str, options: argparse.Namespace
) -> Rows:
    """Time the actions; one row for each, compared with the one named `beside`."""
    seconds = interleaved(actions, options.repeats, options.warmup, options.device)
    reference = statistics.median(seconds[beside])
    return [
        {
            "model": size,
            "case": case,
            "method": name,
            "ms": 1e3 * statistics.median(found),
            "best_ms": 1e3 * min(found),
            "ratio": statistics.median(found) / reference,
            "beside": beside,
            "seconds": found,
        }
        for name, found in seconds.items()
    ]


def quietly(action: Callable[..., Any], *args: Any) -> Callable[[], None]:
    """A function that calls the action with its arguments and returns nothing, so that `interleaved` takes the time."""

    def call() -> None:
        action(*args)

    return call


def inference(size: str, options: argparse.Namespace) -> Rows:
    """Time forward passes with one adapter, unmerged and merged, for batches of several sizes."""
    base = make_base(size, options)
    models: dict[str, nn.Module] = {"base": base}
    for method in METHODS:
        models[f"{method}, unmerged"] = with_tasks(copy.deepcopy(base), method, TASKS[:1]).eval()
        models[f"{method}, merged"] = copy.deepcopy(models[f"{method}, unmerged"])
        models[f"{method}, merged"].merge_adapter()
    rows = []
    for batch_size in options.batch_sizes:
        batch = make_batch(batch_size, options)
        plain = run(base, batch)
        for method in METHODS:
            own, merged = (run(models[f"{method}, {kind}"], batch) for kind in ("unmerged", "merged"))
            check(merged, own, f"{method}, merged", exactly=method == "diff_pruning")
            if distance(own, plain) < rounding(own):
                raise SystemExit(f"{method}: the adapter does next to nothing, so that nothing is checked")
        actions = {name: quietly(run, model, batch) for name, model in models.items()}
        rows += rows_of(size, f"inference, batch {batch_size}", actions, "base", options)
    return rows


def switching(size: str, options: argparse.Namespace) -> Rows:
    """Time switching to another merged task."""
    base, actions = make_base(size, options), {}
    for method, change in {"lora": switch, "diff_pruning": switch_at_once}.items():
        model = with_tasks(copy.deepcopy(base), method, TASKS[:2]).eval()
        model.merge_adapter()
        actions[method] = quietly(_switch_to_the_other, model, change)
    return rows_of(size, "switch", actions, "lora", options)


def _switch_to_the_other(model: PeftModel, change: Callable[[PeftModel, str], float]) -> None:
    (name,) = model.active_adapters
    change(model, TASKS[1 - TASKS.index(name)])


def mixing(size: str, options: argparse.Namespace) -> Rows:
    """Time the rows of eight tasks in one mixed batch, and in a pass for each task."""
    base = make_base(size, options)
    batch = make_batch(8 * len(TASKS), options)
    names = TASKS * 8
    parts = {
        name: {key: rows[number :: len(TASKS)] for key, rows in batch.items()} for number, name in enumerate(TASKS)
    }
    actions: dict[str, Callable[[], Any]] = {
        "base, one pass": quietly(run, base, batch),
        "base, 8 passes": quietly(_each, base, parts),
    }
    for method in METHODS:
        model = with_tasks(copy.deepcopy(base), method, TASKS).eval()
        mixed = run(model, batch, adapter_names=names)
        for number, name in enumerate(TASKS):
            model.set_adapter(name)
            check(mixed[number :: len(TASKS)], run(model, parts[name]), f"{method}, rows of {name}")
            if number and distance(run(model, parts[TASKS[0]]), mixed[:: len(TASKS)]) < rounding(mixed):
                raise SystemExit(f"{method}: the adapters do the same, so that nothing is checked")
        actions[f"{method}, mixed"] = quietly(partial(run, adapter_names=names), model, batch)
        actions[f"{method}, one by one"] = quietly(_apart, model, parts, options.device)
        actions[f"{method}, one by one, passes alone"] = partial(_apart, model, parts, options.device)
    return rows_of(size, f"{len(names)} rows of {len(TASKS)} tasks", actions, "lora, mixed", options)


def _each(base: BertModel, parts: dict[str, dict[str, Tensor]]) -> None:
    """Run each task's rows by themselves on the base."""
    for batch in parts.values():
        run(base, batch)


def _apart(model: PeftModel, parts: dict[str, dict[str, Tensor]], device: str) -> float:
    """Run each task's rows by themselves; return the seconds of the forward passes alone."""
    seconds = 0.0
    for name, batch in parts.items():
        model.set_adapter(name)
        start = time.perf_counter()
        run(model, batch)
        wait(device)
        seconds += time.perf_counter() - start
    return seconds


def loading(size: str, options: argparse.Namespace) -> Rows:
    """Time loading adapters from files, without and with a first forward pass."""
    base: Any = make_base(size, options)
    shapes = linear_shapes(base)
    batch = make_batch(1, options)
    rank, expected, files, rows = 8, {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        for method in reversed(METHODS):  # the size of the diff's file determines LoRA's rank
            model = with_tasks(base, method, ["default"], rank).eval()
            expected[method] = run(model, batch)
            # This script alone starts at random values; an ordinary file says that it starts at zero.
            for flag in ("init_weights", "init_lora_weights"):
                if hasattr(model.peft_config["default"], flag):
                    setattr(model.peft_config["default"], flag, True)
            model.save_pretrained(Path(folder) / method)
            files[method] = (Path(folder) / method / "adapter_model.safetensors").stat().st_size
            base = model.unload()
            rank = max(1, round(files[method] / (4 * sum(sum(shape) for shape in shapes))))
        for low in (False, True):
            for first in (False, True):
                actions = {
                    method: partial(_load, base, Path(folder) / method, low, first, batch, expected[method], options)
                    for method in METHODS
                }
                case = f"load{' and first pass' if first else ''}, low_cpu_mem_usage={low}"
                rows += rows_of(size, case, actions, "lora", options)
    return [{**row, "bytes": files[row["method"]]} for row in rows]


def _load(
    base: nn.Module,
    path: Path,
    low: bool,
    first: bool,
    batch: dict[str, Tensor],
    expected: Tensor,
    options: argparse.Namespace,
) -> float:
    """Load an adapter, run it once if `first`, take it off again; return the seconds of loading and of that run."""
    wait(options.device)
    start = time.perf_counter()
    model = PeftModel.from_pretrained(base, path, low_cpu_mem_usage=low)
    output = run(model, batch) if first else None
    wait(options.device)
    seconds = time.perf_counter() - start
    check(run(model.eval(), batch) if output is None else output, expected, f"{path.name}, loaded", exactly=True)
    model.unload()
    return seconds


PARTS = {"inference": inference, "switching": switching, "mixing": mixing, "loading": loading}


def main(words: list[str] | None = None) -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ["minilm", "large"])
    add_repeats(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 32], help="of the part inference")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    options = parser.parse_args(words)
    begin(options)
    rows = [row for size in options.model for part in options.parts for row in PARTS[part](size, options)]
    show(options, rows, table(rows, COLUMNS))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
