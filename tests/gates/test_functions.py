"""Parameters under sampled gates and layers that make them again: values, gradients and noise of the plain form."""

import logging
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from diffpeft import DiffPruningConfig
from diffpeft.gates import compile as compiling
from diffpeft.gates import hard_concrete as gates
from diffpeft.gates import kernels
from diffpeft.gates.forward_pass import Workspace
from diffpeft.gates.functions import (
    GatedTensors,
    GateSample,
    gated_embedding,
    gated_linear,
    gated_parameter_sampled,
)
from diffpeft.gates.noise import new_seed, seed_words, uniform
from diffpeft.gates.update import kernels as update_kernels
from diffpeft.gates.update.state import StoredGates
from diffpeft.tuner import injection

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles

STRETCH = (-1.5, 1.5)
Leaves = dict[str, Tensor | None]


COMPILED = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")


@pytest.fixture(params=[False, pytest.param(True, marks=COMPILED)], ids=["eager", "compiled"])
def fused(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Chains of elementwise operations one by one, and as a compiler fuses them."""
    assert not compiling.broken
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield request.param
    torch.set_num_threads(threads)
    assert not compiling.broken, "what was to be compiled ran eagerly"


def sample(fused: bool = False) -> GateSample:
    return GateSample(new_seed(), STRETCH, fused, Workspace())


def make_leaves(shape: tuple[int, ...], device: str, structured: bool = True, spread: float = 2.0) -> Leaves:
    generator = torch.Generator().manual_seed(1)
    w, log_alpha = (torch.randn(shape, generator=generator) for _ in range(2))
    group = torch.tensor([0.3]) if structured else None
    named = {"w": w, "log_alpha": log_alpha * spread, "group_log_alpha": group}
    return {name: None if leaf is None else leaf.to(device).requires_grad_() for name, leaf in named.items()}


def plain_parameter(base: Tensor, w: Tensor, log_alpha: Tensor, group: Tensor | None, how: GateSample) -> Tensor:
    """The same with the noise written out."""
    positions = torch.arange(w.numel() + 1, dtype=torch.int32, device=w.device)
    noise = uniform(seed_words(how.seed, w.device), positions)
    return gates.gated_parameter(base, w, log_alpha, group, STRETCH, (noise[:-1].view(w.shape), noise[-1:]))


def gradients(leaves: Leaves, function: Callable[..., Tensor], weight: Tensor) -> list[Tensor]:
    """The result and what each leaf gets of `weight`, the gradient of the result."""
    for leaf in leaves.values():
        if leaf is not None:
            leaf.grad = None
    result = function(*leaves.values())
    result.backward(weight.expand_as(result))
    return [result.detach(), *(leaf.grad.clone() for leaf in leaves.values() if leaf is not None)]


def assert_same(actual: list[Tensor], expected: list[Tensor], rtol: float = 1e-5) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=rtol, atol=2e-5 if rtol < 1e-3 else 2e-2)


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "unstructured"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 4, 2)], ids=str)
def test_a_sampled_parameter_is_the_plain_one(device, fused, shape, dtype, structured):
    leaves, base = make_leaves(shape, device, structured), torch.randn(shape, device=device).to(dtype)
    weight, how = torch.randn(shape, device=device).to(dtype), sample(fused)
    actual = gradients(leaves, lambda *own: gated_parameter_sampled(GatedTensors(base, *own), how), weight)
    assert_same(actual, gradients(leaves, lambda *own: plain_parameter(base, *own, how), weight))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0)], ids=str)
def test_parameters_of_hardly_any_element(device, shape):
    leaves, base, how = make_leaves(shape, device), torch.randn(shape, device=device), sample(True)
    weight = torch.ones(shape, device=device)
    actual = gradients(leaves, lambda *own: gated_parameter_sampled(GatedTensors(base, *own), how), weight)
    assert_same(actual, gradients(leaves, lambda *own: plain_parameter(base, *own, how), weight))


def test_chunks_have_the_noise_of_the_whole(device, monkeypatch):
    leaves, base, how = make_leaves((9, 11), device), torch.randn(9, 11, device=device), sample()
    whole = gradients(
        leaves, lambda *own: gated_parameter_sampled(GatedTensors(base, *own), how), torch.ones(9, 11, device=device)
    )
    monkeypatch.setattr(compiling, "CHUNK_ELEMENTS", 16)
    chunks = gradients(
        leaves, lambda *own: gated_parameter_sampled(GatedTensors(base, *own), how), torch.ones(9, 11, device=device)
    )
    assert_same(chunks, whole)


def test_memory_layout_does_not_matter(device):
    leaves, base, how = make_leaves((2, 3, 4, 5), device), torch.randn(2, 3, 4, 5, device=device), sample(True)
    weight = torch.randn(2, 3, 4, 5, device=device)
    expected = gradients(leaves, lambda *own: gated_parameter_sampled(GatedTensors(base, *own), how), weight)
    base = base.contiguous(memory_format=torch.channels_last)
    assert_same(
        gradients(leaves, lambda *own: gated_parameter_sampled(GatedTensors(base, *own), how), weight), expected
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [(), (4,), (2, 3)], ids=str)
def test_a_sampled_linear_layer_is_one_with_the_plain_parameter(device, fused, rows, autocast):
    leaves, base, how = make_leaves((5, 6), device), torch.randn(5, 6, device=device), sample(fused)
    leaves["x"] = torch.randn(*rows, 6, device=device).requires_grad_()
    leaves["bias"] = torch.randn(5, device=device).requires_grad_()
    weight = torch.randn(*rows, 5, device=device)

    def own(w: Tensor, log_alpha: Tensor, group: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return gated_linear(x, bias, GatedTensors(base, w, log_alpha, group), how).float()

    def plain(w: Tensor, log_alpha: Tensor, group: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(x, plain_parameter(base, w, log_alpha, group, how), bias).float()

    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        assert_same(gradients(leaves, own, weight), gradients(leaves, plain, weight), rtol=2e-2 if autocast else 1e-5)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_a_sampled_embedding_is_one_with_the_plain_parameter(device, fused, padding_idx):
    leaves, base, how = make_leaves((10, 6), device), torch.randn(10, 6, device=device), sample(fused)
    ids = torch.tensor([[1, 3, 3], [9, 1, 0]], device=device)
    weight = torch.randn(2, 3, 6, device=device)
    actual = gradients(leaves, lambda *own: gated_embedding(ids, padding_idx, GatedTensors(base, *own), how), weight)
    expected = gradients(
        leaves, lambda *own: functional.embedding(ids, plain_parameter(base, *own, how), padding_idx), weight
    )
    assert_same(actual, expected)


def test_nothing_but_the_input_is_kept_for_backward():
    leaves, base = make_leaves((8, 6), "cpu"), torch.randn(8, 6)
    x, kept = torch.randn(4, 6, requires_grad=True), []
    known = {tensor.data_ptr() for tensor in (x, base, leaves["w"], leaves["log_alpha"])}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        output = gated_linear(x, None, GatedTensors(base, *leaves.values()), sample())
    assert set(kept) == known
    weights = [ctx for ctx in vars(output.grad_fn.gates).values() if isinstance(ctx, Tensor)]
    assert all(tensor.numel() <= 4 for tensor in weights)


@pytest.fixture
def makings(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The outputs that effective parameters were written to, in the order of the calls."""
    made, make = [], kernels.effective

    def noting(tensors: tuple[Tensor, ...], *others: object, **options: object) -> None:
        made.append(tensors[0])
        make(tensors, *others, **options)

    monkeypatch.setattr(kernels, "effective", noting)
    return made


@pytest.mark.parametrize("between", ["nothing", "another pass", "another layer", "clearing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kept_weight_is_made_once_unless_its_memory_was_used(makings, between, dtype):
    leaves, base = make_leaves((5, 6), "cpu"), torch.randn(5, 6).to(dtype)
    leaves["x"] = torch.randn(4, 6).to(dtype).requires_grad_()
    weight, how = torch.randn(4, 5).to(dtype), sample()._replace(reserve_as="this")

    def own(w: Tensor, log_alpha: Tensor, group: Tensor, x: Tensor) -> Tensor:
        tensors = GatedTensors(base, w, log_alpha, group)
        result = gated_linear(x, None, tensors, how)
        if between == "another pass":
            gated_linear(x, None, tensors, how._replace(seed=new_seed()))
        elif between == "another layer":
            gated_linear(x, None, tensors, how._replace(seed=new_seed(), reserve_as="other"))
        elif between == "clearing":
            how.workspace.clear()
        return result

    def plain(w: Tensor, log_alpha: Tensor, group: Tensor, x: Tensor) -> Tensor:
        return functional.linear(x, plain_parameter(base, w, log_alpha, group, how))

    actual = gradients(leaves, own, weight)
    assert len(makings) == {"nothing": 1, "another pass": 3, "another layer": 2, "clearing": 2}[between]
    assert_same(actual, gradients(leaves, plain, weight), rtol=1e-5 if dtype == torch.float32 else 2e-2)


def test_a_weight_that_backward_does_not_need_is_not_kept(makings):
    leaves, how = make_leaves((5, 6), "cpu"), sample()._replace(reserve_as="this")
    tensors = GatedTensors(torch.randn(5, 6), *leaves.values())
    gated_linear(torch.randn(4, 6), None, tensors, how).sum().backward()
    assert len(makings) == 1
    assert not how.workspace._reservations


def test_gates_that_moved_before_backward_are_noticed():
    leaves = make_leaves((8, 6), "cpu")
    output = gated_linear(torch.randn(4, 6), None, GatedTensors(torch.randn(8, 6), *leaves.values()), sample())
    with torch.no_grad():
        leaves["log_alpha"].add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        output.sum().backward()


def test_memory_of_a_workspace_is_used_again_and_grows():
    workspace = Workspace()
    first = workspace.take("weight", torch.Size((4, 5)), torch.float32, torch.device("cpu"))
    again = workspace.take("weight", torch.Size((5, 2)), torch.float32, torch.device("cpu"))
    assert again.shape == (5, 2)
    assert again.data_ptr() == first.data_ptr()
    other = workspace.take("gradient", torch.Size((5, 2)), torch.float32, torch.device("cpu"))
    assert other.data_ptr() != first.data_ptr()
    assert workspace.take("weight", torch.Size((9, 9)), torch.float32, torch.device("cpu")).shape == (9, 9)


@COMPILED
@pytest.mark.parametrize("shape", [(300,), (170, 200)], ids=str)
def test_compiled_updates_of_gates_are_the_eager_ones(device, shape):
    generator = torch.Generator().manual_seed(2)
    log_alpha, grad, exp_avg = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    state = [log_alpha * 3, grad * 1e-3, exp_avg * 1e-3, (exp_avg * 1e-3) ** 2]
    rule = torch.tensor([1e-4, 0.2, 0.1, 1.1, 1.2], device=device)
    weight = torch.tensor(1e-3, device=device)
    results = []
    for fused in (False, True):
        automatic, fixed = ([tensor.clone() for tensor in state] for _ in range(2))
        shift = gates.open_shift(STRETCH)
        counted = StoredGates(*automatic).step(rule, STRETCH, fused)
        assert counted == update_kernels.open_elements(automatic[:1], shift, fused=fused)
        update_kernels.adam(fixed, shift, weight, rule[2:].contiguous(), fused=fused)
        square = update_kernels.penalised_square((state[1], state[0]), shift, weight, fused=fused)
        opened = update_kernels.open_elements(state[:1], shift, fused=fused)
        results.append([*automatic, *fixed, square, opened.float() / update_kernels.PROBABILITY_UNIT])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert not compiling.broken
    expected = gates.open_probability(state[0].double(), STRETCH).sum()
    torch.testing.assert_close(results[1][-1].double(), expected, rtol=1e-5, atol=1e-6 * state[0].numel())


def test_without_a_compiler_the_gates_run_eagerly_and_say_so(monkeypatch, caplog):
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(compiling, "broken", [])
    monkeypatch.setattr(compiling, "compiled", lambda *_: no_compiler)
    leaves, base, how = make_leaves((5, 6), "cpu"), torch.randn(5, 6), sample(True)
    with caplog.at_level(logging.WARNING, "diffpeft"):
        actual = gradients(
            leaves, lambda *own: gated_parameter_sampled(GatedTensors(base, *own), how), torch.ones(5, 6)
        )
    assert_same(actual, gradients(leaves, lambda *own: plain_parameter(base, *own, how), torch.ones(5, 6)))
    told = [record.message for record in caplog.records]
    assert len(told) == 1
    assert "No working C++ compiler found" in told[0]


def test_the_whole_model_compiles_its_chains_from_a_size_on(monkeypatch):
    for limit, expected in ((21, False), (20, True)):
        monkeypatch.setattr(injection, "MIN_COMPILED_GATES", limit)
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), DiffPruningConfig())
        assert [layer.fused for layer in model.base_model.all_layers()] == [expected]
