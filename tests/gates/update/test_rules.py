"""How the gates move: the paper's fixed lambda, and the lambda that is solved for."""

import math
from collections.abc import Sequence

import pytest
import torch
from gate_groups import STRETCH, automatic_step, expected_nonzeros, open_elements, penalty_gradient
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffpeft.gates.hard_concrete import expected_l0, open_probability
from diffpeft.gates.update import rules
from diffpeft.gates.update.rules import StepSettings
from diffpeft.gates.update.state import Group, StoredGates

SHAPES = ((6, 5), (7,), (1,))
both_forms = pytest.mark.parametrize("form", ["product", "additive"])
with_and_without_groups = pytest.mark.parametrize("structured", [True, False], ids=["structured", "unstructured"])


def fresh(log_alpha: Tensor) -> StoredGates:
    return StoredGates(log_alpha, *(torch.zeros_like(log_alpha) for _ in range(3)))


def make_groups(shapes: Sequence[tuple[int, ...]], structured: bool, mean: float, device: str = "cpu") -> list[Group]:
    """Gates with random log_alpha, without gradients or moments."""
    generator = torch.Generator().manual_seed(len(shapes))
    groups = []
    for shape in shapes:
        tensors = [(torch.randn(s, generator=generator) + mean).to(device) for s in (shape, (1,))]
        groups.append(Group(fresh(tensors[0]), fresh(tensors[1]) if structured else None))
    return groups


def all_gates(groups: Sequence[Group]) -> list[StoredGates]:
    return [gates for group in groups for gates in group if gates is not None]


def all_log_alphas(groups: Sequence[Group]) -> Tensor:
    return torch.cat([gates.log_alpha.reshape(-1) for gates in all_gates(groups)])


