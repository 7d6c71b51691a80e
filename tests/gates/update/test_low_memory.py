"""Gates in three bytes: rounding, and their moments and moves beside those of gates in fp32."""

import shutil

import pytest
import torch
from gate_groups import STRETCH, automatic_step, expected_nonzeros
from hypothesis import given
from hypothesis import strategies as st

from diffpeft.gates.noise import new_seed, random_bits, seed_words
from diffpeft.gates.update import factored, kernels, rules
from diffpeft.gates.update.kernels import BETAS
from diffpeft.gates.update.low_memory import LowMemoryGates, round_to_codes, round_to_half
from diffpeft.gates.update.state import Group, StoredGates

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles

COMPILED = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
fused_or_not = pytest.mark.parametrize("fused", [False, pytest.param(True, marks=COMPILED)], ids=["eager", "compiled"])


def make_gates(shape=(12, 16), device="cpu", mean=5.0) -> LowMemoryGates:
    rows, columns = factored.matrix_shape(torch.Size(shape))
    log_alpha = torch.full(shape, mean, dtype=torch.float16, device=device)
    zeros = [torch.zeros(size, device=device) for size in (rows, rows, columns)]
    return LowMemoryGates(log_alpha, torch.zeros(shape, dtype=torch.int8, device=device), *zeros)


def moments(gates: LowMemoryGates):
    positions = torch.arange(gates.log_alpha.numel(), device=gates.log_alpha.device)
    at = gates.at(positions)
    return [tensor.view(gates.log_alpha.shape) for tensor in (at.log_alpha, at.exp_avg, at.exp_avg_sq)]


def random_words(shape, device="cpu"):
    positions = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device)
    return random_bits(seed_words(new_seed(), torch.device(device)), positions.view(shape))


# Rounding


@given(st.floats(-60, 60, width=32).filter(lambda x: abs(x) > 1e-3 or x == 0))
def test_rounding_to_half_goes_to_a_neighbour_and_is_right_on_average(x):
    exact = torch.full((1 << 14,), x)
    rounded = round_to_half(exact, random_words(exact.shape)).float()
    spacing = float((rounded.max() - rounded.min()).clamp_min(abs(x) * 2**-11))
    assert len(rounded.unique()) <= 2
    assert float((rounded - exact).abs().max()) <= abs(x) * 2**-10
    assert float((rounded - exact).mean().abs()) <= 4 * 0.5 * spacing / 2**7 + 1e-7


@given(st.floats(-127, 127, width=32))
def test_rounding_to_codes_goes_to_a_neighbour_and_is_right_on_average(x):
    exact = torch.full((1 << 14,), x)
    rounded = round_to_codes(exact, random_words(exact.shape)).float()
    beyond = (rounded < exact.floor()) | (rounded > exact.ceil())
    assert int(beyond.count_nonzero()) <= 2  # fp32 rounds x plus a random number up once in about 2^18 times
    assert float((rounded - exact).mean().abs()) <= 4 * 0.5 / 2**7


@pytest.mark.parametrize("rounding", [round_to_half, round_to_codes])
def test_what_needs_no_rounding_stays_as_it_is(device, rounding):
    exact = torch.arange(-127.0, 128.0, device=device)
    assert torch.equal(rounding(exact, random_words(exact.shape, device)).float(), exact)


# Moments


