"""Fine-tune a pretrained model on SQuAD v1.1 (extractive question answering) with Diff Pruning, all three phases.

    python examples/run_squad.py --model_name_or_path bert-large-cased-whole-word-masking --output_dir runs/squad \\
        --learning_rate 1e-5 --per_device_train_batch_size 8 --num_train_epochs 4 --target_density 0.01
    python examples/run_squad.py examples/configs/squad.yaml               # the same from one file

The data come from the hub (rajpurkar/squad), or with --data_dir from its train*.parquet and validation*.parquet.
--method trains a baseline instead, as in run_glue.py. With --eval_strategy epoch (or steps) exact match and F1 are in
the log, and --load_best_model_at_end true --metric_for_best_model f1 --greater_is_better true ends with the best of
fixmask. The adapter, all_results.json, predictions.json and nbest_predictions.json go to output_dir.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import DiffPruningArguments, ModelArguments, Run, check_length, parse_arguments
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

COLUMNS = ("id", "question", "context", "answers")
WAY_BACK = ["example", "context_start", "offsets"]
"""Columns of a window that map its tokens back to the text."""


@dataclass
class DataArguments:
    """Data, and how questions become windows and windows become answers."""

    data_dir: str | None = field(default=None, metadata={"help": "Holds train*.parquet and validation*.parquet."})
    max_seq_length: int = field(default=384, metadata={"help": "Question and a window of its context, in tokens."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that consecutive windows of a context share."})
    max_query_length: int = field(default=64, metadata={"help": "Longer questions are truncated, in tokens."})
    n_best_size: int = field(default=20, metadata={"help": "Answers a question in nbest_predictions.json."})
    max_answer_length: int = field(default=30, metadata={"help": "Longer answers are not considered, in tokens."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many questions, spread evenly over the articles."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on so many questions, spread evenly over the articles."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an adapter that output_dir already holds."})


def load_data(args: DataArguments) -> DatasetDict:
    """The splits "train" and "validation", every question with an answer."""
    data = load_dataset("rajpurkar/squad") if args.data_dir is None else load_dataset("parquet", data_dir=args.data_dir)
    found = {}
    for split, count in (("train", args.max_train_samples), ("validation", args.max_eval_samples)):
        if split not in data:
            raise SystemExit(f"--data_dir has the splits {sorted(data)}, but needs {split}*.parquet")
        rows = data[split]
        if not set(COLUMNS) <= set(rows.column_names):
            raise SystemExit(f"the {split} split has the columns {rows.column_names}, but needs {sorted(COLUMNS)}")
        unanswerable = sum(not answers["text"] for answers in rows["answers"])
        if unanswerable:
            raise SystemExit(
                f"{unanswerable} of {len(rows)} questions of the {split} split have no answer, as in SQuAD v2; this "
                'script is for v1.1: take them out, e.g. data.filter(lambda row: row["answers"]["text"])'
            )
        size = min(len(rows), count or len(rows))
        found[split] = rows.select(np.linspace(0, len(rows) - 1, size).round().astype(int))  # rows stand by article
    return DatasetDict(found)


def check_lengths(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Exit where the tokenizer could not cut a context into windows."""
    for name in ("n_best_size", "max_answer_length", "max_query_length"):
        if getattr(args, name) < 1:
            raise SystemExit(f"{name}={getattr(args, name)} leaves no answer to find; use 1 or more")
    if not tokenizer.is_fast:
        raise SystemExit(
            f"{type(tokenizer).__name__} does not say which characters a token covers; use a fast tokenizer"
        )
    needed = args.max_query_length + tokenizer.num_special_tokens_to_add(pair=True) + max(args.doc_stride, 0)
    if args.doc_stride < 0 or args.max_seq_length <= needed:
        raise SystemExit(
            f"max_seq_length={args.max_seq_length} does not hold max_query_length={args.max_query_length}, the special "
            f"tokens, doc_stride={args.doc_stride} and a token more; use max_seq_length > {needed} and doc_stride >= 0"
        )


