"""Gradients of gates that are not stored: made later they are those of the plain way, and what would make them others is noticed."""

import copy
import pickle
import shutil

import pytest
import torch
from gating_models import make
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, Trainer, TrainingArguments

from diffpeft import DiffPruningCallback, DiffPruningConfig, compiling, gate_groups, gate_tensors, kernels, layer
from diffpeft.deferred import DeferredGates
from diffpeft.noise import new_seed, parts

STRETCH = (-1.5, 1.5)
COMPILED = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
fused_or_not = pytest.mark.parametrize("fused", [False, pytest.param(True, marks=COMPILED)], ids=["eager", "compiled"])
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles


# Chains


def tensors(shape, device, spread=2.0):
    """Gradient of an effective parameter, w, log_alpha, gate of the group, seed."""
    generator = torch.Generator().manual_seed(3)
    grad, w, log_alpha = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    return grad, w, log_alpha * spread, torch.tensor(0.7, device=device), parts(new_seed(), torch.device(device))


@fused_or_not
@pytest.mark.parametrize("shape", [(300,), (170, 200)], ids=str)
def test_the_gradient_by_the_locations_follows_from_that_by_w(device, fused, shape):
    grad, w, log_alpha, whole, seed = tensors(shape, device)
    settings = w, log_alpha, whole, seed, STRETCH, None, fused
    by_w, by_log_alpha, total = kernels.gradients(grad, *settings)
    own, own_total = kernels.gradient(grad, *settings)
    torch.testing.assert_close(own, by_w)
    torch.testing.assert_close(own_total, total, rtol=1e-5, atol=1e-4)
    made = kernels.deferred_gradient(own, w, log_alpha, seed, STRETCH, fused)
    torch.testing.assert_close(made, by_log_alpha, rtol=1e-5, atol=1e-7)
    assert bool((made != 0).any())
    assert bool((made == 0).any())
    assert not compiling.broken


@fused_or_not
def test_the_gradient_of_some_elements_is_that_of_all(device, fused):
    seeds, found, columns = [], [], []
    for index in range(2):
        grad, w, log_alpha, whole, _ = tensors((40, 50), device)
        seed = parts(new_seed(), torch.device(device))
        by_w, _ = kernels.gradient(grad, w, log_alpha, whole, seed, STRETCH)
        places = torch.arange(index, 2000, 7, dtype=torch.int32, device=device)
        found.append(kernels.deferred_gradient(by_w, w, log_alpha, seed, STRETCH).view(-1)[places.long()])
        columns.append([*(tensor.view(-1)[places.long()] for tensor in (by_w, w, log_alpha)), places])
        seeds.append(seed.unsqueeze(1).expand(4, len(places)))
    joined = [torch.cat(column) for column in zip(*columns, strict=True)]
    made = kernels.deferred_gradient_at(*joined, torch.cat(seeds, 1).contiguous(), STRETCH, fused)
    torch.testing.assert_close(made, torch.cat(found), rtol=1e-5, atol=1e-7)


@fused_or_not
@pytest.mark.parametrize("rows", [None, [1, 4, 39]], ids=["all", "some"])
def test_gates_move_as_with_the_stored_gradient(device, fused, rows):
    grad, w, log_alpha, whole, seed = tensors((40, 50), device)
    rows = None if rows is None else torch.tensor(rows, device=device)
    if rows is not None:
        grad = torch.zeros_like(grad).index_copy_(0, rows, grad[rows])
    by_w, by_log_alpha, total = kernels.gradients(grad, w, log_alpha, whole, seed, STRETCH)
    rule = torch.tensor([1e-2, 0.2, 0.1, 1.1, 1.2], device=device)
    moments = [torch.randn_like(w) * 1e-2, torch.rand_like(w) * 1e-4]
    plain, own = ([tensor.clone() for tensor in (log_alpha, *moments)] for _ in range(2))
    kernels.automatic_(plain[0], by_log_alpha, *plain[1:], STRETCH, rule, fused)
    counted = DeferredGates(*own, w, by_w, seed, rows, total, STRETCH).move(rule, fused)
    torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6)
    assert counted == kernels.open_elements(own[0], STRETCH, fused)
    assert not torch.equal(own[0], log_alpha)


@given(st.integers(0, 1 << 30), st.floats(0, 60), st.floats(1e-30, 1e30))
def test_gates_at_either_end_give_no_gradient_that_is_not_finite(seed, spread, scale):
    torch.manual_seed(seed)
    grad, w, log_alpha, whole, noise = tensors((64,), "cpu", spread)
    by_w, by_log_alpha, _ = kernels.gradients(grad * scale, w, log_alpha, whole, noise, STRETCH)
    made = kernels.deferred_gradient(by_w, w, log_alpha, noise, STRETCH)
    assert bool(made.isfinite().all())
    torch.testing.assert_close(made, by_log_alpha, rtol=1e-4, atol=1e-6 * scale)


