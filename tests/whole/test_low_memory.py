"""The low-memory mode in models: what training leaves behind, beside the plain mode, and what is refused."""

import math

import pytest
import torch
from accelerate.state import GradientState
from gating_models import make
from peft import PeftModel
from transformers import AlbertConfig, AlbertForSequenceClassification, BertConfig, BertForSequenceClassification

from diffpeft.gates import hard_concrete as gates
from diffpeft.gates.update.collect import groups_of
from diffpeft.gates.update.kernels import BETAS
from diffpeft.gates.update.low_memory import LowMemoryGates


def low_memory_model(base, optimizer=True, **config):
    model = make(base, low_memory=True, **config)
    model.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model.updates = model.base_model.update_in_backward(model.optimizer) if optimizer else None
    return model


def pass_through(model, batch, seed=7):
    torch.manual_seed(seed)
    model(**batch).loss.backward()


def parts_of(model):
    """For each parameter: its layer, its name there and the gates of its elements."""
    return {
        layer.parameter_key(name): (layer, name, pair[0])
        for layer in model.base_model.all_layers()
        for name, pair in groups_of(layer, "default").items()
    }


def first_moment(low):
    return low.exp_avg * low.scale.unsqueeze(1)


def tiny_albert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64}
    others = {"embedding_size": 16, "num_attention_heads": 2, "max_position_embeddings": 32}
    return AlbertForSequenceClassification(AlbertConfig(**sizes, **others))


def check_against_plain(plain, low, uses=1):
    """Moments after one backward pass of both, from the plain model's gradients."""
    large = 0
    for key, (layer, name, gates_) in parts_of(low).items():
        plain_layer, _, plain_gates = parts_of(plain)[key]
        grad, w_grad = plain_gates.log_alpha.grad, plain_layer.diffpruning_w["default"][name].grad
        assert gates_.log_alpha.grad is None
        if not isinstance(gates_, LowMemoryGates):
            torch.testing.assert_close(gates_.exp_avg, (1 - BETAS[0]) * grad)
            continue
        large += 1
        error = (first_moment(gates_) - (1 - BETAS[0]) * grad).abs()
        if uses == 1:
            assert bool((error <= gates_.scale.unsqueeze(1) * 1.001 + 1e-12).all())
        else:  # rounded in units of what it was between uses
            assert float(error.mean() / grad.abs().mean()) < 0.02 * (1 - BETAS[0]) * uses
        if uses == 1:
            torch.testing.assert_close(gates_.rows, (1 - BETAS[1]) * grad.square().mean(1), rtol=1e-4, atol=1e-20)
            torch.testing.assert_close(gates_.columns, (1 - BETAS[1]) * grad.square().mean(0), rtol=1e-4, atol=1e-20)
        w = layer.diffpruning_w["default"][name]
        assert w.grad is None
        rows = layer.diffpruning_w_sq_rows["default"][name]
        torch.testing.assert_close(rows, (1 - BETAS[1]) * w_grad.square().mean(1), rtol=1e-4, atol=1e-20)
        assert not torch.equal(w, plain_layer.diffpruning_w["default"][name])
    return large


def test_a_backward_pass_leaves_moments_and_updated_diffs_and_no_gradients(low_memory_tiny_bert, batch):
    plain, low = make(low_memory_tiny_bert()), low_memory_model(low_memory_tiny_bert())
    before = {key: gates.log_alpha.clone() for key, (_, _, gates) in parts_of(low).items()}
    for model in (plain, low):
        pass_through(model, batch())
    assert check_against_plain(plain, low) == 15
    assert all(torch.equal(before[key], gates.log_alpha) for key, (_, _, gates) in parts_of(low).items())
    low.base_model.gate_step(5, 10)
    low.optimizer.step()
    large = {name for name, p in low.named_parameters() if "diffpruning_w." in name and p.numel() > 1000}
    states = {id(parameter) for parameter in low.optimizer.state}
    assert not any(id(p) in states for name, p in low.named_parameters() if name in large or "log_alpha" in name)
    assert all(not torch.equal(before[key], gates.log_alpha) for key, (_, _, gates) in parts_of(low).items())


def test_a_parameter_that_is_used_three_times_is_updated_once_from_all_uses(low_memory_tiny_bert, batch):
    plain, low = make(tiny_albert()), low_memory_model(tiny_albert())
    for model in (plain, low):
        pass_through(model, batch())
    assert check_against_plain(plain, low, uses=3) > 5


