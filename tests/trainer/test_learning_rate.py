import pytest
import torch

from diffpeft.trainer.learning_rate import RateSchedule


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
def test_every_group_begins_fixmask_at_its_rate_and_warms_up(warmup):
    schedule, made = RateSchedule(1e-3, 2e-2, 8, 16, warmup), optimizer(1e-3, 5e-4, 0.0)
    schedule.begin_fixmask(made)
    assert schedule.fixmask_factors == [20.0, 40.0, 1.0]
    for step, share in ((8, 0.25), (11, 1.0), (15, 1.0)):
        schedule.apply(made, step, None)
        assert rates(made) == pytest.approx([share * 2e-2, share * 2e-2, 0.0])
        schedule.restore(made)


def test_a_pruned_adapter_trains_at_the_scheduled_rate_and_no_further_than_the_run():
    schedule, made = RateSchedule(1e-3, 2e-2, 0, 16), optimizer(1e-3)
    assert schedule.apply(made, 0, None) == 1e-3
    schedule.restore(made)
    assert schedule.apply(made, 16, None) == 0.0
