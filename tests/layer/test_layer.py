import copy
import pickle

import pytest
import torch
from torch import nn

from diffpeft import DiffPruningConfig
from diffpeft.layer.layer import DiffPruningLayer


def make_layer(base: nn.Module, **config) -> DiffPruningLayer:
    layer = DiffPruningLayer(base, "m", {})
    layer._active_adapter = ["a"]
    layer.update_layer("a", DiffPruningConfig(**config))
    return layer


def random_diff(layer: DiffPruningLayer, name: str = "weight", k: int = 5) -> None:
    numel = layer.own_parameters()[name].numel()
    where = torch.randperm(numel)[:k].sort().values
    layer.set_diff("a", {name: (where, torch.randn(len(where)))})


class Bare(nn.Module):
    """A parameter on a module with children, as ViT's cls token."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x, *, scale=1.0):
        return self.inner(x + self.token) * scale


@pytest.mark.parametrize(
    ("base", "inputs"),
    [
        (nn.Linear(6, 3), torch.randn(2, 6)),
        (nn.Embedding(7, 4, padding_idx=0), torch.arange(7)),
        (nn.LayerNorm(5), torch.randn(2, 5)),
        (nn.Conv2d(2, 3, 2), torch.randn(1, 2, 4, 4)),
        (Bare(), torch.randn(2, 4)),
    ],
)
def test_any_module_starts_unchanged_and_runs_with_its_diff(base, inputs, device):
    base, inputs = base.to(device), inputs.to(device)
    expected = base(inputs)
    layer = make_layer(base)
    assert torch.equal(layer(inputs), expected)
    name = next(iter(layer.own_parameters()))
    random_diff(layer, name)
    layer.to(device)
    changed = copy.deepcopy(base)
    where, values = layer.sparse("a", name).positions, layer.diffpruning_values["a"][name]
    getattr(changed, name).data.put_(where, values.data, accumulate=True)
    assert torch.equal(layer(inputs), changed(inputs))
    assert not torch.equal(layer(inputs), expected)


def test_gates_are_sampled_in_training_only():
    layer = make_layer(nn.Linear(8, 8), init_weights=False, init_log_alpha=0.0, structured=False)
    x = torch.randn(2, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_reading_a_parameter_gives_the_effective_one():
    layer = make_layer(Bare())
    random_diff(layer, "token", 2)
    assert torch.equal(layer.token, layer.effective("token"))
    assert not torch.equal(layer.token, layer.base_layer.token)
    assert layer.inner is layer.base_layer.inner
    linear = make_layer(nn.Linear(3, 2))
    assert linear.in_features == 3
    random_diff(linear)
    assert not torch.equal(linear.weight, linear.base_layer.weight)
    with pytest.raises(AttributeError, match="nothing"):
        _ = linear.nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gating", [True, False])
def test_merge_equals_unmerged_and_unmerging_restores_every_bit(dtype, gating, device):
    layer = make_layer(nn.Linear(32, 16, device=device, dtype=dtype), init_weights=False)
    if not gating:
        random_diff(layer, k=100)
        layer.to(device)
    layer.eval()
    x = torch.randn(4, 32, device=device, dtype=dtype)
    before = {name: p.detach().clone() for name, p in layer.own_parameters().items()}
    unmerged = layer(x)
    for _ in range(50):
        layer.merge()
        assert torch.equal(layer(x), unmerged)
        layer.unmerge()
    assert not torch.equal(layer.base_layer(x), unmerged)
    for name, parameter in layer.own_parameters().items():
        assert torch.equal(parameter, before[name])


def test_safe_merge_refuses_what_is_not_finite_and_writes_nothing():
    layer = make_layer(nn.Linear(4, 4))
    random_diff(layer)
    layer.diffpruning_values["a"]["weight"].data[2] = float("nan")
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter a"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_positions_follow_a_buffer_that_is_filled_behind_the_layers_back():
    source, target = make_layer(nn.Linear(9, 9)), make_layer(nn.Linear(9, 9))
    random_diff(source)
    random_diff(target)
    assert len(target.sparse("a", "weight").positions)
    target.diffpruning_positions["a"]["weight"].copy_(source.diffpruning_positions["a"]["weight"])
    assert torch.equal(target.sparse("a", "weight").positions, source.sparse("a", "weight").positions)


def test_damaged_positions_name_parameter_and_adapter():
    layer = make_layer(nn.Linear(9, 9))
    random_diff(layer)
    layer.diffpruning_positions["a"]["weight"].fill_(255)
    with pytest.raises(ValueError, match=r"m\.weight, adapter 'a': .*damaged"):
        layer(torch.randn(1, 9))


def test_more_nonzeros_than_elements_is_refused():
    with pytest.raises(ValueError, match=r"m\.weight has no 17 elements"):
        make_layer(nn.Linear(4, 4), nnz_pattern={"m.weight": 17})


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same_and_are_independent(copies):
    layer = make_layer(nn.Linear(6, 6))
    random_diff(layer)
    x = torch.randn(2, 6)
    twin = copies(layer)
    assert torch.equal(twin(x), layer(x))
    twin.diffpruning_values["a"]["weight"].data.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_casting_the_model_leaves_gates_and_values_in_fp32():
    layer = make_layer(nn.Linear(6, 6), init_weights=False)
    layer.bfloat16()
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert {p.dtype for p in layer.adapter_parameters("a")} == {torch.float32}
    assert layer.diffpruning_exp_avg["a"]["weight"].dtype == torch.float32
    assert layer(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_tracing_says_merge_first_and_merged_layers_can_be_traced(grad):
    """Tried too: a whole BERT, in gating and fixmask, with adapters disabled, and `torch.onnx.export`, which traces."""
    layer, x = make_layer(nn.Linear(6, 3)).eval(), torch.randn(2, 6)
    random_diff(layer)
    with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match="merge first"):
        torch.jit.trace(layer, x)
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)


@pytest.mark.parametrize("gating", [True, False], ids=["gating", "fixmask"])
@pytest.mark.parametrize(
    ("base", "x"),
    [
        (nn.Linear(6, 3), torch.randn(2, 4, 6)),
        (nn.Linear(6, 3, bias=False), torch.randn(40, 6)),
        (nn.Embedding(7, 3), torch.randint(7, (2, 4))),
        (nn.LayerNorm(6), torch.randn(2, 4, 6)),
        (nn.Conv1d(6, 3, 1), torch.randn(2, 6, 4)),
    ],
    ids=["linear", "no_bias", "embedding", "norm", "conv1d"],
)
def test_models_may_write_into_what_a_layer_returns(base, x, gating):
    """Gradients too are as without writing. Tried too: Hubert, SpeechT5, UniSpeech, Data2Vec with masks over time."""
    torch.manual_seed(2)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(x.shape) if x.is_floating_point() else x
    layer = make_layer(base, init_weights=False).train()
    if not gating:
        random_diff(layer, k=100)
    trained, gradients = [p for p in layer.parameters() if p.requires_grad], []
    for inplace in (True, False):
        torch.manual_seed(0)
        output = layer(x)
        if inplace:
            output += 0.1
            output[output > 2] = 0.5
            torch.relu_(torch.dropout_(output, 0.5, True))
        else:
            output = output + 0.1
            output = torch.relu(torch.dropout(output.masked_fill(output > 2, 0.5), 0.5, True))
        gradients.append(torch.autograd.grad(output.square().sum(), trained, allow_unused=True))
    assert any(gradient is not None and gradient.any() for gradient in gradients[1])
    torch.testing.assert_close(*gradients)
