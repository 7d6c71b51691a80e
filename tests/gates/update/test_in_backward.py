"""Steps within the backward pass: when gradients are used, and with which rates."""

import pytest
import torch
from accelerate.state import GradientState
from torch import nn

from diffpeft.gates.update.held import UpdateStatus
from diffpeft.gates.update.in_backward import BackwardStep, InBackward


class Scene:
    """A parameter that steps, and what its step was given."""

    def __init__(self, optimizer=torch.optim.AdamW, in_optimizer=True, held=True, finite=True, **options):
        self.parameter, self.given, self.status = nn.Parameter(torch.ones(3)), [], UpdateStatus()

        def step(grad, rate, decay):
            self.given.append((grad.clone(), rate, decay))
            return finite

        steps = [BackwardStep("it", self.parameter, step, in_optimizer, lambda: self.status)]
        own = [{"params": [nn.Parameter(torch.ones(2))], "lr": 1.0}]
        own += [{"params": [self.parameter], "lr": 0.5}] if held else []
        self.optimizer = optimizer(own, **options)
        self.updates = InBackward(self.optimizer, steps)

    def backward(self, times=1.0):
        (self.parameter * torch.arange(3.0) * times).sum().backward()


def test_a_gradient_is_used_with_the_rates_of_its_group():
    scene = Scene(weight_decay=0.1)
    scene.updates.rate_factor = 4.0
    scene.backward()
    grad, rate, decay = scene.given[0]
    assert grad.tolist() == [0, 1, 2]
    assert (rate, decay) == (2.0, 0.1)
    assert scene.parameter.grad is None
    assert scene.status == UpdateStatus(True, {"it"})
    scene.optimizer.step()
    assert scene.parameter not in scene.optimizer.state


def test_what_was_not_finite_is_noted():
    scene = Scene(finite=False)
    scene.backward()
    assert not scene.status.finite


def test_gradients_are_used_in_the_last_pass_of_an_update(monkeypatch):
    scene = Scene()
    monkeypatch.setattr(GradientState(), "sync_gradients", False)
    scene.backward()
    assert not scene.given
    assert scene.parameter.grad.tolist() == [0, 1, 2]
    monkeypatch.setattr(GradientState(), "sync_gradients", True)
    scene.backward(2.0)
    assert scene.given[0][0].tolist() == [0, 3, 6]


def test_a_second_gradient_for_an_update_is_refused():
    scene = Scene()
    scene.backward()
    with pytest.raises(RuntimeError, match=r"it got a gradient twice for one update.*use_reentrant=False.*gate_step"):
        scene.backward()
    scene.status = UpdateStatus()
    scene.backward()


def test_a_run_after_one_that_broke_off_begins_again():
    scene = Scene()
    scene.backward()
    optimizer = torch.optim.AdamW([scene.parameter], lr=0.25, weight_decay=0.0)
    step = BackwardStep(
        "it", scene.parameter, lambda *given: scene.given.append(given) or True, True, lambda: scene.status
    )
    InBackward(optimizer, [step])
    scene.backward()
    assert [rate for _, rate, _ in scene.given] == [0.5, 0.25]


def test_removed_it_leaves_gradients_to_the_optimizer():
    scene = Scene()
    scene.updates.remove()
    scene.backward()
    assert not scene.given
    assert scene.parameter.grad is not None


def test_a_parameter_lives_no_longer_for_its_hook():
    import weakref

    scene = Scene(held=False, in_optimizer=False)
    seen = weakref.ref(scene.parameter)
    del scene.parameter
    assert seen() is None


def test_what_it_cannot_work_with_is_refused():
    with pytest.raises(ValueError, match=r"not Adam's in SGD; use an optimizer with betas.*or low_memory=False"):
        Scene(torch.optim.SGD)
    with pytest.raises(ValueError, match=r"optimizer lacks 1 diffs, \['it'\].*build it from model.parameters"):
        Scene(held=False)
    Scene(held=False, in_optimizer=False)
