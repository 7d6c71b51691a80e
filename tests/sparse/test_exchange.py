"""The loop that exchanges entries, against the definition and against torch's operations."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpeft.sparse import exchange
from diffpeft.sparse.exchange import Exchange, Progress, can_exchange, exchange_all

BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}
NONE = torch.zeros(0, dtype=torch.int64)


@pytest.fixture(params=["loop", "torch"])
def way(request, monkeypatch):
    """Both ways, whatever the number of entries."""
    monkeypatch.setattr(exchange, "WORTH_LOADING", 0 if request.param == "loop" else 1 << 62)
    if request.param == "loop" and exchange._loops() is None:
        pytest.skip("no C++ compiler")
    return request.param


def places(generator, numel):
    count = int(torch.randint(numel + 1, (), generator=generator))
    return torch.randperm(numel, generator=generator)[:count].sort().values


def made(seed, numel, dtype):
    """A tensor with all kinds of numbers, and what is to be exchanged in it."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-42, 5, (numel,), generator=generator).float()
    tensor = (torch.randn(numel, generator=generator) * scale).to(dtype)
    back_at, at = places(generator, numel), places(generator, numel)
    back = torch.randn(back_at.numel(), generator=generator).to(dtype)
    values = torch.randn(at.numel(), generator=generator) * 10.0 ** float(torch.randint(-5, 3, (), generator=generator))
    return Exchange(tensor, back_at, back, at, values, torch.empty(at.numel(), dtype=dtype))


def expected(tensor, back_at, back, at, values):
    """What the tensor holds afterwards, and what stood at `at`; place by place."""
    after, old = tensor.clone(), []
    for place, entry in zip(back_at.tolist(), back, strict=True):
        after[place] = entry
    for place, value in zip(at.tolist(), values, strict=True):
        old.append(after[place].clone())
        after[place] = (after[[place]] + value.reshape(1)).to(tensor.dtype)[0]
    return after, torch.stack(old) if old else torch.zeros(0, dtype=tensor.dtype)


def same(one, other):
    return torch.equal(one.view(BITS[one.dtype]), other.view(BITS[other.dtype]))


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_exchanges_are_as_defined_to_the_bit(way, dtype):
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 400)), min_size=1, max_size=4))
    def check(tensors):
        exchanges = [made(seed, numel, dtype) for seed, numel in tensors]
        wanted = [expected(*e[:5]) for e in exchanges]
        assert all(can_exchange(*e[:5]) for e in exchanges)
        progress = Progress()
        exchange_all(exchanges, progress)
        assert progress.value == len(exchanges)
        for e, (after, old) in zip(exchanges, wanted, strict=True):
            assert same(e.tensor, after)
            assert same(e.old, old)

    check()


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_an_exchange_there_and_back_restores_every_bit(way, dtype):
    first = made(3, 5000, dtype)
    before = first.tensor.clone()
    exchange_all([first._replace(back_at=NONE, back=first.back[:0])], Progress())
    assert not same(first.tensor, before)
    back = first._replace(back_at=first.at, back=first.old, at=NONE, values=torch.zeros(0), old=first.old[:0])
    exchange_all([back], Progress())
    assert same(first.tensor, before)


@pytest.mark.parametrize("where", ["back_at", "at"])
@pytest.mark.parametrize("wrong", [100, 1 << 40])
@pytest.mark.parametrize("nth", [0, 150, 298])
def test_a_place_that_is_not_there_is_an_error_that_leaves_what_can_be_undone(way, where, wrong, nth):
    good, bad = made(5, 100, torch.float32), made(6, 100, torch.float32)
    every = torch.arange(100).repeat(3)[:299]  # places that occur twice are written in turn
    every[nth:] = wrong
    filled = torch.ones(299)
    others = {"back_at": bad.back_at[:0], "back": bad.back[:0]} if where == "at" else {"back_at": every, "back": filled}
    own = {"at": every, "values": filled, "old": torch.empty(299)} if where == "at" else {}
    bad = bad._replace(**{**others, **own})
    before, wanted, progress = bad.tensor.clone(), expected(*good[:5]), Progress()
    error, words = (
        (IndexError, "100 elements") if way == "loop" else ((IndexError, RuntimeError), "out of (range|bounds)")
    )
    with pytest.raises(error, match=words):
        exchange_all([good, bad], progress)
    assert progress.value == 1
    assert same(good.tensor, wanted[0])
    if where == "at":
        assert same(bad.tensor, before)


def test_no_compiler_means_a_warning_and_the_same_numbers(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no g++\nand more")

    monkeypatch.setattr(exchange, "WORTH_LOADING", 0)
    monkeypatch.setattr(exchange.CppCodeCache, "load", broken)
    exchange._loops.cache_clear()
    try:
        for seed in (1, 2):
            one = made(seed, 50, torch.float32)
            wanted = expected(*one[:5])
            with caplog.at_level(logging.WARNING):
                exchange_all([one], Progress())
            assert same(one.tensor, wanted[0])
    finally:
        exchange._loops.cache_clear()
    assert [record.message for record in caplog.records] == [
        "unmerged adapters run and merged ones are switched more slowly: the loop for it cannot be compiled, RuntimeError: no "
        "g++. It takes a C++ compiler"
    ]


UNFIT = {
    "strided": {"tensor": torch.zeros(4, 6).t()},
    "integers": {"tensor": torch.zeros(24, dtype=torch.int64)},
    "a parameter": {"tensor": torch.nn.Parameter(torch.zeros(24))},
    "elsewhere": {"tensor": torch.zeros(24, device="meta")},
    "places elsewhere": {"at": torch.zeros(2, dtype=torch.int64, device="meta")},
    "places of another dtype": {"at": torch.zeros(2, dtype=torch.int32)},
    "old places of another dtype": {"back_at": torch.zeros(1, dtype=torch.int32)},
    "strided places": {"at": torch.arange(4)[::2]},
    "old entries of another dtype": {"back": torch.zeros(1, dtype=torch.float64)},
    "old entries of another number": {"back": torch.zeros(2)},
    "values of another dtype": {"values": torch.zeros(2, dtype=torch.float16)},
    "values of another number": {"values": torch.zeros(3)},
    "strided values": {"values": torch.zeros(4)[::2]},
}


@pytest.mark.parametrize("changed", UNFIT.values(), ids=UNFIT)
def test_what_the_loop_does_not_take_is_told(changed):
    fit = {
        "tensor": torch.zeros(24),
        "back_at": torch.tensor([1]),
        "back": torch.zeros(1),
        "at": torch.tensor([1, 2]),
        "values": torch.zeros(2),
    }
    assert can_exchange(**fit)
    assert not can_exchange(**{**fit, **changed})
