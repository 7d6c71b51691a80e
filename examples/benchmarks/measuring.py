"""What step_cost.py, memory.py, serving.py and pruning.py share: models, ways to fine-tune them, medians, memory, tables."""

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, TrainerControl, TrainerState, TrainingArguments

from diffpeft import DiffPruningCallback, DiffPruningConfig, DiffPruningLayer

# Models

SHAPES = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "minilm": (6, 384, 12),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
"""Layers, width and heads of BERTs: all-MiniLM-L6's, and the six sizes that BERT was published in."""
SIX = ("tiny", "mini", "small", "medium", "base", "large")
VOCABULARY = 30522
LINEAR = r".*encoder\..*\.(query|key|value|dense)"
"""The linear layers of the encoder, as PEFT's `target_modules`."""


def bert_config(name: str) -> BertConfig:
    """A BERT of the size, with BERT's own vocabulary and dropout."""
    layers, width, heads = SHAPES[name]
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width}
    return BertConfig(vocab_size=VOCABULARY, hidden_size=width, **sizes)


def count_parameters(size: str) -> int:
    """Of a BERT of the size, with its classifier."""
    with torch.device("meta"):
        model = BertForSequenceClassification(bert_config(size))
    return sum(parameter.numel() for parameter in model.parameters())


def linear_shapes(model: nn.Module) -> list[torch.Size]:
    """Shapes of the weights that `LINEAR` names."""
    return [module.weight.shape for name, module in model.named_modules() if re.fullmatch(LINEAR, name)]


def nearest_rank(shapes: Sequence[torch.Size], parameters: float) -> tuple[int, int]:
    """The rank with which LoRA on weights of these shapes comes nearest to so many parameters; how many it has then."""
    each = sum(sum(shape) for shape in shapes)
    rank = max(1, round(parameters / each))
    return rank, rank * each


# Fine-tuning

GATING: dict[str, dict[str, Any]] = {"gating": {}, "gating-low-memory": {"low_memory": True}}
"""The variants of gating that are compared with full fine-tuning, with what their config has beside the defaults."""
METHODS = ("full", *GATING, "fixmask", "lora", "shira", "supertuning", "fixmask-linear")
RATE = 1e-4


def make_config(method: str, base: nn.Module, density: float) -> peft.PeftConfig:
    """The config of a method.

    "fixmask" has `density` of all parameters. The last four are on the encoder's linear layers, with the number of
    parameters that LoRA has at the rank that is nearest to `density` of these layers.
    """
    shapes = linear_shapes(base)
    linear = sum(shape.numel() for shape in shapes)
    rank, count = nearest_rank(shapes, density * linear)
    common = {"task_type": "SEQ_CLS"}
    if method in GATING:
        return DiffPruningConfig(**common, **GATING[method])
    if method == "fixmask":
        return DiffPruningConfig(**common, target_density=density, gated=False, init_weights=False)
    common["target_modules"] = LINEAR
    if method == "fixmask-linear":
        share = count / sum(p.numel() for p in base.base_model.parameters())
        return DiffPruningConfig(**common, target_density=share, gated=False, init_weights=False)
    if method == "lora":
        return LoraConfig(**common, r=rank)
    if method == "shira":
        return ShiraConfig(**common, r=rank, random_seed=0)
    return SupertuningConfig(**common, sparsity=1 - count / linear)


