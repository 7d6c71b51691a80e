"""What the authors' released code computes, reproduced (reference/README.md)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gate_groups import penalty_gradient
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from diffpeft import DiffPruningConfig, DiffPruningLayer
from diffpeft.gates import functions, kernels
from diffpeft.gates import hard_concrete as gates
from diffpeft.gates.forward_pass import ForwardPass
from diffpeft.gates.small_parameters import SmallParameter
from diffpeft.gates.update.rules import StepSettings, fixed_lambda_step
from diffpeft.gates.update.state import Group, StoredGates
from diffpeft.sparse.top_k import global_top_k

DIRECTORY = Path(__file__).parent
TENSORS = load_file(DIRECTORY / "official_gates.safetensors")
FACTS = json.loads((DIRECTORY / "official_gates.json").read_text())
STRETCH = tuple(FACTS["stretch"])
LAMBDA = FACTS["lambda"]
GATED, UNGATED = FACTS["gated"], FACTS["ungated"]
KINDS = ("w", "log_alpha", "group_log_alpha")

each_step = pytest.mark.parametrize("step", range(FACTS["steps"]))
each_cut = pytest.mark.parametrize("cut", FACTS["prune"], ids=lambda cut: str(cut["target_density"]))


def assert_close(actual: Tensor | float, expected: Tensor | float) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=1e-6, atol=1e-6)


def recorded(step: int, kind: str, name: str) -> Tensor:
    return TENSORS[f"step{step}/{kind}/{name}"]


def state(step: int) -> dict[str, dict[str, Tensor]]:
    """Leaves by kind and name: w of all parameters, log_alpha of the gated ones."""
    return {
        kind: {name: recorded(step, kind, name).clone().requires_grad_() for name in names}
        for kind, names in zip(KINDS, (GATED + UNGATED, GATED, GATED), strict=True)
    }


def net(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = F.linear(x, parameters["encoder.weight"], parameters["encoder.bias"])
    hidden = torch.tanh(F.layer_norm(hidden, (8,), parameters["norm.weight"], parameters["norm.bias"]))
    return F.linear(hidden, parameters["classifier.weight"], parameters["classifier.bias"])


def task_loss(leaves: dict[str, dict[str, Tensor]], step: int) -> Tensor:
    effective = {name: TENSORS[f"pretrained/{name}"] + leaves["w"][name] for name in UNGATED}
    for name in GATED:
        noise = recorded(step, "u", name), recorded(step, "group_u", name)
        leaf = (leaves[kind][name] for kind in KINDS)
        effective[name] = gates.gated_parameter(TENSORS[f"pretrained/{name}"], *leaf, STRETCH, noise)
    return F.cross_entropy(net(effective, TENSORS["x"]), TENSORS["y"])


def group(step: int, name: str) -> Group:
    """The gates of a parameter with the recorded gradients and no moments yet."""
    gate = []
    for kind in KINDS[1:]:
        log_alpha, grad = recorded(step, kind, name).clone(), recorded(step, f"grad_{kind}", name).clone()
        gate.append(StoredGates(log_alpha, grad, torch.zeros_like(grad), torch.zeros_like(grad)))
    return Group(*gate)


class Net(nn.Module):
    """The same net as a module, with the pretrained parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm, self.classifier = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.load_state_dict({name: TENSORS[f"pretrained/{name}"] for name in GATED + UNGATED})

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.norm(self.encoder(x))))


