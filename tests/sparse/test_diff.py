"""The sparse diff: exact to the bit when reverted, and the gradient of a dense one."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from diffpeft.sparse.diff import add_, put_, sparse_parameter

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
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


@each_dtype
@each_layout
def test_restoring_is_exact_to_the_bit_over_many_cycles(device, layout, dtype):
    storage = made((12, 15), seed=0).mul_(10).to(device, dtype)
    target, before = layout(storage), storage.clone()
    for cycle in range(50):
        positions = some_positions(target.numel(), target.numel() // 2, cycle).to(device)
        values = made((len(positions),), seed=cycle).mul_(10.0 ** (cycle % 5)).to(device)
        old = add_(target, values, positions)
        assert not torch.equal(storage, before)
        put_(target, old, positions)
        assert torch.equal(storage.view(BITS[dtype]), before.view(BITS[dtype]))


@each_dtype
def test_restoring_brings_back_what_a_sum_would_lose(device, dtype):
    target = torch.tensor([float("nan"), float("inf"), -0.0, 1.0], device=device).to(dtype)
    before, positions = target.clone(), torch.arange(4, device=device)
    old = add_(target, torch.tensor([1.0, -float("inf"), 0.0, 1e30], device=device), positions)
    put_(target, old, positions)
    assert torch.equal(target.view(BITS[dtype]), before.view(BITS[dtype]))


@each_dtype
@each_layout
def test_adding_rounds_once_at_the_logical_positions_and_returns_what_stood_there(device, layout, dtype):
    storage = made((12, 15), seed=0).to(device, dtype)
    target = layout(storage)
    positions = some_positions(target.numel(), 20, seed=1).to(device)
    values = made((20,), seed=2).to(device)
    before = target.clone().reshape(-1)
    expected = before.double()
    expected[positions] += values.double()
    old = add_(target, values, positions)
    assert torch.equal(old, before[positions])
    assert torch.equal(target.reshape(-1), expected.float().to(dtype))


@each_dtype
@each_layout
def test_sparse_parameter_is_dense_addition_with_its_gradient(device, layout, dtype):
    base = layout(made((12, 15), seed=0).to(device, dtype))
    before = base.clone()
    positions = some_positions(base.numel(), 20, seed=1).to(device)
    values = made((20,), seed=2).to(device).requires_grad_()
    dense_values = values.detach().clone().requires_grad_()
    upstream = layout(made((12, 15), seed=3).to(device, dtype))

    effective = sparse_parameter(base, values, positions)
    effective.backward(upstream)
    delta = torch.zeros(base.numel(), device=device).scatter(0, positions, dense_values).reshape(base.shape)
    expected = (base + delta).to(dtype)
    expected.backward(upstream)

    assert effective.dtype == dtype
    assert torch.equal(effective, expected)
    assert values.grad.dtype == torch.float32
    assert torch.equal(values.grad, dense_values.grad)
    assert torch.equal(base, before)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """What `full_determinism=True` turns on in the Trainer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_everything_works_under_deterministic_algorithms(device):
    base, positions = torch.zeros(2, 3, device=device), torch.tensor([1, 5], device=device)
    values = torch.ones(2, device=device, requires_grad=True)
    sparse_parameter(base, values, positions).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0]
    old = add_(base, values.detach(), positions)
    assert base.flatten().tolist() == [0, 1, 0, 0, 0, 1]
    put_(base, old, positions)
    assert base.count_nonzero() == 0


def test_sparse_parameter_takes_the_gradient_of_an_expanded_sum(device):
    values = torch.ones(2, device=device, requires_grad=True)
    sparse_parameter(torch.zeros(3, 4, device=device), values, torch.tensor([1, 11], device=device)).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0]


def test_the_pretrained_parameter_receives_no_gradient():
    base, values = torch.zeros(4, requires_grad=True), torch.ones(1, requires_grad=True)
    sparse_parameter(base, values, torch.tensor([2])).sum().backward()
    assert base.grad is None


@pytest.mark.parametrize("shape", [(0,), (3, 2)], ids=str)
def test_no_positions_change_nothing(device, shape):
    base, values = torch.ones(shape, device=device), torch.empty(0, device=device, requires_grad=True)
    effective = sparse_parameter(base, values, torch.empty(0, dtype=torch.int64, device=device))
    effective.sum().backward()
    assert torch.equal(effective, base)
    assert values.grad.shape == (0,)


def test_a_scalar_parameter_has_one_position(device):
    base, values = torch.tensor(2.0, device=device), torch.tensor([3.0], device=device, requires_grad=True)
    effective = sparse_parameter(base, values, torch.tensor([0], device=device))
    effective.backward()
    assert effective.item() == 5.0
    assert values.grad.tolist() == [1.0]
