"""Every method through the same GLUE data, steps, schedule and seeds; one JSON line for each run.

    python examples/benchmarks/quality/glue.py search --data_dir <glue>     # learning rates, on held-out training rows
    python examples/benchmarks/quality/glue.py final --data_dir <glue>      # the chosen rates, on the validation set
    python examples/benchmarks/quality/glue.py table                        # tables from the kept lines

The encoder is all-MiniLM-L6-v2 from its package (`--model` for another). Runs append to results/glue/runs.jsonl, with
all of their settings; those that are there are skipped, and one that was cut off goes on from its last checkpoint in
`--work_dir`. Two lanes: start the command twice, with `--lane 0 --lanes 2` and `--lane 1 --lanes 2`.

Learning rates were fixed before any run: three for each method, in `METHODS`. "search" trains each on nine tenths of
CoLA's and MRPC's training rows and evaluates on the last tenth. A method's rate is the one with the best mean rank
there; "final" uses it for all tasks, trains on all rows and looks at the validation set once.
"""

import argparse
import inspect
import json
import shutil
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
from benchmarks.shared.report import markdown
from common import minilm
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from run_glue import SENTENCES, compute_metrics, load_data
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from diffpeft import DiffPruningCallback, DiffPruningConfig, last_checkpoint

RESULTS = Path(__file__).parent / "results" / "glue"
STEPS = {"cola": 520, "mrpc": 460, "rte": 390, "stsb": 480, "sst2": 500}
"""Updates by task, in batches of 32."""
METRIC = {"cola": "matthews_correlation", "mrpc": "accuracy", "rte": "accuracy", "stsb": "pearson", "sst2": "accuracy"}
WARMUP = 0.06
HELD_OUT = 0.1
DENSITY = 0.005
SELECTION_BATCHES = 8
METHODS: dict[str, tuple[float, float, float]] = {
    "full": (5e-5, 1e-4, 2e-4),
    "lora_r3": (5e-4, 1e-3, 2e-3),
    "lora_r4": (5e-4, 1e-3, 2e-3),
    "lora_r16": (5e-4, 1e-3, 2e-3),
    "bitfit": (1e-3, 2e-3, 4e-3),
    "shira": (1e-3, 2e-3, 4e-3),
    "supertuning": (1e-3, 2e-3, 4e-3),
    "gates": (1e-4, 2e-4, 4e-4),
    "magnitude": (5e-5, 1e-4, 2e-4),
    "gradient": (1e-3, 2e-3, 4e-3),
    "random": (1e-3, 2e-3, 4e-3),
}
"""Methods and their learning rates, those of gating for "gates" and "magnitude". LoRA of rank 3 has 124 k parameters
where 0.5% are 114 k; of rank 4 as many bytes in a file; rank 16 is what people use. SHiRA has rank 3 as well."""
MAIN = ("full", "lora_r3", "shira", "gates", "gradient")
"""Methods that "final" runs with three seeds; the others with one."""
SEARCH_TASKS = ("cola", "mrpc")
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Setting:
    """All that a run's result depends on, besides the code."""

    task: str
    method: str
    learning_rate: float
    seed: int
    held_out: bool
    """Whether it evaluates on a tenth of the training rows, which are left out of training."""
    steps: int
    model: str = "all-MiniLM-L6-v2"
    density: float = DENSITY
    gating_ratio: float = 0.5
    changes: dict[str, Any] = field(default_factory=dict)
    """Other arguments of `DiffPruningConfig` and `DiffPruningCallback`, and of ablations.py's variants."""

    @property
    def name(self) -> str:
        """The run's folder."""
        return "-".join(str(value) for value in asdict(self).values()).translate(str.maketrans("/'{}: ", "______"))

    def of(self, kind: type) -> dict[str, Any]:
        """The changes that are arguments of a class."""
        known = inspect.signature(kind).parameters
        return {name: value for name, value in self.changes.items() if name in known}


