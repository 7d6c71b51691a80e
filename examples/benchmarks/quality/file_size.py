"""Bits a nonzero on disk, for diffs that were really trained, beside other formats and the information bound.

    python examples/benchmarks/quality/file_size.py                   # two to three minutes on two cores
    python examples/benchmarks/quality/file_size.py --steps 20 --json sizes.json

Trains gates on the quickstart's task with all-MiniLM-L6-v2, prunes copies of that model to several densities and saves
each. "payload" counts the diff's tensors, "file" also the file's header; neither counts the head. The bound is the
entropy of the positions, log2 of the number of ways to choose them in each parameter, and the bits of the values.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

from benchmarks.shared.report import markdown
from common import AtTransition
from peft import PeftModel, ShiraConfig, get_peft_model
from quickstart import LEARNING_RATE, make_data, make_model, make_trainer
from safetensors.torch import load_file, save_file
from torch import nn

from diffpeft import DiffPruningCallback, DiffPruningConfig
from diffpeft.tools.export import to_coo, to_super_tuning

DENSITIES = (0.001, 0.0025, 0.005, 0.01)


def gated(steps: int) -> PeftModel:
    """A model whose gates were trained, right before pruning."""
    model = get_peft_model(make_model(), DiffPruningConfig(task_type="SEQ_CLS", target_density=max(DENSITIES)))
    kept: list[PeftModel] = []
    pruning = DiffPruningCallback(gating_steps=steps)
    callbacks = [AtTransition(pruning, lambda model: kept.append(copy.deepcopy(model))), pruning]
    make_trainer(model, make_data(), callbacks, max_steps=steps, learning_rate=LEARNING_RATE).train()
    return kept[0]


def bytes_of_diff(directory: Path) -> int:
    """Bytes of the adapter file without its head."""
    tensors = load_file(directory / "adapter_model.safetensors")
    own = directory / "diff.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if ".diffpruning_" in key}, own)
    return own.stat().st_size


def entropy(diff: dict[str, Any], elements: dict[str, int]) -> float:
    """Entropy in bits of the positions, given the number of nonzeros in each parameter."""
    bits = 0.0
    for name, (positions, _) in diff.items():
        n, k = elements[name], positions.numel()
        bits += (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
    return bits


def shira_bits(scratch: Path) -> float:
    """Bits a nonzero of SHiRA's file."""
    model = get_peft_model(nn.Sequential(nn.Linear(512, 512)), ShiraConfig(r=8, target_modules=["0"]))
    model.save_pretrained(scratch / "shira")
    nonzeros = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 8 * (scratch / "shira" / "adapter_model.safetensors").stat().st_size / nonzeros


def measure(model: PeftModel, density: float, scratch: Path) -> dict[str, float]:
    """Bits a nonzero of all formats at one density."""
    model = copy.deepcopy(model)
    tuner = model.base_model
    tuner.magnitude_prune(density)
    elements, diff = tuner.adapted_parameters(), tuner.get_diff()
    nonzeros = tuner.num_nonzeros()
    shapes = {name.replace(".base_layer", ""): p.shape for name, p in tuner.model.named_parameters()}
    row = {"density": density, "nonzeros": nonzeros, "positions, bound": entropy(diff, elements) / nonzeros}
    for dtype, bits in (("float32", 32), ("bfloat16", 16), ("int8", 8)):
        if dtype != "float32":
            tuner.cast_values(dtype)
        model.save_pretrained(scratch / dtype)
        tensors = load_file(scratch / dtype / "adapter_model.safetensors")
        payload = sum(t.numel() * t.element_size() for key, t in tensors.items() if ".diffpruning_" in key)
        row[f"{dtype}, bound"] = row["positions, bound"] + bits
        row[f"{dtype}, payload"] = 8 * payload / nonzeros
        row[f"{dtype}, file"] = 8 * bytes_of_diff(scratch / dtype) / nonzeros
        row[f"{dtype}, payload / bound"] = row[f"{dtype}, payload"] / row[f"{dtype}, bound"]
    to_coo(diff, shapes, scratch / "coo.safetensors")
    row["COO, file"] = 8 * (scratch / "coo.safetensors").stat().st_size / nonzeros
    found = to_super_tuning(diff, make_model(), scratch / f"st{density}", leave_out=True)
    size = (scratch / f"st{density}" / "adapter_model.safetensors").stat().st_size
    row["Super-Tuning, file"] = 8 * size / found.nonzeros
    row["SHiRA, file"] = shira_bits(scratch)
    return row


def main() -> None:
    """Train, measure all densities and print a column for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="of gating")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    model = gated(options.steps)
    with tempfile.TemporaryDirectory() as directory:
        rows = [measure(model, density, Path(directory)) for density in DENSITIES]

    def cell(name: str, value: float) -> str:
        return f"{value:,}" if name == "nonzeros" else f"{value:.3f}" if "/" in name else f"{value:.2f}"

    names = list(rows[0])[1:]
    lines = ([name, *(cell(name, row[name]) for row in rows)] for name in names)
    print(markdown(["bits a nonzero", *(f"{row['density']:.2%}" for row in rows)], lines))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
