"""Times of actions that are compared with each other."""

import gc
import time
from collections.abc import Callable, Mapping

import torch


def wait(device: str) -> None:
    """Wait until the device has done all its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    actions: Mapping[str, Callable[[], float | None]], repeats: int, warmup: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each action, timed `repeats` times in turn; each turn begins with another action.

    Args:
        actions: functions to time, by name. One that returns seconds has measured its time itself.
        repeats: turns that count.
        warmup: turns before them.
        device: device of the work, "cpu" or "cuda".
    """
    names = list(actions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait(device)
            start = time.perf_counter()
            counted = actions[name]()
            wait(device)
            passed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(passed if counted is None else counted)
    return seconds