def test_accumulated_gradients_are_those_of_one_batch(low_memory_tiny_bert, batch, monkeypatch):
    plain, low = make(low_memory_tiny_bert()), low_memory_model(low_memory_tiny_bert())
    units = {}  # of the int8 moments, which were rounded to them twice
    for seed in (1, 2):
        monkeypatch.setattr(GradientState(), "sync_gradients", seed == 2)
        for model in (plain, low):
            pass_through(model, batch(seed=seed), seed)
        for key, (_, _, gates_) in parts_of(low).items():
            if isinstance(gates_, LowMemoryGates):
                units[key] = units.get(key, 0.0) + gates_.scale.unsqueeze(1)
    for key, (layer, name, gates_) in parts_of(low).items():
        plain_layer, _, plain_gates = parts_of(plain)[key]
        w_grad = plain_layer.diffpruning_w["default"][name].grad
        if isinstance(gates_, LowMemoryGates):
            error = (first_moment(gates_) - (1 - BETAS[0]) * plain_gates.log_alpha.grad).abs()
            assert bool((error <= units[key] * 1.001 + 1e-12).all())
            rows = layer.diffpruning_w_sq_rows["default"][name]
            torch.testing.assert_close(rows, (1 - BETAS[1]) * w_grad.square().mean(1), rtol=1e-4, atol=1e-20)
        else:
            torch.testing.assert_close(gates_.exp_avg, (1 - BETAS[0]) * plain_gates.log_alpha.grad)


def test_gradient_checkpointing_changes_nothing(low_memory_tiny_bert, batch):
    runs = []
    for checkpointing in (False, True):
        model = low_memory_model(low_memory_tiny_bert())
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        pass_through(model, batch())
        runs.append(model.state_dict())
    for key, tensor in runs[0].items():
        if "sq" in key or "diffpruning_w." in key:
            torch.testing.assert_close(runs[1][key], tensor, rtol=1e-4, atol=1e-12)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_of_shared_layers_is_noticed(low_memory_tiny_bert, batch):
    model = low_memory_model(tiny_albert())
    albert = model.base_model.model.albert.encoder
    inner = albert.albert_layer_groups[0]
    plain_forward = inner.forward

    def checkpointed(hidden, *args, **kwargs):
        return torch.utils.checkpoint.checkpoint(
            lambda x: plain_forward(x, *args, **kwargs), hidden, use_reentrant=True
        )

    inner.forward = checkpointed
    with pytest.raises(RuntimeError, match=r"got a gradient twice for one update.*use_reentrant=False"):
        pass_through(model, batch())


def test_an_update_that_is_not_finite_is_skipped(low_memory_tiny_bert, batch):
    model = low_memory_model(low_memory_tiny_bert())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    (model(**batch()).loss * torch.nan).backward()
    assert math.isnan(model.base_model.gate_step(5, 10))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    pass_through(model, batch())
    assert model.base_model.gate_step(5, 10) > 0


def test_evaluation_and_pruning_are_those_of_plain_gates_with_the_same_numbers(low_memory_tiny_bert, batch, tmp_path):
    plain, low = make(low_memory_tiny_bert()), low_memory_model(low_memory_tiny_bert())
    torch.testing.assert_close(plain.eval()(**batch()).logits, low.eval()(**batch()).logits)
    one, other = plain.base_model, low.base_model
    assert one.expected_nonzeros() == other.expected_nonzeros()
    torch.testing.assert_close(one.l0_penalty(), other.l0_penalty())
    assert one.num_nonzeros() == other.num_nonzeros()
    low.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(low_memory_tiny_bert(), tmp_path)
    mine, theirs = low.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]) for key in mine)
    for model in (one, other):
        model.magnitude_prune()
    mine, theirs = one.get_diff(), other.get_diff()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(a, b) for key in mine for a, b in zip(mine[key], theirs[key], strict=True))


@pytest.mark.parametrize("cast", ["half", "float", "double", "bfloat16"])
def test_casts_of_the_model_leave_the_adapter_as_it_is(low_memory_tiny_bert, cast):
    model = low_memory_model(low_memory_tiny_bert())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "diffpruning" in key}
    getattr(model, cast)()
    after = model.state_dict()
    assert all(after[key].dtype == tensor.dtype and torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("layer_type", ["conv", "shared head"])
def test_convolutions_and_tied_weights(low_memory_tiny_bert, layer_type):
    torch.manual_seed(0)
    if layer_type == "conv":
        base = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Flatten(), torch.nn.LazyLinear(2))
        inputs = torch.randn(4, 8, 5, 5)
        base(inputs)
    else:
        base = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 50))
        base[1].weight = base[0].weight
        inputs = torch.randint(50, (4, 6))
    model = low_memory_model(base, task_type=None, modules_to_save=None)
    low = [gates for _, _, gates in parts_of(model).values() if isinstance(gates, LowMemoryGates)]
    assert len(low) == 1
    model(inputs).square().sum().backward()
    assert bool(low[0].rows.any())
    before = low[0].log_alpha.clone()
    assert model.base_model.gate_step(5, 10) > 0
    assert not torch.equal(low[0].log_alpha, before)
    model.base_model.magnitude_prune(optimizer=model.optimizer)
    model(inputs).square().sum().backward()
    model.optimizer.step()


