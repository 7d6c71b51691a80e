"""Random BERTs of several sizes, and batches for them."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

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


def bert_config(size: str) -> BertConfig:
    """Config of a BERT of the size, with BERT's own vocabulary and dropout."""
    layers, width, heads = SHAPES[size]
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width}
    return BertConfig(vocab_size=VOCABULARY, hidden_size=width, **sizes)


def count_parameters(size: str) -> int:
    """Number of parameters of a BERT of the size, its classifier included."""
    with torch.device("meta"):
        model = BertForSequenceClassification(bert_config(size))
    return sum(parameter.numel() for parameter in model.parameters())


def linear_shapes(model: nn.Module) -> list[torch.Size]:
    """Shapes of the weights that `LINEAR` names."""
    return [module.weight.shape for name, module in model.named_modules() if re.fullmatch(LINEAR, name)]


def nearest_rank(shapes: Sequence[torch.Size], parameters: float) -> tuple[int, int]:
    """LoRA's rank that comes nearest to so many parameters on weights of these shapes, and the number that it gives."""
    each = sum(sum(shape) for shape in shapes)
    rank = max(1, round(parameters / each))
    return rank, rank * each


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