@pytest.fixture
def adapted(step: int, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The net as a user adapts it, in the recorded state and with the recorded noise."""
    config = DiffPruningConfig(
        target_modules=["encoder", "norm"],
        modules_to_save=["classifier"],
        structured=True,
        group_penalty="additive",
        stretch=STRETCH,
    )
    model = get_peft_model(Net(), config)
    noise = {}
    with torch.no_grad():
        for name, leaves in adapter_leaves(model).items():
            for kind, leaf in leaves.items():
                pretrained = TENSORS[f"pretrained/{name}"] if name in UNGATED else 0
                leaf.copy_(pretrained + recorded(step, kind, name))
            if name in GATED:
                noise[name] = recorded(step, "u", name), recorded(step, "group_u", name)
    keys = sorted(noise)

    def seed_of(self: ForwardPass, key: tuple[str, str, str]) -> Tensor:
        return torch.tensor([keys.index(f"{key[0]}.{key[2]}"), 0])

    def small_noise(small: list[SmallParameter], layout: object) -> tuple[Tensor, Tensor]:
        own = [noise[keys[one.seed[0]]] for one in small]
        return tuple(torch.cat([pair[kind].reshape(-1) for pair in own]) for kind in (0, 1))

    monkeypatch.setattr(ForwardPass, "seed", seed_of)
    monkeypatch.setattr(ForwardPass, "seed_of", seed_of)
    monkeypatch.setattr("diffpeft.gates.small_parameters._noise", small_noise)
    monkeypatch.setattr(kernels, "uniform", lambda seed, positions: noise[keys[seed[0]]][0].reshape(-1)[positions])
    monkeypatch.setattr(functions, "uniform", lambda seed, position: noise[keys[seed[0]]][1].reshape(()))
    return model.train()


def layers(model: nn.Module) -> list[DiffPruningLayer]:
    return [module for module in model.modules() if isinstance(module, DiffPruningLayer)]


def adapter_leaves(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """What the adapter trains, by the base model's parameter and by kind."""
    head = model.base_model.model.classifier.modules_to_save["default"]
    leaves = {f"classifier.{name}": {"w": parameter} for name, parameter in head.named_parameters()}
    for layer in layers(model):
        for name in layer.own_parameters():
            kinds = {kind: getattr(layer, f"diffpruning_{kind}")["default"][name] for kind in KINDS}
            leaves[layer.parameter_key(name)] = kinds
    return leaves


@each_step
@pytest.mark.parametrize("name", GATED)
def test_gates_follow_from_the_noise(step, name):
    for prefix in ("", "group_"):
        log_alpha, noise = recorded(step, f"{prefix}log_alpha", name), recorded(step, f"{prefix}u", name)
        assert_close(gates.gate(log_alpha, noise, STRETCH), recorded(step, f"{prefix}z", name))


@each_step
def test_loss_and_task_gradients(step):
    leaves = state(step)
    loss = task_loss(leaves, step)
    loss.backward()
    assert_close(loss, FACTS["loss"][step])
    for name in GATED + UNGATED:
        assert_close(leaves["w"][name].grad, recorded(step, "grad_w", name))
    for name in GATED:
        assert_close(leaves["log_alpha"][name].grad, recorded(step, "task_grad_log_alpha", name))
        assert_close(leaves["group_log_alpha"][name].grad, recorded(step, "task_grad_group_log_alpha", name))


@each_step
def test_expected_l0_and_gradients_with_the_penalty(step):
    leaves = state(step)
    terms = [
        gates.expected_l0(leaves["log_alpha"][name], leaves["group_log_alpha"][name], STRETCH, "additive")
        for name in GATED
    ]
    assert_close(sum(terms), FACTS["expected_l0"][step])
    (task_loss(leaves, step) + LAMBDA * sum(terms)).backward()
    for name in GATED:
        for kind in KINDS:
            assert_close(leaves[kind][name].grad, recorded(step, f"grad_{kind}", name))


@each_step
@pytest.mark.parametrize("name", GATED)
def test_closed_form_penalty_gradient_is_the_released_one(step, name):
    for kind, by in zip(KINDS[1:], penalty_gradient(group(step, name), STRETCH, "additive"), strict=True):
        assert_close(recorded(step, f"task_grad_{kind}", name) + LAMBDA * by, recorded(step, f"grad_{kind}", name))


def test_fixed_lambda_steps_follow_the_released_trajectory():
    decay = 1 - 0.1 * 0.01  # the recording used AdamW's default weight decay, which the package leaves out
    groups = [group(0, name) for name in GATED]
    for step in range(FACTS["steps"] - 1):
        for name, pair in zip(GATED, groups, strict=True):
            for gate, now in zip(pair, group(step, name), strict=True):
                gate.grad.copy_(now.grad)
                gate.log_alpha.mul_(decay)
        # The recorded gradients hold the penalty's.
        fixed_lambda_step(groups, 0.0, "additive", StepSettings(step, 0.1, STRETCH))
        for name, pair in zip(GATED, groups, strict=True):
            for gate, after in zip(pair, group(step + 1, name), strict=True):
                assert_close(gate.log_alpha, after.log_alpha)


@each_step
def test_the_adapted_model_has_the_released_loss_and_gradients(step, adapted):
    loss = F.cross_entropy(adapted(TENSORS["x"]), TENSORS["y"])
    penalty = adapted.base_model.l0_penalty()
    (loss + LAMBDA * penalty).backward()
    assert_close(loss, FACTS["loss"][step])
    assert_close(penalty, FACTS["expected_l0"][step])
    for name, leaves in adapter_leaves(adapted).items():
        for kind, leaf in leaves.items():
            assert_close(leaf.grad, recorded(step, f"grad_{kind}", name))


@each_step
def test_the_adapted_model_changes_as_many_entries_as_the_released_gates_leave_open(step, adapted):
    for leaves in adapter_leaves(adapted).values():
        leaves["w"].data.fill_(1.0)
    changed = [
        layer.effective(name) != base for layer in layers(adapted) for name, base in layer.own_parameters().items()
    ]
    assert sum(int(mask.sum()) for mask in changed) == FACTS["nonzero"][step]


def open_probability64(log_alpha: Tensor, stretch: tuple[float, float]) -> np.ndarray:
    return 1 / (1 + np.exp(math.log(-stretch[0] / stretch[1]) - log_alpha.numpy().astype(np.float64)))


@each_step
@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize(
    ("stretch", "dtype", "atol"),
    [(STRETCH, torch.float32, 3e-7), (STRETCH, torch.float64, 0), ((-0.1, 1.1), torch.float64, 0)],
    ids=["float32", "float64", "asymmetric float64"],
)
def test_product_form_and_its_gradients_are_the_closed_form_in_float64(step, name, stretch, dtype, atol):
    leaves = [recorded(step, kind, name).to(dtype, copy=True) for kind in KINDS[1:]]
    element, group_gate = (open_probability64(leaf, stretch) for leaf in leaves)
    expected = group_gate * element * (1 - element), element.sum() * group_gate * (1 - group_gate)

    closed_form = penalty_gradient(Group(*(StoredGates(leaf, leaf, leaf, leaf) for leaf in leaves)), stretch, "product")
    penalty = gates.expected_l0(*(leaf.requires_grad_() for leaf in leaves), stretch, "product")
    by_autograd = torch.autograd.grad(penalty, leaves)

    np.testing.assert_allclose(penalty.item(), (group_gate * element.sum()).item(), rtol=1e-6)
    for actual in (closed_form, by_autograd):
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6, atol=atol)
        np.testing.assert_allclose(actual[1], expected[1], rtol=1e-6, atol=atol)


DIFFS = {name: TENSORS[f"prune/{name}"] for name in FACTS["prune"][0]["kept"]}


@each_cut
def test_released_threshold_keeps_the_released_counts(cut):
    kept = {name: int((diff.abs() >= cut["threshold"]).sum()) for name, diff in DIFFS.items()}
    assert kept == cut["kept"]


@each_cut
def test_pruning_keeps_exactly_the_target_and_all_that_the_released_bisection_keeps(cut):
    k = round(cut["target_density"] * sum(diff.numel() for diff in DIFFS.values()))
    kept, threshold = global_top_k([lambda diff=diff: [diff.abs()] for diff in DIFFS.values()], k)
    assert sum(positions.numel() for positions in kept) == k
    for positions, diff in zip(kept, DIFFS.values(), strict=True):
        magnitudes = diff.abs().reshape(-1)
        released = torch.nonzero(magnitudes >= cut["threshold"]).squeeze(1)
        assert set(released.tolist()) <= set(positions.tolist())
        assert (magnitudes[released] >= threshold.value).all()
