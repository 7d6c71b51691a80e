"""Choosing a mask before any training: by the gradients of a few batches, or at random."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, distributed, nn

from diffpeft.config import DiffPruningConfig
from diffpeft.layer.layer import DiffPruningLayer
from diffpeft.layer.wrapped import device_of
from diffpeft.sparse.sharded import check_whole
from diffpeft.sparse.top_k import Scores
from diffpeft.tuner import pruning

Owner = tuple[DiffPruningLayer, str]
"""A layer, and the name that a parameter has there."""


def select_positions(
    tuner: BaseTuner,
    adapter_name: str,
    batches: Iterable[Any] | None,
    loss: Callable[[Any], Tensor] | None,
    optimizer: torch.optim.Optimizer | None,
) -> pruning.PruningSummary:
    """Choose an adapter's positions as its config says; see `DiffPruningModel.select_positions`."""
    config: DiffPruningConfig = tuner.peft_config[adapter_name]
    if config.chosen_in_training:
        raise ValueError(f"selection={config.selection!r} chooses positions in training; call magnitude_prune after it")
    pruning.check(tuner, adapter_name, config.target_density)
    owners = [(layer, name) for layer in tuner.layers_of(adapter_name) for name in layer.shapes]
    if config.selection == "random":
        scores = {(layer, name): _random_scores(layer, name) for layer, name in owners}
    elif batches is None or loss is None:
        raise ValueError("selection='gradient' needs batches to take gradients of; pass batches and loss")
    else:
        found = _squared_gradients(tuner, owners, batches, loss)
        scores = {owner: partial(list, [squares]) for owner, squares in found.items()}

    def choice(layer: DiffPruningLayer, name: str) -> tuple[Scores, pruning.Values]:
        return scores[layer, name], partial(torch.zeros_like, dtype=torch.float32)

    return pruning.keep_largest(tuner, adapter_name, None, choice, optimizer)


def _random_scores(layer: DiffPruningLayer, name: str) -> Scores:
    """Uniform scores of a parameter, the same each time that they are computed and in all processes."""
    seeds, numel, device = [int(torch.randint(1 << 62, ()))], layer.shapes[name].numel(), device_of(layer.base_layer)
    if distributed.is_initialized():
        distributed.broadcast_object_list(seeds)
    return lambda: [torch.rand(numel, generator=torch.Generator().manual_seed(seeds[0])).to(device)]


def _squared_gradients(
    tuner: BaseTuner, owners: list[Owner], batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> dict[Owner, Tensor]:
    """Sums over batches, and over processes, of the squared gradient of each parameter, fp32, flat.

    They estimate the diagonal of the Fisher information (Sung, Nair, Raffel 2021, arXiv 2111.09839, section 3). Beside
    them only one gradient is held at a time.
    """
    found = {
        (layer, name): torch.zeros(layer.shapes[name].numel(), device=device_of(layer.base_layer))
        for layer, name in owners
    }
    before = {parameter: parameter.grad for parameter in tuner.parameters()}
    for parameter in before:
        parameter.grad = None  # backward would add to it in place
    batches = list(batches)
    if not batches:
        raise ValueError("selection='gradient' got no batches, so no position is better than another; pass some")
    with _gradients_into(found):
        for batch in batches:
            loss(batch).backward()  # type: ignore[no-untyped-call]
    for parameter, gradient in before.items():
        parameter.grad = gradient
    for scores in found.values() if distributed.is_initialized() else ():
        distributed.all_reduce(scores)
    return found


@contextmanager
def _gradients_into(scores: dict[Owner, Tensor]) -> Iterator[None]:
    """Add the square of each gradient to the scores as soon as backward has it, for a block.

    A quantised weight has no gradient: that of a linear layer's is the product of its output's gradient and its input.
    """
    handles: list[Any] = []
    trained: list[Tensor] = []
    try:
        for (layer, name), total in scores.items():
            if layer.quantized and name == "weight":
                handles.append(layer.base_layer.register_forward_hook(partial(_watch_output, total)))
                continue
            parameter: Any = layer.own_parameters()[name]
            check_whole([parameter], "selection by gradients")
            trained.append(parameter.requires_grad_(True))
            handles.append(parameter.register_post_accumulate_grad_hook(partial(_add_square, total)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(False)


def _add_square(total: Tensor, parameter: Tensor) -> None:
    """Add the square of a parameter's gradient to its scores, and let go of the gradient."""
    if parameter.grad is not None:
        total.add_(parameter.grad.reshape(-1).float().square())
        parameter.grad = None


def _watch_output(total: Tensor, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Add the square of a linear layer's weight gradient to its scores once its output has a gradient."""
    inputs = args[0].detach()

    def add(gradient: Tensor) -> None:
        product = gradient.flatten(0, -2).float().T @ inputs.flatten(0, -2).float()
        total.add_(product.reshape(-1).square())

    if torch.is_grad_enabled():
        output.requires_grad_(True).register_hook(add)  # type: ignore[no-untyped-call]
