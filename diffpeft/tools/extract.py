"""Extract a pruned adapter from a fully fine-tuned model: its largest differences from the base, without training."""

import os
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffpeft.config import DiffPruningConfig, check_density
from diffpeft.files import fingerprint
from diffpeft.files.adapter import write_adapter
from diffpeft.files.checkpoint import Source, open_as, open_checkpoint
from diffpeft.files.encoding import check_dtype, rounded
from diffpeft.sparse.diff import Diff, count_nonzeros
from diffpeft.sparse.top_k import Scores, global_threshold, select
from diffpeft.tools.alignment import Alignment, align_models, inside

Progress: TypeAlias = Callable[[float], None]
CHUNK_ELEMENTS = 1 << 20
"""Entries that are compared at once: fewer take less memory beside a tensor, more take less time."""


class Extraction(NamedTuple):
    """The result of [`extract_diff`]. Names are those of the fine-tuned model's parameters, if nothing else is said."""

    diff: Diff
    """Positions and values of each parameter with nonzeros."""
    kept: int
    """Nonzeros of the diff."""
    total: int
    """Parameters of the fine-tuned model without its heads, of which densities are shares."""
    density: float
    """kept / total."""
    heads: dict[str, Tensor]
    """The tensors that are saved whole, in the fine-tuned model's dtype."""
    only_in_base: list[str]
    """Parameters of the base that the fine-tuned model lacks, by their names in the base."""
    differing_buffers: list[str]
    """Buffers, such as a batch norm's running statistics, that differ. No adapter has them: the base's stay."""
    per_parameter: dict[str, tuple[int, int]]
    """(kept, elements) of each parameter that was compared."""


