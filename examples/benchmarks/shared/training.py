"""Fine-tuning by each of the compared methods, step by step as the stock Trainer takes them."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.shared.models import LINEAR, bert_config, linear_shapes, make_batches, nearest_rank
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertForSequenceClassification, TrainerControl, TrainerState, TrainingArguments

from diffpeft import DiffPruningCallback, DiffPruningConfig, DiffPruningLayer

GATING: dict[str, dict[str, Any]] = {"gating": {}, "gating-low-memory": {"low_memory": True}}
"""Variants of gating, and the settings of their config beside the defaults."""
METHODS = ("full", *GATING, "fixmask", "lora", "shira", "supertuning", "fixmask-linear")
LEARNING_RATE = 1e-4


def make_config(method: str, base: nn.Module, density: float) -> PeftConfig:
    """The config of a method.

    "fixmask" trains a share `density` of all parameters. "lora", "shira", "supertuning" and "fixmask-linear" train
    equally many parameters of the encoder's linear layers: as many as LoRA has at the rank that comes nearest to
    `density`.
    """
    shapes = linear_shapes(base)
    linear = sum(shape.numel() for shape in shapes)
    rank, count = nearest_rank(shapes, density * linear)
    common = {"task_type": "SEQ_CLS"}
    if method in GATING:
        return DiffPruningConfig(**common, **GATING[method])
    if method == "fixmask":
        return DiffPruningConfig(**common, target_density=density, selection="magnitude", init_weights=False)
    common["target_modules"] = LINEAR
    if method == "fixmask-linear":
        share = count / sum(p.numel() for p in base.base_model.parameters())
        return DiffPruningConfig(**common, target_density=share, selection="magnitude", init_weights=False)
    if method == "lora":
        return LoraConfig(**common, r=rank)
    if method == "shira":
        return ShiraConfig(**common, r=rank, random_seed=0)
    return SupertuningConfig(**common, sparsity=1 - count / linear)


@torch.no_grad()
def set_gates(model: nn.Module, fill: Callable[[Tensor], Any]) -> None:
    """Set up the state of gating: log_alpha by `fill`, the dense diff and the moments of the gates at random."""
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
    """A random BERT with a classifier, ready to train by the method."""
    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(bert_config(size)).to(device, dtype)
    if method != "full":
        model = get_peft_model(model, make_config(method, model, density))
    if method.startswith("fixmask"):
        model.base_model.magnitude_prune()
    return model.train()


class Training:
    """A model, its optimizer and its steps, as the stock Trainer takes them.

    DiffPruningCallback takes part in each step. Gating begins at 60% of the phase, where the gates move, with log_alpha
    spread so that the expected density is the scheduled one.

    Args:
        size: the model's size, a key of `SHAPES`.
        method: one of `METHODS`.
        density: share of parameters to train, see [`make_config`].
        options: the command line, see [`add_training_options`].
        steps: the largest number of steps that will be taken.
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
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.trainable = sum(parameter.numel() for parameter in trained)
        self.parts: dict[str, list[float]] = {}
        self.callback = None
        if method in GATING or method.startswith("fixmask"):
            gating_steps = max(100, 4 * steps) if method in GATING else 0
            self.callback = DiffPruningCallback(gating_steps=gating_steps)
            arguments = TrainingArguments(
                "unused", learning_rate=LEARNING_RATE, report_to="none", use_cpu=device.type == "cpu"
            )
            self.state = TrainerState(max_steps=gating_steps + 100)
            self.event = arguments, self.state, TrainerControl()
            self.callback.on_train_begin(*self.event, model=self.model, optimizer=self.optimizer)
            self.state.global_step = 6 * gating_steps // 10
            set_gates(self.model, lambda log_alpha: log_alpha.normal_(-6.6, 4))

    def forward(self) -> Tensor:
        """Loss of the next batch."""
        self.batches.append(self.batches.pop(0))
        with torch.autocast(**self.autocast):
            loss: Tensor = self.model(**self.batches[0]).loss
        return loss

    def step(self) -> None:
        """Make one update, and add the seconds of its parts to `parts`, which are right on a CPU alone."""
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
