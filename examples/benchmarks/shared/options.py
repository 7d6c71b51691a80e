"""Command-line options that several benchmarks have."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.shared.models import SHAPES, SIX
from benchmarks.shared.training import METHODS


def add_options(parser: argparse.ArgumentParser, models: Sequence[str]) -> None:
    """Add the options of every script."""
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(models), help="sizes of random BERTs")
    parser.add_argument("--sizes", action="store_true", help=f"the six sizes of BERT instead: {', '.join(SIX)}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base's weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write what was found here too")


def add_repeats(parser: argparse.ArgumentParser) -> None:
    """Add the options of the scripts that take times."""
    parser.add_argument("--repeats", type=int, default=9, help="of which the median counts")
    parser.add_argument("--warmup", type=int, default=2, help="turns before them, which do not count")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the scripts that train."""
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--densities", nargs="+", type=float, default=[0.005], help="of all methods but full and gating"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--autocast", action="store_true", help="to bfloat16; weights stay in their dtype")
    parser.add_argument("--eager", action="store_true", help="gating and fixmask without torch.compile")


def begin(options: argparse.Namespace) -> None:
    """Apply the options that concern the whole process."""
    torch.set_num_threads(options.threads)
    if options.sizes:
        options.model = list(SIX)