def set_random_gradients(groups: Sequence[Group], scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for gates in all_gates(groups):
        gates.grad.copy_(torch.randn(gates.grad.shape, generator=generator) * scale)


def set_random_moments(groups: Sequence[Group], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for gates in all_gates(groups):
        gates.exp_avg.copy_(torch.randn(gates.grad.shape, generator=generator) * 1e-3)
        gates.exp_avg_sq.copy_(torch.rand(gates.grad.shape, generator=generator) * 1e-6)


def automatic_steps(groups: Sequence[Group], steps: int, target: float) -> float:
    """A whole gating phase under constant gradients; returns the expected number of nonzeros at its end."""
    start = expected_nonzeros(groups)
    for step in range(steps):
        expected = expected_nonzeros(groups)
        max_step, wanted = rules.automatic_max_step(step, steps), rules.density_schedule(step, steps, start, target)
        automatic_step(groups, step, max_step, expected, wanted)
    return expected_nonzeros(groups)


# Expected nonzeros and their gradient


@with_and_without_groups
def test_expected_nonzeros_is_the_papers_penalty(device, structured):
    groups = make_groups(SHAPES, structured, mean=0.5, device=device)
    group_gates = [group.group_gate.log_alpha if structured else None for group in groups]
    penalty = sum(expected_l0(g.elements.log_alpha, own, STRETCH) for g, own in zip(groups, group_gates, strict=True))
    assert expected_nonzeros(groups) == pytest.approx(float(penalty), rel=1e-5)


@both_forms
@with_and_without_groups
@pytest.mark.parametrize("stretch", [STRETCH, (-0.1, 1.1)], ids=str)
def test_penalty_gradient_is_that_of_autograd(device, form, structured, stretch):
    for group in make_groups(SHAPES, structured, mean=0.5, device=device):
        leaves = [gates.log_alpha.clone().requires_grad_() for gates in all_gates([group])]
        expected_l0(leaves[0], leaves[1] if structured else None, stretch, form).backward()
        by_element, by_group = penalty_gradient(group, stretch, form)
        torch.testing.assert_close(by_element, leaves[0].grad, rtol=1e-5, atol=1e-7)
        if structured:
            torch.testing.assert_close(by_group, leaves[1].grad, rtol=1e-5, atol=1e-6)
        else:
            assert by_group is None


# Fixed lambda


@both_forms
@with_and_without_groups
@pytest.mark.parametrize(
    ("scale", "l0_lambda", "mean"),
    [(0.05, 3e-3, 0.5), (3.0, 0.5, 0.5), (0.0, 1.25e-7, 5.0)],
    ids=["unclipped", "clipped", "the paper's lambda alone"],
)
def test_fixed_lambda_steps_are_adamw_on_the_penalised_loss(device, form, structured, scale, l0_lambda, mean):
    groups = make_groups(SHAPES, structured, mean, device)
    leaves = [gates.log_alpha.clone().requires_grad_() for gates in all_gates(groups)]
    pairs = [leaves[i : i + 2] if structured else [leaves[i], None] for i in range(0, len(leaves), 1 + structured)]
    optimizer = torch.optim.AdamW(leaves, lr=0.1, weight_decay=0)
    for step in range(6):
        set_random_gradients(groups, scale, seed=step)
        task = sum((leaf * gates.grad).sum() for leaf, gates in zip(leaves, all_gates(groups), strict=True))
        optimizer.zero_grad()
        (task + l0_lambda * sum(expected_l0(*pair, STRETCH, form) for pair in pairs)).backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        rules.fixed_lambda_step(groups, l0_lambda, form, StepSettings(step, 0.1, STRETCH))
        for leaf, gates in zip(leaves, all_gates(groups), strict=True):
            torch.testing.assert_close(gates.log_alpha, leaf.detach(), rtol=1e-5, atol=2e-5)


def test_fixed_lambda_step_leaves_the_task_gradients_as_they_are():
    groups = make_groups(SHAPES, True, mean=0.5)
    set_random_gradients(groups, scale=3.0, seed=0)
    before = [gates.grad.clone() for gates in all_gates(groups)]
    rules.fixed_lambda_step(groups, 0.1, "product", StepSettings(0, 0.1, STRETCH))
    for gates, grad in zip(all_gates(groups), before, strict=True):
        assert torch.equal(gates.grad, grad)


# Schedule

densities = st.floats(1e-6, 1)
lengths = st.integers(1, 10_000)


@given(lengths, densities, densities)
def test_schedule_ends_at_its_target_and_stays_there(gating_steps, first, second):
    start, target = max(first, second), min(first, second)
    settled = math.ceil(rules.SETTLE_SHARE * gating_steps)
    for step in {max(0, settled - 1), gating_steps - 1, gating_steps + 5}:
        assert rules.density_schedule(step, gating_steps, start, target) == pytest.approx(target)


@given(lengths, densities, densities, st.data())
def test_schedule_is_held_then_falls_in_equal_ratios(gating_steps, first, second, data):
    start, target = max(first, second), min(first, second)
    held, settled = (share * gating_steps - 1 for share in (rules.HOLD_SHARE, rules.SETTLE_SHARE))
    step = data.draw(st.integers(0, gating_steps - 1))
    density = rules.density_schedule(step, gating_steps, start, target)
    if step <= held:
        assert density == pytest.approx(start)
        assert rules.automatic_max_step(step, gating_steps) == 0.0
    else:
        assert rules.automatic_max_step(step, gating_steps) > 0.0
    if held <= step <= settled - 1:
        after = rules.density_schedule(step + 1, gating_steps, start, target)
        assert after == pytest.approx(density * (target / start) ** (1 / (settled - held)), rel=1e-6)


@given(lengths, densities, densities, st.integers(0, 10_000))
def test_schedule_never_rises_nor_leaves_its_range(gating_steps, first, second, step):
    start, target = max(first, second), min(first, second)
    now, then = (rules.density_schedule(s, gating_steps, start, target) for s in (step, step + 1))
    assert target * (1 - 1e-9) <= then <= now <= start * (1 + 1e-9)


# Automatic lambda


@pytest.mark.parametrize("step", [0, 50])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
@with_and_without_groups
def test_automatic_step_reaches_what_is_wanted_within_2_percent(device, structured, share, step):
    groups = make_groups([(40, 50), (300,), (1,)], structured, mean=1.0, device=device)
    set_random_gradients(groups, 1e-3, seed=1)
    if step:
        set_random_moments(groups, seed=2)
    for gates in all_gates(groups):  # the task wants every gate open, so that lambda alone closes any
        gates.grad.abs_().neg_(), gates.exp_avg.abs_().neg_()
    for group in groups if structured else []:
        group.group_gate.log_alpha.fill_(20.0)  # far from closing, so that the elements alone decide
    expected = expected_nonzeros(groups)
    _, opened = automatic_step(groups, step, 3.0, expected, share * expected)
    assert torch.equal(opened, open_elements(groups))
    assert expected_nonzeros(groups) == pytest.approx(share * expected, rel=0.02)


def test_automatic_step_does_not_count_the_elements_of_a_shut_group():
    groups = make_groups([(2000,), (1000,)], True, mean=1.0)
    set_random_gradients(groups, 1e-3, seed=1)
    for group, elements, group_gate in zip(groups, (1.0, 8.0), (20.0, -20.0), strict=True):
        group.elements.log_alpha.fill_(elements)
        group.group_gate.log_alpha.fill_(group_gate)
        group.elements.grad.abs_().neg_()
    expected = expected_nonzeros(groups)
    automatic_step(groups, 0, 3.0, expected, 0.7 * expected)
    assert expected_nonzeros(groups) == pytest.approx(0.7 * expected, rel=0.02)


def test_automatic_step_samples_many_gates_and_still_reaches_what_is_wanted(monkeypatch):
    monkeypatch.setattr(rules, "SAMPLE_GATES", 2000)
    groups = make_groups([(100, 100), (3000,)], False, mean=1.0)
    set_random_gradients(groups, 1e-3, seed=1)
    for group in groups:  # no part of a tensor is like the whole
        gain = torch.logspace(-2, 2, group.elements.grad.numel()).view(group.elements.grad.shape)
        group.elements.grad.abs_().neg_().mul_(gain)
    expected = expected_nonzeros(groups)
    automatic_step(groups, 0, 3.0, expected, 0.7 * expected)
    assert expected_nonzeros(groups) == pytest.approx(0.7 * expected, rel=0.02)


def test_automatic_step_out_of_reach_closes_every_gate_as_far_as_it_may():
    groups = make_groups(SHAPES, False, mean=1.0)
    set_random_gradients(groups, 1e-3, seed=1)
    before, expected = all_log_alphas(groups), expected_nonzeros(groups)
    automatic_step(groups, 0, 0.1, expected, 0.01 * expected)
    torch.testing.assert_close(all_log_alphas(groups), before - 0.1, rtol=0, atol=1e-3)


def test_automatic_step_lambdas_no_gate_while_the_density_is_below_what_is_wanted():
    groups = make_groups(SHAPES, True, mean=1.0)
    set_random_gradients(groups, 1e-3, seed=1)
    before = all_log_alphas(groups)
    gradients = torch.cat([gates.grad.reshape(-1) for gates in all_gates(groups)])
    expected = expected_nonzeros(groups)
    assert automatic_step(groups, 0, 0.1, expected, 2 * expected)[0] == 0.0
    # Those that the task wants open go on; those that it wants shut would only lead further away.
    torch.testing.assert_close(all_log_alphas(groups), before + 0.1 * (gradients < 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("structured", [True, False])
def test_automatic_step_slows_down_gates_that_close_by_themselves_too_fast(structured):
    groups = make_groups([(40, 50), (300,)], structured, mean=1.0)
    set_random_gradients(groups, 1e-3, seed=1)
    for group in groups:
        group.elements.grad.abs_()
        if structured:
            group.group_gate.log_alpha.fill_(20.0)
    expected = expected_nonzeros(groups)
    assert automatic_step(groups, 0, 3.0, expected, 0.9 * expected)[0] == 0.0
    assert expected_nonzeros(groups) == pytest.approx(0.9 * expected, rel=0.02)


@given(st.integers(0, 1000), st.floats(1e-3, 10), st.floats(0.01, 1.5), st.floats(1e-9, 1e3))
def test_automatic_step_moves_no_gate_further_than_it_may(seed, max_step, share, scale):
    groups = make_groups(SHAPES, True, mean=1.0)
    set_random_gradients(groups, scale, seed)
    set_random_moments(groups, seed + 1)
    before, expected = all_log_alphas(groups), expected_nonzeros(groups)
    automatic_step(groups, seed, max_step, expected, share * expected)
    assert float((all_log_alphas(groups) - before).abs().max()) <= max_step * (1 + 1e-5) + 1e-5


def test_gating_ends_at_the_target_with_the_gates_of_largest_gain_open():
    gain = torch.logspace(-6, -2, 1000)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    groups = [Group(fresh(torch.full((600,), 5.0)), None), Group(fresh(torch.full((20, 20), 5.0)), None)]
    for group, part in zip(groups, gain.split([600, 400]), strict=True):
        group.elements.grad.copy_(-part.view(group.elements.grad.shape))
    assert automatic_steps(groups, steps=100, target=50) == pytest.approx(50, rel=0.1)
    by_gain = open_probability(all_log_alphas(groups), STRETCH)[gain.argsort(descending=True)]
    assert bool((by_gain[1:] <= by_gain[:-1] + 1e-4).all())
    assert by_gain[20] > 0.9
    assert by_gain[120] < 0.1


@pytest.mark.parametrize("useful", [1, 20])
def test_whole_tensors_stay_open_while_their_elements_close(useful):
    groups = [
        Group(fresh(torch.full(shape, 5.0)), fresh(torch.full((1,), 5.0))) for shape in ((40, 50), (400,), (400,))
    ]
    for seed, group in enumerate(groups):
        grad = torch.randn(group.elements.grad.shape, generator=torch.Generator().manual_seed(seed)) * 1e-5
        grad.view(-1)[: useful + seed] = -1e-3
        group.elements.grad.copy_(grad)
        group.group_gate.grad.copy_(grad.sum())
    target = sum(useful + seed for seed in range(3))
    assert automatic_steps(groups, steps=100, target=target) == pytest.approx(target, rel=0.2)
    for seed, group in enumerate(groups):
        assert open_probability(group.group_gate.log_alpha, STRETCH) > 0.9
        open_elements = open_probability(group.elements.log_alpha.view(-1), STRETCH)
        assert open_elements[: useful + seed].min() > 0.5 > open_elements[useful + seed :].max()


def test_a_tensor_that_is_worth_nothing_shuts_as_a_whole():
    groups = [Group(fresh(torch.full((200,), 5.0)), fresh(torch.full((1,), 5.0))) for _ in range(2)]
    for group, gain in zip(groups, (1e-3, -1e-3), strict=True):
        group.elements.grad.fill_(-gain)
        group.group_gate.grad.fill_(-200 * gain)
    automatic_steps(groups, steps=100, target=150)
    assert (
        open_probability(groups[0].group_gate.log_alpha, STRETCH)
        > 0.9
        > 0.1
        > open_probability(groups[1].group_gate.log_alpha, STRETCH)
    )


@with_and_without_groups
def test_the_scale_of_the_loss_does_not_matter(structured):
    runs, lambdas = [], []
    for scale in (1.0, 1e-6):
        groups = make_groups(SHAPES, structured, mean=5.0)
        for step in range(30):
            set_random_gradients(groups, scale * 1e-3, seed=step)
            expected = expected_nonzeros(groups)
            wanted = rules.density_schedule(step, 30, 37.0, 4.0)
            lambdas.append(automatic_step(groups, step, 0.5, expected, wanted)[0] / scale)
        runs.append(all_log_alphas(groups))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=1e-2)
    assert lambdas[30:] == pytest.approx(lambdas[:30], rel=1e-2)


def test_gates_without_any_gradient_close():
    groups = make_groups(SHAPES, True, mean=2.0)
    before = all_log_alphas(groups)
    expected = expected_nonzeros(groups)
    automatic_step(groups, 0, 0.1, expected, 0.5 * expected)
    torch.testing.assert_close(all_log_alphas(groups), before - 0.1)


def test_gates_that_are_all_shut_for_good_do_no_harm():
    groups = make_groups(SHAPES, True, mean=-60.0)
    expected = expected_nonzeros(groups)
    assert 0 < expected < 1e-6
    assert automatic_step(groups, 0, 0.1, expected, 2.0)[0] == 0.0
    assert bool(torch.isfinite(all_log_alphas(groups)).all())


def test_a_tensor_without_elements_does_no_harm():
    groups = make_groups([(6, 5), (0,)], True, mean=1.0)
    set_random_gradients(groups, 1e-3, seed=0)
    expected = expected_nonzeros(groups)
    automatic_step(groups, 0, 0.1, expected, 0.9 * expected)
    assert bool(torch.isfinite(all_log_alphas(groups)).all())


@pytest.mark.parametrize("rule", ["automatic", "fixed"])
def test_memory_layout_does_not_matter(rule):
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        groups = make_groups([(2, 3, 3, 3)], False, mean=1.0)
        set_random_gradients(groups, 1e-3, seed=0)
        groups = [Group(StoredGates(*(t.contiguous(memory_format=layout) for t in groups[0].elements[:4])), None)]
        if rule == "automatic":
            automatic_step(groups, 0, 0.1, 30.0, 20.0)
        else:
            rules.fixed_lambda_step(groups, 1e-3, "product", StepSettings(0, 0.1, STRETCH))
        moved.append(all_log_alphas(groups))
    torch.testing.assert_close(moved[1], moved[0])
