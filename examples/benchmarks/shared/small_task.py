"""A task and a model that train in seconds, for benchmarks that ask what happens and not how fast."""

from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

VOCABULARY = 200
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of fifteen random tokens, labelled 1 if most of them come from the upper half of the vocabulary."""
    ids = torch.randint(VOCABULARY, (count, 15), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": int((row >= VOCABULARY // 2).sum() > 7)} for row in ids]


def make_base(**sizes: int) -> BertForSequenceClassification:
    """A small BERT of the same random weights at each call."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=128, **sizes))
