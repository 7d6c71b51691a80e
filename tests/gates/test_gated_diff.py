"""What pruning keeps of gated diffs, chunk by chunk, against scores of whole tensors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffpeft.gates import compile as compiling
from diffpeft.gates import hard_concrete as gates
from diffpeft.gates.hard_concrete import GatedDiff
from diffpeft.sparse.top_k import global_top_k

PAPER = (-1.5, 1.5)
STRETCHES = [PAPER, (-0.1, 1.1), (-1e-4, 1.5), (-50.0, 1.001)]
Parts = tuple[Tensor, Tensor | None, Tensor | None]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(compiling, "CHUNK_ELEMENTS", 64)
    monkeypatch.setattr(compiling, "GPU_CHUNK_ELEMENTS", 64)


def dense(w: Tensor, log_alpha: Tensor | None, group: Tensor | None, stretch: tuple[float, float]) -> Tensor:
    if log_alpha is None:
        return w.clone()
    delta = gates.gate(log_alpha, None, stretch).mul_(w)
    return delta if group is None else delta.mul_(gates.gate(group, None, stretch).reshape(()))


def dense_scores(w: Tensor, log_alpha: Tensor | None, group: Tensor | None, stretch: tuple[float, float]) -> Tensor:
    delta = dense(w, log_alpha, group, stretch).abs()
    if log_alpha is None:
        return delta
    return torch.where(delta > 0, delta, gates.open_probability(log_alpha, stretch).mul_(w.abs()).mul_(1e-12))


def check(tensors: list[Parts], k: int, stretch: tuple[float, float] = PAPER) -> None:
    """The same positions, threshold and values as with whole tensors."""
    diffs = [GatedDiff(*parts, stretch) for parts in tensors]
    kept, threshold = global_top_k([diff.scores for diff in diffs], k)
    expected, expected_threshold = global_top_k([lambda t=t: [dense_scores(*t, stretch)] for t in tensors], k)
    assert threshold == expected_threshold
    for parts, diff, where, plain in zip(tensors, diffs, kept, expected, strict=True):
        assert where.dtype == torch.int64
        assert where.device == parts[0].device
        assert torch.equal(where, plain)
        assert torch.equal(diff.values(where), dense(*parts, stretch).reshape(-1)[plain])


@st.composite
def gated(draw, device: str) -> tuple[list[Parts], tuple[float, float]]:
    stretch = draw(st.sampled_from(STRETCHES))
    edges = [
        math.log(s / (1 - s))
        for s in (-stretch[0] / (stretch[1] - stretch[0]), (1 - stretch[0]) / (stretch[1] - stretch[0]))
    ]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(0, 300))
        w = torch.randn(n, generator=generator) * 10.0 ** draw(st.sampled_from([-30, -20, -4, 0]))
        if draw(st.booleans()):  # ties
            w = w.sign() * w.abs().max() if n else w
        w[torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
        centre = draw(st.sampled_from([*edges, -20.0, 0.0, 20.0]))
        log_alpha = centre + torch.randn(n, generator=generator) * draw(st.sampled_from([0.0, 1e-6, 2.0]))
        group = draw(st.sampled_from([None, -5.0, 5.0, 0.3]))
        parts = [w, log_alpha, None if group is None else torch.tensor([group])]
        if draw(st.sampled_from([False, False, True])):
            parts = [w, None, None]
        tensors.append(tuple(part if part is None else part.to(device) for part in parts))
    return tensors, stretch


@given(st.data())
def test_what_is_kept_is_what_whole_tensors_keep(device, data):
    tensors, stretch = data.draw(gated(device))
    total = sum(parts[0].numel() for parts in tensors)
    if total:
        check(tensors, data.draw(st.integers(1, total)), stretch)


@pytest.mark.parametrize("k", [1, 7, 150, 1000])
def test_scores_that_rise_to_the_end(k):
    w = torch.arange(1000.0)
    check([(w, torch.full_like(w, 5.0), None)], k)
    check([(w.flip(0).reshape(10, 100).t(), None, None)], k)


@pytest.mark.parametrize("wrong", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("log_alpha", [-20.0, 5.0, None])
def test_diffs_without_an_order_are_refused(device, wrong, log_alpha):
    w = torch.ones(100, device=device)
    w[50] = wrong
    gate = None if log_alpha is None else torch.full_like(w, log_alpha)
    diffs = GatedDiff(torch.ones(3, device=device), None, None, PAPER), GatedDiff(w, gate, None, PAPER)
    with pytest.raises(ValueError, match=r"NaN, infinite or negative.*lower the learning rate"):
        global_top_k([diff.scores for diff in diffs], 5)


@pytest.mark.parametrize("group", [False, True])
def test_gates_that_are_nan_are_refused(group):
    w, log_alpha, group_log_alpha = torch.ones(100), torch.zeros(100), torch.zeros(1)
    (group_log_alpha if group else log_alpha)[-1] = float("nan")
    with pytest.raises(ValueError, match="NaN, infinite or negative"):
        global_top_k([GatedDiff(w, log_alpha, group_log_alpha, PAPER).scores], 5)


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1000, 30_001])
def test_single_entries_have_the_bits_of_the_whole(numel):
    generator = torch.Generator().manual_seed(numel)
    w, log_alpha = torch.randn(numel, generator=generator), torch.randn(numel, generator=generator)
    diff = GatedDiff(w, log_alpha, torch.tensor([0.2]), PAPER)
    whole = dense(w, log_alpha, torch.tensor([0.2]), PAPER)
    for share in (0.01, 0.5, 1.0):
        where = torch.from_numpy(np.flatnonzero(np.random.default_rng(0).random(numel) < share))
        assert torch.equal(diff.values(where), whole[where])
        assert torch.equal(gates.delta(*diff), whole)
