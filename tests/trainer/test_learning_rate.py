"""Rates that no schedule drives above what was asked: one factor for all groups, from what is left of the schedule."""

import pytest
import torch
from transformers import get_scheduler

from diffpeft.trainer.learning_rate import RateSchedule, rates_of_diff


def optimizer(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_gatings_factor_goes_from_one_to_fixmasks_rate_and_is_taken_back():
    schedule, made = RateSchedule(1e-3, 2e-2, 8, 16), optimizer(1e-3, 5e-4)
    for progress, factor in ((0.0, 1.0), (0.5, 20**0.5), (1.0, 20.0)):
        assert schedule.apply(made, 3, progress) == pytest.approx(1e-3 * factor)
        assert rates(made) == pytest.approx([1e-3 * factor, 5e-4 * factor])
        schedule.restore(made)
        assert rates(made) == [1e-3, 5e-4]


@pytest.mark.parametrize("warmup", [4, 0.5])
def test_groups_keep_their_ratio_in_fixmask_and_warm_up_together(warmup):
    schedule, made = RateSchedule(1e-3, 2e-2, 8, 16, warmup), optimizer(1e-3, 5e-4, 0.0)
    schedule.begin_fixmask(made, None)
    assert schedule.fixmask_factor == 20.0
    for step, share in ((8, 0.25), (11, 1.0), (15, 1.0)):
        schedule.apply(made, step, None)
        assert rates(made) == pytest.approx([share * 2e-2, share * 1e-2, 0.0])
        schedule.restore(made)


def test_the_fastest_group_with_parts_of_the_diff_counts_whatever_others_have():
    made = optimizer(1e-2, 1e-4, 1e-5)
    diff = {group["params"][0] for group in made.param_groups[1:]}
    assert rates_of_diff(made, diff, 5e-5) == (1e-4, [1, 2])
    assert rates_of_diff(made, set(), 5e-5) == (5e-5, [])
    schedule = RateSchedule(1e-4, 1e-3, 8, 16, diff_groups=[1, 2])
    schedule.begin_fixmask(made, None)
    schedule.apply(made, 8, None)
    assert rates(made) == pytest.approx([1e-1, 1e-3, 1e-4])


def test_gating_keeps_a_scheduled_rate_above_fixmasks():
    schedule, made = RateSchedule(1e-3, 5e-4, 8, 16), optimizer(1e-3)
    for progress, rate in ((0.0, 1e-3), (1.0, 5e-4)):
        assert schedule.apply(made, 3, progress) == pytest.approx(rate)
        schedule.restore(made)


SCHEDULES = {
    "linear": {},
    "cosine": {},
    "constant": {},
    "constant_with_warmup": {},
    "polynomial": {},
    "inverse_sqrt": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.5},
    "warmup_stable_decay": {"num_decay_steps": 10},
}


def highest_rates(make_scheduler, transition=20, steps=40):
    """The highest rates in gating and in fixmask, and fixmask's first, of a run at 1e-4 that asks for 1e-3."""
    made = optimizer(1e-4)
    scheduler = make_scheduler(made)
    schedule = RateSchedule(1e-4, 1e-3, transition, steps)
    used = []
    for step in range(steps):
        if step == transition:
            schedule.begin_fixmask(made, scheduler)
        used.append(schedule.apply(made, step, step / transition if step < transition else None))
        schedule.restore(made)
        made.step()
        scheduler.step()
    return max(used[:transition]), max(used[transition:]), used[transition]


@pytest.mark.parametrize("warmup", [0, 4, 35], ids="warm-up {}".format)
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_of_the_trainer_exceeds_the_rates_that_were_asked(name, warmup):
    """Before, restarts went 33 times and a warm-up beyond gating 10 times above them."""
    settings = {} if name == "constant" else SCHEDULES[name]
    gating, fixmask, first = highest_rates(lambda made: get_scheduler(name, made, warmup, 40, settings))
    assert gating <= 1e-3 * (1 + 1e-9)
    assert fixmask == pytest.approx(1e-3)
    if name in ("linear", "cosine", "constant") and warmup < 20:
        assert first == pytest.approx(1e-3)


def cyclic(made):
    return torch.optim.lr_scheduler.CyclicLR(made, 1e-5, 1e-3, step_size_up=7, cycle_momentum=False)


def one_cycle(made):
    return torch.optim.lr_scheduler.OneCycleLR(made, 1e-2, total_steps=41)


@pytest.mark.parametrize("make", [cyclic, one_cycle], ids=["cyclic", "one cycle"])
def test_schedules_of_ones_own_that_rise_are_held_down(make):
    gating, fixmask, _ = highest_rates(make)
    assert gating <= 1e-3 * (1 + 1e-9)
    assert fixmask <= 1e-3 * (1 + 1e-9)


def test_a_pruned_adapter_trains_at_the_scheduled_rate_and_no_further_than_the_run():
    schedule, made = RateSchedule(1e-3, 2e-2, 0, 16), optimizer(1e-3)
    assert schedule.apply(made, 0, None) == 1e-3
    schedule.restore(made)
    assert schedule.apply(made, 16, None) == 0.0
