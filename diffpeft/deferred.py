"""Gradients of gates that are never stored: the update makes them from those of the diffs.

Both follow from the one gradient g of an effective parameter: by w it is g z z_group, by the location of an element's gate
g z_group w z'. The second is thus the first times w z' / z where z > 0, and nought where z is; and noise and with it z can be made
anew (`diffpeft/noise.py`). Between the backward pass and the update a gradient of w is clipped and unscaled: the gates' is with it.

That holds where one use of a parameter has given its w all of the gradient. What else there may be is noticed in time, and
the gates' gradient is then stored as ever.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffpeft import kernels
from diffpeft.gates import Stretch


class _Held(NamedTuple):
    """What a gradient of gates is made from."""

    by_w: Tensor
    """The gradient of w, in the very memory that becomes `w.grad`."""
    seed: Tensor
    """int32, shape (4,), of the noise."""
    rows: Tensor | None
    """int64: which rows of w the gradient is in, each once; None: in all."""
    total: Tensor
    """Sum of gradient z w, shape (): finite if all of the gradient is."""
    versions: tuple[int, int]
    """Of w and of the locations."""


class DeferredGates(NamedTuple):
    """The gates of one parameter, all tensors of its shape, fp32, and what their gradient is made from."""

    log_alpha: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    w: Tensor
    by_w: Tensor
    """The gradient of w."""
    seed: Tensor
    rows: Tensor | None
    total: Tensor
    stretch: Stretch

    def probe(self) -> Tensor:
        """Finite if the gradient is, shape (): what scales all of it, as clipping does, shows in any one element."""
        return self.total + self.by_w.reshape(-1)[:1].sum()

    def move(self, rule: Tensor, fused: bool = False) -> Tensor:
        """Move the gates by the automatic rule; see [`diffpeft.kernels.automatic_`], what it returns too."""
        if self.rows is None:
            return self._move(rule, fused)
        # Most rows have no gradient: all move without one, but for those of the batch.
        tensors: dict[str, Any] = {
            name: getattr(self, name).index_select(0, self.rows)
            for name in ("log_alpha", "exp_avg", "exp_avg_sq", "w", "by_w")
        }
        some = self._replace(**tensors)
        total = kernels.automatic_idle_(self.log_alpha, self.exp_avg, self.exp_avg_sq, self.stretch, rule, fused)
        total = total - kernels.open_elements(self.log_alpha.index_select(0, self.rows), self.stretch)
        total = total + some._move(rule, fused=False)
        for name in ("log_alpha", "exp_avg", "exp_avg_sq"):
            getattr(self, name).index_copy_(0, self.rows, tensors[name])
        return total

    def _move(self, rule: Tensor, fused: bool) -> Tensor:
        own = self.log_alpha, self.exp_avg, self.exp_avg_sq, self.by_w, self.w
        return kernels.automatic_deferred_(*own, self.seed, self.stretch, rule, self.rows, fused)


class Deferral:
    """Sees to it that the gates of one parameter need no gradient of their own.

    Args:
        label: the parameter's name.
        w: the dense diff.
        log_alpha: locations of the gates.
        stretch: (l, r).
    """

    def __init__(self, label: str, w: nn.Parameter, log_alpha: nn.Parameter, stretch: Stretch) -> None:
        self._label, self._stretch = label, stretch
        self._w, self._log_alpha = weakref.ref(w), weakref.ref(log_alpha)
        self._ahead: weakref.WeakSet[Any] = weakref.WeakSet()
        """Uses whose backward pass may come, for as long as their graph lives."""
        self._removed = False
        self._held: _Held | None = None
        self._hook: Any = w.register_hook(self._arrives)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Store gradients again, those of passes that have begun too. What is held is lost unless it is stored before."""
        self._hook.remove()
        self._held, self._removed = None, True

    def is_of(self, w: Tensor, log_alpha: Tensor) -> bool:
        """Whether it sees these, and both train."""
        return self._w() is w and self._log_alpha() is log_alpha and w.requires_grad and log_alpha.requires_grad

    def begin_use(self, use: object) -> None:
        """Note that a forward pass uses the parameter; `use` is something that its graph keeps alive."""
        self.store()
        self._ahead.add(use)

    def applies(self, use: object) -> bool:
        """Whether the backward pass of a use, which comes now, may leave a gradient out: no other is ahead, in one process."""
        alone = len(self._ahead) == 1 and use in self._ahead and self._held is None and not self._removed
        self._ahead.discard(use)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return alone and not (distributed and torch.distributed.get_world_size() > 1)

    def hold(self, by_w: Tensor, seed: Tensor, rows: Tensor | None, total: Tensor) -> None:
        """Take over: the gradient of w is about to be given to autograd."""
        w, log_alpha = self._parameters()
        # A second name for its memory has autograd add nothing to it in place.
        self._held = _Held(by_w.detach(), seed, rows, total, (w._version, log_alpha._version))

    def _parameters(self) -> tuple[Tensor, Tensor]:
        w, log_alpha = self._w(), self._log_alpha()
        assert w is not None
        assert log_alpha is not None
        return w, log_alpha

    def _arrives(self, grad: Tensor) -> None:
        """A gradient of w is complete and about to be added to `w.grad`."""
        if self._held is not None:
            w, _ = self._parameters()
            if w.grad is not None or grad.data_ptr() != self._held.by_w.data_ptr():
                self._store(self._held)

    @torch.no_grad()
    def _store(self, held: _Held) -> None:
        w, log_alpha = self._parameters()
        self._held = None
        self._check(held)
        grad = kernels.deferred_gradient(held.by_w, w.detach(), log_alpha.detach(), held.seed, self._stretch)
        log_alpha.grad = grad if log_alpha.grad is None else log_alpha.grad.add_(grad)

    def _take(self) -> _Held | None:
        """What is held, if it is a gradient still, with what has been made of it since."""
        held, self._held = self._held, None
        w = self._w()
        if held is None or w is None or w.grad is None:
            return None
        self._check(held)
        return held._replace(by_w=w.grad)

    def _check(self, held: _Held) -> None:
        w, log_alpha = self._parameters()
        if held.versions != (w._version, log_alpha._version):
            raise ValueError(
                f"the diff of {self._label} or its gates have changed since the backward pass, and the gradient of the gates cannot "
                "be made any more; call gate_step before optimizer.step(), or defer_gate_gradients(False) before training"
            )

    def store(self) -> None:
        """Store the gradient that is held, if there is one. Raises ValueError if w or the gates have changed since."""
        held = self._take()
        if held is not None:
            self._store(held)

    def finish(self, exp_avg: Tensor, exp_avg_sq: Tensor) -> DeferredGates | None:
        """The gates for an update, with the moments of their gradients; None where gradients are stored. Raises as [`store`]."""
        w, log_alpha = self._parameters()
        if log_alpha.grad is not None:  # from elsewhere, like a penalty of one's own
            self.store()
        held = self._take()
        if held is None:
            return None
        own = log_alpha.detach(), exp_avg, exp_avg_sq, w.detach(), held.by_w
        return DeferredGates(*own, held.seed, held.rows, held.total, self._stretch)


class Deferrals(dict[tuple[str, str], Deferral]):
    """Those of one module, by adapter and name of the parameter. A copy of the module has none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Deferrals, ()
