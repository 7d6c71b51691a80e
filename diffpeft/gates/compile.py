"""Chains of elementwise operations, each compiled into one loop: C++ on a CPU, Triton on a GPU.

torch.compile's own checks take longer at each call than a small loop. So what it made is kept by the arguments' dtypes,
shapes and constants, and called at once where these are known. Without a compiler a warning says so, once, and all runs
eagerly, on a CPU in chunks that stay in its cache.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import lookup_backend

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 1 << 17
"""Elements worked on at a time on a CPU, so that a chain of elementwise operations stays in its cache."""
GPU_CHUNK_ELEMENTS = 1 << 24
"""Elements worked on at a time on a GPU where all would take too much memory."""
MIN_COMPILED_GATES = 1 << 20
"""Gates of an adapter from which on a compiler's time pays."""
MIN_PARALLEL_ELEMENTS = 1 << 15
"""Elements from which on several threads are faster than one."""
MAX_CHAIN_OPERATIONS = 1000
"""More operations than any chain has. A compiler that splits one needs memory for what lies between the parts."""

broken: list[BaseException] = []
"""Why nothing is compiled in this process any more."""


def split_flat(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor, flat and without gradient, in chunks that are worked on at a time; views if it is contiguous."""
    flat = tensor.detach().reshape(-1)
    if torch.compiler.is_compiling():  # a compiler fuses chains itself, and would unroll the loop over chunks
        return (flat,)
    return torch.split(flat, CHUNK_ELEMENTS if tensor.device.type == "cpu" else GPU_CHUNK_ELEMENTS)


def _leaves(arguments: Sequence[Any]) -> list[Any]:
    """The arguments, each tuple's members in its place."""
    return [leaf for argument in arguments for leaf in (argument if isinstance(argument, tuple) else (argument,))]


class CompiledChain:
    """A chain, compiled for a number of threads, which the compiler would choose by the size that comes first."""

    def __init__(self, chain: Callable[..., Any], threads: int) -> None:
        self._options = {
            "cpp.threads": threads,
            "realize_reads_threshold": MAX_CHAIN_OPERATIONS,
            "realize_opcount_threshold": MAX_CHAIN_OPERATIONS,
        }
        self._checked = torch.compile(chain, backend=self._compile)
        self._marked = False
        self._ran: tuple[Callable[..., Any], Sequence[Any]] | None = None  # a compiled loop, and its inputs
        self._launches: dict[Any, tuple[Callable[..., Any], list[tuple[bool, Any]]]] = {}

    def _compile(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph (torch.compile's backend) into a function that notes what it ran with."""
        inductor: Any = lookup_backend("inductor")
        run = inductor(graph, examples, config_patches=self._options)

        def noting(*inputs: Any) -> Any:
            self._ran = run, inputs
            return run(*inputs)

        return noting

    def __call__(self, arguments: Sequence[Any], keep: bool) -> Any:
        """The chain's result; `keep` what was compiled for when such shapes come again."""
        leaves = _leaves(arguments)
        key = tuple([(a.dtype, a.shape, a.device) if isinstance(a, Tensor) else a for a in leaves]) if keep else None
        if key in self._launches:
            run, known = self._launches[key]
            results = run(*[leaves[value] if given else value for given, value in known])
            return results[0] if results else None
        if not self._marked:  # sizes vary; all else, like the stretch, goes into the code as constants
            for tensor in leaves:
                if isinstance(tensor, Tensor):
                    torch._dynamo.mark_dynamic(tensor, [d for d, size in enumerate(tensor.shape) if size > 8])
            self._marked = True
        result = self._checked(*arguments)
        ran, self._ran = self._ran, None
        if keep and ran is not None:
            index_of = {id(leaf): index for index, leaf in enumerate(leaves)}
            known = [(True, index_of[id(x)]) if id(x) in index_of else (False, x) for x in ran[1]]
            others = [x for given, x in known if not given]  # sizes and numbers of which torch.compile has seen several
            if all(isinstance(x, int | float) or (isinstance(x, Tensor) and x.ndim == 0) for x in others):
                self._launches[key] = ran[0], known
        return result


compiled = functools.cache(CompiledChain)


def compile_and_run(chain: Callable[..., Any], *arguments: Any, keep: bool = True) -> tuple[bool, Any]:
    """Whether there is a compiler, and what the chain returns then, None or a tensor.

    `arguments` are constants and contiguous tensors that need no gradient; the first one's size decides on threads.
    `keep` says whether tensors of the same shapes will come again.
    """
    if broken:
        return False, None
    try:
        first: Tensor = _leaves(arguments)[0]
        threads = torch.get_num_threads() if first.numel() >= MIN_PARALLEL_ELEMENTS else 1
        return True, compiled(chain, threads)(arguments, keep)
    except torch.OutOfMemoryError:
        raise
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, OSError, ImportError) as error:
        # A chain fails when compiled, before it has written anything. Wrong arguments show in eager mode.
        broken.append(error)
        logger.warning(
            "gates run eagerly, which is slower: torch.compile, which takes a C++ compiler or Triton, fails: %s",
            str(error).strip().partition("\n")[0],
        )
        return False, None


def _transpose(x: Tensor) -> Tensor:
    return x.t().contiguous()


def transpose(x: Tensor) -> Tensor:
    """The transpose of a matrix, contiguous, by compiled code where that is faster than torch's."""
    worth = min(x.shape) > 8 and x.numel() >= MIN_PARALLEL_ELEMENTS and x.is_contiguous()
    done, result = compile_and_run(_transpose, x.detach()) if worth else (False, None)
    return result if done else _transpose(x)  # type: ignore[return-value]


@functools.cache
@torch.no_grad()
def prepare_transpose() -> None:
    """Compile [`transpose`] before a backward pass, where the compiler's memory would add to all activations."""
    transpose(torch.zeros(MIN_PARALLEL_ELEMENTS >> 7, (1 << 7) + 1))


def elementwise(chain: Callable[..., Any]) -> Callable[..., Any]:
    """Make a chain a function of whole tensors of one shape; what it returns for chunks of them is added up.

    The chain takes chunks, which it may write to, as a tuple, the position of the first element, and settings: tensors,
    tuples of tensors and constants. `fused` compiles it. With `whole` it sees the tensors in their shape, and such
    shapes will not come again.
    """

    @functools.wraps(chain)
    def launch(tensors: Sequence[Tensor], *settings: Any, fused: bool = False, whole: bool = False) -> Any:
        tensors = tuple(tensor.detach() for tensor in tensors)
        if torch.compiler.is_compiling():
            return chain(tensors, 0, *settings)
        flat = all(tensor.is_contiguous() for tensor in tensors)
        if flat and not whole:
            tensors = tuple(tensor.view(-1) for tensor in tensors)
        if fused and flat and tensors[0].numel() > 1:
            done, result = compile_and_run(chain, tensors, 0, *settings, keep=not whole)
            if done:
                return result
        if not flat or whole or tensors[0].device.type != "cpu" or tensors[0].numel() <= CHUNK_ELEMENTS:
            return chain(tensors, 0, *settings)
        results, start = [], 0
        for chunks in zip(*(torch.split(tensor, CHUNK_ELEMENTS) for tensor in tensors), strict=True):
            results.append(chain(chunks, start, *settings))
            start += chunks[0].numel()
        return None if results[0] is None else torch.stack(results).sum()

    return launch
