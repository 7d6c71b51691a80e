"""Time and memory of `magnitude_prune`, on random BERTs at the end of gating.

    python examples/benchmarks/speed/pruning.py --json pruning.json              # six sizes, up to BERT-large's 335 M
    python examples/benchmarks/speed/pruning.py --model large --threads 1

99% of the gates are far shut (log_alpha from -10 to -5), the others open; the dense diff is random; pruning keeps 0.5%
of all parameters. Each size is pruned in fresh processes: several times for the time, of which the median counts, and
once each for the memory by PyTorch's allocator and, on a CPU, by the system. Extra memory is the peak above the level
at which pruning begins, the new diff included. Memory of gating that is freed on the way lowers the system's peak, but
not the CPU allocator's.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
from benchmarks.shared.memory import allocations, forget_peak, in_fresh_process, resident
from benchmarks.shared.models import SIX, bert_config, count_parameters
from benchmarks.shared.options import add_options, add_repeats, begin
from benchmarks.shared.report import show, table
from benchmarks.shared.timing import wait
from benchmarks.shared.training import set_gates
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import BertForSequenceClassification

from diffpeft import DiffPruningConfig

COLUMNS = {
    "model": ("model", "{}"),
    "parameters": ("parameters", "{:,}"),
    "kept": ("kept", "{:,}"),
    "seconds": ("seconds", "{:.2f}"),
    "ns_per_parameter": ("ns a parameter", "{:.1f}"),
    "largest_mb": ("largest tensor, MB", "{:,.1f}"),
    "tensors_mb": ("extra memory, MB", "{:,.1f}"),
    "bytes_per_parameter": ("bytes a parameter", "{:.2f}"),
    "resident_mb": ("of the process, MB", "{:,.1f}"),
}


def fill_log_alpha(log_alpha: Tensor) -> None:
    """Set gates as they are at the end of gating."""
    opened = torch.rand_like(log_alpha) < 0.01
    log_alpha.uniform_(-10, -5).masked_fill_(opened, 5.0)


def gated(base: Any) -> PeftModel:
    """The base model in gating."""
    model: PeftModel = get_peft_model(base, DiffPruningConfig(task_type="SEQ_CLS"))
    set_gates(model, fill_log_alpha)
    return model


def make_base(size: str, options: argparse.Namespace) -> Any:
    """A random BERT with a classifier."""
    torch.manual_seed(0)
    base: Any = BertForSequenceClassification(bert_config(size))
    return base.to(options.device, getattr(torch, options.dtype))


def timed(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of pruning, several times."""
    base, seconds, kept = make_base(size, options), [], 0
    largest = max(parameter.numel() for parameter in base.parameters())
    for _ in range(options.warmup + options.repeats):
        model = gated(base)
        wait(options.device)
        start = time.perf_counter()
        kept = model.base_model.magnitude_prune().kept
        wait(options.device)
        seconds.append(time.perf_counter() - start)
        base = model.unload()
    return {"all_seconds": seconds[options.warmup :], "kept": kept, "largest": 4 * largest}


def tensors(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Extra bytes by the allocator."""
    model = gated(make_base(size, options))
    with allocations(options.device) as found:
        model.base_model.magnitude_prune()
    return {"tensors": found.peak}


def process(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Extra bytes by the system."""
    gated(make_base("tiny", options)).base_model.magnitude_prune()  # what libraries allocate once does not count
    model = gated(make_base(size, options))
    forget_peak()
    level = resident()
    model.base_model.magnitude_prune()
    return {"resident": resident("VmHWM") - level}


RUNS = {"timed": timed, "tensors": tensors, "process": process}


def row(size: str, found: dict[str, Any]) -> dict[str, Any]:
    """A row of the table, from the results of all runs."""
    parameters, seconds = count_parameters(size), statistics.median(found["all_seconds"])
    megabytes = {f"{key}_mb": found[key] / 1e6 for key in ("largest", "tensors", "resident") if key in found}
    return {
        "model": size,
        "parameters": parameters,
        "kept": found["kept"],
        "seconds": seconds,
        "all_seconds": found["all_seconds"],
        "ns_per_parameter": 1e9 * seconds / parameters,
        "bytes_per_parameter": found["tensors"] / parameters,
        **megabytes,
    }


def main(words: list[str] | None = None) -> None:
    """Measure the sizes that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, SIX)
    add_repeats(parser)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    begin(options)
    if options.run:
        print(json.dumps(RUNS[options.run](options.model[0], options)))
        return
    same = ["--device", options.device, "--dtype", options.dtype, "--threads", str(options.threads)]
    same += ["--repeats", str(options.repeats), "--warmup", str(options.warmup)]
    rows = []
    for size in options.model:
        found: dict[str, Any] = {}
        for run in ("timed", "tensors") if torch.device(options.device).type == "cuda" else RUNS:
            found |= in_fresh_process(__file__, *same, "--model", size, "--run", run)
        rows.append(row(size, found))
    show(options, rows, table(rows, COLUMNS))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