def answer_tokens(answers: dict[str, list[Any]], offsets: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """First and last token of the first gold answer, or None unless all of it is there.

    `offsets` are the first and last characters that each token covers.
    """
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    covered = [token for token, (left, right) in enumerate(offsets) if left < end and right > start]
    if not covered or offsets[0][0] > start or offsets[-1][1] < end:
        return None
    return covered[0], covered[-1]


def make_windows(rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> dict[str, Any]:
    """Windows of tokens: each question with as many overlapping pieces of its context as it needs.

    Returns:
        The tokenizer's columns; `start_positions` and `end_positions`, the tokens of the first gold answer, or both 0
        (the first token, [CLS] in BERT) if the window does not hold it; `example`, the number of the row;
        `context_start`, the first token of the context; and `offsets`, the characters that each token of it covers.
    """
    limit = {"truncation": True, "max_length": args.max_query_length, "add_special_tokens": False}
    questions = [question.strip() for question in rows["question"]]
    spans = tokenizer(questions, return_offsets_mapping=True, **limit)["offset_mapping"]
    batch = tokenizer(
        [question[: max((end for _, end in kept), default=0)] for question, kept in zip(questions, spans, strict=True)],
        rows["context"],
        truncation="only_second",
        max_length=args.max_seq_length,
        stride=args.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows: dict[str, Any] = {name: [] for name in ("start_positions", "end_positions", *WAY_BACK)}
    sources, characters = batch.pop("overflow_to_sample_mapping"), batch.pop("offset_mapping")
    for window, source in enumerate(sources):
        parts = batch.sequence_ids(window)
        count = parts.count(1)
        first = parts.index(1) if count else 0
        offsets = characters[window][first : first + count]
        found = answer_tokens(rows["answers"][source], offsets)
        windows["start_positions"].append(first + found[0] if found else 0)
        windows["end_positions"].append(first + found[1] if found else 0)
        windows["example"].append(rows["number"][source])
        windows["context_start"].append(first)
        windows["offsets"].append(offsets)
    return {**batch, **windows}


def best_spans(start: np.ndarray, end: np.ndarray, count: int, longest: int) -> list[tuple[int, int]]:
    """The best spans (first token, last token) of at most `longest` tokens, best first.

    A span's score is start[first] + end[last]; `count` spans are returned, or all if there are fewer.
    """
    if not len(start):
        return []
    ends = np.lib.stride_tricks.sliding_window_view(np.pad(end, (0, longest - 1), constant_values=-np.inf), longest)
    scores = (start[:, None] + ends).reshape(-1)  # (first, last - first)
    places = np.argpartition(-scores, min(count, len(scores)) - 1)[:count]
    ranked = sorted(places[np.isfinite(scores[places])].tolist(), key=lambda place: -scores[place])
    return [(place // longest, place // longest + place % longest) for place in ranked]


def best_answers(
    contexts: Sequence[str], windows: Iterable[dict[str, Any]], logits: Sequence[np.ndarray], args: DataArguments
) -> list[list[dict[str, Any]]]:
    """The n best answers to each question, best first: text, probability among the n, and logits.

    The same text in several windows is one answer, with the best of its scores.

    Args:
        contexts: text of each question.
        windows: the columns `WAY_BACK` of each window.
        logits: start and end logits, each of shape (windows, tokens).
        args: how many answers, and how long.
    """
    candidates: list[dict[str, tuple[float, float]]] = [{} for _ in contexts]
    for window, start, end in zip(windows, *logits, strict=True):
        offsets, found = window["offsets"], candidates[window["example"]]
        inside = slice(window["context_start"], window["context_start"] + len(offsets))
        start, end = start[inside].astype(np.float64), end[inside].astype(np.float64)
        for first, last in best_spans(start, end, args.n_best_size, args.max_answer_length):
            text = contexts[window["example"]][offsets[first][0] : offsets[last][1]]
            found[text] = max(found.get(text, (-np.inf, -np.inf)), (float(start[first]), float(end[last])), key=sum)
    answers = []
    for found in candidates:
        ranked = sorted(found.items(), key=lambda item: -sum(item[1]))[: args.n_best_size] or [("", (0.0, 0.0))]
        weights = np.exp([sum(scores) - sum(ranked[0][1]) for _, scores in ranked])
        answers.append(
            [
                {"text": text, "probability": float(weight), "start_logit": scores[0], "end_logit": scores[1]}
                for (text, scores), weight in zip(ranked, weights / weights.sum(), strict=True)
            ]
        )
    return answers


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous whitespace."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1_score(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words of the normalized answers, repeated words counted."""
    words, gold_words = normalize_answer(prediction).split(), normalize_answer(gold).split()
    common = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * common / (len(words) + len(gold_words)) if common else 0.0


def squad_metrics(predictions: Iterable[str], golds: Iterable[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 in percent, each question's best over its gold answers.

    Equal to SQuAD's official script for v1.1 (Rajpurkar et al. 2016).
    """
    exact, f1 = [], []
    for prediction, answers in zip(predictions, golds, strict=True):
        exact.append(max(normalize_answer(prediction) == normalize_answer(answer) for answer in answers))
        f1.append(max(f1_score(prediction, answer) for answer in answers))
    return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}


class SquadTrainer(Trainer):
    """Evaluates the windows in their order.

    The stock Trainer, if it groups training examples by length, groups these too, and its logits would be those of
    other questions.
    """

    def _get_eval_sampler(self, eval_dataset: Dataset) -> None:
        return None


class SquadRun(Run):
    """One training run on SQuAD."""

    def __init__(
        self,
        model_args: ModelArguments,
        data_args: DataArguments,
        diff_args: DiffPruningArguments,
        args: TrainingArguments,
    ) -> None:
        data = load_data(data_args)
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        tokenizer.padding_side = "right"  # what is left of a window would move the positions of the answers
        check_lengths(data_args, tokenizer)
        model = AutoModelForQuestionAnswering.from_pretrained(model_args.model_name_or_path)
        check_length("max_seq_length", data_args.max_seq_length, model)
        super().__init__(model, "squad", "QUESTION_ANS", model_args, diff_args, args)

        def prepare(rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            return make_windows({**rows, "number": numbers}, tokenizer, data_args)

        with args.main_process_first(desc="cutting into windows"):
            windows = data.map(
                prepare, batched=True, with_indices=True, remove_columns=data["train"].column_names, desc="windows"
            )
        self.data_args, self.examples = data_args, data["validation"]
        self.windows = windows["validation"].select_columns(WAY_BACK).with_format("numpy")
        inputs = windows.remove_columns(WAY_BACK)
        self.evaluation = {"validation": inputs["validation"]}
        self.answers: list[list[dict[str, Any]]] = []
        self.trainer = SquadTrainer(
            model=self.model,
            args=args,
            train_dataset=inputs["train"],
            eval_dataset=inputs["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=self.metrics,
            callbacks=self.callbacks,
        )

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Exact match and F1, the Trainer's `compute_metrics`; keeps the answers."""
        contexts, golds = self.examples["context"][:], [answers["text"] for answers in self.examples["answers"]]
        self.answers = best_answers(contexts, self.windows, prediction.predictions[:2], self.data_args)
        return squad_metrics((ranked[0]["text"] for ranked in self.answers), golds)

    def train(self) -> dict[str, Any]:
        """Train, evaluate, save, and write the answers of the last evaluation."""
        results = super().train()
        if self.trainer.is_world_process_zero():
            ranked = dict(zip(self.examples["id"], self.answers, strict=True))
            best = {name: answers[0]["text"] for name, answers in ranked.items()}
            for file, content in (("predictions.json", best), ("nbest_predictions.json", ranked)):
                (Path(self.args.output_dir) / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return results


def main() -> None:
    """Train and evaluate as the command line says."""
    arguments = parse_arguments(DataArguments)
    set_seed(arguments[-1].seed)
    SquadRun(*arguments).train()


if __name__ == "__main__":
    main()
