"""Putting old entries back into many tensors and adding a diff to each: by one loop of C++ on a CPU, else by torch's operations.

Where a diff has few entries, torch's operations take longer to launch than to run; where it has many, they wait for memory:
entries lie too far apart for the processor to foresee the next one. The loop (`exchange.cpp`) knows where it will be, and fetches
ahead.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.codecache import CppCodeCache

from diffpeft.sparse.diff import put_, take

logger = logging.getLogger(__name__)

WORTH_LOADING = 1 << 13
"""Entries from which on a process loads the loop, for some hundredths of a second, after a machine has once compiled it."""

NOWHERE, NOTHING = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
"""Places and values of an exchange that only puts back, or only adds."""

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Progress(ctypes.c_int64):
    """How many exchanges have been made, as they go."""


class Exchange(NamedTuple):
    """What is to be done to a tensor: write `back` at `back_at`, then copy what stands at `at` to `old`, and add `values` there."""

    tensor: Tensor
    back_at: Tensor
    """int64, flat, none twice; so is `at`."""
    back: Tensor
    """In the tensor's dtype; so is `old`."""
    at: Tensor
    values: Tensor
    """fp32; a sum is rounded once."""
    old: Tensor


def can_exchange(tensor: Tensor, back_at: Tensor, back: Tensor, at: Tensor, values: Tensor) -> bool:
    """Whether an exchange of these can be made: by plain tensors on a CPU, in the dtypes and sizes that it takes."""
    return (
        type(tensor) is Tensor
        and tensor.dtype in _DTYPES
        and back.dtype == tensor.dtype
        and values.dtype == torch.float32
        and back_at.dtype == at.dtype == torch.int64
        and back.numel() == back_at.numel()
        and values.numel() == at.numel()
        and (tensor.is_cpu and tensor.is_contiguous())
        and (back_at.is_cpu and back_at.is_contiguous())
        and (back.is_cpu and back.is_contiguous())
        and (at.is_cpu and at.is_contiguous())
        and (values.is_cpu and values.is_contiguous())
    )


def exchange_all(exchanges: Sequence[Exchange], progress: Progress) -> None:
    """Make exchanges in tensors of one dtype, one after the other, each of which can be made ([`can_exchange`]).

    Raises:
        IndexError: for a place that its tensor does not have; without the loop it is torch's own error. Exchanges before it are
            made, it and later ones are not, but some of its `back` may be written.
    """
    if not exchanges:
        return
    worth = sum([e.at.numel() + e.back_at.numel() for e in exchanges]) >= WORTH_LOADING
    loop = loop_for(exchanges[0].tensor.dtype) if worth else None
    if loop is None:
        for tensor, back_at, back, at, values, old in exchanges:
            put_(tensor, back, back_at)
            old.copy_(take(tensor, at))
            progress.value += 1
            put_(tensor, old + values, at)
        return
    loop(addresses(exchanges), len(exchanges), ctypes.byref(progress))
    if progress.value < len(exchanges):
        raise too_small(exchanges[progress.value].tensor.shape)


def addresses(exchanges: Sequence[Exchange]) -> ctypes.Array[ctypes.c_int64]:
    """The exchanges as the loop takes them, while their tensors are where they are."""
    rows: list[int] = []
    for tensor, back_at, back, at, values, old in exchanges:
        rows += (tensor.data_ptr(), tensor.numel(), back_at.data_ptr(), back_at.numel(), back.data_ptr())
        rows += (at.data_ptr(), at.numel(), values.data_ptr(), old.data_ptr())
    return (ctypes.c_int64 * len(rows))(*rows)


def too_small(shape: torch.Size) -> IndexError:
    """The error for a place that a parameter of this shape does not have."""
    return IndexError(
        f"a diff has a place beyond the {shape.numel()} elements of its parameter, shape {tuple(shape)}, which was larger when "
        "the adapter was attached; load the adapter onto the model as it is now"
    )


def loop_for(dtype: torch.dtype) -> Any:
    """The loop for tensors of a dtype: a function of [`addresses`], their number and the address of a [`Progress`]; None where
    there is no compiler."""
    loops = _loops()
    return None if loops is None else loops[dtype]


@functools.cache
def _loops() -> dict[torch.dtype, Any] | None:
    """The compiled loop for each dtype, or None where there is no compiler, which a warning says."""
    source = Path(__file__).with_suffix(".cpp").read_text()
    # Older versions of torch try out vector instructions in any case, which takes a second.
    plain = {"needs_vec_isa", "kernel_needs_vec_isa"} & inspect.signature(CppCodeCache.load_async).parameters.keys()
    try:
        library = CppCodeCache.load(source, **dict.fromkeys(plain, False))
    except Exception as error:  # compilers fail in many ways, and torch's own differ from version to version
        logger.warning(
            "unmerged adapters run and merged ones are switched more slowly: the loop for it cannot be compiled, %s: %s. It takes a "
            "C++ compiler",
            type(error).__name__,
            str(error).strip().partition("\n")[0],
        )
        return None
    loops = {dtype: getattr(library, "exchange_" + str(dtype).removeprefix("torch.")) for dtype in _DTYPES}
    for loop in loops.values():
        loop.argtypes, loop.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p), None
    return loops
