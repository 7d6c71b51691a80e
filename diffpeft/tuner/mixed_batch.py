"""Batches whose rows belong to different adapters (`adapter_names=`): which modules run on which rows.

A module that adapters change runs once for each adapter, on its rows. That is right only where the rows are a dimension
of what the module takes and gives, which a shape cannot tell: a batch of 8 and 8 relative positions look alike. So the
model first runs on two and on three rows; a dimension that grows with them is the rows', which may stand in it several
times in a row (tokens of a mixture of experts, beams). Where a module has no such dimension, or its parameter is read
without running it, the model as a whole runs once for each adapter instead. So it does on a CPU where adapters have several rows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from diffpeft.tuner.row_layout import (
    Call as Seen,
)
from diffpeft.tuner.row_layout import (
    Calls,
    CannotSplitError,
    Layout,
    Layouts,
    find_layouts,
    is_plain,
    join,
    sketch,
    structure_of,
    take,
)

BASE = "__base__"
"""PEFT's name for rows without an adapter."""

WORTH_APART = 4
"""Rows an adapter, on average, from which on a pass for each adapter is faster. Measured on one CPU."""

NOT_APART = "not apart"
"""With a structure, among what is known: outputs of a pass for each adapter, such as caches and losses, cannot be put together."""

Call = Callable[..., Any]


class Layer(Protocol):
    """What is asked of a layer: whether an adapter changes one of its parameters."""

    def changes(self, adapter_name: str, name: str) -> bool:
        """Whether the adapter has a diff for the parameter."""

    def parameter_key(self, name: str) -> str:
        """The parameter's name in the base model."""


class Part(NamedTuple):
    """A module that may run on some of the rows."""

    module: nn.Module
    key: str
    changed_by: Callable[[str], bool]
    """Whether an adapter changes what the module does by itself, apart from its children."""
    call: Call
    """Runs it for the rows of an adapter, its first argument; [`BASE`] for those of several that do not change it."""
    shared_rows: bool
    """Whether an output with one row stands for all rows, and may be given a row for each instead."""