# Models


@pytest.fixture
def large(monkeypatch):
    """How many elements a parameter of these tests has for its gates' gradient to be deferred."""
    for module in (gate_tensors, gate_groups, layer):
        monkeypatch.setattr(module, "SMALL", 1000)
    return 1000


def deferring(base, **config):
    model = make(base, **config)
    model.base_model.defer_gate_gradients()
    return model


def gradients_of(model):
    """By name; what is held is stored first."""
    model.base_model.defer_gate_gradients(False)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def left_out(model, size):
    """Large parameters of locations without a gradient."""
    large = [p for name, p in model.named_parameters() if ".diffpruning_log_alpha." in name and p.numel() > size]
    assert large
    return [p for p in large if p.grad is None], large


def assert_same_gradients(actual, expected):
    actual, expected = gradients_of(actual), gradients_of(expected)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-7 + 1e-5 * float(grad.abs().max()), msg=name)
    assert any(bool((grad != 0).any()) for name, grad in expected.items() if ".diffpruning_log_alpha." in name)


def loss_of(model, batch, seed=7):
    torch.manual_seed(seed)
    return model(**batch).loss


class Convolutions(nn.Module):
    """Parameters that have no way of their own, in another memory layout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 20, 5), nn.Conv2d(20, 20, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, seed=0, **_):
        image = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
        output = self.second(self.first(image).relu())
        return type("Output", (), {"loss": output.square().mean()})


def tiny_albert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64}
    others = {"embedding_size": 16, "num_attention_heads": 2, "max_position_embeddings": 32}
    return AlbertForSequenceClassification(AlbertConfig(**sizes, **others))


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "unstructured"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backward_pass_stores_none_and_they_can_be_had(tiny_bert, batch, large, dtype, structured):
    plain, own = (kind(tiny_bert().to(dtype), structured=structured) for kind in (make, deferring))
    for model in (plain, own):
        loss_of(model, batch()).backward()
    assert left_out(plain, large)[0] == []
    without, those = left_out(own, large)
    assert len(without) == len(those) == 15
    assert_same_gradients(own, plain)


def test_convolutions_in_another_layout(large):
    plain, own = (kind(Convolutions(), task_type=None) for kind in (make, deferring))
    for model in (plain, own):
        loss_of(model, {}).backward()
    without, those = left_out(own, large)
    assert len(without) == len(those) == 2
    assert_same_gradients(own, plain)


def test_parameters_that_a_pass_uses_several_times_have_stored_gradients(batch, large):
    plain, own = make(tiny_albert()), deferring(tiny_albert())
    for model in (plain, own):
        loss_of(model, batch()).backward()
    without, those = left_out(own, large)
    assert 0 < len(without) < len(those)  # the embeddings and the pooler are used once
    assert_same_gradients(own, plain)


def two_passes(model, batch):
    (loss_of(model, batch(seed=1), 1) + loss_of(model, batch(seed=2), 2)).backward()


def accumulated(model, batch):
    for seed in range(3):
        loss_of(model, batch(seed=seed), seed).backward()


def penalised_in_the_loss(model, batch):
    diffs = [p for name, p in model.named_parameters() if "diffpruning_w." in name]
    (loss_of(model, batch()) + sum(p.square().sum() for p in diffs)).backward()


def penalised_before(model, batch):
    sum(p.square().sum() for name, p in model.named_parameters() if "diffpruning_w." in name).backward()
    loss_of(model, batch()).backward()


def penalised_after(model, batch):
    loss_of(model, batch()).backward()
    sum(p.square().sum() for name, p in model.named_parameters() if "diffpruning_w." in name).backward()


def penalised_gates(model, batch):
    loss_of(model, batch()).backward()
    sum(p.square().sum() for name, p in model.named_parameters() if "log_alpha" in name).backward()


def twice_through_one_graph(model, batch):
    loss = loss_of(model, batch())
    loss.backward(retain_graph=True)
    loss.backward()


def onto_zeros(model, batch):
    loss_of(model, batch(seed=3)).backward()
    model.zero_grad(set_to_none=False)
    for name, parameter in model.named_parameters():
        if "log_alpha" in name and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    loss_of(model, batch()).backward()


def after_one_that_was_dropped(model, batch):
    loss_of(model, batch(seed=3)).backward()
    model.zero_grad()
    loss_of(model, batch()).backward()


def without_a_backward_pass_before(model, batch):
    loss_of(model, batch(seed=3))
    loss_of(model, batch()).backward()


def beside_one_that_is_kept(model, batch):
    model.kept = loss_of(model, batch(seed=3))
    loss_of(model, batch()).backward()


def after_one_that_is_kept(model, batch):
    model.kept = loss_of(model, batch(seed=3))
    model.kept.backward()
    model.zero_grad()
    loss_of(model, batch()).backward()


def in_turns(model, batch):
    first, second = loss_of(model, batch(seed=1), 1), loss_of(model, batch(seed=2), 2)
    second.backward()
    first.backward()


def after_an_evaluation(model, batch):
    with torch.no_grad():
        loss_of(model, batch(seed=3))
    loss_of(model, batch()).backward()


def with_deterministic_gates_too(model, batch):
    model.eval()
    loss = loss_of(model, batch(seed=3))
    model.train()
    (loss + loss_of(model, batch())).backward()


def checkpointed(model, batch):
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    loss_of(model, batch()).backward()


def checkpointed_reentrantly(model, batch):
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    loss_of(model, batch()).backward()


@pytest.mark.parametrize(
    "way",
    [
        two_passes,
        accumulated,
        penalised_in_the_loss,
        penalised_before,
        penalised_after,
        penalised_gates,
        twice_through_one_graph,
        onto_zeros,
        after_one_that_was_dropped,
        without_a_backward_pass_before,
        beside_one_that_is_kept,
        after_one_that_is_kept,
        in_turns,
        after_an_evaluation,
        with_deterministic_gates_too,
        checkpointed,
        checkpointed_reentrantly,
    ],
    ids=lambda way: way.__name__,
)
def test_whatever_else_gives_a_diff_its_gradient_the_gates_get_theirs(tiny_bert, batch, large, way):
    plain, own = make(tiny_bert()), deferring(tiny_bert())
    for model in (plain, own):
        way(model, batch)
    assert_same_gradients(own, plain)


@pytest.mark.parametrize("way", [without_a_backward_pass_before, after_one_that_is_kept], ids=lambda way: way.__name__)
def test_passes_that_are_over_do_not_count(tiny_bert, batch, large, way):
    model = deferring(tiny_bert())
    way(model, batch)
    assert len(left_out(model, large)[0]) == 15


def scale_gradients(model, factor):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "diffpruning" in name}


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "unstructured"])
def test_updates_are_the_plain_ones_clipped_alike(tiny_bert, batch, large, structured):
    plain, own = make(tiny_bert(), structured=structured), deferring(tiny_bert(), structured=structured)
    before = state_of(plain)
    for step in range(5, 8):
        pulls = []
        for model in (plain, own):
            loss_of(model, batch(seed=step), step).backward()
            scale_gradients(model, 0.3)
            pulls.append(model.base_model.gate_step(step, 10))
            assert all(p.grad is None for name, p in model.named_parameters() if "log_alpha" in name)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "diffpruning_w." in name:
                        parameter.sub_(0.1 * parameter.grad)
            model.zero_grad()
        assert pulls[1] == pytest.approx(pulls[0], rel=1e-3)
    after = state_of(own)
    for name, expected in state_of(plain).items():
        scale = float(expected.abs().max())
        if "self.key" in name and "bias" in name:
            continue  # a key's bias makes no difference to attention: its gradients are roundings
        torch.testing.assert_close(after[name], expected, rtol=1e-3, atol=1e-4 * scale, msg=name)
        if name.endswith("weight") and "group" not in name:
            assert not torch.equal(after[name], before[name]), name


def test_a_real_clipping_norm_hardly_counts_the_gates(tiny_bert, batch, large):
    plain, own = make(tiny_bert()), deferring(tiny_bert())
    norms = []
    for model in (plain, own):
        loss_of(model, batch()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)))
    assert norms[1] < norms[0]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_the_count_after_an_update_is_that_of_counting(tiny_bert, batch, large):
    model = deferring(tiny_bert())
    loss_of(model, batch()).backward()
    model.base_model.gate_step(5, 10)
    known = model.base_model.expected_density()
    del model.base_model.__dict__["_last_opened"]
    assert model.base_model.expected_density() == known


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["backward", "clipping"])
def test_an_update_whose_gradients_are_not_finite_is_skipped(tiny_bert, batch, large, bad, where):
    model = deferring(tiny_bert())
    before = state_of(model)
    loss = loss_of(model, batch())
    (loss * bad if where == "backward" else loss).backward()
    if where == "clipping":
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and (parameter.numel() > large or "log_alpha" not in name):
                parameter.grad.mul_(bad)
    assert torch.tensor(model.base_model.gate_step(5, 10)).isnan()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())
    model.zero_grad()
    loss_of(model, batch()).backward()
    assert len(left_out(model, large)[0]) == 15
    assert model.base_model.gate_step(5, 10) > 0


def test_a_diff_that_has_changed_by_then_is_told(tiny_bert, batch, large):
    model = deferring(tiny_bert())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, batch()).backward()
    optimizer.step()
    told = pytest.raises(
        ValueError, match=r"the diff of .*weight or its gates have changed since .*before optimizer.step"
    )
    with told:
        model.base_model.gate_step(5, 10)
    model.zero_grad()
    loss_of(model, batch()).backward()
    model.base_model.gate_step(5, 10)
    optimizer.step()
    model.zero_grad()
    loss_of(model, batch()).backward()
    optimizer.step()
    with told:  # the update would have the gradients of two passes
        loss_of(model, batch())
    with told:
        penalty = sum(p.square().sum() for name, p in model.named_parameters() if "diffpruning_w." in name)
        penalty.backward()
    model.base_model.magnitude_prune()  # the gates go anyway


def test_a_penalty_of_ones_own_ends_it(tiny_bert, batch, large):
    plain, own = make(tiny_bert()), deferring(tiny_bert())
    for model in (plain, own):
        (loss_of(model, batch()) + 1e-6 * model.base_model.l0_penalty()).backward()
    assert left_out(own, large)[0] == []
    assert_same_gradients(own, plain)
    own.base_model.defer_gate_gradients()
    with torch.no_grad():
        own.base_model.l0_penalty()
    own.zero_grad()
    loss_of(own, batch()).backward()
    assert len(left_out(own, large)[0]) == 15


@pytest.mark.parametrize("config", [{"l0_lambda": 1e-7}, {"low_memory": True}], ids=str)
def test_what_has_no_use_for_it_is_as_ever(tiny_bert, batch, large, config):
    model = deferring(tiny_bert(), **config)
    loss_of(model, batch()).backward()
    without, _ = left_out(model, large)
    assert without == []


def test_gates_or_diffs_that_do_not_train_are_as_ever(tiny_bert, batch, large):
    plain, own = make(tiny_bert()), deferring(tiny_bert())
    for model in (plain, own):
        for name, parameter in model.named_parameters():
            if ("diffpruning_log_alpha" in name and "query" in name) or ("diffpruning_w." in name and "key" in name):
                parameter.requires_grad_(False)
        loss_of(model, batch()).backward()
    assert_same_gradients(own, plain)


def test_several_processes_store_them(tiny_bert, batch, large, monkeypatch):
    model = deferring(tiny_bert())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    loss_of(model, batch()).backward()
    assert left_out(model, large)[0] == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_stores_them(tiny_bert, batch, large, copied):
    plain = make(tiny_bert())
    own = copied(deferring(tiny_bert()))
    for model in (plain, own):
        loss_of(model, batch()).backward()
    assert left_out(own, large)[0] == []
    assert_same_gradients(own, plain)


def test_pruning_and_deleting_in_between_do_no_harm(tiny_bert, batch, large):
    model = deferring(tiny_bert())
    loss_of(model, batch()).backward()
    model.base_model.magnitude_prune()
    assert all(not layer.deferrals for layer in model.base_model.all_layers())
    loss_of(model, batch()).backward()
    model = deferring(tiny_bert())
    loss_of(model, batch()).backward()
    model.delete_adapter("default")
    assert all(not layer.deferrals for layer in model.base_model.all_layers())


def test_asking_twice_is_asking_once(tiny_bert, batch, large):
    model = deferring(tiny_bert())
    loss_of(model, batch()).backward()
    model.base_model.defer_gate_gradients()
    w = next(p for name, p in model.named_parameters() if "diffpruning_w." in name and p.numel() > large)
    assert len(w._backward_hooks) == 1
    assert model.base_model.gate_step(5, 10) > 0
    model.base_model.defer_gate_gradients(False)
    assert not w._backward_hooks


def test_a_model_that_is_dropped_in_between_is_freed(tiny_bert, batch, large):
    import gc
    import weakref

    model = deferring(tiny_bert())
    loss_of(model, batch()).backward()
    watched = [weakref.ref(p) for name, p in model.named_parameters() if "diffpruning_w." in name]
    del model
    gc.collect()
    assert all(one() is None for one in watched)


def test_the_callback_defers_them(tiny_bert, batch, large, tmp_path, monkeypatch):
    seen = []
    step = kernels.automatic_deferred_
    monkeypatch.setattr(kernels, "automatic_deferred_", lambda *a, **k: seen.append(1) or step(*a, **k))
    data = [{key: value[0] for key, value in batch(1, seed=seed).items()} for seed in range(8)]
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    model = get_peft_model(tiny_bert(), DiffPruningConfig(task_type="SEQ_CLS"))
    args = TrainingArguments(str(tmp_path), save_strategy="no", disable_tqdm=True, **arguments)
    Trainer(model=model, args=args, train_dataset=data, callbacks=[DiffPruningCallback()]).train()
    assert len(seen) == 2 * 15
    assert model.base_model.phase() == "fixmask"
