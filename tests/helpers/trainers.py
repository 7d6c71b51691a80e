"""Small Trainers, for the tests of callbacks."""

import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from diffpeft import DiffPruningCallback, DiffPruningConfig


class Rows(Dataset):
    """Sequences labelled by their first token, which a small model learns in a few steps."""

    def __init__(self, count=64):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(100, (count, 6), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": int(self.ids[index, 0] >= 50)}


def arguments(path, **kwargs):
    defaults = {
        "max_steps": 16,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(path), **{**defaults, **kwargs})


def peft_model(tiny_bert, **config):
    torch.manual_seed(3)
    defaults = {"task_type": "SEQ_CLS", "target_density": 0.02}
    return get_peft_model(tiny_bert(), DiffPruningConfig(**{**defaults, **config}))


def make_trainer(tiny_bert, path, callback=None, extra=(), config=None, **kwargs):
    callbacks = [callback or DiffPruningCallback(), *extra]
    return Trainer(
        model=peft_model(tiny_bert, **(config or {})),
        args=arguments(path, **kwargs),
        train_dataset=Rows(),
        eval_dataset=Rows(16),
        callbacks=callbacks,
    )
