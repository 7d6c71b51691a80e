"""The seeds of one forward pass of a model, and memory that lives as long as the pass or is used again."""

import hashlib
import struct
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.gates.noise import new_seed

MAX_IDLE_PASSES = 256
"""Training passes without a step of the gates before a warning; gradients are accumulated over fewer."""
MAX_ALIASES = 1 << 16
"""Repeated uses remembered for gradient checkpointing: many forward passes of any model that shares parameters."""


def remove_hooks(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
    """Take forward hooks off a module; unlike their handles this works on copies of it too."""
    for hooks, mine in ((module._forward_pre_hooks, before), (module._forward_hooks, after)):
        for key in [key for key, hook in hooks.items() if hook == mine]:
            hooks.pop(key)
    module._forward_hooks_always_called = OrderedDict(
        (key, True) for key in module._forward_hooks_always_called if key in module._forward_hooks
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _digest(key: Hashable) -> tuple[int, ...]:
    """A hash of a name: two signed numbers of 64 bits."""
    return struct.unpack("<qq", hashlib.blake2b(repr(key).encode(), digest_size=16).digest())


def may_be_replayed() -> bool:
    """Whether the code that runs now could run again in the backward pass, as under `torch.utils.checkpoint`."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class Workspace:
    """Memory on a CPU that one module after the other uses, or that a tensor keeps from forward to backward.

    Fresh pages cost more than the arithmetic that fills them. A GPU's allocator keeps its own.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Hashable, torch.dtype], Tensor] = {}
        self._reservations: dict[Hashable, object] = {}

    def take(self, use: Hashable, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, valid until memory for the same use is taken again."""
        self._reservations.pop(use, None)
        if device.type != "cpu" or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)
        buffer = self._buffers.get((use, dtype))
        if buffer is None or buffer.numel() < shape.numel():
            buffer = self._buffers[use, dtype] = torch.empty(shape.numel(), dtype=dtype)
        return buffer[: shape.numel()].view(shape)

    def reserve(self, use: Hashable) -> object:
        """A token by which [`reserved`] knows what was written into the memory just taken."""
        token = self._reservations[use] = object()
        return token

    def reserved(self, use: Hashable, token: object, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """The tensor that was written, if it is still there: on a CPU, until memory for the same use is taken again."""
        buffer = self._buffers.get((use, dtype))
        if buffer is None or self._reservations.get(use) is not token:
            return None
        return buffer[: shape.numel()].view(shape)

    def clear(self) -> None:
        """Let go of the memory."""
        self._buffers, self._reservations = {}, {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Workspace, ()  # a copy begins with none


class ForwardPass:
    """The state of one forward pass of a model: a seed for each parameter, however often the pass uses it.

    A tied embedding, or a layer that runs twelve times, is one parameter with one gate (arXiv 2012.07463, section 2).
    Every use draws from torch's generator; the pass's first draw and the parameter's name tell the seed. Gradient
    checkpointing replays parts of a pass with the generator's state restored: `_aliases` tells what a draw stood for.
    """

    def __init__(self) -> None:
        self.workspace = Workspace()
        """Memory for the layers while they run, and for weights that stay until backward."""
        self.model: nn.Module | None = None
        """The model, while a pass of it runs."""
        self.small_effective: dict[Hashable, Tensor] | None = None
        """Effective small parameters of the pass, made all at once; None before the first of them is used."""
        self.sharded = False
        """Whether FSDP shards the model: outside of a pass, layers then show the base's parameters as they are."""
        self.idle_passes: int | None = 0
        """Training passes so far, until the gates' first step; None from then on."""
        self._shared: Tensor | None = None
        self._first: dict[Hashable, Tensor] | None = None
        self._pass: Tensor | None = None
        self._aliases: dict[int, Tensor] = {}
        self._runs_in: dict[str, int] = {}  # a dict, because its setdefault cannot be interrupted

    def watch(self, model: nn.Module) -> None:
        """Have each call of `model` be a pass."""
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
                raise RuntimeError("two threads run this model at once; use a lock, or a model for each thread")
        self.model, self.small_effective, self._first, self._pass = module, None, {}, None

    def _end(self, module: nn.Module, args: Sequence[Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            if self._runs_in.get("thread") != threading.get_ident():
                return  # the pass that was refused
            self._runs_in.clear()
        self.model, self.small_effective, self._first, self._pass = None, None, None, None

    def share(self, key: Hashable) -> None:
        """Let the passes from now on follow from `key`, which processes share; None: from torch's generator."""
        self._shared = None if key is None else torch.tensor(_digest(key))

    def seed(self, key: Hashable) -> Tensor:
        """The seed of the parameter named `key`, at one of its uses: int64, shape (2,)."""
        drawn = new_seed()
        if self._first is None:
            return drawn if torch.compiler.is_compiling() else self._aliases.get(int(drawn[0]), drawn)
        if self._pass is None:
            self._pass = drawn if self._shared is None else self._shared
            self._count_pass()
        seed = self.seed_of(key)
        if not torch.compiler.is_compiling() and may_be_replayed():  # a compiled pass has its own replay
            self._aliases[int(drawn[0])] = seed
            if len(self._aliases) > MAX_ALIASES:
                del self._aliases[next(iter(self._aliases))]
        return seed

    def _count_pass(self) -> None:
        if self.idle_passes is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.idle_passes += 1
            if self.idle_passes == MAX_IDLE_PASSES:
                warnings.warn(
                    f"{MAX_IDLE_PASSES} training passes have sampled gates without a gate_step: nothing will be "
                    "pruned; add DiffPruningCallback() to the Trainer's callbacks, or call gate_step in your own loop",
                    stacklevel=2,
                )

    def seed_of(self, key: Hashable) -> Tensor:
        """The seed of a parameter without a draw, within a pass that has had one."""
        assert self._first is not None
        assert self._pass is not None
        if key not in self._first:
            self._first[key] = self._pass ^ torch.tensor(_digest(key))
        return self._first[key]