class MixedBatch:
    """The state of one mixed batch.

    Args:
        root: the model.
        names: an adapter's name, or [`BASE`], for each row.
        parts: the modules that may run on some of the rows.
        known: what was found out about them before; added to.
        run_root: runs the model's own forward, its first argument, with the parameters that the model itself owns.
        expand: rows that generation makes of one.
    """

    def __init__(
        self,
        root: nn.Module,
        names: Sequence[str],
        parts: Sequence[Part],
        known: dict[Any, Layouts],
        run_root: Call | None = None,
        expand: int = 1,
    ) -> None:
        self.root = root
        self.names = list(names)
        self._run_root_with = run_root
        self._parts = parts
        self._known = known
        self._expand = expand
        self._layouts: Layouts | None = None
        self._calls: Calls | None = None

    # What layers ask

    def selected(self, layer: Layer, name: str) -> list[str]:
        """The adapter that changes the layer's parameter in the rows that run just now, if any."""
        names = set(self.names)
        changing = [adapter for adapter in sorted(names) if adapter != BASE and layer.changes(adapter, name)]
        if changing and len(names) > 1:
            raise CannotSplitError(f"{layer.parameter_key(name)} is read without running its module")
        return changing

    # Running

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, the parts run on the rows of each adapter."""
        hooked: list[nn.Module] = []

        def replace(module: nn.Module, forward: Call) -> None:
            # wraps: generation looks at the signature for what the model takes.
            module.forward = functools.wraps(module.forward)(forward)
            hooked.append(module)

        try:
            for part in self._parts:
                replace(part.module, functools.partial(self._run, part))
            own, root = self._run_root_with, self.root
            call = root.forward if own is None else functools.partial(own, root.forward)
            replace(root, functools.partial(self._run_root, root, call))
            encoder: Any = cast(Any, root).get_encoder() if _is_encoder_decoder(root) else None
            if isinstance(encoder, nn.Module) and encoder not in hooked:  # generation runs it by itself
                replace(encoder, functools.partial(self._run_root, encoder, encoder.forward))
            yield
        finally:
            for module in hooked:
                del module.forward

    @contextmanager
    def _rows_of(self, names: list[str]) -> Iterator[None]:
        before, self.names = self.names, names
        try:
            yield
        finally:
            self.names = before

    def _run_root(self, root: nn.Module, call: Call, *args: Any, **kwargs: Any) -> Any:
        if self._layouts is not None or self._calls is not None:
            return call(*args, **kwargs)  # within a root that runs already
        leaves, spec = tree_flatten((args, kwargs))
        rows = _rows(root, args, kwargs)
        if rows not in (len(self.names), len(self.names) * self._expand):
            raise ValueError(
                f"adapter_names has {len(self.names)} names for a batch of {rows} rows; give one name for each row"
            )
        names = [name for name in self.names for _ in range(rows // len(self.names))]
        inputs = tuple(0 if _is_row_tensor(leaf, rows) else None for leaf in leaves)
        # What comes out depends on flags, like output_hidden_states.
        flags = tuple(leaf for leaf in leaves if isinstance(leaf, (bool, str)))
        structure = (type(root).__qualname__, inputs, flags, *structure_of(leaves, spec))
        with self._rows_of(names):
            if len(set(names)) == 1:
                return call(*args, **kwargs)
            if structure not in self._known:
                self._known[structure] = self._trace(root, call, leaves, spec, inputs)
            self._layouts = self._known[structure]
            try:
                if (NOT_APART, structure) not in self._known and self._runs_apart(leaves):
                    try:
                        return self._run_apart(call, leaves, spec)
                    except CannotSplitError:
                        self._known[NOT_APART, structure] = {}
                return call(*args, **kwargs)
            except CannotSplitError as reason:
                return self._run_whole(root, call, leaves, spec, reason)
            finally:
                self._layouts = None

    def _runs_apart(self, leaves: list[Any]) -> bool:
        """Whether the model had better run once for each adapter though its modules could: on a CPU, where a pass over many rows
        saves nothing, and what goes into each module and comes out of it need not be taken apart and put together."""
        return (
            len(self.names) >= WORTH_APART * len(set(self.names))
            and self._layout_of_model() is not None
            and all(is_plain(leaf) and (not isinstance(leaf, Tensor) or leaf.is_cpu) for leaf in leaves)
        )

    def _layout_of_model(self) -> Layout | None:
        assert self._layouts is not None
        return next(iter(self._layouts[""].values()))

    def _run_apart(self, call: Call, leaves: list[Any], spec: TreeSpec) -> Any:
        """Run the model once for each adapter."""
        layout = self._layout_of_model()
        assert layout is not None
        inputs = tuple(0 if _is_row_tensor(leaf, len(self.names)) else None for leaf in leaves)
        calls = [(call, rows) for rows in _groups(self.names).values()]
        return self._by_rows(calls, Layout(inputs, layout.outputs), leaves, spec, False, "the model")

    def _run_whole(
        self,
        root: nn.Module,
        call: Call,
        leaves: list[Any],
        spec: TreeSpec,
        reason: CannotSplitError,
    ) -> Any:
        """Run the model once for each adapter, because it must; without a cache, which nobody could put together, unless it is asked
        for."""
        opaque = [type(leaf).__name__ for leaf in leaves if not is_plain(leaf)]
        if opaque or self._layout_of_model() is None:
            raise NotImplementedError(
                f"a batch that mixes adapters needs the rows of every module's input apart, but {reason}; and the model "
                f"cannot run once for each adapter because of {', '.join(opaque) or 'its outputs'}: use one batch for each "
                "adapter, or use_cache=False"
            )
        args, kwargs = tree_unflatten(leaves, spec)
        if _caches(root) and kwargs.get("use_cache") is None:
            call = functools.partial(call, use_cache=False)
            kwargs.pop("use_cache", None)
            leaves, spec = tree_flatten((args, kwargs))
        try:
            return self._run_apart(call, leaves, spec)
        except CannotSplitError as why:
            raise NotImplementedError(
                f"a batch that mixes adapters needs the rows of every module's input apart, but {reason}; and of the "
                f"outputs of one run for each adapter {why}: use one batch for each adapter"
            ) from None

    def _run(self, part: Part, *args: Any, **kwargs: Any) -> Any:
        if self._calls is not None:
            return self._record(part.key, functools.partial(part.call, BASE), args, kwargs)
        changing = [name for name in dict.fromkeys(self.names) if name != BASE and part.changed_by(name)]
        if not changing or len(set(self.names)) == 1:
            return part.call(changing[0] if changing else BASE, *args, **kwargs)
        if self._layouts is None:
            raise ValueError(f"{part.key} runs outside of the model's forward, where adapter_names has no rows to name")
        groups = _groups([name if name in changing else BASE for name in self.names])
        leaves, spec = tree_flatten((args, kwargs))
        layout = (self._layouts or {}).get(part.key, {}).get(structure_of(leaves, spec))
        if layout is None:
            raise CannotSplitError(f"where {part.key} has them cannot be told")
        opaque = [type(leaf).__name__ for leaf in leaves if not is_plain(leaf)]
        if opaque:
            raise CannotSplitError(f"{part.key} takes {', '.join(opaque)}")
        calls = [(functools.partial(part.call, name), rows) for name, rows in groups.items()]
        return self._by_rows(calls, layout, leaves, spec, part.shared_rows, part.key)

    def _by_rows(
        self,
        calls: Sequence[tuple[Call, list[int]]],
        layout: Layout,
        leaves: list[Any],
        spec: TreeSpec,
        shared_rows: bool,
        key: str,
    ) -> Any:
        """Make each call on its rows and put what comes out back in the rows' order."""
        total, outputs = len(self.names), []
        groups = [rows for _, rows in calls]
        for call, rows in calls:
            own = [take(leaf, dim, rows, total, key) for leaf, dim in zip(leaves, layout.inputs, strict=True)]
            args, kwargs = tree_unflatten(own, spec)
            with self._rows_of([self.names[row] for row in rows]):
                outputs.append(tree_flatten(call(*args, **kwargs)))
        if any(len(leaves) != len(layout.outputs) for leaves, _ in outputs):
            raise CannotSplitError(f"{key} gives other outputs than for a few rows")
        joined = [
            join(parts, dim, groups, total, shared_rows, key)
            for parts, dim in zip(zip(*(leaves for leaves, _ in outputs), strict=True), layout.outputs, strict=True)
        ]
        return tree_unflatten(joined, outputs[0][1])

    # Finding the rows

    @torch.no_grad()
    def _trace(
        self, root: nn.Module, call: Call, leaves: list[Any], spec: TreeSpec, inputs: tuple[int | None, ...]
    ) -> Layouts:
        """Run the base model on two and on three rows and compare the shapes."""
        traces = []
        for count in (2, 3):
            index = [row % len(self.names) for row in range(count)]
            few = [
                leaf.index_select(0, torch.tensor(index, device=leaf.device)) if dim == 0 else _plain(leaf)
                for leaf, dim in zip(leaves, inputs, strict=True)
            ]
            args, kwargs = tree_unflatten(few, spec)
            if _caches(root):
                kwargs["use_cache"] = False
            self._calls = {}
            try:
                with self._rows_of([BASE] * count):
                    self._record("", call, args, kwargs)
                traces.append(self._calls)
            finally:
                self._calls = None
        return find_layouts(*traces)

    def _record(self, key: str, call: Call, args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        output = call(*args, **kwargs)
        results, _ = tree_flatten(output)
        assert self._calls is not None
        rows = len(self.names)
        seen = Seen(tuple(sketch(leaf, rows) for leaf in leaves), tuple(sketch(leaf, rows) for leaf in results))
        self._calls.setdefault(key, []).append((structure_of(leaves, spec), seen))
        return output


def _groups(names: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each name."""
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    return groups


def _is_encoder_decoder(root: nn.Module) -> bool:
    return bool(getattr(getattr(root, "config", None), "is_encoder_decoder", False))


def _caches(root: nn.Module) -> bool:
    return "use_cache" in inspect.signature(root.forward).parameters


def _rows(root: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    name = getattr(root, "main_input_name", "input_ids")
    known = [kwargs.get(key) for key in (name, "input_ids", "inputs_embeds", "decoder_input_ids")]
    leaves, _ = tree_flatten((known, args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        raise ValueError("adapter_names names the rows of a batch, but the model was given no tensor with rows")
    return tensors[0].shape[0]


def _is_row_tensor(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows


def _plain(leaf: Any) -> Any:
    """Caches are left out when rows are looked for."""
    return leaf if is_plain(leaf) else None
