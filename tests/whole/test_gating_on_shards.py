"""Gating, pruning and fixmask on shards of FSDP2: processes under gloo, beside one process or plain replicas."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "examples" / "benchmarks" / "robustness" / "sharding.py"

LOOP = """
import os, sys
import torch
from peft import get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import (BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, T5Config,
    T5ForConditionalGeneration)
from diffpeft import DiffPruningConfig

folder, kind, parts = sys.argv[1], sys.argv[2], int(sys.argv[3])
rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if processes > 1:
    distributed.init_process_group("gloo")
torch.manual_seed(0)
sizes = {"vocab_size": 51, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 33}
if kind == "bert":
    base = BertForSequenceClassification(BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
elif kind == "t5":
    base = T5ForConditionalGeneration(T5Config(vocab_size=51, d_model=16, d_ff=33, d_kv=8, num_layers=2, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0))
else:
    base = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=kind == "tied"))
task = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(kind, "CAUSAL_LM")
model = get_peft_model(base, DiffPruningConfig(task_type=task, target_density=0.05), low_cpu_mem_usage=processes > 1)
tuner = model.base_model
if processes > 1:
    for module in list(model.modules()):
        if type(module).__name__ in ("BertLayer", "LlamaDecoderLayer", "T5Block"):
            fully_shard(module)
    fully_shard(model)
    tuner.after_sharding()
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids, labels, log = torch.randint(50, (16, 4 * parts, 6)), torch.arange(4 * parts) % 2, []
for step in range(16):
    state = torch.get_rng_state()
    for part in [rank] if processes > 1 else range(parts):
        torch.set_rng_state(state)
        own = slice(4 * part, 4 * part + 4)
        batch = {"input_ids": ids[step, own], "labels": labels[own] if kind == "bert" else ids[step, own]}
        loss = model(**batch).loss
        (loss if processes > 1 else loss / parts).backward()
    if step < 8:
        log.append((tuner.gate_step(step, 8), tuner.expected_nonzeros(), tuner.num_nonzeros()))
    optimizer.step()
    optimizer.zero_grad()
    if step == 7:
        tuner.magnitude_prune(optimizer=optimizer)
diff = tuner.get_diff()
if rank == 0:
    torch.save({"log": log, "diff": diff}, f"{folder}/{processes}.pt")
if processes > 1:
    distributed.barrier()
    os._exit(0)
"""


def launch(processes, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[:3000]  # the processes' own words; the launcher's come last


@pytest.mark.parametrize(
    ("kind", "processes"),
    [
        ("bert", 2),
        pytest.param("bert", 3, marks=pytest.mark.slow),
        pytest.param("tied", 2, marks=pytest.mark.slow),
        ("untied", 4),
        pytest.param("t5", 2, marks=pytest.mark.slow),
    ],
)
def test_a_loop_on_shards_learns_what_one_process_learns(tmp_path, kind, processes):
    """Uneven pieces, gates of one element, processes without rows; the same lambda, counts and positions."""
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    for count in (1, processes):
        launch(count, script, tmp_path, kind, processes)
    one, sharded = (torch.load(tmp_path / f"{count}.pt") for count in (1, processes))
    exact = processes != 3  # a third has no exact bits, and the gates of a toy turn on the last of them
    assert sharded["log"][0] == one["log"][0]
    for own, other in zip(sharded["log"], one["log"], strict=True):
        assert own == pytest.approx(other, rel=1e-5 if exact else 0.05, abs=1e-12)
    same = [torch.equal(positions, sharded["diff"][name][0]) for name, (positions, _) in one["diff"].items()]
    assert all(same) or not exact
    if exact:
        for name, (_, values) in one["diff"].items():
            torch.testing.assert_close(sharded["diff"][name][1], values, rtol=1e-4, atol=1e-6)
    counts = [sum(len(positions) for positions, _ in run["diff"].values()) for run in (sharded, one)]
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind"), [("bert", "fsdp2"), ("llama-tied", "fsdp2-sharded")])
def test_the_trainer_on_shards_ends_as_on_replicas_and_resumes_to_the_same_bits(tmp_path, model, kind):
    found, tensors = {}, {}
    for name, how, more in (
        ("ddp", "ddp", []),
        ("whole", kind, []),
        ("gating", kind, ["--checkpoint", tmp_path / "whole" / "checkpoint-4"]),
        ("transition", kind, ["--checkpoint", tmp_path / "whole" / "checkpoint-8"]),
        ("fixmask", kind, ["--checkpoint", tmp_path / "whole" / "checkpoint-12"]),
    ):
        launch(2, BENCHMARK, "--train", how, "--model", model, "--folder", tmp_path / name, *more)
        found[name] = json.loads((tmp_path / name / "found.json").read_text())
        tensors[name] = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    assert (found["ddp"]["type"], found["whole"]["type"]) == ("MULTI_CPU", "FSDP")
    assert found["whole"]["losses"] == pytest.approx(found["ddp"]["losses"], rel=1e-5)
    for key, tensor in tensors["ddp"].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensors["whole"][key], tensor, rtol=1e-4, atol=1e-6)
    for name in ("gating", "transition", "fixmask"):
        assert found[name]["losses"] == found["whole"]["losses"]
        assert all(torch.equal(tensor, tensors[name][key]) for key, tensor in tensors["whole"].items())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "reentrant"])
def test_gradient_checkpointing_on_shards_changes_nothing(tmp_path, way):
    losses = []
    for more in ([], ["--gradient_checkpointing", way]):
        folder = tmp_path / str(len(more))
        launch(2, BENCHMARK, "--train", "fsdp2", "--model", "llama", "--folder", folder, *more)
        losses.append(json.loads((folder / "found.json").read_text())["losses"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
