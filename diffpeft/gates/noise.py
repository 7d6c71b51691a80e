"""The gates' noise: uniform numbers that follow from a seed, and the seeds of a forward pass."""

from __future__ import annotations

import hashlib
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.gates.workspace import Scratch

NOISE_MARGIN = 1e-4
"""The noise is uniform on (NOISE_MARGIN, 1 - NOISE_MARGIN), which keeps logit(u) finite."""

ALIASES = 1 << 16
"""Repeated uses remembered for gradient checkpointing: many forward passes of any model that shares parameters."""


def new_seed() -> Tensor:
    """A seed, int64, shape (2,), from torch's default generator, whose state a checkpoint restores."""
    return torch.randint(1 << 62, (2,), device="cpu")


def parts(seed: Tensor, device: torch.device) -> Tensor:
    """A seed as [`uniform`] takes it: int32, shape (4,), on `device`."""
    return seed.view(torch.int32).to(device)


def bits(seed: Tensor, places: Tensor) -> Tensor:
    """32 random bits at each place of the stream that belongs to a seed: int32, shape of `places`.

    They follow from seed and place alone, so that noise can be made anew for a backward pass, for some rows of a matrix
    and on any device, with the same bits, and need not be stored. Three numbers of the seed choose the stream: an odd factor and
    an offset of the place, and what is mixed in on the way. The mixer is that of MurmurHash3 with Chris Wellons' constants
    ("lowbias32", hash prospector).

    Args:
        seed: int32, shape (4,), of [`parts`].
        places: int32, any shape.
    """
    x = places * (seed[0] | 1) + seed[1]
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = x ^ seed[2]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def uniform(seed: Tensor, places: Tensor) -> Tensor:
    """Uniform numbers at places of the stream that belongs to a seed: fp32, shape of `places`, in (NOISE_MARGIN,
    1 - NOISE_MARGIN). Arguments as of [`bits`]."""
    return ((bits(seed, places) >> 8) & 0xFFFFFF).to(torch.float32) * (2.0**-24 * (1 - 2 * NOISE_MARGIN)) + NOISE_MARGIN


def uniform_at(seed: Tensor, place: int) -> Tensor:
    """One of [`uniform`]'s numbers, to the bit, of a seed of [`new_seed`], shape (), on the CPU: without a dozen launches."""
    first, second = seed.tolist()
    x = place * (first & 0xFFFFFFFF | 1) + (first >> 32) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF ^ (second & 0xFFFFFFFF)
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    x ^= x >> 16
    return torch.tensor(x >> 8, dtype=torch.float32) * (2.0**-24 * (1 - 2 * NOISE_MARGIN)) + NOISE_MARGIN


def remove_hooks(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
    """Take the forward hooks off a module; unlike their handles this works on copies of it too."""
    for hooks, mine in ((module._forward_pre_hooks, before), (module._forward_hooks, after)):
        for key in [key for key, hook in hooks.items() if hook == mine]:
            hooks.pop(key)
    module._forward_hooks_always_called = OrderedDict(
        (key, True) for key in module._forward_hooks_always_called if key in module._forward_hooks
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _digest(key: Hashable) -> tuple[int, ...]:
    """What stands for a name: two numbers of 64 bits with a sign."""
    return struct.unpack("<qq", hashlib.blake2b(repr(key).encode(), digest_size=16).digest())


def may_be_replayed() -> bool:
    """Whether what runs now could be run again in the backward pass, as `torch.utils.checkpoint` does."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class NoisePass:
    """Gives a parameter one seed a forward pass of the model, however often the pass uses it: a tied embedding, or a
    layer that runs twelve times, is one parameter with one gate (arXiv 2012.07463, section 2).

    Every use draws from torch's generator. The pass's first draw and the parameter's name tell its seed, whatever the order of
    uses. Gradient checkpointing replays parts of a pass later, with the generator's state restored: the draw comes out the
    same, and `_aliases` tells what it stood for.
    """

    def __init__(self) -> None:
        self.scratch = Scratch()
        """For what the layers of the model need while they run, and for weights that stay until backward."""
        self.model: nn.Module | None = None
        """The model, while a pass of it runs."""
        self.made: dict[Hashable, Tensor] | None = None
        """Effective parameters of the pass that were made before they are used; None before the first ones."""
        self._first: dict[Hashable, Tensor] | None = None
        self._pass: Tensor | None = None
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
        self.model, self.made, self._first, self._pass = module, None, {}, None

    def _end(self, module: nn.Module, args: Sequence[Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            if self._runs_in.get("thread") != threading.get_ident():
                return  # the pass that was refused
            self._runs_in.clear()
        self.model, self.made, self._first, self._pass = None, None, None, None

    def seed(self, key: Hashable) -> Tensor:
        """The seed of the parameter that `key` stands for, at one of its uses."""
        drawn = new_seed()
        if self._first is None:
            return drawn if torch.compiler.is_compiling() else self._aliases.get(int(drawn[0]), drawn)
        self._pass = drawn if self._pass is None else self._pass
        seed = self.seed_of(key)
        if not torch.compiler.is_compiling() and may_be_replayed():  # a compiled pass has its own replay
            self._aliases[int(drawn[0])] = seed
            if len(self._aliases) > ALIASES:
                del self._aliases[next(iter(self._aliases))]
        return seed

    def seed_of(self, key: Hashable) -> Tensor:
        """The same for what is not a use, within a pass that has had one."""
        assert self._first is not None
        assert self._pass is not None
        if key not in self._first:
            self._first[key] = self._pass ^ torch.tensor(_digest(key))
        return self._first[key]
