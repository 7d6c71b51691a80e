"""The model card of an adapter: what it changes, how large it is, and how to load it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

BEGIN, END = "<!-- diffpeft: begin -->", "<!-- diffpeft: end -->"
TAGS = ("diffpeft", "diff-pruning")
AUTO_CLASS_SUFFIXES = {
    "SEQ_CLS": "ForSequenceClassification",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}
"""How PEFT's auto class of a task type ends."""
MAX_ROWS = 12
"""Rows of the table of the parameters with most nonzeros; the rest is one row more."""


def update_card(
    directory: Path,
    config: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    repo_id: str = "user/this-adapter",
) -> None:
    """Write the part of an adapter's README.md that is between our marks; the rest is left alone.

    `config` has the contents of adapter_config.json; `metrics` the results to show, by name, None those that are there.
    """
    path = directory / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard("---\n{}\n---\n", ignore_metadata_errors=True)
    data: Any = card.data
    base = config.get("base_model_name_or_path")
    if base and not data.get("base_model"):
        data.base_model = base
    if data.get("base_model") and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(data.base_model)):
        data.base_model = None  # a directory means nothing to others, and the Hub refuses it
        data.tags = [tag for tag in data.get("tags") or [] if not tag.startswith("base_model:")]
    data.library_name = "peft"
    data.tags = [*(data.get("tags") or []), *(tag for tag in TAGS if tag not in (data.get("tags") or []))]
    text = card.text
    if metrics is None:
        shown = re.search(r"\n(\| metric \|.*?)\n\n", text, re.DOTALL)
        results = shown.group(1) if shown else ""
    else:
        rows = (f"| {name} | {value:.4g} |" for name, value in metrics.items())
        results = "\n".join(["| metric | value |", "|---|---|", *rows])
    weights = directory / "adapter_model.safetensors"
    section = _section(config, weights.stat().st_size if weights.is_file() else None, results, repo_id)
    old = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    card.text = old.sub(lambda _: section, text) if old.search(text) else f"{section}\n\n{text.strip()}\n"
    card.save(path)


def _section(config: Mapping[str, Any], size: int | None, results: str, repo_id: str) -> str:
    base = config.get("base_model_name_or_path") or "the base model"
    nnz: Mapping[str, int] | None = config.get("nnz_pattern")
    title = "# A sparse diff\n\n[Diff Pruning](https://arxiv.org/abs/2012.07463) adapter"
    if nnz is None:
        what = [f"{title} of `{base}`, still in gating: a checkpoint of training, dense."]
    else:
        nonzeros = sum(nnz.values())
        what = [
            f"{title} of `{base}`: {nonzeros:,} of its parameters differ (density {config['target_density']:.3%}).",
            "" if size is None else f"Weights: {size:,} bytes. Merging and unmerging it is exact to the bit.",
            _table(nnz, nonzeros),
        ]
    auto_class = "AutoPeftModel" + AUTO_CLASS_SUFFIXES.get(str(config.get("task_type")), "")
    use = f"""`pip install diffpeft`, then

```python
import diffpeft  # so that PEFT knows the method; without it: KeyError: 'DIFFPRUNING'
from peft import {auto_class}

model = {auto_class}.from_pretrained("{repo_id}")
```"""
    return "\n\n".join(part for part in (BEGIN, *what, results, use, END) if part)


def _table(nnz: Mapping[str, int], nonzeros: int) -> str:
    """The table of nonzeros by parameter, layers taken together."""
    kinds: dict[str, int] = {}
    for name, count in nnz.items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        kinds[kind] = kinds.get(kind, 0) + count
    largest = sorted(kinds.items(), key=lambda item: -item[1])
    rows = [f"| `{kind}` | {count:,} | {count / nonzeros:.1%} |" for kind, count in largest[:MAX_ROWS]]
    rest = sum(count for _, count in largest[MAX_ROWS:])
    if rest:
        rows.append(f"| {len(largest) - MAX_ROWS} others | {rest:,} | {rest / nonzeros:.1%} |")
    return "\n".join(["| parameters | nonzeros | share |", "|---|---|---|", *rows])
