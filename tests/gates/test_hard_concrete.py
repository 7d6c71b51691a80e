"""Hard-concrete gates: their range, their distribution and the gradients of the effective parameter."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffpeft.gates import hard_concrete as gates
from diffpeft.gates import noise as noise_module

STRETCHES = [(-1.5, 1.5), (-0.1, 1.1)]
log_alphas = st.lists(st.floats(-1e4, 1e4, width=32), max_size=20).map(torch.tensor)
noises = st.floats(noise_module.NOISE_MARGIN, 1 - noise_module.NOISE_MARGIN)
stretches = st.tuples(st.floats(-3, -0.01), st.floats(1.01, 3))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * (1 - 2e-4) + 1e-4


def stream(count: int, device: str) -> Tensor:
    """Noise as the layers use it."""
    seed = noise_module.seed_words(noise_module.new_seed(), torch.device(device))
    return noise_module.uniform(seed, torch.arange(count, dtype=torch.int32, device=device))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(log_alphas, noises, stretches)
def test_gates_lie_between_0_and_1_at_any_log_alpha(device, log_alpha, noise, stretch):
    log_alpha = log_alpha.to(device)
    z = gates.gate(log_alpha, torch.full_like(log_alpha, noise), stretch)
    assert z.shape == log_alpha.shape
    assert bool(((z >= 0) & (z <= 1)).all())


@given(log_alphas, stretches)
def test_a_deterministic_gate_is_the_gate_of_the_median_noise(device, log_alpha, stretch):
    log_alpha = log_alpha.to(device)
    half = torch.full_like(log_alpha, 0.5)
    torch.testing.assert_close(gates.gate(log_alpha, None, stretch), gates.gate(log_alpha, half, stretch))


@given(st.floats(-8, 8), st.tuples(noises, noises).map(sorted), stretches)
def test_a_gate_opens_with_its_noise_and_its_log_alpha(log_alpha, noise, stretch):
    low, high = (gates.gate(torch.tensor([log_alpha]), torch.tensor([u]), stretch) for u in noise)
    further = gates.gate(torch.tensor([log_alpha + 1]), torch.tensor([noise[0]]), stretch)
    assert low <= high + 1e-5
    assert low <= further + 1e-5


def test_far_gates_are_wide_open_or_shut_whatever_the_noise(device):
    noise = torch.tensor([noise_module.NOISE_MARGIN, 1 - noise_module.NOISE_MARGIN], device=device)
    for log_alpha, z in ((-1e3, 0.0), (1e3, 1.0)):
        assert gates.gate(torch.full_like(noise, log_alpha), noise, (-1.5, 1.5)).tolist() == [z, z]


@pytest.mark.parametrize("stretch", STRETCHES, ids=str)
@pytest.mark.parametrize("log_alpha", [-5.0, -2.4, -1.0, 0.0, 1.0, 5.0])
def test_open_probability_is_the_share_of_gates_that_noise_leaves_open(device, log_alpha, stretch):
    torch.manual_seed(1)
    samples = torch.full((100_000,), log_alpha, device=device)
    share = (gates.gate(samples, stream(samples.numel(), device), stretch) > 0).double().mean().item()
    probability = gates.open_probability(samples[:1], stretch).item()
    deviation = math.sqrt(probability * (1 - probability) / len(samples))
    assert abs(share - probability) <= 4 * deviation + noise_module.NOISE_MARGIN


@given(st.floats(-8, 8), stretches)
def test_expected_l0_of_open_group_gates_is_that_of_the_elements(log_alpha, stretch):
    elements, far = torch.full((7,), log_alpha), torch.full((1,), 1e3)
    alone = gates.expected_l0(elements, None, stretch)
    torch.testing.assert_close(gates.expected_l0(elements, far, stretch, "product"), alone)
    torch.testing.assert_close(gates.expected_l0(elements, far, stretch, "additive"), alone + 1)


def plain_effective(
    base: Tensor,
    w: Tensor,
    log_alpha: Tensor,
    group_log_alpha: Tensor | None,
    stretch: tuple[float, float],
    noise: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """The effective parameter in float64, one autograd operation after the other."""

    def z(log_alpha: Tensor, u: Tensor | None) -> Tensor:
        u = torch.full_like(log_alpha, 0.5) if u is None else u.double()
        s = torch.sigmoid(torch.log(u) - torch.log(1 - u) + log_alpha)
        return torch.clamp(s * (stretch[1] - stretch[0]) + stretch[0], 0, 1)

    delta = z(log_alpha, noise[0]) * w
    if group_log_alpha is not None:
        delta = delta * z(group_log_alpha, noise[1]).squeeze()
    return base.double() + delta


def result_and_gradients(
    function: Callable[..., Tensor], leaves: list[Tensor | None], upstream: Tensor, base: Tensor, *settings: Any
) -> list[Tensor]:
    """What `function` computes, and the gradient that every leaf receives from `upstream`."""
    leaves = [None if leaf is None else leaf.clone().requires_grad_() for leaf in leaves]
    effective = function(base, *leaves, *settings)
    effective.backward(upstream)
    return [effective.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def doubled(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "deterministic"])
@pytest.mark.parametrize("structured", [True, False], ids=["structured", "unstructured"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (3, 5), (4, 3, 3)], ids=str)
def test_effective_parameter_and_gradients_are_those_of_plain_autograd(device, shape, structured, sampled, dtype, rtol):
    base, upstream = normal(*shape, seed=1).to(device, dtype), normal(*shape, seed=2).to(device, dtype)
    leaves = [normal(*shape, seed=3).to(device), normal(*shape, seed=4).to(device)]
    leaves.append(normal(1, seed=5).to(device) / 4 if structured else None)
    noise = uniform(*shape, seed=6).to(device) if sampled else None
    group_noise = torch.full((1,), 0.45, device=device) if sampled and structured else None
    for stretch in STRETCHES:
        settings = base, stretch, (noise, group_noise)
        actual = result_and_gradients(gates.gated_parameter, leaves, upstream, *settings)
        expected = result_and_gradients(plain_effective, doubled(leaves), upstream.double(), *settings)
        assert [tensor.dtype for tensor in actual] == [dtype] + [torch.float32] * (2 + structured)
        torch.testing.assert_close(actual[0].double(), expected[0], rtol=rtol, atol=1e-5)
        torch.testing.assert_close(doubled(actual[1:]), expected[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["w", "log_alpha", "upstream", "base", "noise"])
def test_memory_layout_does_not_matter(device, which):
    names = ["w", "log_alpha", "upstream", "base", "noise"]
    plain = [torch.sigmoid(normal(2, 3, 3, 3, seed=seed)).to(device) for seed in range(5)]
    other = [
        t.to(memory_format=torch.channels_last) if name == which else t for name, t in zip(names, plain, strict=True)
    ]
    results = [
        result_and_gradients(gates.gated_parameter, [w, log_alpha, None], upstream, base, (-1.5, 1.5), (noise, None))
        for w, log_alpha, upstream, base, noise in (other, plain)
    ]
    torch.testing.assert_close(*results)


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another dtype of tensors that are made without saying which."""
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_dtype")
def test_torchs_default_dtype_does_not_matter(device):
    w, log_alpha, upstream, base = (normal(50, seed=seed).to(device, torch.float32) for seed in range(4))
    noise = stream(log_alpha.numel(), device)
    assert noise.dtype == torch.float32
    settings = upstream, base, (-1.5, 1.5), (noise, None)
    actual = result_and_gradients(gates.gated_parameter, [w, log_alpha, None], *settings)
    expected = result_and_gradients(plain_effective, doubled([w, log_alpha, None]), upstream.double(), *settings[1:])
    torch.testing.assert_close(doubled(actual), expected, rtol=1e-4, atol=1e-5)
    assert {tensor.dtype for tensor in actual} == {torch.float32}


def test_gradients_of_a_sum_arrive_expanded(device):
    w = normal(5, 5).to(device).requires_grad_()
    open_wide = torch.full((5, 5), 50.0, device=device)
    gates.gated_parameter(torch.zeros_like(w), w, open_wide, None, (-1.5, 1.5)).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


def test_the_pretrained_parameter_receives_no_gradient_and_stays(device):
    base = normal(4).to(device).requires_grad_()
    before = base.detach().clone()
    w, log_alpha = normal(4, seed=1).to(device).requires_grad_(), normal(4, seed=2).to(device).requires_grad_()
    gates.gated_parameter(base, w, log_alpha, None, (-1.5, 1.5)).sum().backward()
    assert base.grad is None
    assert torch.equal(base, before)
