"""Align a base and a fine-tuned model: which of their tensors belong together, and which are heads."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from diffpeft.files.checkpoint import Checkpoint
from diffpeft.files.keys import ROOT, owners


class Alignment(NamedTuple):
    """Two models, and which of their tensors belong together."""

    old: Checkpoint
    new: Checkpoint
    modules: list[str]
    """Modules of the new model that are saved whole."""
    compared: list[str]
    """Parameters that are compared."""
    total: int
    """Parameters of the new model outside of `modules`."""
    only_in_old: list[str]
    """Parameters of the old model that the new one lacks."""


def align_models(old: Checkpoint, new: Checkpoint, exclude: Sequence[str] | str) -> Alignment:
    """Find what belongs together in a base and a fine-tuned model, without the modules of `exclude`.

    Raises ValueError where [`extract_diff`] does, of which this is the first step.
    """
    # What is one tensor there and two in the base has two diffs.
    for name, shape in new.tied.items():
        if name in old.parameters and not any(one in new.parameters for one in old.aliases[name]):
            new.parameters[name] = shape
    shapes = {**old.others, **old.tied, **old.parameters}
    modules = _whole_modules(old, new, shapes)
    body = [name for name in new.parameters if not inside(name, modules)]
    left_out = _excluded(owners(body), exclude)
    compared = [name for name in body if name.rpartition(".")[0] not in left_out]
    for group in [old.aliases[name] for name in old.parameters if len(old.aliases[name]) > 1]:
        twins = [name for name in compared if name in group]
        if len(twins) > 1:
            raise ValueError(
                f"{twins} differ in {new.label} and are one tensor in {old.label}, so no adapter of that base holds "
                "both; save the base with a copy of it under each name and tie_word_embeddings=False, and use that"
            )
    total = sum(new.parameters[name].numel() for name in body)
    only_in_old = [name for name in (*old.parameters, *old.unused) if name not in new.parameters]
    return Alignment(old, new, modules, compared, total, only_in_old)


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
        raise ValueError(
            f"{old.label} has only {len(new.parameters) - len(lost)} of the {len(new.parameters)} parameters of "
            f"{new.label}, e.g. not {lost[0]}; use the base that it was fine-tuned from"
        )
    heads = list(new.heads)
    for name, shape in new.parameters.items():
        if shapes.get(name, shape) != shape and not inside(name, heads):
            top = name.partition(".")[0]
            if new.backbone in (None, top) or "." not in name:
                raise ValueError(
                    f"{name} is {tuple(shapes[name])} in {old.label} and {tuple(shape)} in {new.label}, and no diff "
                    "goes between shapes; resize the base as the fine-tuned model was, e.g. with "
                    "resize_token_embeddings"
                )
            heads.append(top)
    there = (name for name in new.parameters if name in shapes and not inside(name, heads))
    shared = {module for name in there for module in _ancestors(name)}
    for name in lost:
        if not inside(name, heads):
            module = next((module for module in _ancestors(name) if module not in shared), None)
            if module is None:
                raise ValueError(
                    f"{name} is only in {new.label}, in a module that {old.label} has too, so neither a diff nor a "
                    "head can hold it; use the base that it was fine-tuned from"
                )
            heads.append(module)
    return heads


def _ancestors(name: str) -> list[str]:
    """The modules around a parameter, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _excluded(modules: set[str], exclude: Sequence[str] | str) -> set[str]:
    """The modules that PEFT would leave out. Raises ValueError for a name that matches none."""
    found = set[str]()
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        regex = pattern if isinstance(exclude, str) else rf"(.*\.)?{re.escape(pattern)}"
        matched = {module for module in modules if re.fullmatch(regex, module or ROOT)}
        if pattern and not matched:
            example = sorted(modules)[-1]
            raise ValueError(f"exclude={pattern!r} matches no module with parameters; use names such as {example!r}")
        found |= matched
    return found
