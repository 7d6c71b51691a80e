"""Re-point an optimizer at the parameters that take the place of others, keeping its groups."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Replacement = Mapping[nn.Parameter, nn.Parameter | None]
"""New parameter, or None where there is none, of each old one."""


def check_replaceable(optimizer: torch.optim.Optimizer, old: set[nn.Parameter]) -> None:
    """Raise ValueError unless the optimizer's groups hold every parameter in `old`, so that they can be replaced."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    missing = len(old - held)
    if missing:
        raise ValueError(
            f"the optimizer ({type(optimizer).__name__}) does not hold {missing} of the {len(old)} parameters that "
            "pruning replaces, so it would go on without the kept values; build it from model.parameters(), and do not "
            "let it flatten or shard them"
        )


def replace_parameters(optimizer: torch.optim.Optimizer, replacement: Replacement) -> None:
    """Put new parameters where old ones stood in the optimizer's groups, in the same order, with fresh state.

    Groups and order equal those of an optimizer made for the changed model, so that a checkpoint's optimizer state
    fits when training resumes from it.
    """
    for group in optimizer.param_groups:
        new: list[Any] = [replacement.get(parameter, parameter) for parameter in group["params"]]
        group["params"] = [parameter for parameter in new if parameter is not None]
    for old in replacement:
        optimizer.state.pop(old, None)
