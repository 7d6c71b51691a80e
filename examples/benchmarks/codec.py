"""What packing a diff's positions costs, in time and in bits beside their entropy.

    python examples/benchmarks/codec.py
    python examples/benchmarks/codec.py --sizes 1e6 --densities 0.005 0.5 0.999 --json codec.json

A size is the number of random positions, of which the density says how many elements there are. Times are medians of
the process's own, so that other jobs on the machine count little. The ratio is that of positions and values together to
log2 of the number of such sets plus the bits of the values.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffpeft.positions import pack, unpack


def random_positions(count: int, numel: int) -> Tensor:
    """About `count` sorted positions below `numel`."""
    generator = np.random.default_rng(0)
    if 2 * count > numel:
        return torch.from_numpy(np.flatnonzero(generator.random(numel) * numel < count))
    # So many draws with replacement hit `count` different positions.
    draws = round(-numel * math.log1p(-count / numel))
    return torch.from_numpy(np.unique(generator.integers(0, numel, draws)))


def entropy_bits(count: int, numel: int) -> float:
    """log2 of the number of sets of `count` positions below `numel`."""
    logs = [math.lgamma(size + 1) for size in (numel, count, numel - count)]
    return (logs[0] - logs[1] - logs[2]) / math.log(2)


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """Seconds of this process that the action takes."""
    action()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def measure(size: int, density: float, repeats: int) -> dict[str, float]:
    """A row of the table."""
    numel = round(size / density)
    where = random_positions(size, numel)
    count = len(where)
    packed = pack(where, numel)
    if not torch.equal(unpack(packed, count, numel), where):
        raise RuntimeError(f"{count} positions below {numel} do not come back")
    bits, entropy = 8 * len(packed), entropy_bits(count, numel)
    return {
        "density": density,
        "positions": count,
        "elements": numel,
        "encode_per_second": count / median_seconds(lambda: pack(where, numel), repeats),
        "decode_per_second": count / median_seconds(lambda: unpack(packed, count, numel), repeats),
        "bits_a_position": bits / count,
        "entropy_bits_a_position": entropy / count,
        "ratio_with_32_bit_values": (bits + 32 * count) / (entropy + 32 * count),
        "ratio_with_16_bit_values": (bits + 16 * count) / (entropy + 16 * count),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e5, 1e6, 1e7], help="positions")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.001, 0.005, 0.01, 0.05, 0.25, 0.5, 0.9])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}\n")
    print(
        "| density | positions | encode M/s | decode M/s | bits a position | entropy | ratio, 32 bits | ratio, 16 bits |"
    )
    print("|---|---|---|---|---|---|---|---|")
    found = []
    for size in arguments.sizes:
        for density in arguments.densities:
            row = measure(round(size), density, arguments.repeats)
            found.append(row)
            print(
                f"| {density:.4%} | {row['positions']} | {row['encode_per_second'] / 1e6:.0f} | "
                f"{row['decode_per_second'] / 1e6:.0f} | {row['bits_a_position']:.3f} | "
                f"{row['entropy_bits_a_position']:.3f} | {row['ratio_with_32_bit_values']:.4f} | "
                f"{row['ratio_with_16_bit_values']:.4f} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
