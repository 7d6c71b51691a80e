"""Gates in three bytes: rounding, and their moments and moves beside those of gates in fp32."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffpeft.gates import kernels
from diffpeft.gates.kernels import BETAS
from diffpeft.gates.noise import bits, new_seed, parts
from diffpeft.gates.update import factored
from diffpeft.gates.update import low_memory as lean
from diffpeft.gates.update import rules as gate_update
from diffpeft.gates.update import state as gate_groups
from diffpeft.gates.update.low_memory import LeanGates, to_half, to_levels
from diffpeft.gates.update.state import Gates, Group

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles

STRETCH = (-1.5, 1.5)
COMPILED = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
fused_or_not = pytest.mark.parametrize("fused", [False, pytest.param(True, marks=COMPILED)], ids=["eager", "compiled"])


def make_gates(shape=(12, 16), device="cpu", mean=5.0) -> LeanGates:
    rows, columns = factored.matrix_shape(torch.Size(shape))
    log_alpha = torch.full(shape, mean, dtype=torch.float16, device=device)
    zeros = [torch.zeros(size, device=device) for size in (rows, rows, columns)]
    return LeanGates(log_alpha, torch.zeros(shape, dtype=torch.int8, device=device), *zeros)


def moments(gates: LeanGates):
    places = torch.arange(gates.log_alpha.numel(), device=gates.log_alpha.device)
    return [tensor.view(gates.log_alpha.shape) for tensor in gates.at(places)]


def random_bits(shape, device="cpu"):
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device)
    return bits(parts(new_seed(), torch.device(device)), places.view(shape))


# Rounding


@given(st.floats(-60, 60, width=32).filter(lambda x: abs(x) > 1e-3 or x == 0))
def test_rounding_to_half_goes_to_a_neighbour_and_is_right_on_average(x):
    exact = torch.full((1 << 14,), x)
    rounded = to_half(exact, random_bits(exact.shape)).float()
    spacing = float((rounded.max() - rounded.min()).clamp_min(abs(x) * 2**-11))
    assert len(rounded.unique()) <= 2
    assert float((rounded - exact).abs().max()) <= abs(x) * 2**-10
    assert float((rounded - exact).mean().abs()) <= 4 * 0.5 * spacing / 2**7 + 1e-7


@given(st.floats(-127, 127, width=32))
def test_rounding_to_levels_goes_to_a_neighbour_and_is_right_on_average(x):
    exact = torch.full((1 << 14,), x)
    rounded = to_levels(exact, random_bits(exact.shape)).float()
    assert set(rounded.unique().tolist()) <= {float(torch.tensor(x).floor()), float(torch.tensor(x).ceil())}
    assert float((rounded - exact).mean().abs()) <= 4 * 0.5 / 2**7


@pytest.mark.parametrize("rounding", [to_half, to_levels])
def test_what_needs_no_rounding_stays_as_it_is(device, rounding):
    exact = torch.arange(-127.0, 128.0, device=device)
    assert torch.equal(rounding(exact, random_bits(exact.shape, device)).float(), exact)


# Moments


@fused_or_not
@pytest.mark.parametrize("parts_of_an_update", [1, 3])
def test_moments_are_those_of_adam_but_for_rounding_and_factors(device, fused, parts_of_an_update):
    gates, rule = make_gates(device=device), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0], device=device)
    mean, square = torch.zeros(2, 12, 16, dtype=torch.float64, device=device)
    scales = torch.rand(12, 1, device=device) * torch.logspace(0, 2, 16, device=device) * 1e-6
    noise = torch.zeros_like(mean)  # variance of what was rounded off
    for _ in range(8):
        mean, square, noise = mean * BETAS[0], square * BETAS[1], noise * BETAS[0] ** 2
        for _ in range(parts_of_an_update):
            grad = torch.randn(12, 16, device=device) * scales
            assert gates.fold(grad, fused=fused)
            mean, square = mean + (1 - BETAS[0]) * grad, square + (1 - BETAS[1]) * grad.double().square()
            noise = noise + (gates.scale.double() ** 2 / 4).unsqueeze(1)
        _, actual, _ = moments(gates)
        assert float(((actual - mean) / noise.sqrt()).abs().max()) < 5.0
        torch.testing.assert_close(gates.rows.double(), square.mean(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(gates.columns.double(), square.mean(0), rtol=1e-5, atol=0)
        gates.move(rule, fused)
    assert bool((gates.log_alpha == 5.0).all())


def test_rows_of_a_gradient_are_the_gradient_with_zeros_elsewhere(device):
    rows = torch.tensor([1, 4, 9], device=device)
    one, other = make_gates(device=device), make_gates(device=device)
    for _ in range(4):
        part = torch.randn(3, 16, device=device)
        whole = torch.zeros(12, 16, device=device).index_copy_(0, rows, part)
        assert one.fold(part, rows)
        assert other.fold(whole)
        for actual, expected in zip(moments(one)[1:], moments(other)[1:], strict=True):
            # The two are rounded apart, by up to a level each time.
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=4 * 4 * 0.1 / 127)
        torch.testing.assert_close(one.columns, other.columns)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    gates = make_gates()
    assert gates.fold(torch.randn(12, 16))
    before = [tensor.clone() for tensor in gates]
    grad = torch.randn(12, 16)
    grad[3, 2] = bad
    assert not gates.fold(grad)
    assert not gates.fold(grad[2:4], torch.tensor([2, 3]))
    assert all(torch.equal(a, b) for a, b in zip(gates, before, strict=True))
    plain = [torch.zeros(3), torch.zeros(3)]
    assert not lean.fold_plain(*plain, torch.tensor([1.0, bad, 0.0]))
    assert not torch.stack(plain).any()


def test_rows_without_gradients_for_long_end_at_nought_and_never_below_what_can_be_computed_with():
    gates, rule = make_gates(), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    gates.fold(torch.randn(12, 16))
    for _ in range(800):
        gates.move(rule)
        assert not bool(((gates.scale > 0) & (gates.scale < 1e-33)).any())
    assert not gates.scale.any()


# Moves


@fused_or_not
@pytest.mark.parametrize("shape", [(12, 16), (2, 3, 4, 5), (700, 300)], ids=str)
def test_gates_move_as_plain_ones_with_the_same_moments_do(device, fused, shape):
    gates = make_gates(shape, device, mean=1.0)
    for _ in range(3):
        gates.fold(torch.randn(shape, device=device) * 1e-3)
    log_alpha, exp_avg, exp_avg_sq = moments(gates)
    plain = Gates(log_alpha.clone(), torch.zeros_like(exp_avg), exp_avg.clone(), exp_avg_sq.clone())
    rule = torch.tensor([1e-4, 0.5, 0.25, 3.0, 200.0], device=device)
    kernels.automatic_(*plain, (-1.5, 1.5), rule)
    gates.move(rule, fused)
    actual = moments(gates)
    assert float((actual[0] - plain.log_alpha).abs().max()) <= 2**-9  # of fp16 below 2
    assert float((actual[0] - plain.log_alpha).mean().abs()) <= 4 * 2**-10 / len(actual[0].view(-1)) ** 0.5
    torch.testing.assert_close(actual[1], plain.exp_avg)
    torch.testing.assert_close(actual[2], plain.exp_avg_sq)


def test_moves_far_below_the_spacing_of_fp16_add_up(device):
    gates = make_gates((128, 128), device)
    rule = torch.tensor([1.0, 1e-4, 1e-4, 1.0, 1.0], device=device)
    for _ in range(50):
        gates.move(rule)  # without gradients they close at the pace
    assert float(gates.log_alpha.float().mean()) == pytest.approx(5 - 50e-4, abs=2e-4)


def test_memory_layout_does_not_matter():
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        plain = make_gates((8, 6, 3, 3))
        gates = LeanGates(*(t.contiguous(memory_format=layout) for t in plain[:2]), *plain[2:])
        gates.fold(torch.randn(8, 6, 3, 3).contiguous(memory_format=layout))
        gates.move(torch.tensor([1e-4, 0.5, 0.25, 3.0, 200.0]))
        runs.append([tensor.contiguous() for tensor in gates])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_automatic_step_reaches_the_density_with_lean_and_plain_gates_together(device):
    """And with the same rule: plain gates have their gradients folded too."""
    steps, scale = 60, torch.randn(200, 100, device=device) * 1e-3
    gates = make_gates((200, 100), device)
    small = Gates(*(torch.full((50,), x, device=device) for x in (5.0, 0.0, 0.0, 0.0)))
    groups = [Group(gates, None), Group(small, None)]
    start = gate_groups.expected_nonzeros(groups, STRETCH)
    assert start == pytest.approx(20050 * 0.993307, rel=1e-4)
    for step in range(steps):
        assert gates.fold(scale + torch.randn_like(scale) * 1e-3)
        assert lean.fold_plain(small.exp_avg, small.exp_avg_sq, scale[0, :50])
        expected = gate_groups.expected_nonzeros(groups, STRETCH)
        wanted = gate_update.density_schedule(step, steps, start, 100.0)
        pace = gate_update.automatic_pace(step, steps)
        gate_update.automatic_step(groups, step, pace, STRETCH, expected, wanted, folded=True)
    assert gate_groups.expected_nonzeros(groups, STRETCH) == pytest.approx(100.0, rel=0.1)


def test_folded_moments_move_plain_gates_as_their_gradients_do():
    runs = []
    for folded in (False, True):
        torch.manual_seed(0)
        gates = Gates(*(torch.full((50,), x) for x in (5.0, 0.0, 0.0, 0.0)))
        for step in range(5):
            grad = torch.randn(50) * 1e-3
            if folded:
                lean.fold_plain(gates.exp_avg, gates.exp_avg_sq, grad)
            else:
                gates = gates._replace(grad=grad)
            gate_update.automatic_step([Group(gates, None)], step, 0.5, STRETCH, 50.0, 40.0, folded=folded)
        runs.append(gates.log_alpha)
    torch.testing.assert_close(runs[1], runs[0])
