"""Time of the elementwise work on gates by itself: the least that gating adds to a step of full fine-tuning.

    python examples/benchmarks/speed/gate_kernels.py --json gate_kernels.json
    python examples/benchmarks/speed/gate_kernels.py --device cuda

Each chain of operations runs over the linear layers of a MiniLM (1536 x 384 each), which together are larger than a
CPU's caches. A copy, which only moves memory, and AdamW's update stand beside them. A step of gating samples each gate
of a linear layer once, computes the gradients of its diff and its log_alpha once, and moves and counts every gate.
"""

import argparse
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import torch
from benchmarks.shared.options import add_options, add_repeats, begin
from benchmarks.shared.report import show, table
from benchmarks.shared.timing import interleaved
from torch import Tensor

from diffpeft.gates import kernels
from diffpeft.gates.hard_concrete import open_shift
from diffpeft.gates.kernels import Draw
from diffpeft.gates.noise import new_seed, seed_words
from diffpeft.gates.update import kernels as update_kernels
from diffpeft.gates.update.state import StoredGates

SHAPE, LAYERS, STRETCH = (1536, 384), 18, (-1.5, 1.5)
COLUMNS = {
    "chain": ("chain", "{}"),
    "bytes": ("bytes a gate", "{}"),
    "ns": ("ns a gate", "{:.2f}"),
    "gb_s": ("GB/s", "{:.0f}"),
}


def over(layers: Sequence[Sequence[Tensor]], chain: Callable[..., object]) -> Callable[[], None]:
    """A function that runs the chain on the tensors of each layer."""

    def run() -> None:
        for tensors in layers:
            chain(*tensors)

    return run


def adamw(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor) -> None:
    """The fused update of AdamW."""
    torch._fused_adamw_(
        [weight], [grad], [exp_avg], [exp_avg_sq], [], [steps],
        lr=1e-6, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


def make_chains(device: str) -> dict[str, tuple[int, Callable[[], None]]]:
    """Bytes a gate, without those that stay in a cache, and a function that runs it over all layers, by chain."""

    def tensors(*scales: float) -> list[list[Tensor]]:
        return [[scale * torch.randn(SHAPE, device=device) for scale in scales] for _ in range(LAYERS)]

    out, group_gate = torch.empty(SHAPE, device=device), torch.ones((), device=device)
    draw, by_log_alpha = Draw(seed_words(new_seed(), out.device), group_gate, STRETCH), torch.empty_like(out)
    rule = torch.tensor([1e-7, 1e-3, 1e-3, 1.0, 1.0], device=device)
    gates, moments = tensors(1.0, 1e-3, 4.0), tensors(4.0, 1e-7, 1e-7, 1e-6)
    for layer in moments:
        layer[2].square_()  # second moments are not negative
    adam = [[*layer, torch.zeros_like(out), torch.zeros_like(out)] for layer in tensors(1e-3, 1e-3)]
    steps = torch.ones((), device=device)
    return {
        "copy": (8, over(gates, lambda b, w, a: out.copy_(b))),
        "sample the weight": (12, over(gates, lambda b, w, a: kernels.effective((out, b, w, a), draw, fused=True))),
        "gradients of diff and log_alpha": (
            16,
            over(gates, lambda g, w, a: kernels.gradients((out, by_log_alpha, g, w, a), draw, fused=True)),
        ),
        "count": (4, over(moments, lambda a, *_: update_kernels.open_elements([a], open_shift(STRETCH), fused=True))),
        "move by a gradient, and count": (
            28,
            over(moments, lambda a, m, v, g: StoredGates(a, g, m, v).step(rule, STRETCH, fused=True)),
        ),
        "AdamW": (28, over(adam, lambda *own: adamw(*own, steps))),
    }


def main(words: list[str] | None = None) -> None:
    """Measure all chains, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, [])
    add_repeats(parser)
    options = parser.parse_args(words)
    begin(options)
    torch.manual_seed(0)
    chains = make_chains(options.device)
    actions = {name: run for name, (_, run) in chains.items()}
    seconds = interleaved(actions, options.repeats, options.warmup, options.device)
    rows = []
    for name, (size, _) in chains.items():
        ns = 1e9 * statistics.median(seconds[name]) / (LAYERS * math.prod(SHAPE))
        rows.append({"chain": name, "bytes": size, "ns": ns, "gb_s": size / ns, "seconds": seconds[name]})
    show(options, rows, table(rows, COLUMNS))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
