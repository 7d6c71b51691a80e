"""Small parameters made at once against each made by itself."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from diffpeft import DiffPruningConfig
from diffpeft.gates.forward_pass import Workspace
from diffpeft.gates.functions import GatedTensors, GateSample, gated_parameter_sampled
from diffpeft.gates.noise import new_seed
from diffpeft.gates.small_parameters import SmallParameter, small_parameters
from diffpeft.layer import run

STRETCH = (-1.5, 1.5)
SHAPES = [(5,), (3, 4), (1,), (7,)]


def make_parts(device, structured, dtype=torch.float32):
    torch.manual_seed(0)
    parts = []
    for shape in SHAPES:
        base = torch.randn(shape, device=device).to(dtype)
        w, log_alpha = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
        group = torch.full((1,), 0.3, device=device, requires_grad=True) if structured else None
        parts.append(SmallParameter(GatedTensors(base, w, log_alpha, group), new_seed()))
    return parts


def leaves_of(parts):
    return [leaf for part in parts for leaf in part.tensors[1:] if leaf is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("used", [(0, 1, 2, 3), (1, 3)])
def test_values_and_gradients_are_those_of_each_alone(device, structured, dtype, used):
    parts = make_parts(device, structured, dtype)
    upstream = [torch.randn(part.tensors.base.shape, device=device).to(dtype) for part in parts]
    results = []
    for alone in (False, True):
        if alone:
            made = [
                gated_parameter_sampled(part.tensors, GateSample(part.seed, STRETCH, False, Workspace()))
                for part in parts
            ]
        else:
            made = list(small_parameters(parts, STRETCH))
        for leaf in leaves_of(parts):
            leaf.grad = None
        torch.autograd.backward([made[index] for index in used], [upstream[index] for index in used])
        assert [tensor.dtype for tensor in made] == [dtype] * len(parts)
        results.append([tensor.detach() for tensor in made] + [leaf.grad for leaf in leaves_of(parts)])
    for together, alone in zip(*results, strict=True):
        assert (together is None) == (alone is None)
        if alone is not None and device == "cpu":
            assert torch.equal(together, alone)
        elif alone is not None:
            torch.testing.assert_close(together, alone)


def test_backward_may_come_through_the_parts_one_by_one(device):
    parts = make_parts(device, True)
    for at_once in (True, False):
        made = small_parameters(parts, STRETCH)
        losses = [tensor.square().sum() for tensor in made]
        if at_once:
            sum(losses).backward()
            expected = [leaf.grad for leaf in leaves_of(parts)]
            for leaf in leaves_of(parts):
                leaf.grad = None
        else:
            for loss in losses:
                loss.backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves_of(parts)], expected, rtol=0, atol=0)


@pytest.mark.parametrize("structured", [True, False])
def test_a_model_learns_the_same_either_way(tiny_bert, batch, monkeypatch, structured):
    results = []
    for most in (run.MAX_SMALL_ELEMENTS, 0):
        monkeypatch.setattr(run, "MAX_SMALL_ELEMENTS", most)
        torch.manual_seed(0)
        config = DiffPruningConfig(task_type="SEQ_CLS", structured=structured, init_weights=False, init_log_alpha=0.0)
        model = get_peft_model(tiny_bert(), config).train()
        torch.manual_seed(1)
        loss = model(**batch()).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)

    def forward(self, x):
        return self.second(self.first(x))


def test_small_parameters_of_a_pass_are_made_once(monkeypatch):
    calls = []

    def counted(parts, stretch):
        calls.append(len(parts))
        return small_parameters(parts, stretch)

    monkeypatch.setattr(run, "small_parameters", counted)
    model = get_peft_model(Norms(), DiffPruningConfig(target_density=0.5)).train()
    x = torch.randn(2, 4)
    model(x)
    model(x)
    assert calls == [4, 4]
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert calls == [4, 4]
    model.train().base_model.model.second.eval()
    model(x)
    assert calls == [4, 4, 2]
