"""The gates' noise: uniform numbers that follow from a seed, and the seeds of a forward pass."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NOISE_MARGIN = 1e-4
"""The noise is uniform on (NOISE_MARGIN, 1 - NOISE_MARGIN), which keeps logit(u) finite."""

ALIASES = 1 << 16
"""Repeated uses remembered for gradient checkpointing: many forward passes of any model that shares parameters."""


def new_seed() -> Tensor:
    """A seed, int64 scalar, from torch's default generator, whose state a checkpoint restores."""
    return torch.randint(1 << 62, (), device="cpu")


def uniform(seed: Tensor, count: int, device: torch.device | str) -> Tensor:
    """`count` uniform numbers that follow from `seed`, fp32, shape (count,), in (NOISE_MARGIN, 1 - NOISE_MARGIN).

    On a CPU they come from numpy's SFC64, which is four times as fast as torch.rand.
    """
    device = torch.device(device)
    if torch.compiler.is_compiling():  # numpy's generator cannot be traced; the operator stands for it
        noise: Tensor = _uniform_operator(seed, count, device)
        return noise
    return _uniform(seed, count, device)


def _uniform(seed: Tensor, count: int, device: torch.device) -> Tensor:
    noise = torch.empty(count, dtype=torch.float32, device=device)
    if device.type == "cpu":
        np.random.Generator(np.random.SFC64(int(seed))).random(out=noise.numpy(), dtype=np.float32)
    else:
        noise.uniform_(generator=torch.Generator(device).manual_seed(int(seed)))
    return noise.mul_(1 - 2 * NOISE_MARGIN).add_(NOISE_MARGIN)


@torch.library.custom_op("diffpeft::uniform", mutates_args=())
def _uniform_operator(seed: Tensor, count: int, device: torch.device) -> Tensor:
    return _uniform(seed, count, device)


@_uniform_operator.register_fake
def _(seed: Tensor, count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device=device)


def remove_hooks(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
    """Take the forward hooks off a module; unlike their handles this works on copies of it too."""
    for hooks, mine in ((module._forward_pre_hooks, before), (module._forward_hooks, after)):
        for key in [key for key, hook in hooks.items() if hook == mine]:
            hooks.pop(key)
    module._forward_hooks_always_called = OrderedDict(
        (key, True) for key in module._forward_hooks_always_called if key in module._forward_hooks
    )


class NoisePass:
    """Gives a parameter one seed a forward pass of the model, however often the pass uses it: a tied embedding, or a
    layer that runs twelve times, is one parameter with one gate (arXiv 2012.07463, section 2).

    Every use draws from torch's generator; within a pass the first draw for a parameter counts. Gradient checkpointing
    replays parts of a pass later, with the generator's state restored: the draw comes out the same, and `_aliases`
    tells which one it stood for.
    """

    def __init__(self) -> None:
        self._first: dict[Hashable, Tensor] | None = None
        self._aliases: dict[int, Tensor] = {}
        self._runs_in: dict[str, int] = {}  # a dict, because its setdefault cannot be interrupted

    def watch(self, model: nn.Module) -> None:
        """A pass is one call of `model`."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def unwatch(self, model: nn.Module) -> None:
        """Undo [`watch`]."""
        remove_hooks(model, self._begin, self._end)

    def _begin(self, module: nn.Module, args: Sequence[Any]) -> None:
        if not torch.compiler.is_compiling():
            mine = threading.get_ident()
            if self._runs_in.setdefault("thread", mine) != mine:
                # Modules hold effective parameters while they run: a second thread would take these for the base's.
                raise RuntimeError(
                    "two threads run this model at once, but a model with diffs runs in one at a time; hold a lock around "
                    "the forward pass, or give each thread a model of its own"
                )
        self._first = {}

    def _end(self, module: nn.Module, args: Sequence[Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            if self._runs_in.get("thread") != threading.get_ident():
                return  # the pass that was refused
            self._runs_in.clear()
        self._first = None

    def seed(self, key: Hashable) -> Tensor:
        """The seed of the parameter that `key` stands for."""
        drawn = new_seed()
        if self._first is None:
            return drawn if torch.compiler.is_compiling() else self._aliases.get(int(drawn), drawn)
        first = self._first.setdefault(key, drawn)
        if first is not drawn and not torch.compiler.is_compiling():  # a compiled pass has its own replay
            self._aliases[int(drawn)] = first
            if len(self._aliases) > ALIASES:
                del self._aliases[next(iter(self._aliases))]
        return first