@torch.no_grad()
def set_gates(model: nn.Module, fill: Callable[[Tensor], Any]) -> None:
    """Have `fill` write the locations of the gates, and make up a dense diff and what the gates remember of gradients."""
    scales = {"diffpruning_w": 1e-3, "diffpruning_exp_avg": 2e-7, "diffpruning_exp_avg_sq": 1e-6}
    fills = {
        "diffpruning_exp_avg_scale": 5e-9,
        "diffpruning_exp_avg_sq_rows": 1e-12,
        "diffpruning_exp_avg_sq_columns": 1e-12,
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        kind = name.split(".")[-3:][0]
        if kind == "diffpruning_log_alpha":
            fill(tensor)
        elif tensor.dtype == torch.int8:
            tensor.copy_(torch.randn_like(tensor, dtype=torch.float32).mul_(40).clamp_(-127, 127))
        elif kind in fills:
            tensor.fill_(fills[kind])
        elif kind in scales:
            tensor.normal_(std=scales[kind])
        if kind == "diffpruning_exp_avg_sq":
            tensor.square_()


def make_model(size: str, method: str, density: float, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A random BERT with a classifier, ready to be fine-tuned by the method."""
    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(bert_config(size)).to(device, dtype)
    if method != "full":
        model = get_peft_model(model, make_config(method, model, density))
    if method.startswith("fixmask"):
        model.base_model.magnitude_prune()
    return model.train()


class Training:
    """A model, its optimizer and its steps, as the stock Trainer takes them.

    What DiffPruningCallback does around an update is done by the callback itself. Gating begins at 60% of the phase, with
    gates as they are by then: spread, at the density that the schedule wants.

    Args:
        size: of the model, a key of `SHAPES`.
        method: one of `METHODS`.
        density: as of [`make_config`].
        options: the command line, see [`add_training_options`].
        steps: how many will be taken at most.
    """

    def __init__(self, size: str, method: str, density: float, options: argparse.Namespace, steps: int) -> None:
        device = torch.device(options.device)
        self.model = make_model(size, method, density, getattr(torch, options.dtype), device)
        if options.eager:
            for module in self.model.modules():
                if isinstance(module, DiffPruningLayer):
                    module.fused = False
        self.batches = make_batches(options.batch_size, options.length, device)
        self.autocast = {"device_type": device.type, "dtype": torch.bfloat16, "enabled": options.autocast}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
        self.trainable = sum(parameter.numel() for parameter in trained)
        self.parts: dict[str, list[float]] = {}
        self.callback = None
        if method in GATING or method.startswith("fixmask"):
            gating_steps = max(100, 4 * steps) if method in GATING else 0
            self.callback = DiffPruningCallback(gating_steps=gating_steps)
            arguments = TrainingArguments("unused", learning_rate=RATE, report_to="none", use_cpu=device.type == "cpu")
            self.state = TrainerState(max_steps=gating_steps + 100)
            self.event = arguments, self.state, TrainerControl()
            self.callback.on_train_begin(*self.event, model=self.model, optimizer=self.optimizer)
            self.state.global_step = 6 * gating_steps // 10
            set_gates(self.model, lambda log_alpha: log_alpha.normal_(-6.6, 4))

    def forward(self) -> Tensor:
        """The loss of the next batch."""
        self.batches.append(self.batches.pop(0))
        with torch.autocast(**self.autocast):
            loss: Tensor = self.model(**self.batches[0]).loss
        return loss

    def step(self) -> None:
        """One update; how long each part of it took is added to `parts`, which counts where the device is a CPU."""
        start = time.perf_counter()

        def passed(part: str) -> None:
            nonlocal start
            before, start = start, time.perf_counter()
            self.parts.setdefault(part, []).append(start - before)

        if self.callback is not None:
            self.callback.on_step_begin(*self.event, optimizer=self.optimizer)
        loss = self.forward()
        passed("forward")
        loss.backward()
        passed("backward")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        passed("clipping")
        if self.callback is not None:
            self.callback.on_pre_optimizer_step(*self.event, optimizer=self.optimizer)
            passed("callback")
        self.optimizer.step()
        passed("optimizer")
        if self.callback is not None:
            self.callback.on_optimizer_step(*self.event, optimizer=self.optimizer)
            self.state.global_step += 1
        self.model.zero_grad()
        passed("the rest")


def make_batches(batch_size: int, length: int, device: torch.device, count: int = 8) -> list[dict[str, Tensor]]:
    """Random tokens and labels, the same for every method."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, length)
    return [
        {
            "input_ids": torch.randint(VOCABULARY, shape, generator=generator).to(device),
            "attention_mask": torch.ones(shape, dtype=torch.int64, device=device),
            "labels": torch.randint(2, shape[:1], generator=generator).to(device),
        }
        for _ in range(count)
    ]


# Time


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    actions: Mapping[str, Callable[[], float | None]], repeats: int, warmup: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each action, `repeats` times each, in turn, each turn beginning with another one.

    Args:
        actions: what to time, by name. One that returns seconds has counted for itself.
        repeats: turns that count.
        warmup: turns before them.
        device: where the work is done.
    """
    names = list(actions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait(device)
            start = time.perf_counter()
            counted = actions[name]()
            wait(device)
            passed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(passed if counted is None else counted)
    return seconds


# Memory


class Allocations:
    """Bytes that tensors took within a [`allocations`] block: the most at a time, and what was left of them at its end."""

    peak = left = 0


@contextmanager
def allocations(device: str) -> Iterator[Allocations]:
    """Count what PyTorch's allocator gives and takes back, temporaries inside of kernels too.

    On a CPU the block can only see that memory go which it, or a block before it, has seen come.
    """
    found = Allocations()
    gc.collect()
    if torch.device(device).type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        gc.collect()
        wait(device)
        found.peak = torch.cuda.max_memory_allocated(device) - before
        found.left = torch.cuda.memory_allocated(device) - before
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
        gc.collect()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        found.left += event.nbytes()
        found.peak = max(found.peak, found.left)


def resident(field: str = "VmRSS") -> int:
    """Bytes of the process in memory: now (VmRSS), or at most since [`forget_peak`] (VmHWM). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Begin VmHWM anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def in_fresh_process(script: str, *words: str) -> dict[str, Any]:
    """Run a script; what it prints last, which is JSON. Memory that is freed goes back to the system there at once."""
    thresholds = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", script, *words]
    done = subprocess.run(command, env={**os.environ, **thresholds}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# Command line and results

SHOWN = ("device", "dtype", "autocast", "eager", "batch_size", "length", "repeats")
"""The options that are printed."""


def add_options(parser: argparse.ArgumentParser, models: Sequence[str]) -> None:
    """The options that all the scripts have."""
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(models), help="sizes of random BERTs")
    parser.add_argument("--sizes", action="store_true", help=f"the six sizes of BERT instead: {', '.join(SIX)}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base's weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write what was found here too")


def add_repeats(parser: argparse.ArgumentParser) -> None:
    """The options of the scripts that take times."""
    parser.add_argument("--repeats", type=int, default=9, help="of which the median counts")
    parser.add_argument("--warmup", type=int, default=2, help="turns before them, which do not count")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The options of the scripts that train."""
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--densities", nargs="+", type=float, default=[0.005], help="of all methods but full and gating"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--autocast", action="store_true", help="to bfloat16; weights stay in their dtype")
    parser.add_argument("--eager", action="store_true", help="gating and fixmask without torch.compile")


def begin(options: argparse.Namespace) -> None:
    """Set what the options say for the whole process."""
    torch.set_num_threads(options.threads)
    if options.sizes:
        options.model = list(SIX)


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
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


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """The rows in Markdown. Columns are (title, format) by key; what a row lacks stays empty, what all lack is left out."""
    columns = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}
    lines = [[title for title, _ in columns.values()], ["---"] * len(columns)]
    for row in rows:
        values = [(row.get(key), form) for key, (_, form) in columns.items()]
        lines.append(["" if value is None else form.format(value) for value, form in values])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def show(options: argparse.Namespace, rows: list[dict[str, Any]], *tables: str) -> None:
    """Print machine and tables, and write machine, options and rows as JSON where the options say so."""
    found = machine(options.device)
    settings = {key: value for key, value in vars(options).items() if key not in ("json", "run", "sizes")}
    print(", ".join([found["gpu"] or found["cpu"], f"{found['threads']} threads", f"torch {found['torch']}"]))
    print(", ".join(f"{key} {value}" for key, value in settings.items() if key in SHOWN), end="\n\n")
    print("\n\n".join(tables))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": found, "settings": settings, "rows": rows}, indent=1) + "\n")
