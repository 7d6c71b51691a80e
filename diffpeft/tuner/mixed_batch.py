"""Batches whose rows belong to different adapters (`adapter_names=`): the model runs once for each, on its rows.

What a row gets is, to the bit, what it gets in a batch of that adapter's rows alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.cache_utils import Cache

BASE = "__base__"
"""PEFT's name for rows without an adapter."""

CACHE_FLAGS = ("use_cache", "use_mems")
"""Arguments and config fields that turn on a model's cache of earlier tokens."""

WHOLE_BATCH = ("past_key_values", "cache_params", "mems", "streamer")
"""Arguments that gather the rows of a whole batch: caches of earlier tokens by their names, and streamers."""

ONE_BATCH_EACH = "use one batch for each adapter"


class MixedBatch:
    """Runs a model on a batch whose rows belong to the named adapters.

    Args:
        names: an adapter's name, or [`BASE`], for each row.
        activate: gives a context in which an adapter is the active one.
    """

    def __init__(self, names: Sequence[str], activate: Callable[[str], AbstractContextManager[None]]) -> None:
        self._names = list(names)
        self._activate = activate
        self._inside = False  # within a run of one adapter's rows, which `generate` makes of many forward passes

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Within the block, `model.forward` and `model.generate` run once for each adapter."""
        verbs = {"forward": self._forward, "generate": self._generate}
        replaced = {verb: model.__dict__.get(verb) for verb in verbs if callable(getattr(model, verb, None))}
        for verb in replaced:
            own = getattr(model, verb)
            # generation looks at the signature of `forward` for what the model takes
            setattr(model, verb, functools.wraps(own)(functools.partial(verbs[verb], own)))
        try:
            yield
        finally:
            for verb, before in replaced.items():
                delattr(model, verb)
                if before is not None:
                    setattr(model, verb, before)

    def _forward(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return own(*args, **kwargs)
        self._check_rows(args, kwargs)
        if len(set(self._names)) == 1:
            with self._activate(self._names[0]):
                return own(*args, **kwargs)
        _check_no_cache(args, kwargs)
        _check_not_decoding(kwargs)
        for flag in CACHE_FLAGS:
            if kwargs.get(flag):
                raise NotImplementedError(
                    f"{flag}=True: rows of several adapters have no common cache; {ONE_BATCH_EACH}"
                )
            if flag in inspect.signature(own).parameters:
                kwargs[flag] = False
        outputs = self._run(own, args, kwargs)
        leaves = [tree_flatten(output) for output in outputs]
        if any(str(spec) != str(leaves[0][1]) for _, spec in leaves):
            raise NotImplementedError(f"the adapters' rows give outputs of different forms; {ONE_BATCH_EACH}")
        columns = list(zip(*(own_leaves for own_leaves, _ in leaves), strict=True))
        counts = [len(rows) for rows in self._groups().values()]
        if any(_may_compare_rows(column, counts) for column in columns):
            self._check_against_one_more_row(own, args, kwargs, [column[0] for column in columns])
        return tree_unflatten([self._join(column) for column in columns], leaves[0][1])

    def _generate(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._check_rows(args, kwargs)
        if len(set(self._names)) == 1:
            with self._activate(self._names[0]):
                return self._within(own, args, kwargs)
        _check_no_cache(args, kwargs)
        outputs = self._run(own, args, kwargs)
        configs = [kwargs.get("generation_config"), getattr(getattr(own, "__self__", None), "generation_config", None)]
        sources = [kwargs, *(config.__dict__ for config in configs if config is not None)]
        told = [source.get(name) for name in ("pad_token_id", "eos_token_id") for source in sources]
        padding = int(torch.as_tensor(next((value for value in told if value is not None), 0)).reshape(-1)[0])
        if isinstance(outputs[0], Tensor):
            return self._join_steps([(output,) for output in outputs], padding)[0]
        return self._join_generated(outputs, padding)

    def _join_generated(self, outputs: list[Any], padding: int) -> Any:
        """Sequences, scores and logits of several `generate` calls that returned dicts; caches are left out."""
        lost = sorted(name for name in outputs[0] if name.endswith(("attentions", "hidden_states")))
        if lost or ("beam_indices" in outputs[0] and "scores" in outputs[0]):
            raise NotImplementedError(
                f"of a batch that mixes adapters, generate gives sequences, scores and logits, but not "
                f"{', '.join(lost) or 'scores of beams'}; {ONE_BATCH_EACH}"
            )
        sequences = self._join_steps([(output.sequences,) for output in outputs], padding)[0]
        joined: dict[str, Any] = {"sequences": sequences}
        for name in ("scores", "logits"):
            if name in outputs[0]:
                joined[name] = self._join_steps([output[name] for output in outputs], 0)
        return type(outputs[0])(**joined)

    def _join_steps(self, parts: list[tuple[Tensor, ...]], padding: int) -> tuple[Tensor, ...]:
        """Tensors of as many steps as the longest part has; shorter parts and rows are filled with `padding`."""
        steps = []
        for step in range(max(map(len, parts))):
            example = next(part[step] for part in parts if len(part) > step)
            width = max(part[step].shape[1] for part in parts if len(part) > step)
            padded = []
            for part, rows in zip(parts, self._groups().values(), strict=True):
                times = part[0].shape[0] // len(rows)
                own = part[step] if len(part) > step else example.new_full((times * len(rows), width), padding)
                padded.append(functional.pad(own, (0, width - own.shape[1]), value=padding))
            steps.append(self._join(padded))
        return tuple(steps)

    # Rows

    def _groups(self) -> dict[str, list[int]]:
        """The rows of each adapter."""
        groups: dict[str, list[int]] = {}
        for row, name in enumerate(self._names):
            groups.setdefault(name, []).append(row)
        return groups

    def _check_rows(self, args: Any, kwargs: dict[str, Any]) -> None:
        known = [kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids")]
        tensors = [leaf for leaf in tree_flatten((known, args, kwargs))[0] if isinstance(leaf, Tensor) and leaf.ndim]
        rows = len(tensors[0]) if tensors else 0
        if rows != len(self._names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(self._names)} and "
                f"{rows} respectively."
            )

    def _within(self, own: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        self._inside = True
        try:
            return own(*args, **kwargs)
        finally:
            self._inside = False

    def _run(self, own: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> list[Any]:
        """The outputs of each adapter's rows."""
        outputs = []
        for name, rows in self._groups().items():
            with self._activate(name):
                outputs.append(self._within(own, *self._take((args, kwargs), rows)))
        return outputs

    def _take(self, inputs: Any, rows: list[int]) -> Any:
        """The inputs with some of their rows: tensors whose first dimension is the batch's."""
        leaves, spec = tree_flatten(inputs)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(self._names):
                leaves[index] = leaf.index_select(0, torch.tensor(rows, device=leaf.device))
        return tree_unflatten(leaves, spec)

    def _join(self, parts: Sequence[Any]) -> Any:
        """Parts of the output, one for each adapter, in the order of the batch's rows; refused if they have none."""
        first, groups = parts[0], list(self._groups().values())
        if not isinstance(first, Tensor):
            if not all(type(part) is type(first) and part == first for part in parts):
                raise NotImplementedError(f"outputs of type {type(first).__name__} cannot be joined; {ONE_BATCH_EACH}")
            return first
        times = len(first) // len(groups[0]) if first.ndim else 0
        shapes = [(times * len(rows), *first.shape[1:]) for rows in groups]
        if not times or [tuple(part.shape) for part in parts] != shapes:
            raise NotImplementedError(
                f"an output of shape {tuple(first.shape)} is not made of rows, as a loss or similarities between rows "
                f"are not: leave labels out and compute a loss from the logits, or {ONE_BATCH_EACH}"
            )
        joined = first.new_empty((len(self._names), times, *first.shape[1:]))
        for part, rows in zip(parts, groups, strict=True):
            joined[torch.tensor(rows, device=first.device)] = part.view(len(rows), times, *first.shape[1:])
        return joined.flatten(0, 1)

    def _check_against_one_more_row(
        self, own: Callable[..., Any], args: Any, kwargs: dict[str, Any], outputs: list[Any]
    ) -> None:
        """Raise NotImplementedError where a row more changes other dimensions than the first: rows meet each other."""
        name, rows = next(iter(self._groups().items()))
        with self._activate(name):
            larger = tree_flatten(self._within(own, *self._take((args, kwargs), [*rows, rows[0]])))[0]
        for output, other in zip(outputs, larger, strict=True):
            if isinstance(output, Tensor) and output.shape[1:] != other.shape[1:]:
                raise NotImplementedError(f"an output compares rows, which adapters cannot share; {ONE_BATCH_EACH}")


