"""Align a base and a fine-tuned model: which of their tensors belong together, and which are heads."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from diffpeft.files.checkpoint import Checkpoint
from diffpeft.files.keys import ROOT, owners


class Alignment(NamedTuple):
    """Two models, and which of their tensors belong together."""

    old: Checkpoint
    new: Checkpoint
    modules: list[str]
    """Modules of the new model that are saved whole."""
    compared: dict[str, str]
    """The old name of each parameter that is compared, by its name in the new model."""
    total: int
    """Parameters of the new model outside of `modules`."""
    only_in_old: list[str]
    """Parameters of the old model that the new one lacks."""


def align_models(old: Checkpoint, new: Checkpoint, exclude: Sequence[str] | str) -> Alignment:
    """Find what belongs together in a base and a fine-tuned model, without the modules of `exclude`.

    Raises ValueError where [`extract_diff`] does, of which this is the first step.
    """
    # What is one tensor there and two in the base has two diffs.
    new.parameters.update({n: s for n, s in new.tied.items() if _is_apart(n, old, new)})
    names = _align(old, new)
    modules = _whole_modules(old, new, names)
    body = [name for name in new.parameters if not inside(name, modules)]
    left_out = _excluded(owners(body), exclude)
    compared = {name: names[name] for name in body if name.rpartition(".")[0] not in left_out}
    for group in [old.aliases[name] for name in old.parameters if len(old.aliases[name]) > 1]:
        twins = [name for name, its_name in compared.items() if its_name in group]
        if len(twins) > 1:
            raise ValueError(
                f"{twins} differ in {new.label} and are one tensor in {old.label}, so no adapter of that base holds "
                "both; save the base with a copy of it under each name and tie_word_embeddings=False, and use that"
            )
    total = sum(new.parameters[name].numel() for name in body)
    used = set(names.values())
    only_in_old = [name for name in (*old.parameters, *old.unused) if name not in used]
    return Alignment(old, new, modules, compared, total, only_in_old)


def _is_apart(name: str, old: Checkpoint, new: Checkpoint) -> bool:
    """Whether the old model has a tensor of its own for a tied parameter of the new one."""
    return name in old.parameters and not any(one in new.parameters for one in old.aliases[name])


def inside(name: str, modules: Sequence[str]) -> bool:
    """Whether the tensor `name` is in one of the modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def _align(old: Checkpoint, new: Checkpoint) -> dict[str, str]:
    """The base's name of each parameter of the fine-tuned model that it has, with the backbone's prefix added, removed
    or neither, whichever finds the most. Raises ValueError where that is less than half."""
    available = old.parameters.keys() | old.tied.keys() | old.others.keys()
    best = {name: name for name in new.parameters if name in available}
    for dot in sorted({f"{name.partition('.')[0]}." for name in (*available, *new.parameters)}):
        more = {name: dot + name for name in new.parameters if dot + name in available}
        less = {dot + name: name for name in available if dot + name in new.parameters}
        best = max(best, more, less, key=len)
    if 2 * len(best) < len(new.parameters):
        raise ValueError(
            f"{old.label} has only {len(best)} of the {len(new.parameters)} parameters of {new.label}, e.g. not "
            f"{next(name for name in new.parameters if name not in best)}; use the base that it was fine-tuned from"
        )
    return best


def _whole_modules(old: Checkpoint, new: Checkpoint, names: dict[str, str]) -> list[str]:
    """The modules to save whole: fresh heads, those whose parameters are all new, and heads of another shape. Raises
    ValueError for a parameter of the backbone that is new or of another shape."""
    heads = list(new.heads)
    every = {**old.others, **old.tied, **old.parameters}
    sizes = Counter[str]()
    for name, shape in new.parameters.items():
        sizes[name.partition(".")[0]] += shape.numel()
    backbone = new.backbone or max(sizes, key=lambda top: sizes[top], default="")
    for name, shape in new.parameters.items():
        top = name.partition(".")[0]
        if name in names and every[names[name]] != shape and not inside(name, heads):
            if top == backbone or "." not in name or (new.backbone is None and new.model_class is not None):
                raise ValueError(
                    f"{name} is {tuple(every[names[name]])} in {old.label} and {tuple(shape)} in {new.label}, and no "
                    "diff goes between shapes; resize the base as the fine-tuned model was, e.g. with "
                    "resize_token_embeddings"
                )
            heads.append(top)
    shared = {module for name in names if not inside(name, heads) for module in _ancestors(name)}
    for name in new.parameters:
        if name not in names and not inside(name, heads):
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