def extract_diff(
    base: Source,
    finetuned: Source,
    density: float = 0.005,
    output: str | os.PathLike[str] | None = None,
    *,
    value_dtype: str = "float32",
    task_type: str | None = None,
    base_name: str | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Turn a fully fine-tuned model into a pruned adapter: the k largest |finetuned - base| of all tensors together.

    k = round(density * parameters), or the number of entries that differ, where that is less. Tensors are read one pair
    at a time, so that memory holds little more than the largest of them and the result. Where all that differs is kept,
    the base plus the diff, in the base's dtype, is the fine-tuned model to within a rounding of the larger entry.

    Modules that are new, and a fresh task head even where the base has one, are saved whole (`modules_to_save`). A bare
    backbone and a task model around one are aligned; the adapter has the fine-tuned model's names. Buffers and tensors
    that are not floating stay the base's.

    Args:
        base: a model in memory, or a directory of safetensors, in one file or in shards with an index.
        finetuned: as `base`.
        density: nonzeros as a share of the fine-tuned model's parameters, heads not counted.
        output: a directory to write the adapter into; None writes nothing.
        value_dtype: of the values; "bfloat16", "float16" and "int8" make smaller files and less exact models.
        task_type: for the adapter's config, e.g. "SEQ_CLS".
        base_name: the base model's name in the adapter's config, by default that of `base`.
        progress: called with the share of the readings that are done, before each.

    Raises:
        ValueError: a directory that cannot be read; another architecture, or another shape in the backbone; differences
            that are NaN, infinite, or zero throughout; a density that leaves nothing.
    """
    check_density(density)
    check_dtype(value_dtype)
    new = open_checkpoint(finetuned)
    new.check_whole()
    found = align_models(open_as(base, new.model_class), new)
    extraction = _extract(found, density, value_dtype, progress)
    if output is not None:
        source = os.fspath(base) if isinstance(base, (str, os.PathLike)) else getattr(base, "name_or_path", None)
        kind = found.new.model_class
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__} if kind else None
        config = DiffPruningConfig(
            task_type=task_type,
            auto_mapping=mapping if task_type is None else None,
            base_model_name_or_path=base_name or source or None,
            target_density=density,
            modules_to_save=found.modules or None,
            value_dtype=value_dtype,
            base_fingerprint=fingerprint.take(found.compared, found.old.load),
        )
        shapes = {name: found.new.parameters[name] for name in found.compared}
        write_adapter(output, config, extraction.diff, shapes, extraction.heads)
    return extraction


def _extract(found: Alignment, density: float, value_dtype: str, progress: Progress | None) -> Extraction:
    old, new, compared = found.old, found.new, found.compared
    total = sum(new.parameters[name].numel() for name in compared)
    k = round(density * total)
    if k < 1 or not compared:
        raise ValueError(
            f"density={density} of {total} parameters, {len(compared)} tensors, is {k} nonzeros; use a higher one"
        )
    differences = _Differences(found, progress)
    differing = sum(differences.count(name) for name in compared)
    if not differing:
        raise ValueError(f"{old.label} and {new.label} are the same outside the heads, so there is nothing to extract")
    count = min(k, differing)
    pairs = _largest(differences, count)
    diff = {name: (positions, rounded(values, value_dtype)) for name, (positions, values) in pairs.items()}
    for name, (_, values) in diff.items():
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name}: differences are beyond {value_dtype}; use value_dtype='float32'")
    kept = count_nonzeros(diff)
    every = (*new.parameters, *new.tied, *new.others)
    buffers = [name for name in new.others if name in old.others and not inside(name, found.modules)]
    return Extraction(
        diff=diff,
        kept=count,
        total=total,
        density=count / total,
        heads={name: new.load(name).clone() for name in every if inside(name, found.modules)},
        only_in_base=found.only_in_old,
        differing_buffers=[name for name in buffers if not torch.equal(old.load(name), new.load(name))],
        per_parameter={name: (kept.get(name, 0), new.parameters[name].numel()) for name in compared},
    )


class _Differences:
    """finetuned - base of one parameter at a time, fp32, flat; each overwrites the one before."""

    READINGS = 4
    """Readings of each pair: one to count the differences, two to find the threshold, one to take those above it."""

    def __init__(self, found: Alignment, progress: Progress | None) -> None:
        self.old, self.new, self.names = found.old, found.new, found.compared
        self._progress, self._read = progress, 0
        self._buffer = torch.empty(max(self.new.parameters[name].numel() for name in self.names))

    def of(self, name: str) -> Tensor:
        """The differences in the parameter `name`; they last until the next are asked for."""
        if self._progress is not None:
            self._progress(self._read / (self.READINGS * len(self.names)))
        self._read += 1
        delta, changed = self._buffer[: self.new.parameters[name].numel()], self.new.load(name)
        if changed.dtype == torch.float64:
            return delta.copy_((changed - self.old.load(name).to(changed.device)).reshape(-1))
        delta.copy_(changed.reshape(-1))
        del changed
        return delta.sub_(self.old.load(name).reshape(-1).to("cpu"))

    def scores(self, name: str) -> Scores:
        """A function that gives the magnitudes of [`of`]."""
        return lambda: torch.split(self.of(name).abs_(), CHUNK_ELEMENTS)

    def count(self, name: str) -> int:
        """The number of entries that differ. Raises ValueError where a difference is not finite."""
        delta = self.of(name).abs_()
        if delta.numel() and not bool(torch.isfinite(delta.max())):
            raise ValueError(
                f"{name}: finetuned - base is NaN or infinite; one of {self.new.label} and {self.old.label} is damaged"
            )
        return int(delta.count_nonzero())


def _largest(differences: _Differences, k: int) -> Diff:
    """The k largest differences of all tensors together, ties going to the first tensors and positions."""
    threshold = global_threshold([differences.scores(name) for name in differences.names], k)
    diff, ties = {}, threshold.ties
    for name in differences.names:
        delta, parts = differences.of(name), []
        for offset in range(0, delta.numel(), CHUNK_ELEMENTS):
            found, ties = select(delta[offset : offset + CHUNK_ELEMENTS].abs(), threshold, ties)
            parts.append(found + offset)
        positions = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        if positions.numel():
            diff[name] = positions, delta[positions]
    return diff
