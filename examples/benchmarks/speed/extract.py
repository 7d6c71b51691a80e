"""Memory and time of `extract_diff` on a large checkpoint: a random Llama, and the same one with noise on every weight.

    python examples/benchmarks/speed/extract.py                       # 1.1 B parameters, bf16: 2 x 2.2 GB on disk
    python examples/benchmarks/speed/extract.py --layers 32 --hidden 4096 --work /scratch     # 7 B: 2 x 13.5 GB

Extraction runs in a process of its own; its peak is counted above the level after imports.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
from benchmarks.shared.memory import forget_peak, in_fresh_process, resident
from benchmarks.shared.report import table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

COLUMNS = {
    "parameters": ("parameters", "{:,}"),
    "model_gb": ("model on disk", "{:.2f} GB"),
    "largest_gb": ("largest tensor, fp32", "{:.2f} GB"),
    "kept": ("nonzeros", "{:,}"),
    "peak_gb": ("peak memory", "{:.2f} GB"),
    "share": ("of the model", "{:.0%}"),
    "seconds": ("seconds", "{:.0f}"),
}


def write_models(config: LlamaConfig, directory: Path) -> int:
    """Write both models, a shard for each layer, never whole in memory; return the number of parameters."""
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
    """Extract and print seconds, peak bytes above the level after imports, and nonzeros, as JSON."""
    from diffpeft import extract_diff

    forget_peak()
    level, start = resident(), time.perf_counter()
    found = extract_diff(directory / "base", directory / "tuned", density, directory / "adapter")
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": resident("VmHWM") - level, "kept": found.kept}))


def main() -> None:
    """Write both models, extract in a process of its own, and print one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--work", type=Path, help="directory with room for both models; default: a temporary one")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        extract(options.run, options.density)
        return
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=11 * options.hidden // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
    )
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        parameters = write_models(config, Path(scratch))
        found = in_fresh_process(__file__, "--run", scratch, "--density", str(options.density))
        size = sum(file.stat().st_size for file in (Path(scratch) / "base").glob("*.safetensors"))
    row = {
        "parameters": parameters,
        "model_gb": size / 1e9,
        "largest_gb": 4 * config.vocab_size * config.hidden_size / 1e9,
        "kept": found["kept"],
        "peak_gb": found["peak"] / 1e9,
        "share": found["peak"] / size,
        "seconds": found["seconds"],
    }
    print(table([row], COLUMNS))


if __name__ == "__main__":
    main()
