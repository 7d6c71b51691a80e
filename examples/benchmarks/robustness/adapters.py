"""The small adapter that damaged_files.py damages, its base models and its files."""

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from diffpeft import DiffPruningConfig
from diffpeft.files.adapter import write_adapter

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
HEADS = ["classifier", "pooler"]
Files = dict[str, bytearray]
"""The contents of an adapter's files by name."""


class Base(NamedTuple):
    """A base model without an adapter (`bare`), with an adapter "default" (`occupied`), and saved (`directory`)."""

    bare: nn.Module
    occupied: PeftModel
    directory: Path


def make_base(directory: Path, seed: int, width: int = 12) -> Base:
    """A small BERT of random weights, whose 99 x 12 word embeddings leave room for encoded positions out of range."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 99, "hidden_size": width, "num_labels": width, "intermediate_size": 20}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 33}
    bare = BertForSequenceClassification(BertConfig(**sizes)).eval()
    bare.save_pretrained(directory)
    config = DiffPruningConfig(task_type="SEQ_CLS", target_density=0.05, init_weights=False, modules_to_save=HEADS)
    occupied = get_peft_model(copy.deepcopy(bare), config).eval()
    occupied.base_model.magnitude_prune()
    return Base(bare, occupied, directory)


def make_adapter(directory: Path, base: Base, seed: int, density: float = 0.1, heads_seed: int = 0) -> Files:
    """The files of an adapter of random values, with equally many nonzeros in both layers."""
    heads = {name: t for name, t in base.bare.state_dict().items() if any(head in name for head in HEADS)}
    shapes = {name: p.shape for name, p in base.bare.named_parameters() if name not in heads}
    diff = {}
    torch.manual_seed(seed)
    for name in (name for name in shapes if name.endswith("weight")):
        positions = torch.randperm(shapes[name].numel())[: round(density * shapes[name].numel())].sort().values
        diff[name] = positions, 0.1 * torch.randn(len(positions))
    torch.manual_seed(heads_seed)
    heads = {name: head + 0.1 * torch.randn_like(head) for name, head in heads.items()}
    write_adapter(directory, base.occupied.peft_config["default"], diff, shapes, heads)
    PeftModel.from_pretrained(copy.deepcopy(base.bare), directory).save_pretrained(directory)
    return {file.name: bytearray(file.read_bytes()) for file in directory.iterdir()}
