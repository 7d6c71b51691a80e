"""The custom loop on a small model, by one process and by two, which must train the same diff."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[2] / "examples" / "by_feature"
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

SCRIPT = """
import json, os, sys
import accelerate_loop, torch
from quickstart import make_data
from transformers import BertConfig, BertForSequenceClassification

def make_model():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))

def make_few():
    rows, held_out, collator = make_data()
    return rows.select(range(68)), held_out.select(range(33)), collator

accelerate_loop.make_model, accelerate_loop.make_data = make_model, make_few
tuner = accelerate_loop.train(accelerate_loop.parse_options(sys.argv[2:]))
diff = {name: (where.tolist(), values.tolist()) for name, (where, values) in tuner.get_diff().items()}
heads = {name: p.tolist() for name, p in tuner.named_parameters() if "modules_to_save" in name}
with open(f"{sys.argv[1]}/rank{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump({"diff": diff, "heads": heads, "nonzeros": round(0.02 * tuner.num_base_parameters())}, file)
"""


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ([], ["--accumulation", "2", "--mixed_precision", "bf16"]),
        ([], ["--accumulation", "2", "--low_memory"]),
        (TWO, []),
        (TWO, ["--accumulation", "2", "--mixed_precision", "bf16"]),
    ],
    ids=["one process", "one process, low memory", "two processes", "two processes, bf16"],
)
def test_every_process_ends_with_the_saved_diff(tmp_path, launcher, options):
    script = tmp_path / "small.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join(map(str, (FOLDER.parents[1], FOLDER.parent, FOLDER)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    words = ["--steps", "12", "--gating_steps", "7", "--batch_size", "8", "--density", "0.02", "--cpu", *options]
    command = [sys.executable, *launcher, str(script), str(tmp_path), *words, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("after fixmask") == 1
    ranks = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("rank*.json"))]
    assert len(ranks) == (2 if launcher else 1)
    assert ranks[0] == ranks[-1]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, (_, values) in ranks[0]["diff"].items():
        module, _, parameter = name.rpartition(".")
        assert saved[f"base_model.model.{module}.diffpruning_values.{parameter}"].tolist() == values
    assert sum(len(values) for _, values in ranks[0]["diff"].values()) == ranks[0]["nonzeros"]
