"""Updates in place: as defined, and exact to the bit when reverted, also after an error or an interrupt."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffpeft.sparse import inplace
from diffpeft.sparse.inplace import Entry, InplaceUpdate, can_be_overwritten, read_at, write_at

BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}
each_dtype = pytest.mark.parametrize("dtype", BITS, ids=str)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda storage: storage,
    "transposed": lambda storage: storage.t(),
    "strided": lambda storage: storage[::2, 1::3],
    "reversed axes": lambda storage: storage.view(4, 3, 15).permute(2, 0, 1),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def made(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_positions(numel: int, count: int, seed: int) -> Tensor:
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(BITS[one.dtype]), other.view(BITS[other.dtype]))


@each_dtype
@each_layout
def test_reverting_is_exact_to_the_bit_over_many_cycles(device, layout, dtype):
    storage = made((12, 15), seed=0).mul_(10).to(device, dtype)
    target, before = layout(storage), storage.clone()
    for cycle in range(50):
        positions = some_positions(target.numel(), target.numel() // 2, cycle).to(device)
        values = made((len(positions),), seed=cycle).mul_(10.0 ** (cycle % 5)).to(device)
        update = InplaceUpdate([Entry(target, positions, values)])
        update.apply()
        assert not torch.equal(storage, before)
        update.revert()
        assert same(storage, before)


@each_dtype
@pytest.mark.parametrize("whole", [False, True])
def test_reverting_brings_back_what_a_sum_would_lose(device, dtype, whole):
    target = torch.tensor([float("nan"), float("inf"), -0.0, 1.0], device=device).to(dtype)
    before, positions = target.clone(), None if whole else torch.arange(4, device=device)
    values = torch.tensor([1.0, -float("inf"), 0.0, 1e30], device=device)
    update = InplaceUpdate([Entry(target, positions, values)])
    with update:
        assert not bool(read_at(target, positions).isfinite().all())
    assert same(target, before)


@each_dtype
@each_layout
def test_a_sum_is_rounded_once_at_the_logical_positions(device, layout, dtype):
    storage = made((12, 15), seed=0).to(device, dtype)
    target = layout(storage)
    positions = some_positions(target.numel(), 20, seed=1).to(device)
    values = made((20,), seed=2).to(device)
    before = target.clone().reshape(-1)
    expected = before.to(torch.float64, copy=True)
    expected[positions] += values.double()
    expected = expected.float() if dtype != torch.float64 else expected
    assert torch.equal(read_at(target, positions), before[positions])
    InplaceUpdate([Entry(target, positions, values)]).apply()
    assert torch.equal(target.reshape(-1), expected.to(dtype))


@each_dtype
def test_updates_are_as_defined_to_the_bit_and_so_is_the_way_back(dtype):
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 400)), min_size=1, max_size=4))
    def check(tensors):
        entries, wanted = [], []
        for seed, numel in tensors:
            generator = torch.Generator().manual_seed(seed)
            scale = 10.0 ** torch.randint(-42, 5, (numel,), generator=generator).float()
            tensor = (torch.randn(numel, generator=generator) * scale).to(dtype)
            count = int(torch.randint(numel + 1, (), generator=generator))
            positions = some_positions(numel, count, seed)
            values = torch.randn(count, generator=generator) * 10.0 ** (seed % 8 - 5)
            after = tensor.clone()
            for position, value in zip(positions.tolist(), values, strict=True):
                after[position] = (tensor[[position]] + value.reshape(1)).to(dtype)[0]
            entries.append(Entry(tensor, positions, values))
            wanted.append(after)
        before = [entry.tensor.clone() for entry in entries]
        with InplaceUpdate(entries):
            assert all(same(entry.tensor, after) for entry, after in zip(entries, wanted, strict=True))
        assert all(same(entry.tensor, old) for entry, old in zip(entries, before, strict=True))

    check()


def test_entries_of_one_tensor_add_up_in_their_order(device):
    target, positions = torch.zeros(4, device=device, dtype=torch.bfloat16), torch.tensor([1, 3], device=device)
    values = torch.tensor([256.0, 1.0], device=device)
    with InplaceUpdate([Entry(target, positions, values), Entry(target, positions, torch.ones(2, device=device))]):
        assert target.tolist() == [0, 256, 0, 2], "256 + 1 is rounded to 256"
    assert target.count_nonzero() == 0


def diffs() -> list[Entry]:
    shapes = (((30, 20), 150), ((30,), 3), ((7,), 0))
    return [
        Entry(nn.Parameter(made(shape, 1)), some_positions(made(shape, 1).numel(), count, 2), made((count,), 3))
        for shape, count in shapes
    ]


@pytest.mark.parametrize("nth", [0, 1, 2])
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("when", ["applying", "reverting"])
def test_an_interrupt_loses_nothing(monkeypatch, nth, written, when):
    own, calls = diffs(), []
    before = [entry.tensor.detach().clone() for entry in own]

    def interrupted(tensor, values, positions):
        calls.append(1)
        if written:
            write_at(tensor, values, positions)
        if len(calls) == nth + 1:
            raise KeyboardInterrupt
        write_at(tensor, values, positions)

    update = InplaceUpdate(own)
    if when == "reverting":
        update.apply()
    monkeypatch.setattr(inplace, "write_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update.apply() if when == "applying" else update.revert()
    monkeypatch.undo()
    update.revert()
    assert all(same(entry.tensor.detach(), old) for entry, old in zip(own, before, strict=True))
    with update:
        assert not torch.equal(own[0].tensor, before[0])
    assert all(same(entry.tensor.detach(), old) for entry, old in zip(own, before, strict=True))


@pytest.mark.parametrize("wrong", [30, 1 << 40])
def test_a_position_that_is_not_there_changes_nothing(wrong):
    own = diffs()
    own[1].positions[-1] = wrong
    before = [entry.tensor.detach().clone() for entry in own]
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        InplaceUpdate(own).apply()
    assert all(same(entry.tensor.detach(), old) for entry, old in zip(own, before, strict=True))


def test_what_moves_or_is_copied_in_between_is_restored_where_it_is():
    own = diffs()
    before = [entry.tensor.detach().clone() for entry in own]
    update = InplaceUpdate(own)
    update.apply()
    own[0].tensor.data = own[0].tensor.data.clone()  # as when a model moves to another device
    others = [nn.Parameter(entry.tensor.detach().clone()) for entry in own]
    copied = copy.deepcopy(update)
    copied.revert(others)
    assert all(same(one.detach(), old) for one, old in zip(others, before, strict=True))
    assert not torch.equal(own[0].tensor, before[0])
    update.revert()
    assert all(same(entry.tensor.detach(), old) for entry, old in zip(own, before, strict=True))


def test_autograd_sees_no_change():
    weight = nn.Parameter(made((3, 4), 0))
    version = weight._version
    with InplaceUpdate([Entry(weight, torch.tensor([2]), torch.ones(1, requires_grad=True))]):
        pass
    assert weight._version == version


@pytest.mark.parametrize("shape", [(0,), (3, 2)], ids=str)
def test_no_positions_change_nothing(device, shape):
    base, none = torch.ones(shape, device=device), torch.empty(0, dtype=torch.int64, device=device)
    with InplaceUpdate([Entry(base, none, torch.empty(0, device=device))]):
        assert torch.equal(base, torch.ones(shape, device=device))


@pytest.fixture
def deterministic():
    """What `full_determinism=True` turns on in the Trainer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@each_layout
def test_updates_work_under_deterministic_algorithms(device, layout):
    base = layout(torch.zeros(12, 15, device=device))
    positions, values = torch.tensor([1, 5], device=device), torch.ones(2, device=device)
    with InplaceUpdate([Entry(base, positions, values)]):
        assert base.reshape(-1)[:6].tolist() == [0, 1, 0, 0, 0, 1]
    assert base.count_nonzero() == 0


def test_what_a_pass_may_not_overwrite():
    assert can_be_overwritten(torch.zeros(3, 4))
    assert not can_be_overwritten(torch.zeros(3, 4).t())
    assert not can_be_overwritten(torch.zeros(3, device="meta"))
    assert not can_be_overwritten(torch.zeros(3).share_memory_())
    with torch.inference_mode():
        made_here = torch.zeros(3)
        assert can_be_overwritten(made_here)
    assert not can_be_overwritten(made_here)
