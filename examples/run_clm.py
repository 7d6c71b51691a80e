"""Fine-tune a causal language model on text with Diff Pruning: gating, magnitude pruning, fixmask, one adapter.

    python examples/run_clm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset_name Salesforce/wikitext \\
        --dataset_config_name wikitext-2-raw-v1 --output_dir runs/clm --learning_rate 1e-4 --num_train_epochs 2
    python examples/run_clm.py --train_file train.txt --validation_file validation.txt ...      # or .parquet
    python examples/run_clm.py examples/configs/clm.yaml                   # from one file

All text of a split is strung together and cut into blocks. --method trains a baseline instead, as in run_glue.py;
there is no "head", because the output layer of a language model is pretrained and adapted like the rest. Perplexity
and accuracy of the next token are in the log with --eval_strategy epoch (or steps), and in
<output_dir>/all_results.json for each phase.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from common import METHODS, DiffPruningArguments, ModelArguments, Run, check_length, parse_arguments
from datasets import DatasetDict, load_dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

BUILDERS = {".txt": ("text", {"keep_linebreaks": True}), ".parquet": ("parquet", {})}


@dataclass
class DataArguments:
    """Text to train and evaluate on."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_file: str | None = field(default=None, metadata={"help": "Text to train on, .txt or .parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Text to evaluate on, of the same kind."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text; of a .txt: text."})
    block_size: int = field(default=512, metadata={"help": "Tokens a training example."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training blocks."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many blocks to evaluate."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an adapter that output_dir already holds."})


def load_data(args: DataArguments) -> DatasetDict:
    """The text of the splits "train" and "validation"."""
    files = {"train": args.train_file, "validation": args.validation_file}
    if (args.dataset_name is None) == (None in files.values()):
        raise SystemExit(
            f"dataset_name={args.dataset_name}, train_file={args.train_file} and "
            f"validation_file={args.validation_file} do not say which text; pass --dataset_name, "
            "or both --train_file and --validation_file"
        )
    if args.dataset_name is not None:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        missing = [file for file in files.values() if not Path(file).is_file()]
        if missing:
            raise SystemExit(
                f"{' and '.join(missing)}: no such file; --train_file and --validation_file name files of text"
            )
        kinds = {Path(file).suffix for file in files.values()}
        if len(kinds) > 1 or not kinds <= set(BUILDERS):
            raise SystemExit(
                f"train_file={args.train_file} and validation_file={args.validation_file} must both be "
                f"{' or both be '.join(BUILDERS)}"
            )
        builder, options = BUILDERS[kinds.pop()]
        data = load_dataset(builder, data_files=files, **options)
    for split in files:
        if split not in data or args.text_column not in data[split].column_names:
            raise SystemExit(
                f"there is no {split} split with a column {args.text_column!r}, but {data.column_names}; choose "
                "--text_column, or pass --train_file and --validation_file"
            )
    return DatasetDict({split: data[split].select_columns(args.text_column) for split in files})


def group_texts(texts: Iterable[list[int]], block_size: int) -> list[list[int]]:
    """Blocks of `block_size` tokens of all texts, one after another; the rest at the end is dropped."""
    tokens = list(chain.from_iterable(texts))
    return [tokens[start : start + block_size] for start in range(0, len(tokens) - block_size + 1, block_size)]


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Perplexity, exp of the mean loss, and accuracy, how often the next token has the largest logit."""
    right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
    return {"perplexity": math.exp(float(prediction.losses.mean())), "accuracy": float(right.mean())}


def largest(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The token of the largest logit; the Trainer keeps it instead of the logits, which would not fit into memory."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


class ClmRun(Run):
    """One training run on text."""

    def __init__(
        self,
        model_args: ModelArguments,
        data_args: DataArguments,
        diff_args: DiffPruningArguments,
        args: TrainingArguments,
    ) -> None:
        data = load_data(data_args)
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
        check_length("block_size", data_args.block_size, model)
        super().__init__(model, "clm", "CAUSAL_LM", model_args, diff_args, args)
        args.include_for_metrics = ["loss"]

        def blocks(rows: dict[str, list[str]]) -> dict[str, Any]:
            texts = tokenizer(rows[data_args.text_column], verbose=False)["input_ids"]  # no text is too long for blocks
            found = group_texts(texts, data_args.block_size)
            return {"input_ids": found, "labels": found}

        with args.main_process_first(desc="cutting into blocks"):
            data = data.map(blocks, batched=True, remove_columns=[data_args.text_column], desc="blocks")
        for split, count in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
            if not len(data[split]):
                raise SystemExit(
                    f"block_size={data_args.block_size} is more than the {split} text has tokens; use a smaller one"
                )
            data[split] = data[split].select(range(min(len(data[split]), count or len(data[split]))))
        self.evaluation = {"validation": data["validation"]}
        self.trainer = Trainer(
            model=self.model,
            args=args,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=default_data_collator,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=largest,
            callbacks=self.callbacks,
        )


def main() -> None:
    """Train and evaluate as the command line says."""
    arguments = parse_arguments(DataArguments, tuple(method for method in METHODS if method != "head"))
    set_seed(arguments[-1].seed)
    ClmRun(*arguments).train()


if __name__ == "__main__":
    main()
