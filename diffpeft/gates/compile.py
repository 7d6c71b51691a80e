"""Chains of elementwise operations through torch.compile, which makes one loop of each: C++ on a CPU, Triton on a GPU.

torch.compile looks at every call for what could make other code necessary, which takes longer than a small loop, above all where
a matrix product has just emptied the caches. So what it made is kept by the arguments' dtypes, shapes and constants, and called
without asking again where these are known. Without a compiler a warning says so, once, and all runs eagerly.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo import lookup_backend

logger = logging.getLogger(__name__)

WORTH_THREADS = 1 << 15
"""Elements from which on several threads are faster than one."""
LONG = 1000
"""More operations than any chain has. A compiler that splits one needs memory for what lies between the parts."""
MOST_LAUNCHES = 1 << 12
"""Kept of one chain: more than there are shapes in any model."""

broken: list[BaseException] = []
"""Why nothing is compiled in this process any more."""


_Seen = tuple[Callable[..., Any], Sequence[Any]]


class _Launch(NamedTuple):
    """What was compiled, for arguments like some that were there before."""

    run: Callable[..., Sequence[Tensor]]
    inputs: tuple[tuple[bool, Any], ...]
    """Of each input: whether it is an argument, and which; or which number."""

    def __call__(self, arguments: Sequence[Any]) -> Any:
        made = self.run(*(arguments[value] if given else value for given, value in self.inputs))
        return made[0] if made else None


def _is_number(value: Any) -> bool:
    """Whether torch.compile has made an input of a size or of another number, as it does where it has seen several."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


class _Compiled:
    """A chain, compiled for a number of threads.

    The size that comes first would decide whether a loop is parallel, and the compiler's cache on disk does not know for how many
    threads: so the number is said, and small tensors have a loop of their own.
    """

    def __init__(self, chain: Callable[..., Any], threads: int) -> None:
        self._options = {
            "cpp.threads": threads,
            "realize_reads_threshold": LONG,
            "realize_opcount_threshold": LONG,
        }
        self._checked = torch.compile(chain, backend=self._compile)
        self._marked = False
        self._seen: _Seen | None = None
        self._launches: dict[Any, _Launch] = {}

    def _compile(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        """torch.compile's backend."""
        inductor: Any = lookup_backend("inductor")
        run = inductor(graph, examples, config_patches=self._options)

        def noting(*inputs: Any) -> Any:
            self._seen = run, inputs
            return run(*inputs)

        return noting

    def __call__(self, arguments: Sequence[Any], again: bool) -> Any:
        """What the chain returns; arguments of these shapes will come `again`, or may not."""
        if not again:
            return self._check(arguments)[0]
        key = tuple([(a.dtype, a.shape, a.device) if isinstance(a, Tensor) else a for a in arguments])
        launch = self._launches.get(key)
        if launch is not None:
            return launch(arguments)
        result, seen = self._check(arguments)
        if seen is not None and len(self._launches) < MOST_LAUNCHES:
            run, inputs = seen
            places = {id(argument): place for place, argument in enumerate(arguments)}
            told = [(True, places[id(x)]) if id(x) in places else (False, x) for x in inputs]
            if all(given or _is_number(value) for given, value in told):
                self._launches[key] = _Launch(run, tuple(told))
        return result

    def _check(self, arguments: Sequence[Any]) -> tuple[Any, _Seen | None]:
        """What the chain returns, and what ran with which inputs, if it was compiled."""
        if not self._marked:  # sizes vary; all else, like the stretch, goes into the code as constants
            for tensor in arguments:
                if isinstance(tensor, Tensor):
                    torch._dynamo.mark_dynamic(tensor, [d for d, size in enumerate(tensor.shape) if size > 8])
            self._marked = True
        result = self._checked(*arguments)
        seen, self._seen = self._seen, None
        return result, seen


compiled = functools.cache(_Compiled)


def compile_and_run(chain: Callable[..., Any], *arguments: Any, again: bool = True) -> tuple[bool, Any]:
    """Whether there is a compiler, and what the chain returns then, None or a tensor.

    Args:
        chain: a function of tensors and constants.
        arguments: contiguous tensors that need no gradient, and constants. The size of the first one decides on threads.
        again: whether tensors of the same shapes will come again.
    """
    if broken:
        return False, None
    try:
        threads = torch.get_num_threads() if arguments[0].numel() >= WORTH_THREADS else 1
        return True, compiled(chain, threads)(arguments, again)
    except torch.OutOfMemoryError:
        raise
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, OSError, ImportError) as error:
        # A chain fails when it is compiled, before it has written anything. What is wrong with its arguments shows in eager mode.
        broken.append(error)
        logger.warning(
            "gates and diffs run eagerly, which is slower: torch.compile fails with %s: %s. It takes a C++ compiler and "
            "Python's headers on a CPU, Triton on a GPU",
            type(error).__name__,
            str(error).strip().partition("\n")[0],
        )
        return False, None
