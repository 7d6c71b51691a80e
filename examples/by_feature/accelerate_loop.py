"""A training loop of one's own with Accelerate, no Trainer: all three phases from the model's public methods.

    python examples/by_feature/accelerate_loop.py                                       # four minutes, one core
    torchrun --nproc_per_node 2 examples/by_feature/accelerate_loop.py                  # DistributedDataParallel
    python examples/by_feature/accelerate_loop.py --accumulation 4 --mixed_precision bf16 --low_memory

Task, encoder and settings are those of examples/quickstart.py; the processes share a batch of the same size. Diff
Pruning adds `gate_step` in each update, `magnitude_prune` at the end of gating, and a learning rate that follows the
density.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from quickstart import LEARNING_RATE, SEED, make_data, make_model
from torch.utils.data import DataLoader

from diffpeft import DiffPruningConfig, DiffPruningModel

FACTOR = 10.0  # fixmask's learning rate over the dense diff's
WARMUP = 0.1  # share of fixmask in which its learning rate rises


def learning_rate(tuner: DiffPruningModel, step: int, gating_steps: int, steps: int) -> float:
    """The dense diff's rate, which becomes fixmask's as gates close; then a warm-up, and a straight line to zero."""
    if tuner.phase() == "gating":
        return LEARNING_RATE * FACTOR ** tuner.density_progress()
    done = (step - gating_steps) / (steps - gating_steps)
    return LEARNING_RATE * FACTOR * min((done + 1 / steps) / WARMUP, 1.0, (1 - done) / (1 - WARMUP))


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: Any, batches: DataLoader) -> float:
    """Accuracy on all rows, each counted once."""
    model.eval()
    found = ((model(**batch).logits.argmax(-1), batch["labels"]) for batch in batches)
    right = [accelerator.gather_for_metrics(answer == label) for answer, label in found]
    model.train()
    return torch.cat(right).float().mean().item()


def train(options: argparse.Namespace) -> DiffPruningModel:
    """Train in all phases, print the accuracy after each, and save the adapter; return the tuner."""
    accelerator = Accelerator(
        cpu=options.cpu, mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.accumulation
    )
    rows, held_out, collator = make_data()
    size = options.batch_size // (accelerator.num_processes * options.accumulation)
    batches = DataLoader(rows, size, shuffle=True, drop_last=True, collate_fn=collator)
    tests = DataLoader(held_out, 120, collate_fn=collator)
    config = DiffPruningConfig(task_type="SEQ_CLS", target_density=options.density, low_memory=options.low_memory)
    model = get_peft_model(make_model(), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    model, optimizer, batches, tests = accelerator.prepare(model, optimizer, batches, tests)
    tuner = accelerator.unwrap_model(model).base_model
    if options.low_memory:
        tuner.update_in_backward(optimizer)  # until pruning, at the learning rates that the loop sets
    set_seed(SEED, device_specific=True)  # each process samples gates of its own
    step = 0
    model.train()
    while step < options.steps:
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:  # the gradients of an update are complete, and the same on all processes
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    if tuner.phase() == "gating":
                        tuner.gate_step(step, options.gating_steps)
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(tuner, step, options.gating_steps, options.steps)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            if step % 20 == 0 or step == options.steps:
                accelerator.print(f"step {step}: loss {loss.item():.3f}, density {tuner.expected_density():.2%}")
            if step == options.gating_steps:
                accelerator.print(f"after gating   {evaluate(accelerator, model, tests):.1%}")
                accelerator.print(tuner.magnitude_prune(optimizer=optimizer))
                # DistributedDataParallel averages the gradients of the parameters that it was built with alone.
                model = accelerator.prepare(accelerator.unwrap_model(model))
                accelerator.print(f"after pruning  {evaluate(accelerator, model, tests):.1%}")
            if step == options.steps:
                break
    accelerator.print(f"after fixmask  {evaluate(accelerator, model, tests):.1%}")
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.output_dir)
        print(f"adapter in {options.output_dir}")
    accelerator.wait_for_everyone()  # nobody leaves while another saves, or while a gather is still being cleaned up
    accelerator.end_training()
    return tuner


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="updates")
    parser.add_argument("--gating_steps", type=int, default=120, help="how many of them are gating")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of an update, over all processes")
    parser.add_argument("--accumulation", type=int, default=1, help="in how many parts a process takes its rows")
    parser.add_argument("--density", type=float, default=0.005, help="nonzeros as a share of the base parameters")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--low_memory", action="store_true", help="gating in the memory of full fine-tuning")
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/accelerate_loop"), help="where the adapter goes")
    return parser.parse_args(words)


if __name__ == "__main__":
    train(parse_options())
