"""Several processes of a script, as torchrun starts them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 1800
"""Longer than any of these runs takes, so that a hang ends."""


def run_in_processes(count: int, script: str, *words: str) -> None:
    """Run a script in `count` processes and wait for them; their output is dropped, except for errors."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [sys.executable, *launcher, script, *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_SECONDS)


def read_ranks(folder: Path, count: int) -> list[Any]:
    """The contents of the files 0.json, 1.json, ... that the processes have written to a folder."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
