"""Align a base and a fine-tuned model: which of their tensors belong together, and which are heads."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from diffpeft.files.checkpoint import Checkpoint, fresh_head


class Alignment(NamedTuple):
    """Two models, and which of their tensors belong together."""

    old: Checkpoint
    new: Checkpoint
    modules: list[str]
    """Modules of the new model that are saved whole."""
    compared: list[str]
    """Parameters that are compared: those outside of `modules`."""
    only_in_old: list[str]
    """Parameters of the old model that the new one lacks."""


def align_models(old: Checkpoint, new: Checkpoint) -> Alignment:
    """Find what belongs together in a base and a fine-tuned model.

    Raises ValueError where [`extract_diff`] does, of which this is the first step.
    """
    # What is one tensor there and two in the base has two diffs.
    for name, shape in new.tied.items():
        if name in old.parameters and not any(one in new.parameters for one in old.aliases[name]):
            new.parameters[name] = shape
    shapes = {**old.others, **old.tied, **old.parameters}
    modules = _whole_modules(old, new, shapes)
    compared = [name for name in new.parameters if not inside(name, modules)]
    for group in [old.aliases[name] for name in old.parameters if len(old.aliases[name]) > 1]:
        twins = [name for name in compared if name in group]
        if len(twins) > 1:
            raise ValueError(
                f"{twins} differ in {new.label} and are one tensor in {old.label}, so no adapter of that base holds "
                "both; save the base with a copy of it under each name and tie_word_embeddings=False, and use that"
            )
    only_in_old = [name for name in (*old.parameters, *old.unused) if name not in new.parameters]
    return Alignment(old, new, modules, compared, only_in_old)


def inside(name: str, modules: Sequence[str]) -> bool:
    """Whether the tensor `name` is in one of the modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def _whole_modules(old: Checkpoint, new: Checkpoint, shapes: Mapping[str, torch.Size]) -> list[str]:
    """The modules to save whole: fresh heads, those whose parameters are all new, and heads of another shape.

    Raises ValueError where less than half of the new parameters are in the base, which has tensors of these `shapes`,
    and for a parameter of the backbone that is new or of another shape.
    """
    lost = [name for name in new.parameters if name not in shapes]
    if 2 * len(lost) > len(new.parameters):
        raise ValueError(f"{old.label} lacks {lost[:3]} and more of {new.label}; use the base that it was tuned from")
    heads = [] if new.model is None else fresh_head(new.model)
    for name, shape in new.parameters.items():
        if shapes.get(name, shape) != shape and not inside(name, heads):
            top = name.partition(".")[0]
            if new.backbone in (None, top) or "." not in name:
                raise ValueError(
                    f"{name} is {tuple(shapes[name])} in {old.label} and {tuple(shape)} in {new.label}; resize the "
                    "base as the fine-tuned model was, e.g. with resize_token_embeddings"
                )
            heads.append(top)
    there = (name for name in new.parameters if name in shapes and not inside(name, heads))
    shared = {module for name in there for module in _ancestors(name)}
    for name in lost:
        if not inside(name, heads):
            module = next((module for module in _ancestors(name) if module not in shared), None)
            if module is None:
                raise ValueError(f"{name} of {new.label} has no module of its own; use the base it was tuned from")
            heads.append(module)
    return heads


def _ancestors(name: str) -> list[str]:
    """The modules around a parameter, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
