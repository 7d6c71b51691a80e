"""Updates within the backward pass: the rule, and when gradients are used up."""

import pytest
import torch
from accelerate.state import GradientState
from torch import nn

from diffpeft.gates.kernels import BETAS
from diffpeft.gates.update.in_backward import DiffMoments, InBackward, Pending, Watched


def fresh(rows: int, columns: int, device: str = "cpu") -> DiffMoments:
    return DiffMoments(*(torch.zeros(size, device=device) for size in ((rows,), (columns,), ())))


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)], ids=str)
def test_the_rule_is_adafactors_without_a_first_moment(device, shape):
    w, moments = torch.randn(shape, device=device), fresh(6, 5, device)
    expected, square, clipped = w.view(6, 5).clone(), torch.zeros(6, 5, device=device), []
    for step in range(6):
        grad = torch.randn(shape, device=device) * (1e-3 if step < 4 else 3e-3)
        square = square * BETAS[1] + grad.view(6, 5).square() * (1 - BETAS[1])
        unbiased = square / (1 - BETAS[1] ** (step + 1))
        second = torch.outer(unbiased.mean(1), unbiased.mean(0)) / unbiased.mean()
        update = grad.view(6, 5) / second.sqrt()
        size = update.square().mean().sqrt()
        clipped.append(bool(size > 1))
        expected = expected * (1 - 0.1 * 0.01) - 0.1 * update / size.clamp_min(1.0)
        assert moments.step(w, grad, rate=0.1, decay=0.01)
        torch.testing.assert_close(w.view(6, 5), expected, rtol=1e-4, atol=1e-5)
    assert set(clipped) == {True, False}


def test_a_row_without_any_gradient_stays(device):
    w, moments = torch.ones(6, 5, device=device), fresh(6, 5, device)
    grad = torch.randn(6, 5, device=device)
    grad[2] = 0
    moments.step(w, grad, rate=0.1, decay=0.0)
    assert bool((w[2] == 1).all())
    assert bool((w[:2] != 1).all())
    assert moments.step(w, torch.zeros(6, 5, device=device), rate=0.1, decay=0.0)
    assert bool(w.isfinite().all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    w, moments = torch.randn(6, 5), fresh(6, 5)
    moments.step(w, torch.randn(6, 5), rate=0.1, decay=0.1)
    before = [tensor.clone() for tensor in (w, *moments)]
    grad = torch.randn(6, 5)
    grad[1, 1] = bad
    assert not moments.step(w, grad, rate=0.1, decay=0.1)
    assert all(torch.equal(a, b) for a, b in zip((w, *moments), before, strict=True))


class Scene:
    """A parameter that is watched, and what it was told."""

    def __init__(self, optimizer=torch.optim.AdamW, in_optimizer=True, held=True, finite=True, **options):
        self.parameter, self.taken, self.pending = nn.Parameter(torch.ones(3)), [], Pending()

        def take(grad, rate, decay):
            self.taken.append((grad.clone(), rate, decay))
            return finite

        watched = [Watched("it", self.parameter, take, in_optimizer, lambda: self.pending)]
        own = [{"params": [nn.Parameter(torch.ones(2))], "lr": 1.0}]
        own += [{"params": [self.parameter], "lr": 0.5}] if held else []
        self.optimizer = optimizer(own, **options)
        self.updates = InBackward(self.optimizer, watched)

    def backward(self, times=1.0):
        (self.parameter * torch.arange(3.0) * times).sum().backward()


def test_a_gradient_is_used_up_with_the_rates_of_its_group():
    scene = Scene(weight_decay=0.1)
    scene.updates.rate_factor = 4.0
    scene.backward()
    grad, rate, decay = scene.taken[0]
    assert grad.tolist() == [0, 1, 2]
    assert (rate, decay) == (2.0, 0.1)
    assert scene.parameter.grad is None
    assert scene.pending == Pending(True, {"it"})
    scene.optimizer.step()
    assert scene.parameter not in scene.optimizer.state


def test_what_was_not_finite_is_noted():
    scene = Scene(finite=False)
    scene.backward()
    assert not scene.pending.finite


def test_gradients_are_used_up_in_the_last_pass_of_an_update(monkeypatch):
    scene = Scene()
    monkeypatch.setattr(GradientState(), "sync_gradients", False)
    scene.backward()
    assert not scene.taken
    assert scene.parameter.grad.tolist() == [0, 1, 2]
    monkeypatch.setattr(GradientState(), "sync_gradients", True)
    scene.backward(2.0)
    assert scene.taken[0][0].tolist() == [0, 3, 6]


def test_a_second_gradient_for_an_update_is_refused():
    scene = Scene()
    scene.backward()
    with pytest.raises(RuntimeError, match=r"it got a gradient twice for one update.*use_reentrant=False.*gate_step"):
        scene.backward()
    scene.pending = Pending()
    scene.backward()


def test_a_run_after_one_that_broke_off_begins_anew():
    scene = Scene()
    scene.backward()
    optimizer = torch.optim.AdamW([scene.parameter], lr=0.25, weight_decay=0.0)
    watched = Watched(
        "it", scene.parameter, lambda *given: scene.taken.append(given) or True, True, lambda: scene.pending
    )
    InBackward(optimizer, [watched])
    scene.backward()
    assert [rate for _, rate, _ in scene.taken] == [0.5, 0.25]


def test_removed_it_leaves_gradients_to_the_optimizer():
    scene = Scene()
    scene.updates.remove()
    scene.backward()
    assert not scene.taken
    assert scene.parameter.grad is not None


def test_a_parameter_lives_no_longer_for_being_watched():
    import weakref

    scene = Scene(held=False, in_optimizer=False)
    seen = weakref.ref(scene.parameter)
    del scene.parameter
    assert seen() is None


def test_what_it_cannot_work_with_is_refused():
    with pytest.raises(ValueError, match=r"not Adam's in SGD; use an optimizer with betas.*or low_memory=False"):
        Scene(torch.optim.SGD)
    with pytest.raises(ValueError, match=r"AdamW\) does not hold 1 diffs, \['it'\].*build it from model.parameters"):
        Scene(held=False)
    Scene(held=False, in_optimizer=False)
