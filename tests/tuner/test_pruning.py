"""An optimizer goes on with new parameters in place of old ones."""

import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn

from diffpeft import DiffPruningConfig
from diffpeft.tuner import pruning
from diffpeft.tuner.pruning import check_replaceable, replace_parameters


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((size,), float(size))) for size in range(1, 6)]


@pytest.fixture
def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with two groups of different settings and one step behind it."""
    first = {"params": parameters[:3], "lr": 0.1, "weight_decay": 0.5}
    made = torch.optim.AdamW([first, {"params": parameters[3:], "lr": 0.2}], weight_decay=0.0)
    sum(parameter.sum() for parameter in parameters).backward()
    made.step()
    return made


def test_new_parameters_stand_where_the_old_ones_stood(optimizer, parameters):
    new = nn.Parameter(torch.zeros(7))
    replace_parameters(optimizer, {parameters[1]: new, parameters[2]: None, parameters[3]: None})
    held = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    assert held == [[id(parameters[0]), id(new)], [id(parameters[4])]]


def test_groups_keep_their_settings_even_where_nothing_is_left(optimizer, parameters):
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    replace_parameters(optimizer, dict.fromkeys(parameters[3:]))
    assert optimizer.param_groups[1]["params"] == []
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == settings
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.5), (0.2, 0.0)]


def test_state_of_old_parameters_goes_and_that_of_others_stays(optimizer, parameters):
    kept = optimizer.state[parameters[0]]["exp_avg"].clone()
    new = nn.Parameter(torch.zeros(7))
    replace_parameters(optimizer, {parameters[1]: new, parameters[2]: None})
    assert set(optimizer.state) == {parameters[0], *parameters[3:]}
    assert torch.equal(optimizer.state[parameters[0]]["exp_avg"], kept)


def test_the_next_step_moves_the_new_parameter_and_no_old_one(optimizer, parameters):
    new = nn.Parameter(torch.zeros(7))
    replace_parameters(optimizer, {parameters[1]: new})
    before = parameters[1].detach().clone()
    for parameter in (*parameters, new):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(parameters[1], before)
    torch.testing.assert_close(new.detach(), torch.full((7,), -0.1))  # a first step of Adam, so its state is fresh


def test_state_fits_an_optimizer_made_anew_for_the_new_parameters(optimizer, parameters):
    new = nn.Parameter(torch.zeros(7))
    replace_parameters(optimizer, {parameters[0]: new, parameters[4]: None})
    new.grad = torch.ones_like(new)
    optimizer.step()
    fresh = torch.optim.AdamW([{"params": [new, *parameters[1:3]]}, {"params": [parameters[3]]}])
    fresh.load_state_dict(optimizer.state_dict())
    for parameter in (new, *parameters[1:4]):
        assert torch.equal(fresh.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_parameters_that_the_optimizer_lacks_cannot_be_replaced(optimizer, parameters):
    strangers = {nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))}
    message = r"does not hold 2 parameters; build it from model.parameters\(\)"
    with pytest.raises(ValueError, match=message):
        check_replaceable(optimizer, {*parameters[2:4], *strangers})


def test_parameters_of_any_group_can_be_replaced(optimizer, parameters):
    check_replaceable(optimizer, set(parameters))
    check_replaceable(optimizer, set())


def test_memory_is_given_back_when_nothing_holds_w_any_more(monkeypatch):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), DiffPruningConfig(target_density=0.2, init_weights=False))
    (w, *_) = [weakref.ref(p) for name, p in model.named_parameters() if "diffpruning_w" in name]
    alive = []
    monkeypatch.setattr(pruning, "release_memory", lambda: alive.append(w()))
    model.base_model.magnitude_prune()
    assert alive == [None]
    monkeypatch.undo()
    pruning.release_memory()