def make_model(setting: Setting, path: str, labels: int) -> Any:
    """The encoder with a fresh head, as the method trains it."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels)
    common: dict[str, Any] = {"task_type": "SEQ_CLS"}
    linear = {**common, "target_modules": "all-linear"}
    encoder = sum(p.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear) for p in [m.weight])
    if setting.method == "full":
        return model
    if setting.method == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
        return model
    if setting.method.startswith("lora"):
        rank = int(setting.method.removeprefix("lora_r"))
        return get_peft_model(model, LoraConfig(**linear, r=rank, lora_alpha=2 * rank))
    if setting.method == "shira":
        return get_peft_model(model, ShiraConfig(**linear, r=3, random_seed=setting.seed))
    if setting.method == "supertuning":
        count = round(setting.density * model.base_model.num_parameters())
        return get_peft_model(model, SupertuningConfig(**linear, sparsity=1 - count / encoder))
    common.update(target_density=setting.density, selection=setting.method)
    return get_peft_model(model, DiffPruningConfig(**{**common, **setting.of(DiffPruningConfig)}))


def where(tuner: Any) -> dict[str, int]:
    """Nonzeros of a diff by kind of parameter."""
    counts: Counter[str] = Counter()
    for name, (positions, _) in tuner.get_diff().items():
        kind = "embeddings" if "embeddings" in name else "linear"
        kind = "norms" if "Norm" in name else "biases" if name.endswith("bias") else kind
        counts[f"pooler {kind}" if "pooler" in name else kind] += positions.numel()
    return dict(counts)


class Timed:
    """Seconds of a block."""

    def __enter__(self) -> "Timed":
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.start


def run(setting: Setting, options: argparse.Namespace, extra: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train and evaluate; the run's JSON line. `extra` callbacks come before those of the method."""
    path = minilm() if setting.model == Setting.model else setting.model
    set_seed(setting.seed)
    data = load_data(argparse.Namespace(task_name=setting.task, data_dir=options.data_dir, max_train_samples=None,
                                        max_eval_samples=None))  # fmt: skip
    train, evaluation = data["train"], data["validation"]
    if setting.held_out:
        split = train.train_test_split(test_size=HELD_OUT, seed=0)
        train, evaluation = split["train"], split["test"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    first, second = SENTENCES[setting.task]

    def tokenize(rows: dict[str, Any]) -> dict[str, Any]:
        texts = (rows[first],) if second is None else (rows[first], rows[second])
        return tokenizer(*texts, truncation=True, max_length=128)

    train, evaluation = (part.map(tokenize, batched=True, desc="tokenizing") for part in (train, evaluation))
    labels = 1 if setting.task == "stsb" else len(data["train"].unique("label"))
    model = make_model(setting, path, labels)
    output = options.work_dir / setting.name
    collator = DataCollatorWithPadding(tokenizer)
    callbacks: list[Any] = []
    if setting.method in ("gates", "magnitude"):
        callbacks = [DiffPruningCallback(**{"gating_ratio": setting.gating_ratio, **setting.of(DiffPruningCallback)})]
    elif setting.method in ("gradient", "random"):
        columns = [column for column in train.column_names if column in ("label", *tokenizer.model_input_names)]
        rows = train.shuffle(seed=setting.seed).select_columns(columns)
        batches = [collator([rows[32 * b + i] for i in range(32)]) for b in range(SELECTION_BATCHES)]
        model.base_model.select_positions(batches, lambda batch: model(**batch).loss)
        callbacks = [DiffPruningCallback(gating_steps=0, fixmask_learning_rate=setting.learning_rate)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(output),
            max_steps=setting.steps,
            learning_rate=setting.learning_rate,
            warmup_steps=round(WARMUP * setting.steps),
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            train_sampling_strategy="group_by_length",
            save_steps=options.save_steps,
            save_total_limit=1,
            logging_steps=20,
            seed=setting.seed,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=train,
        data_collator=collator,
        compute_metrics=lambda p: compute_metrics(setting.task, p.predictions, p.label_ids),
        callbacks=[*extra, *callbacks],
    )
    trainer.held_out = evaluation
    for callback in extra:
        callback.trainer = trainer  # type: ignore[attr-defined]
    trained = sum(p.numel() for n, p in trainer.model.named_parameters() if p.requires_grad and "classifier" not in n)
    checkpoint = last_checkpoint(output) if output.exists() else None
    with Timed() as clock:
        trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate(evaluation, metric_key_prefix="end")
    found = {key.removeprefix("end_"): value for key, value in metrics.items() if "per_second" not in key}
    tuner = getattr(trainer.model, "base_model", None)
    if callbacks:
        trained, found["where"] = tuner.num_nonzeros(), where(tuner)
    shutil.rmtree(output, ignore_errors=True)
    whole = checkpoint is None
    return {**asdict(setting), **found, "trained": trained, "seconds": round(clock.seconds, 1) if whole else None}


def load(file: Path = RESULTS / "runs.jsonl") -> list[dict[str, Any]]:
    """The kept lines of a file."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [{"changes": {}, **json.loads(line)} for line in lines]


def is_done(setting: Setting, lines: list[dict[str, Any]]) -> bool:
    """Whether a line has these settings."""
    return any(asdict(setting).items() <= line.items() for line in lines)


def searched() -> Iterator[Setting]:
    """The runs of the search, cheap ones first."""
    for task in SEARCH_TASKS:
        for index in (1, 0, 2):
            for method, rates in METHODS.items():
                yield Setting(task, method, rates[index], 1, True, STEPS[task])


def chosen_rates(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The rate of each method with the best mean rank over the tasks of the search; of equal ones the lower."""
    best = {}
    for method, rates in METHODS.items():
        ranks = dict.fromkeys(rates, 0.0)
        for task in SEARCH_TASKS:
            scores = {rate: _held_out_score(lines, task, method, rate) for rate in rates}
            if None in scores.values():
                break
            for rate, score in scores.items():
                ranks[rate] += sum(other > score for other in scores.values())
        else:
            best[method] = min(rates, key=lambda rate: (ranks[rate], rate))
    return best


def _held_out_score(lines: list[dict[str, Any]], task: str, method: str, rate: float) -> float | None:
    setting = Setting(task, method, rate, 1, True, STEPS[task])
    return next((line[METRIC[task]] for line in lines if asdict(setting).items() <= line.items()), None)


def finals(lines: list[dict[str, Any]]) -> Iterator[Setting]:
    """The runs on the validation sets, of methods whose rate is known."""
    rates = chosen_rates(lines)
    for seed in SEEDS:
        for task, steps in STEPS.items():
            for method in METHODS:
                if method in rates and (seed == SEEDS[0] or method in MAIN):
                    yield Setting(task, method, rates[method], seed, False, steps)


def show(lines: list[dict[str, Any]]) -> str:
    """Markdown tables of the search and of the final runs."""
    rates = chosen_rates(lines)
    parts = ["Search: metric on a held-out tenth of the training rows, one seed; the chosen rate in bold.\n"]
    rows = []
    for task in SEARCH_TASKS:
        for method, tried in METHODS.items():
            cells = []
            for rate in tried:
                score = _held_out_score(lines, task, method, rate)
                cell = f"{rate:g}: " + ("" if score is None else f"{100 * score:.1f}")
                cells.append(f"**{cell}**" if rates.get(method) == rate else cell)
            rows.append([task, METRIC[task], method, *cells])
    parts.append(markdown(["task", "metric", "method", "low rate", "middle", "high"], rows))
    parts.append("\nValidation: mean and standard deviation over seeds (number of seeds).\n")
    rows = []
    for method in METHODS:
        cells, means = [], []
        for task in STEPS:
            final = [e for e in lines if not e["held_out"] and (e["task"], e["method"]) == (task, method)]
            scores = [100 * line[METRIC[task]] for line in final]
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.1f}{spread} ({len(scores)})" if scores else "")
            means += [statistics.mean(scores)] if scores else []
        average = f"{statistics.mean(means):.1f}" if len(means) == len(STEPS) else ""
        rows.append([method, f"{rates[method]:g}" if method in rates else "", *cells, average])
    parts.append(markdown(["method", "rate", *STEPS, "average"], rows))
    return "\n".join(parts) + "\n"


def main() -> None:
    """Run what is missing of a stage, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("search", "final", "table"))
    parser.add_argument("--data_dir", help="holds <task>/{train,validation}.parquet; default: the hub's nyu-mll/glue")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--work_dir", type=Path, default=Path("runs/glue"))
    parser.add_argument("--save_steps", type=int, default=100)
    parser.add_argument("--lane", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
    RESULTS.mkdir(parents=True, exist_ok=True)
    if options.stage != "table":
        settings = searched() if options.stage == "search" else finals(load())
        wanted = [s for s in settings if s.method in options.methods and s.task in options.tasks]
        for index, setting in enumerate(wanted):
            if index % options.lanes == options.lane and not is_done(setting, load()):
                line = run(setting, options)
                with open(RESULTS / "runs.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    text = show(load())
    (RESULTS / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