def test_pruning_ends_the_updates_and_leaves_a_usual_fixmask(low_memory_tiny_bert, batch):
    model = low_memory_model(low_memory_tiny_bert())
    pass_through(model, batch())
    model.base_model.gate_step(0, 10)
    model.base_model.magnitude_prune(optimizer=model.optimizer)
    pass_through(model, batch())
    values = [p for name, p in model.named_parameters() if "diffpruning_values" in name]
    assert all(p.grad is not None for p in values)
    assert not any("exp_avg" in key or "_sq" in key for key in model.state_dict())
    with pytest.raises(ValueError, match=r"is in fixmask .*update_in_backward is for gating with"):
        model.base_model.update_in_backward(model.optimizer)


def test_an_adapter_that_does_not_train_does_not_change(low_memory_tiny_bert, batch):
    model = low_memory_model(low_memory_tiny_bert())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name and "modules_to_save" in name)
    pass_through(model, batch())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_state_takes_eleven_bytes_a_parameter():
    torch.manual_seed(0)
    sizes = {"vocab_size": 2000, "hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 1024}
    base = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4))
    total = sum(parameter.numel() for parameter in base.parameters())
    model = low_memory_model(base)
    pass_through(model, {"input_ids": torch.randint(2000, (2, 8)), "labels": torch.tensor([0, 1])})
    model.base_model.gate_step(5, 10)
    model.optimizer.step()
    model.optimizer.zero_grad()
    state = [t for s in model.optimizer.state.values() for t in s.values()]
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None), *state]
    assert 11 < sum(t.numel() * t.element_size() for t in held) / total <= 11.5


def test_what_would_train_wrongly_is_refused(low_memory_tiny_bert, batch, monkeypatch):
    model = low_memory_model(low_memory_tiny_bert(), optimizer=False)
    pass_through(model, batch())
    with pytest.raises(ValueError, match=r"the diff of .* has a gradient.*call update_in_backward\(optimizer\)"):
        model.base_model.gate_step(0, 10)
    model = low_memory_model(low_memory_tiny_bert())
    pass_through(model.eval(), batch())
    with pytest.raises(ValueError, match=r"the gates of .* have a gradient .*train in model.train\(\)"):
        model.base_model.gate_step(0, 10)
    model = make(low_memory_tiny_bert())
    with pytest.raises(ValueError, match="is in gating and has low_memory=False; update_in_backward is for"):
        model.base_model.update_in_backward(torch.optim.AdamW(model.parameters()))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="launch one, not 2"):
        low_memory_model(low_memory_tiny_bert())


def test_a_compiled_step_is_refused(low_memory_tiny_bert, batch):
    model = low_memory_model(low_memory_tiny_bert())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"torch.compile cannot follow low_memory=True"):
        compiled(**batch())


def test_the_gates_functions_take_half_width_log_alpha(device):
    log_alpha = (torch.randn(50, device=device) * 3).half()
    assert torch.equal(gates.gate(log_alpha, None, (-1.5, 1.5)), gates.gate(log_alpha.float(), None, (-1.5, 1.5)))
    assert gates.open_probability(log_alpha, (-1.5, 1.5)).dtype == torch.float32


def test_effective_weights_are_kept_where_memory_is_no_concern(low_memory_tiny_bert, batch):
    def kept(model):
        loss = model(**batch()).loss
        uses = next(iter(model.base_model.all_layers())).noise.workspace._reservations
        loss.backward()
        return {key[0] for key in uses}

    linear = {name for name, module in low_memory_tiny_bert().named_modules() if isinstance(module, torch.nn.Linear)}
    assert kept(make(low_memory_tiny_bert())) == linear - {"classifier"}  # the head is trained whole
    assert kept(low_memory_model(low_memory_tiny_bert())) == set()
    checkpointed = make(low_memory_tiny_bert())
    checkpointed.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed.base_model.model.enable_input_require_grads()
    assert kept(checkpointed) == {"bert.pooler.dense"}
