"""What the elementwise work on gates costs by itself: the floor of what gating adds to a step of full fine-tuning.

    python examples/benchmarks/gate_kernels.py --json gate_kernels.json
    python examples/benchmarks/gate_kernels.py --device cuda

Each chain of `diffpeft/kernels.py` runs over the linear layers of a MiniLM (1536 x 384 each), which together are larger than a
CPU's caches; beside it a copy, which only moves memory, and AdamW's update. A step of gating samples each gate of a linear layer
once and takes its diff's gradient once; it moves every gate and counts it, those of embeddings too, most of which have no gradient.
"both gradients" and the move by a stored gradient take the place of two others where gradients of gates are stored.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence

import torch
from measuring import add_options, add_repeats, begin, interleaved, show, table
from torch import Tensor

from diffpeft import kernels
from diffpeft.noise import new_seed, parts

SHAPE, LAYERS, STRETCH = (1536, 384), 18, (-1.5, 1.5)
COLUMNS = {
    "chain": ("chain", "{}"),
    "bytes": ("bytes a gate", "{}"),
    "ns": ("ns a gate", "{:.2f}"),
    "gb_s": ("GB/s", "{:.0f}"),
}


def over(layers: Sequence[Sequence[Tensor]], chain: Callable[..., object]) -> Callable[[], None]:
    """The chain on each layer's tensors."""

    def run() -> None:
        for tensors in layers:
            chain(*tensors)

    return run


def main(words: list[str] | None = None) -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, [])
    add_repeats(parser)
    options = parser.parse_args(words)
    begin(options)
    torch.manual_seed(0)

    def tensors(*scales: float) -> list[list[Tensor]]:
        return [[scale * torch.randn(SHAPE, device=options.device) for scale in scales] for _ in range(LAYERS)]

    out, whole = torch.empty(SHAPE, device=options.device), torch.ones((), device=options.device)
    seed = parts(new_seed(), out.device)
    rule = torch.tensor([1e-7, 1e-3, 1e-3, 1.0, 1.0], device=options.device)
    gates, moments = tensors(1.0, 1e-3, 4.0), tensors(4.0, 1e-7, 1e-7, 1e-6, 1e-3)
    for layer in moments:
        layer[2].square_()  # second moments are not negative
    adam = [[layer[0], layer[1], *(torch.zeros_like(out) for _ in range(2))] for layer in tensors(1e-3, 1e-3)]
    count = [torch.ones((), device=options.device)]

    def step(w: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        torch._fused_adamw_(
            [w], [grad], [exp_avg], [exp_avg_sq], [], count,
            lr=1e-6, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    settings = whole, seed, STRETCH, None, True
    chains = {  # bytes without those that stay in a cache
        "copy": (8, over(gates, lambda b, w, a: out.copy_(b))),
        "sample the weight": (12, over(gates, lambda b, w, a: kernels.effective(out, b, w, a, *settings))),
        "gradient of the diff": (12, over(gates, lambda g, w, a: kernels.gradient(g, w, a, *settings))),
        "both gradients": (16, over(gates, lambda g, w, a: kernels.gradients(g, w, a, *settings))),
        "count": (4, over(moments, lambda a, *_: kernels.open_elements(a, STRETCH, True))),
        "move without a gradient, and count": (
            24,
            over(moments, lambda a, m, v, g, w: kernels.automatic_idle_(a, m, v, STRETCH, rule, True)),
        ),
        "move by a stored gradient, and count": (
            28,
            over(moments, lambda a, m, v, g, w: kernels.automatic_(a, g, m, v, STRETCH, rule, True)),
        ),
        "move by the diff's gradient, and count": (
            32,
            over(moments, lambda *own: kernels.automatic_deferred_(*own, seed, STRETCH, rule, None, True)),
        ),
        "AdamW": (28, over(adam, step)),
    }
    seconds = interleaved(
        {name: run for name, (_, run) in chains.items()}, options.repeats, options.warmup, options.device
    )
    numel = LAYERS * out.numel()
    rows = []
    for name, (size, _) in chains.items():
        each = 1e9 * statistics.median(seconds[name]) / numel
        rows.append({"chain": name, "bytes": size, "ns": each, "gb_s": size / each, "seconds": seconds[name]})
    show(options, rows, table(rows, COLUMNS))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
