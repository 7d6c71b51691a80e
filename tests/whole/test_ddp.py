"""Two processes under gloo: both ranks hold the same diff in every phase, and the kept values really train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from diffpeft.trainer.ddp import DDPFinder

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, os, sys
import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from diffpeft import DiffPruningCallback, DiffPruningConfig
from diffpeft.gates.forward_pass import ForwardPass

torch.manual_seed(0)
base = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=32, max_position_embeddings=16))
l0_lambda = 1e-3 if "penalty" in sys.argv else "auto"
model = get_peft_model(base, DiffPruningConfig(task_type="SEQ_CLS", target_density=0.05, l0_lambda=l0_lambda))
gates = {n: p for n, p in model.named_parameters() if "log_alpha" in n}
wanted = dict(zip(gates, torch.autograd.grad(model.base_model.l0_penalty(), list(gates.values()))))
shares = []  # of the penalty's own gradient, what reaches the moments of the first update; the task does not pull then
rows = [{"input_ids": torch.randint(50, (6,)), "labels": i % 2} for i in range(64)]
history = []

ragged, seeds, own = "ragged" in sys.argv, {}, ForwardPass.seed

def seed(self, key):
    found = own(self, key)
    seeds.setdefault(str(key), []).append(found.tolist())
    return found

ForwardPass.seed = seed

class Note(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        torch.rand(3 * int(os.environ["RANK"]) * ragged + 1)  # as a dropout on rows of another length

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not state.global_step:
            moments = {n.replace("exp_avg", "log_alpha"): b for n, b in model.named_buffers() if "exp_avg." in n}
            for n, gradient in wanted.items():
                shares.extend((10 * moments[n] / (1e-3 * gradient)).reshape(-1).tolist())

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        history.append({n: p.detach().double().sum().item() for n, p in trained.items()})

args = TrainingArguments(output_dir=sys.argv[1], max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2,
    report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    gradient_accumulation_steps=1 + ragged)
class Evaluate(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4 and "evaluate" in sys.argv:
            trainer.evaluate()  # runs the model without its wrapper, just before it is pruned

trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows[:8],
    callbacks=[Evaluate(), DiffPruningCallback(), Note()])
trainer.train()
diff = {n: (p.tolist(), v.tolist()) for n, (p, v) in model.base_model.get_diff().items()}
with open(f"{sys.argv[1]}/rank{args.process_index}.json", "w") as file:
    json.dump({"history": history, "diff": diff, "world": args.world_size, "shares": shares, "seeds": seeds}, file)
trainer.accelerator.end_training()
"""


@pytest.mark.parametrize("extra", [[], ["evaluate"], ["penalty"], ["ragged"]], ids=str)
def test_both_ranks_train_the_same_diff(tmp_path, extra):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(script), str(tmp_path), *extra], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["world"] == 2
    assert first["history"] == second["history"]
    assert first["diff"] == second["diff"]
    assert first["seeds"] == second["seeds"]
    passes = 8 if "ragged" in extra else 4  # until pruning, each with a noise of its own
    assert {len(set(map(tuple, found))) for found in first["seeds"].values()} == {passes}
    if "penalty" in extra:
        assert first["shares"] == second["shares"] == pytest.approx([1.0] * len(first["shares"]), abs=1e-5)
    before, after = first["history"][4], first["history"][-1]
    values = [name for name in after if "diffpruning_values" in name]
    assert values
    assert all(before[name] != after[name] for name in values)


def test_without_ddp_nothing_is_found_or_rebuilt():
    finder, model = DDPFinder(), nn.Linear(2, 2)
    finder.watch(model)
    model(torch.zeros(1, 2))
    finder.rebuild()
    finder.stop()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("times", [1, 2])
def test_watching_again_leaves_one_hook(times):
    finder, model = DDPFinder(), nn.Linear(2, 2)
    for _ in range(times):
        finder.watch(model)
    assert len(model._forward_pre_hooks) == 1
