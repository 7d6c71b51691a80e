"""Memory and time of `extract_diff` on a large checkpoint: a random Llama and the same with noise on every weight.

    python examples/benchmarks/extract.py                               # 1.1 B parameters, bf16: 2 x 2.2 GB on disk
    python examples/benchmarks/extract.py --layers 32 --hidden 4096 --work /scratch     # 7 B: 2 x 13.5 GB

Extraction runs in a process of its own; its peak is counted above the level after imports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


def write_models(config: LlamaConfig, directory: Path) -> int:
    """Both models, a shard for each layer, never whole in memory; returns the number of parameters."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else "rest", []).append(name)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for kind in ("base", "tuned"):
        (directory / kind).mkdir()
        config.save_pretrained(directory / kind)
        index = {"metadata": {}, "weight_map": {}}
        for number, (shard, names) in enumerate(shards.items()):
            generator = torch.Generator().manual_seed(number)
            tensors = {
                n: torch.empty(shapes[n], dtype=torch.bfloat16).uniform_(-1, 1, generator=generator) for n in names
            }
            if kind == "tuned":
                for name, tensor in tensors.items():
                    tensors[name] = tensor * (1 + torch.empty_like(tensor).uniform_(-0.1, 0.1, generator=generator))
            file = f"model-{shard}.safetensors"
            save_file(tensors, directory / kind / file, metadata={"format": "pt"})
            index["weight_map"].update(dict.fromkeys(names, file))
        (directory / kind / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(shape.numel() for shape in shapes.values())


def extract(directory: Path, density: float) -> None:
    """In a process of its own: prints seconds and the peak above the level after imports, in bytes."""
    from diffpeft import extract_diff

    Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports does not count
    level, start = _memory("VmRSS"), time.perf_counter()
    found = extract_diff(directory / "base", directory / "tuned", density, directory / "adapter")
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": _memory("VmHWM") - level, "kept": found.kept}))


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--work", type=Path, help="directory with room for both models; default: a temporary one")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        extract(arguments.run, arguments.density)
        sys.exit()
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        shape = LlamaConfig(
            hidden_size=arguments.hidden,
            intermediate_size=11 * arguments.hidden // 4,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden // 128,
        )
        parameters = write_models(shape, Path(scratch))
        command = [sys.executable, "-W", "ignore", __file__, "--run", scratch, "--density", str(arguments.density)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        largest = 4 * shape.vocab_size * shape.hidden_size
        size = sum(file.stat().st_size for file in (Path(scratch) / "base").glob("*.safetensors"))
        print("| parameters | model on disk | largest tensor, fp32 | nonzeros | peak memory | of the model | seconds |")
        print("|---|---|---|---|---|---|---|")
        print(
            f"| {parameters:,} | {size / 1e9:.2f} GB | {largest / 1e9:.2f} GB | {result['kept']:,} | "
            f"{result['peak'] / 1e9:.2f} GB | {result['peak'] / size:.0%} | {result['seconds']:.0f} |"
        )
