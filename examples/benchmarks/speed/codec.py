"""Time to encode and decode a diff's positions, and their bits beside their entropy.

    python examples/benchmarks/speed/codec.py
    python examples/benchmarks/speed/codec.py --sizes 1e6 --densities 0.005 0.5 0.999 --json codec.json

A size is a number of random positions, in a tensor of so many elements that they have the density. Times are medians
of the process's own time, so that other jobs on the machine count little. A ratio compares encoded positions and
values together with their bound: the entropy of the positions and the bits of the values.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # examples/

import numpy as np
import torch
from benchmarks.shared.report import show, table
from torch import Tensor

from diffpeft.sparse.elias_fano import pack, unpack

COLUMNS = {
    "density": ("density", "{:.4%}"),
    "positions": ("positions", "{}"),
    "encode_m_s": ("encode M/s", "{:.0f}"),
    "decode_m_s": ("decode M/s", "{:.0f}"),
    "bits_a_position": ("bits a position", "{:.3f}"),
    "entropy_bits_a_position": ("entropy", "{:.3f}"),
    "ratio_with_32_bit_values": ("ratio, 32 bits", "{:.4f}"),
    "ratio_with_16_bit_values": ("ratio, 16 bits", "{:.4f}"),
}


def random_positions(count: int, numel: int) -> Tensor:
    """About `count` sorted positions below `numel`."""
    generator = np.random.default_rng(0)
    if 2 * count > numel:
        return torch.from_numpy(np.flatnonzero(generator.random(numel) * numel < count))
    # As many draws with replacement as hit `count` different positions on average.
    draws = round(-numel * math.log1p(-count / numel))
    return torch.from_numpy(np.unique(generator.integers(0, numel, draws)))


def entropy_bits(count: int, numel: int) -> float:
    """Entropy of `count` positions below `numel`: log2 of the number of such sets."""
    logs = [math.lgamma(size + 1) for size in (numel, count, numel - count)]
    return (logs[0] - logs[1] - logs[2]) / math.log(2)


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """Median of the seconds that this process spends in the action."""
    action()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def measure(size: int, density: float, repeats: int) -> dict[str, float]:
    """Encode and decode random positions; a row of the table."""
    numel = round(size / density)
    positions = random_positions(size, numel)
    count = len(positions)
    packed = pack(positions, numel)
    if not torch.equal(unpack(packed, count, numel), positions):
        raise RuntimeError(f"{count} positions below {numel} do not come back")
    bits, entropy = 8 * len(packed), entropy_bits(count, numel)
    return {
        "density": density,
        "positions": count,
        "elements": numel,
        "encode_m_s": count / median_seconds(lambda: pack(positions, numel), repeats) / 1e6,
        "decode_m_s": count / median_seconds(lambda: unpack(packed, count, numel), repeats) / 1e6,
        "bits_a_position": bits / count,
        "entropy_bits_a_position": entropy / count,
        "ratio_with_32_bit_values": (bits + 32 * count) / (entropy + 32 * count),
        "ratio_with_16_bit_values": (bits + 16 * count) / (entropy + 16 * count),
    }


def main(words: list[str] | None = None) -> None:
    """Measure the sizes and densities that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e5, 1e6, 1e7], help="positions")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.001, 0.005, 0.01, 0.05, 0.25, 0.5, 0.9])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.set_defaults(device="cpu")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    rows = [measure(round(size), density, options.repeats) for size in options.sizes for density in options.densities]
    show(options, rows, table(rows, COLUMNS))


if __name__ == "__main__":
    main()
