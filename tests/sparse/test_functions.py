"""Sparse diffs that stand in the weight while a module runs: what they compute, and that nothing of them stays."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from diffpeft import DiffPruningConfig
from diffpeft.sparse.functions import (
    RowPattern,
    gradient_at,
    sampling_pays,
    sparse_embedding,
    sparse_linear,
    sparse_parameter,
)
from diffpeft.sparse.inplace import InplaceUpdate, can_be_overwritten

LAYOUTS = {
    "contiguous": lambda storage: storage,
    "transposed": lambda storage: storage.t(),
    "strided": lambda storage: storage[::2, 1::3],
    "reversed axes": lambda storage: storage.view(4, 3, 15).permute(2, 0, 1),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def made(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_positions(numel: int, count: int, seed: int) -> Tensor:
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:count].sort().values


@pytest.fixture
def deterministic():
    """What `full_determinism=True` turns on in the Trainer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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


@pytest.mark.usefixtures("deterministic")
def test_sparse_parameter_works_under_deterministic_algorithms(device):
    base, positions = torch.zeros(2, 3, device=device), torch.tensor([1, 5], device=device)
    values = torch.ones(2, device=device, requires_grad=True)
    sparse_parameter(base, values, positions).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0]


class Entries(NamedTuple):
    values: Tensor
    positions: Tensor


def make_diff(shape: tuple[int, int], k: int, device: str = "cpu") -> Entries:
    positions = torch.randperm(shape[0] * shape[1])[:k].sort().values
    return Entries(torch.randn(k).to(device).requires_grad_(), positions.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("rows", [(), (4,), (2, 3)], ids=str)
def test_a_sparse_linear_layer_is_one_with_the_sum(device, rows, sampled, dtype):
    weight = torch.randn(7, 6, device=device).to(dtype)
    before, version = weight.clone(), weight._version
    diff, bias = make_diff((7, 6), 9, device), torch.randn(7, device=device).to(dtype).requires_grad_()
    x = torch.randn(*rows, 6, device=device).to(dtype).requires_grad_()
    pattern = RowPattern.of(diff.positions, weight.shape) if sampled and dtype == torch.float32 else None
    results = []
    for function in (
        lambda: sparse_linear(x, bias, weight, *diff, pattern),
        lambda: functional.linear(x, sparse_parameter(weight, *diff), bias),
    ):
        for leaf in (x, bias, diff.values):
            leaf.grad = None
        output = function()
        assert torch.equal(weight, before)
        output.square().sum().backward()
        assert torch.equal(weight, before)
        results.append([output.detach(), x.grad, bias.grad, diff.values.grad])
    assert weight._version == version
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(*results, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-4)


def test_under_autocast_a_sparse_linear_layer_computes_as_the_plain_one(device):
    weight, diff = torch.randn(7, 6, device=device), make_diff((7, 6), 9, device)
    x, bias = torch.randn(4, 6, device=device).requires_grad_(), torch.randn(7, device=device).requires_grad_()
    results = []
    for function in (
        lambda: sparse_linear(x, bias, weight, *diff),
        lambda: functional.linear(x, sparse_parameter(weight, *diff), bias),
    ):
        for leaf in (x, bias, diff.values):
            leaf.grad = None
        with torch.autocast(device, dtype=torch.bfloat16):
            output = function()
        output.float().square().sum().backward()
        results.append([output.detach(), x.grad, bias.grad, diff.values.grad])
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_a_sparse_embedding_is_one_with_the_sum(device, padding_idx, dtype):
    weight, diff = torch.randn(10, 6, device=device, dtype=dtype), make_diff((10, 6), 25, device)
    before, ids = weight.clone(), torch.tensor([[1, 3, 3], [9, 1, 0]], device=device)
    upstream, results = torch.randn(2, 3, 6, device=device, dtype=dtype), []
    for function in (
        lambda: sparse_embedding(ids, padding_idx, weight, diff.values, RowPattern.of(diff.positions, weight.shape)),
        lambda: functional.embedding(ids, sparse_parameter(weight, *diff), padding_idx),
    ):
        diff.values.grad = None
        output = function()
        output.backward(upstream)
        assert torch.equal(weight, before)
        results.append([output.detach(), diff.values.grad])
    assert torch.equal(results[0][0], results[1][0])
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(*results, **close)


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_gradient_at_positions_is_the_dense_one_there(height, width, data):
    k = data.draw(st.integers(0, height * width))
    diff = make_diff((height, width), k)
    grad, x = torch.randn(5, height), torch.randn(5, width)
    pattern = RowPattern.of(diff.positions, torch.Size((height, width)))
    torch.testing.assert_close(gradient_at(grad, x, *diff, pattern), gradient_at(grad, x, *diff, None))


@given(st.sets(st.integers(0, 59)).map(sorted))
def test_a_pattern_is_the_positions_as_compressed_rows(found):
    positions = torch.tensor(found, dtype=torch.int64)
    dense = torch.zeros(60).index_fill_(0, positions, 1).view(6, 10)
    expected = dense.to_sparse_csr()
    offsets, columns, _ = RowPattern.of(positions, torch.Size((6, 10)))
    assert torch.equal(offsets, expected.crow_indices())
    assert torch.equal(columns, expected.col_indices())


def pruned(base: nn.Module) -> nn.Module:
    model = get_peft_model(base, DiffPruningConfig(target_density=0.2, selection="magnitude", init_weights=False))
    model.base_model.magnitude_prune()
    return model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.inner = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 3, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.inner(self.norm(self.embed(ids))).transpose(1, 2))