def _may_compare_rows(parts: Sequence[Any], counts: list[int]) -> bool:
    """Whether a dimension after the first could be the rows again, as in a table of similarities."""
    if not isinstance(parts[0], Tensor):
        return False
    dims = range(1, min(part.ndim for part in parts))
    return any(all(part.shape[dim] == count for part, count in zip(parts, counts, strict=True)) for dim in dims)


def _check_no_cache(args: Any, kwargs: dict[str, Any]) -> None:
    """Raise NotImplementedError for what gathers the rows of a whole batch."""
    for name, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Cache) or (name in WHOLE_BATCH and value is not None):
            raise NotImplementedError(
                f"{type(value).__name__} cannot be shared by adapters: leave it out, or {ONE_BATCH_EACH}"
            )


def _check_not_decoding(kwargs: dict[str, Any]) -> None:
    """Raise NotImplementedError in a decode loop, which passes on a cache that a mixed batch does not return."""
    tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    mask, length = kwargs.get("attention_mask"), 0 if tokens is None else tokens.shape[1]
    longer = length and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > length
    if longer or "past_key_values" in kwargs:
        what = f"an attention_mask longer than the {length} tokens" if longer else "past_key_values"
        raise NotImplementedError(
            f"{what} belongs to a cache, which rows of several adapters do not have: call generate, pass all tokens "
            f"in each step and no past_key_values, or {ONE_BATCH_EACH}"
        )


def check_names(names: Sequence[str], adapters: Collection[str], training: bool, layers: Sequence[Any]) -> None:
    """Raise ValueError where `adapter_names` cannot be served; the texts begin as PEFT's do."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names) or not names:
        raise ValueError(f"adapter_names={names!r} must be a list with an adapter's name for each row")
    unknown = sorted(set(names) - {*adapters, BASE})
    if unknown:
        listed = ", ".join(unknown)
        raise ValueError(f"Trying to infer with non-existing adapter(s): {listed}; there are {sorted(adapters)}")
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first")
    if any(layer.merged for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("adapter_names was given while adapters are disabled; enable them, or leave it out")
