"""Combine several sparse diffs into one, without ever making a tensor of a parameter's size.

Task arithmetic (arXiv 2212.04089), TIES (arXiv 2306.01708) and DARE (arXiv 2311.03099) with the arithmetic of PEFT's
`merge_utils`, on the union of the diffs' positions. A diff that lacks a position is zero there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpeft.sparse.diff import Diff, count_nonzeros
from diffpeft.sparse.top_k import global_top_k

COMBINATION_TYPES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MAJORITY_SIGN_METHODS = ("total", "frequency")


def combine(
    diffs: Sequence[Diff],
    weights: Sequence[float],
    combination_type: str = "linear",
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    max_nonzeros: int | None = None,
) -> Diff:
    """Combine several diffs into one.

    - `linear`: the sum of weight * diff.
    - `magnitude_prune`: the same after each diff was reduced to its largest magnitudes.
    - `dare_linear`: the same after each diff lost nonzeros at random and was rescaled by 1 / density.
    - `ties`, `dare_ties`: after the same reductions, each position elects a sign from the unweighted diffs, + if they
      balance; the weighted values of that sign are averaged over their number, not over their weights.

    The diffs are sparse already, so `density` is a share of each diff's own nonzeros: at 1 nothing is removed. In PEFT
    it is a share of all elements of a tensor.

    Args:
        diffs: at least one; a parameter's positions and values have shape (k,), its k may differ between diffs. They
            are not modified.
        weights: one finite number a diff, of any sign.
        combination_type: one of `COMBINATION_TYPES`.
        density: 0 < density <= 1, required by all types but `linear`, which takes none. By magnitude, exactly
            round(density * nonzeros) of a diff stay, over all of its parameters together. DARE keeps each nonzero with
            this probability, drawn from torch's default CPU generator on every device.
        majority_sign_method: the sign that `ties` and `dare_ties` elect is that of the values' sum ("total") or that
            of most values ("frequency").
        max_nonzeros: afterwards only this many entries stay, the largest magnitudes over all parameters together.

    Returns:
        The combined diff, in fp32 on the device of the first diff's values; parameters in the order in which they first
        appear. Entries that come out as 0 and parameters without entries are left out.

    Raises:
        ValueError: no diffs; not one finite weight a diff; an unknown type or method; a density or max_nonzeros out of
            range, missing or out of place; NaN or infinite values in a diff; a result beyond the range of fp32.
    """
    _check(diffs, weights, combination_type, density, majority_sign_method, max_nonzeros)
    device = next((values.device for diff in diffs for _, values in diff.values()), None)
    parts = [_nonzeros(diff, index, device) for index, diff in enumerate(diffs)]
    if density is not None and density < 1:
        if combination_type.startswith("dare"):
            parts = [_drop_randomly(part, density) for part in parts]
        else:
            parts = [_keep_largest(part, round(density * sum(count_nonzeros(part).values()))) for part in parts]
    elect = majority_sign_method if combination_type.endswith("ties") else None
    merged: Diff = {}
    for name in dict.fromkeys(name for diff in diffs for name in diff):
        present = [(*part[name], weight) for part, weight in zip(parts, weights, strict=True) if name in part]
        if present:
            merged[name] = _merge(present, elect)
            if not bool(merged[name][1].isfinite().all()):
                raise ValueError(
                    f"the combination of {name} exceeds the range of fp32; use smaller weights or a larger density"
                )
    merged = _select(merged, [values != 0 for _, values in merged.values()])
    return merged if max_nonzeros is None else _keep_largest(merged, max_nonzeros)


def _check(
    diffs: Sequence[Diff], weights: Sequence[float], how: str, density: float | None, method: str, most: int | None
) -> None:
    if not diffs:
        raise ValueError("0 diffs cannot be combined; give at least 1")
    if len(weights) != len(diffs):
        raise ValueError(f"{len(weights)} weights do not fit {len(diffs)} diffs; give one weight a diff")
    for weight in weights:
        if not abs(weight) <= torch.finfo(torch.float32).max:
            raise ValueError(f"weight {weight} is no finite fp32 number; use finite weights")
    if how not in COMBINATION_TYPES:
        raise ValueError(f"combination_type={how!r} is unknown; use one of {COMBINATION_TYPES}")
    if method not in MAJORITY_SIGN_METHODS:
        raise ValueError(f"majority_sign_method={method!r} is unknown; use one of {MAJORITY_SIGN_METHODS}")
    if how == "linear":
        if density is not None:
            raise ValueError(f"density={density} has no meaning for 'linear', which keeps every nonzero; leave it out")
    elif density is None:
        raise ValueError(f"density=None is too little for {how!r}; use 0 < density <= 1")
    elif not 0 < density <= 1:
        raise ValueError(f"density={density} is no share of the nonzeros; use 0 < density <= 1")
    if most is not None and (not isinstance(most, int) or most < 1):
        raise ValueError(f"max_nonzeros={most} is no number of entries to keep; use an integer >= 1 or None")


def _nonzeros(diff: Diff, index: int, device: torch.device | None) -> Diff:
    """The nonzeros of diff number `index` in fp32 on `device`, as copies."""
    moved = {name: (p.to(device), v.detach().to(device, torch.float32)) for name, (p, v) in diff.items()}
    for name, (_, values) in moved.items():
        infinite = values[~values.isfinite()]
        if len(infinite):
            raise ValueError(f"diff {index} holds {float(infinite[0])} in {name}; leave it out or train it again")
    return _select(moved, [values != 0 for _, values in moved.values()])


def _select(diff: Diff, chosen: Sequence[Tensor]) -> Diff:
    """The entries that a mask or sorted indices choose in each parameter, without parameters that have none left."""
    kept = {name: (p[i], v[i]) for (name, (p, v)), i in zip(diff.items(), chosen, strict=True)}
    return {name: entries for name, entries in kept.items() if entries[0].numel()}


def _keep_largest(diff: Diff, k: int) -> Diff:
    if not 0 < k < sum(count_nonzeros(diff).values()):
        return diff if k else {}
    magnitudes = [lambda values=values: [values.abs()] for _, values in diff.values()]
    return _select(diff, global_top_k(magnitudes, k)[0])


def _drop_randomly(diff: Diff, density: float) -> Diff:
    drawn = [torch.full(v.shape, density, device="cpu").bernoulli().bool().to(v.device) for _, v in diff.values()]
    return {name: (p, v / density) for name, (p, v) in _select(diff, drawn).items()}


def _merge(present: Sequence[tuple[Tensor, Tensor, float]], elect: str | None) -> tuple[Tensor, Tensor]:
    """Combine one parameter's (positions, nonzero values, weight) of each diff: a weighted sum, or TIES with `elect`.

    Adding one diff after the other, each of which has a position at most once, keeps the order of the sums fixed.
    """
    positions, inverse = torch.unique(torch.cat([p for p, _, _ in present]), return_inverse=True)
    indices = inverse.split([len(p) for p, _, _ in present])
    parts = [(index, values, weight) for index, (_, values, weight) in zip(indices, present, strict=True)]
    merged = torch.zeros(positions.shape, dtype=torch.float32, device=positions.device)
    if elect is None:
        for index, values, weight in parts:
            merged.index_add_(0, index, values * weight)
        return positions, merged
    votes = torch.zeros_like(merged)
    for index, values, _ in parts:
        votes.index_add_(0, index, values.sign() if elect == "frequency" else values)
    positive = votes >= 0
    agreeing = torch.zeros_like(merged)
    for index, values, weight in parts:
        agrees = (values > 0) == positive[index]
        merged.index_add_(0, index, torch.where(agrees, values * weight, 0.0))
        agreeing.index_add_(0, index, agrees.to(merged.dtype))
    return positions, merged / agreeing.clamp(min=1)  # none agrees only where subnormal votes were flushed to 0