def base_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in model.base_model.base_parameters()}


def test_a_model_without_gradients_runs_on_its_own_weights_and_leaves_them_alone(device, monkeypatch):
    model, ids = pruned(Net()).to(device), torch.arange(11, device=device)[None]
    before, expected = base_of(model), model(ids).detach()

    def no_copy(*_: object) -> Tensor:
        raise AssertionError("a parameter was copied")

    monkeypatch.setattr("diffpeft.layer.layer.sparse_parameter", no_copy)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(ids), expected)
    after = base_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_error_in_the_middle_of_a_pass_leaves_the_weights_alone(monkeypatch):
    model, ids = pruned(Net()), torch.arange(11)[None]
    before = base_of(model)
    monkeypatch.setattr(nn.Conv1d, "forward", lambda *_: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(ids)
    after = base_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_weights_that_other_processes_share_are_copied_not_overwritten(monkeypatch):
    model, ids = pruned(Net()), torch.arange(11)[None]
    expected = model(ids).detach()
    model.share_memory()

    def no_update(*_: object) -> None:
        raise AssertionError("a shared weight was overwritten")

    monkeypatch.setattr(InplaceUpdate, "apply", no_update)
    with torch.no_grad():
        assert torch.equal(model(ids), expected)
    output = model(ids)
    assert torch.equal(output, expected)
    output.sum().backward()


def test_weights_of_inference_mode_are_copied_outside_of_it():
    with torch.inference_mode():
        base = Net()
    for parameter in base.parameters():
        assert parameter.is_inference()
        assert not can_be_overwritten(parameter)


def test_a_dtype_that_does_not_fit_is_refused_as_by_the_plain_layer():
    model = pruned(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("hooked", ["forward", "pre"])
def test_hooks_of_the_wrapped_module_run(hooked):
    model, seen = pruned(nn.Sequential(nn.Linear(4, 4))), []
    inner = model.base_model.all_layers()[0].base_layer
    if hooked == "forward":
        inner.register_forward_hook(lambda *_: seen.append(1))
    else:
        inner.register_forward_pre_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 4)
    model(x).sum().backward()
    with torch.no_grad():
        model(x)
    assert seen == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_large_enough_for_the_gradient_at_positions_trains_under_autocast_too(device, dtype):
    layer = nn.Linear(128, 128)
    assert sampling_pays(80, layer.weight.shape, torch.zeros(1))
    model = get_peft_model(
        nn.Sequential(layer), DiffPruningConfig(target_density=0.005, selection="magnitude", init_weights=False)
    ).to(device)
    model.base_model.magnitude_prune()
    x = torch.randn(8, 128, device=device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model(x)
    output.float().square().sum().backward()
    assert output.dtype == dtype
    inner = model.base_model.all_layers()[0]
    dense = 2 * (output.detach().float().t() @ x)
    expected = torch.take(dense, inner.sparse("default", "weight").positions)
    rtol = 5e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(inner.diffpruning_values["default"]["weight"].grad, expected, rtol=rtol, atol=rtol)