@fused_or_not
@pytest.mark.parametrize("parts_of_an_update", [1, 3])
def test_moments_are_those_of_adam_up_to_rounding_and_factors(device, fused, parts_of_an_update):
    gates, rule = make_gates(device=device), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0], device=device)
    mean, square = torch.zeros(2, 12, 16, dtype=torch.float64, device=device)
    scales = torch.rand(12, 1, device=device) * torch.logspace(0, 2, 16, device=device) * 1e-6
    noise = torch.zeros_like(mean)  # variance of what was rounded off
    for _ in range(8):
        mean, square, noise = mean * BETAS[0], square * BETAS[1], noise * BETAS[0] ** 2
        for _ in range(parts_of_an_update):
            grad = torch.randn(12, 16, device=device) * scales
            assert gates.accumulate(grad, fused=fused)
            mean, square = mean + (1 - BETAS[0]) * grad, square + (1 - BETAS[1]) * grad.double().square()
            noise = noise + (gates.scale.double() ** 2 / 4).unsqueeze(1)
        _, actual, _ = moments(gates)
        assert float(((actual - mean) / noise.sqrt()).abs().max()) < 5.0
        torch.testing.assert_close(gates.rows.double(), square.mean(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(gates.columns.double(), square.mean(0), rtol=1e-5, atol=0)
        gates.step(rule, STRETCH, fused)
    assert bool((gates.log_alpha == 5.0).all())


def test_rows_of_a_gradient_are_the_gradient_with_zeros_elsewhere(device):
    rows = torch.tensor([1, 4, 9], device=device)
    one, other = make_gates(device=device), make_gates(device=device)
    for _ in range(4):
        part = torch.randn(3, 16, device=device)
        whole = torch.zeros(12, 16, device=device).index_copy_(0, rows, part)
        assert one.accumulate(part, rows)
        assert other.accumulate(whole)
        for actual, expected in zip(moments(one)[1:], moments(other)[1:], strict=True):
            # The two are rounded apart, by up to a level each time.
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=4 * 4 * 0.1 / 127)
        torch.testing.assert_close(one.columns, other.columns)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    gates = make_gates()
    assert gates.accumulate(torch.randn(12, 16))
    before = [tensor.clone() for tensor in gates]
    grad = torch.randn(12, 16)
    grad[3, 2] = bad
    assert not gates.accumulate(grad)
    assert not gates.accumulate(grad[2:4], torch.tensor([2, 3]))
    assert all(torch.equal(a, b) for a, b in zip(gates, before, strict=True))
    plain = StoredGates(*torch.zeros(4, 3))
    assert not plain.accumulate(torch.tensor([1.0, bad, 0.0]))
    assert not torch.stack(plain[:4]).any()


def test_rows_without_gradients_for_long_end_at_zero_and_never_below_what_can_be_computed_with():
    gates, rule = make_gates(), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    gates.accumulate(torch.randn(12, 16))
    for _ in range(800):
        gates.step(rule, STRETCH)
        assert not bool(((gates.scale > 0) & (gates.scale < 1e-33)).any())
    assert not gates.scale.any()


# Moves


@fused_or_not
@pytest.mark.parametrize("shape", [(12, 16), (2, 3, 4, 5), (700, 300)], ids=str)
def test_gates_move_as_plain_ones_with_the_same_moments_do(device, fused, shape):
    gates = make_gates(shape, device, mean=1.0)
    for _ in range(3):
        gates.accumulate(torch.randn(shape, device=device) * 1e-3)
    log_alpha, exp_avg, exp_avg_sq = moments(gates)
    plain = StoredGates(log_alpha.clone(), torch.zeros_like(exp_avg), exp_avg.clone(), exp_avg_sq.clone())
    rule = torch.tensor([1e-4, 0.5, 0.25, 3.0, 200.0], device=device)
    kernels.automatic(plain.columns(), rule)
    gates.step(rule, STRETCH, fused)
    actual = moments(gates)
    assert float((actual[0] - plain.log_alpha).abs().max()) <= 2**-9  # of fp16 below 2
    assert float((actual[0] - plain.log_alpha).mean().abs()) <= 4 * 2**-10 / len(actual[0].view(-1)) ** 0.5
    torch.testing.assert_close(actual[1], plain.exp_avg)
    torch.testing.assert_close(actual[2], plain.exp_avg_sq)


def test_moves_far_below_the_spacing_of_fp16_add_up(device):
    gates = make_gates((128, 128), device)
    rule = torch.tensor([1.0, 1e-4, 1e-4, 1.0, 1.0], device=device)
    for _ in range(50):
        gates.step(rule, STRETCH)  # without gradients they close by the largest step
    assert float(gates.log_alpha.float().mean()) == pytest.approx(5 - 50e-4, abs=2e-4)


def test_memory_layout_does_not_matter():
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        plain = make_gates((8, 6, 3, 3))
        gates = LowMemoryGates(*(t.contiguous(memory_format=layout) for t in plain[:2]), *plain[2:])
        gates.accumulate(torch.randn(8, 6, 3, 3).contiguous(memory_format=layout))
        gates.step(torch.tensor([1e-4, 0.5, 0.25, 3.0, 200.0]), STRETCH)
        runs.append([tensor.contiguous() for tensor in gates])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_automatic_step_reaches_the_density_with_low_memory_and_stored_gates_together(device):
    """And with the same rule: plain gates have their gradients accumulated too."""
    steps, scale = 60, torch.randn(200, 100, device=device) * 1e-3
    gates = make_gates((200, 100), device)
    small = StoredGates(*(torch.full((50,), x, device=device) for x in (5.0, 0.0, 0.0, 0.0)))
    groups = [Group(gates, None), Group(small, None)]
    start = expected_nonzeros(groups)
    assert start == pytest.approx(20050 * 0.993307, rel=1e-4)
    for step in range(steps):
        assert gates.accumulate(scale + torch.randn_like(scale) * 1e-3)
        assert small.accumulate(scale[0, :50])
        expected = expected_nonzeros(groups)
        wanted = rules.density_schedule(step, steps, start, 100.0)
        max_step = rules.automatic_max_step(step, steps)
        automatic_step(groups, step, max_step, expected, wanted, accumulated=True)
    assert expected_nonzeros(groups) == pytest.approx(100.0, rel=0.1)


def test_accumulated_moments_move_plain_gates_as_their_gradients_do():
    runs = []
    for accumulated in (False, True):
        torch.manual_seed(0)
        gates = StoredGates(*(torch.full((50,), x) for x in (5.0, 0.0, 0.0, 0.0)))
        for step in range(5):
            grad = torch.randn(50) * 1e-3
            if accumulated:
                gates.accumulate(grad)
            else:
                gates = gates._replace(grad=grad)
            automatic_step([Group(gates, None)], step, 0.5, 50.0, 40.0, accumulated)
        runs.append(gates.log_alpha)
    torch.testing.assert_close(runs[1], runs[0])
