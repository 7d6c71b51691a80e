"""Memory, by PyTorch's allocator and by the operating system."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.shared.timing import wait


class Allocations:
    """Bytes of the tensors that an [`allocations`] block made: `peak`, the most at a time, and `left`, at its end."""

    peak = left = 0


@contextmanager
def allocations(device: str) -> Iterator[Allocations]:
    """Count the bytes that PyTorch's allocator hands out and takes back, temporaries inside kernels included.

    On a CPU it notices that memory is freed only if this block, or an earlier one, has seen it allocated.
    """
    found = Allocations()
    gc.collect()
    if torch.device(device).type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        gc.collect()
        wait(device)
        found.peak = torch.cuda.max_memory_allocated(device) - before
        found.left = torch.cuda.memory_allocated(device) - before
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
        gc.collect()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        found.left += event.nbytes()
        found.peak = max(found.peak, found.left)


def resident(field: str = "VmRSS") -> int:
    """Bytes of the process in memory: now (VmRSS), or the most since [`forget_peak`] (VmHWM). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Set the process's peak, VmHWM, to its present size."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def in_fresh_process(script: str, *words: str) -> dict[str, Any]:
    """Run a script and return the JSON of the last line that it prints."""
    # So that freed memory goes back to the system at once, and the peak is not that of what is kept for later.
    thresholds = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", script, *words]
    done = subprocess.run(command, env={**os.environ, **thresholds}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
