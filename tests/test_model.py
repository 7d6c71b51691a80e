import json
import pickle
from copy import deepcopy

import pytest
import torch
from gate_groups import penalty_gradient
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from diffpeft import DiffPruningConfig, DiffPruningLayer, DiffPruningModel
from diffpeft.gates.update.collect import collect

CONFIG = {"task_type": "SEQ_CLS", "target_density": 0.02}


def train_steps(model, batch, steps, gating_steps=None, lr=1e-3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        model(**batch).loss.backward()
        if gating_steps:
            model.base_model.gate_step(step, gating_steps)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.fixture
def batch(batch):
    return batch()


@pytest.fixture
def pruned(tiny_bert, batch):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(**CONFIG))
    optimizer = train_steps(model, batch, 6, gating_steps=6)
    model.base_model.magnitude_prune(optimizer=optimizer)
    train_steps(model, batch, 2)
    return model.eval()


def test_default_covers_every_parameter_of_the_base_and_trains_the_head_whole(tiny_bert):
    base = tiny_bert()
    expected = {name: p.shape for name, p in base.named_parameters() if not name.startswith("classifier")}
    model = get_peft_model(base, DiffPruningConfig(task_type="SEQ_CLS"))
    layers = [m for m in model.modules() if isinstance(m, DiffPruningLayer)]
    covered = {layer.parameter_key(n): p.shape for layer in layers for n, p in layer.own_parameters().items()}
    assert covered == expected
    assert model.base_model.num_base_parameters() == sum(shape.numel() for shape in expected.values())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier.modules_to_save" in name for name in trainable)
    assert not any("base_layer" in name or "original_module" in name for name in trainable)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_heads_of_several_modules_are_found(task_type):
    base = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=50, dim=16, n_heads=2, n_layers=1, hidden_dim=8)
    )
    model = get_peft_model(base, DiffPruningConfig(task_type=task_type))
    assert {"pre_classifier", "classifier"} <= set(model.peft_config["default"].modules_to_save)
    assert not any("classifier" in key for key in keys(model))


def keys(model):
    layers = [m for m in model.modules() if isinstance(m, DiffPruningLayer)]
    return [layer.parameter_key(name) for layer in layers for name in layer.own_parameters()]


def test_a_tied_parameter_is_one_parameter_with_one_diff():
    torch.manual_seed(0)
    base = BertForMaskedLM(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    ids = torch.arange(12).reshape(2, 6)
    total = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, DiffPruningConfig(init_weights=False)).eval()
    tuner = model.base_model
    assert tuner.num_base_parameters() == total
    assert [key for key in keys(model) if key.endswith("word_embeddings.weight") or "decoder.weight" in key] == [
        "bert.embeddings.word_embeddings.weight"
    ]
    tuner.magnitude_prune(density=0.5)
    unmerged = model(ids).logits
    with model.disable_adapter():
        assert not torch.equal(unmerged, model(ids).logits)
    merged = model.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert torch.equal(merged(ids).logits, unmerged)


def tiny_vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).eval()


def test_a_second_adapter_reaches_modules_inside_wrapped_ones():
    model = get_peft_model(tiny_vit(), DiffPruningConfig(init_weights=False))
    model.add_adapter("second", DiffPruningConfig(init_weights=False))
    assert model.base_model.adapted_parameters("second") == model.base_model.adapted_parameters("default")


def test_parameters_on_modules_with_children_are_adapted():
    base = tiny_vit()
    pixels = torch.randn(1, 3, 8, 8)
    plain = base(pixels).logits
    model = get_peft_model(base, DiffPruningConfig(init_weights=False)).eval()
    assert {"vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.projection.weight"} <= set(keys(model))
    model.base_model.magnitude_prune(density=0.9)
    unmerged = model(pixels).logits
    assert not torch.equal(unmerged, plain)
    merged = model.merge_and_unload()
    assert torch.equal(merged(pixels).logits, unmerged)
    assert not any(isinstance(m, DiffPruningLayer) for m in merged.modules())


@pytest.mark.parametrize("density", [0.0005, 0.005, 0.25, 1.0])
def test_budget_is_exact_over_all_parameters(tiny_bert, density):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(task_type="SEQ_CLS", init_weights=False))
    tuner = model.base_model
    summary = tuner.magnitude_prune(density)
    expected = round(density * tuner.num_base_parameters())
    assert summary.kept == expected == sum(len(p) for p, _ in tuner.get_diff().values())
    assert sum(model.peft_config["default"].nnz_pattern.values()) == expected
    assert tuner.expected_density() == expected / tuner.num_base_parameters()
    assert int(tuner.l0_penalty()) == expected == tuner.num_nonzeros()


def test_pruning_keeps_the_largest_of_the_diff_and_its_values(tiny_bert):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(init_weights=False, **CONFIG))
    tuner = model.base_model
    dense = tuner.get_diff()
    assert tuner.num_nonzeros() == sum(len(where) for where, _ in dense.values())
    summary = tuner.magnitude_prune()
    kept = tuner.get_diff()
    values = torch.cat([v for _, v in dense.values()]).abs()
    assert summary.threshold == pytest.approx(float(values.sort(descending=True).values[summary.kept - 1]))
    for key, (where, value) in kept.items():
        lookup = dict(zip(dense[key][0].tolist(), dense[key][1].tolist(), strict=True))
        assert value.tolist() == [lookup[p] for p in where.tolist()]
        assert where.dtype == torch.int64


def test_gates_that_are_all_shut_still_fill_the_budget(tiny_bert):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(init_weights=False, init_log_alpha=-3.0, **CONFIG))
    tuner = model.base_model
    assert tuner.get_diff() == {}
    summary = tuner.magnitude_prune()
    assert sum(model.peft_config["default"].nnz_pattern.values()) == summary.kept > 0


@pytest.mark.parametrize("l0_lambda", ["auto", 1e-3])
def test_gating_lowers_the_expected_density(tiny_bert, batch, l0_lambda):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(l0_lambda=l0_lambda, **CONFIG))
    before = model.base_model.expected_density()
    train_steps(model, batch, 20, gating_steps=20)
    after = model.base_model.expected_density()
    assert after < before
    if l0_lambda == "auto":
        assert after == pytest.approx(CONFIG["target_density"], rel=0.1)


def test_density_progress_goes_from_zero_to_one(tiny_bert, batch):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(**CONFIG))
    assert model.base_model.density_progress() == pytest.approx(0.0, abs=0.01)
    train_steps(model, batch, 20, gating_steps=20)
    assert model.base_model.density_progress() == pytest.approx(1.0, abs=0.05)
    ungated = get_peft_model(tiny_bert(), DiffPruningConfig(selection="magnitude", **CONFIG))
    assert ungated.base_model.density_progress() == 0.0


def test_l0_penalty_counts_and_has_the_closed_forms_gradient(tiny_bert):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(**CONFIG))
    tuner = model.base_model
    penalty = tuner.l0_penalty()
    assert penalty.item() == pytest.approx(tuner.expected_nonzeros(), rel=1e-5)
    penalty.backward()
    group = collect(tuner.all_layers(), "default")[0]
    expected = penalty_gradient(group, (-1.5, 1.5), "product")
    assert torch.allclose(group.elements.grad, expected[0])
    assert torch.allclose(group.group_gate.grad, expected[1])


def test_gate_step_leaves_nothing_for_the_optimizer(tiny_bert, batch):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(**CONFIG))
    optimizer = train_steps(model, batch, 1, gating_steps=4)
    gates = [p for n, p in model.named_parameters() if "log_alpha" in n]
    assert gates
    assert all(p.grad is None and p not in optimizer.state for p in gates)


def test_gate_step_skips_an_update_that_is_not_finite(tiny_bert, batch):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(**CONFIG))
    model(**batch).loss.backward()
    gates = {n: p for n, p in model.named_parameters() if "log_alpha" in n}
    next(iter(gates.values())).grad.view(-1)[0] = float("inf")
    before = {n: p.detach().clone() for n, p in gates.items()}
    model.base_model.gate_step(0, 4)
    assert all(torch.equal(before[n], p) for n, p in gates.items())


def test_without_gates_w_trains_and_is_pruned(tiny_bert, batch):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(selection="magnitude", **CONFIG))
    assert not any("log_alpha" in name for name, _ in model.named_parameters())
    train_steps(model, batch, 3, gating_steps=3)
    assert model.base_model.expected_density() == 1.0
    model.base_model.magnitude_prune()
    assert model.base_model.phase() == "fixmask"


def test_only_kept_values_have_parameters_and_state_after_pruning(tiny_bert, batch):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(**CONFIG))
    optimizer = train_steps(model, batch, 4, gating_steps=4)
    head = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    model.base_model.magnitude_prune(optimizer=optimizer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in trainable]
    assert set(optimizer.state) == set(head)
    kept = sum(model.peft_config["default"].nnz_pattern.values())
    assert sum(p.numel() for p in trainable) == kept + sum(p.numel() for p in head)
    before = [p.detach().clone() for p in held]
    model(**batch).loss.backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, held, strict=True))


def test_saved_adapter_is_sparse_and_loads_equal(pruned, tiny_bert, batch, tmp_path):
    expected = pruned(**batch).logits
    pruned.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    nnz = sum(pruned.peft_config["default"].nnz_pattern.values())
    assert sum(t.numel() for name, t in tensors.items() if "values" in name) == nnz
    assert all("classifier" in n or "values" in n or "positions" in n for n in tensors)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, expected)
    assert loaded.base_model.phase() == "fixmask"
    assert not any(p.requires_grad for p in loaded.parameters())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DIFFPRUNING"


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_second_adapter_loads_beside_the_first(pruned, tiny_bert, batch, tmp_path, low_cpu_mem_usage):
    expected = pruned(**batch).logits
    pruned.save_pretrained(tmp_path)
    model = get_peft_model(tiny_bert(), DiffPruningConfig(**CONFIG))
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("second")
    model.eval()
    assert torch.equal(model(**batch).logits, expected)
    assert model.base_model.phase("default") == "gating"
    assert model.base_model.phase("second") == "fixmask"
    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("second")
    assert "second" not in model.peft_config
    assert not any("second" in name for name, _ in model.named_parameters())


def test_loading_with_transformers_alone(pruned, tiny_bert, batch, tmp_path):
    expected = pruned(**batch).logits
    pruned.save_pretrained(tmp_path)
    model = tiny_bert()
    model.load_adapter(str(tmp_path))
    assert torch.equal(model.eval()(**batch).logits, expected)


def test_auto_class_loads_base_and_adapter(pruned, tiny_bert, batch, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    pruned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    pruned.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(**batch).logits, pruned(**batch).logits)


def test_gating_state_survives_saving_and_loading_into_an_existing_adapter(tiny_bert, batch, tmp_path):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(**CONFIG))
    train_steps(model, batch, 3, gating_steps=8)
    model.save_pretrained(tmp_path)
    other = get_peft_model(tiny_bert(), DiffPruningConfig(**CONFIG))
    other.base_model.magnitude_prune()
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert other.base_model.phase() == "gating"
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_merge_unmerge_disable_and_unload(pruned, tiny_bert, batch):
    expected, base = pruned(**batch).logits, tiny_bert().eval()
    with pruned.disable_adapter():
        assert torch.equal(pruned.base_model.model.bert(batch["input_ids"])[0], base.bert(batch["input_ids"])[0])
    before = {n: p.detach().clone() for n, p in pruned.named_parameters() if "base_layer" in n}
    pruned.merge_adapter()
    assert torch.equal(pruned(**batch).logits, expected)
    pruned.unmerge_adapter()
    after = dict(pruned.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    merged = pruned.merge_and_unload()
    assert type(merged) is type(base)
    assert dict(merged.named_parameters()).keys() == dict(base.named_parameters()).keys()
    assert torch.equal(merged(**batch).logits, expected)


def test_targets_exclusions_and_layer_indices(tiny_bert):
    def adapted(**config):
        return set(keys(get_peft_model(tiny_bert(), DiffPruningConfig(task_type="SEQ_CLS", **config))))

    everything = adapted()
    only = adapted(target_modules=["query"])
    assert only == {key for key in everything if ".query." in key}
    assert adapted(target_modules=r".*\.(key|value)") == {k for k in everything if ".key." in k or ".value." in k}
    assert adapted(exclude_modules=["word_embeddings"]) == {k for k in everything if "word_embeddings" not in k}
    assert adapted(layers_to_transform=[1]) == {key for key in everything if ".layer.1." in key}
    linear = adapted(target_modules="all-linear")
    assert linear < everything
    assert not any("LayerNorm" in key or "embeddings" in key for key in linear)


def test_density_counts_all_base_parameters_also_those_not_adapted(tiny_bert):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(target_modules=["query"], init_weights=False, **CONFIG))
    full = get_peft_model(tiny_bert(), DiffPruningConfig(**CONFIG)).base_model.num_base_parameters()
    assert model.base_model.num_base_parameters() == full
    assert model.base_model.magnitude_prune().kept == round(CONFIG["target_density"] * full)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda tuner: tuner.magnitude_prune(), "pruned already, to .* cannot be pruned twice"),
        (lambda tuner: tuner.gate_step(0, 1), "in fixmask, its gates are gone"),
        (lambda tuner: tuner.phase("nobody"), "no adapter 'nobody'; there are"),
    ],
)
def test_errors_in_fixmask(pruned, action, message):
    with pytest.raises(ValueError, match=message):
        action(pruned.base_model)


@pytest.mark.parametrize(
    ("density", "message"),
    [(0.0, "leaves nothing to train"), (1.5, "no share"), (1e-9, "is 0 nonzeros"), (0.9, "offer 1 to")],
)
def test_impossible_densities(tiny_bert, density, message):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=message):
        model.base_model.magnitude_prune(density)


def test_pruning_a_diverged_diff_is_refused(tiny_bert):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(**CONFIG))
    next(p for n, p in model.named_parameters() if "diffpruning_w" in n).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaN, infinite"):
        model.base_model.magnitude_prune()
    assert model.base_model.phase() == "gating"


def test_pruning_with_an_optimizer_of_other_parameters_is_refused(tiny_bert):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(**CONFIG))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="does not hold"):
        model.base_model.magnitude_prune(optimizer=optimizer)
    assert model.base_model.phase() == "gating"


def test_targets_that_match_nothing(tiny_bert):
    with pytest.raises(ValueError, match="no_such_module"):
        get_peft_model(tiny_bert(), DiffPruningConfig(target_modules=["no_such_module"]))


def test_a_model_without_parameters():
    with pytest.raises(ValueError, match="no floating-point parameters"):
        get_peft_model(nn.Sequential(nn.Identity()), DiffPruningConfig())


class Root(nn.Module):
    """A model with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():
            raise FloatingPointError
        return self.linear(x) * self.scale


def test_parameters_of_the_root_module_are_adapted():
    base, x = Root(), torch.randn(3, 2)
    model = get_peft_model(base, DiffPruningConfig(target_density=1.0))
    assert model.base_model.adapted_parameters() == {"scale": 1, "linear.weight": 4, "linear.bias": 2}
    assert not base.scale.requires_grad
    model(x).sum().backward()
    assert base.root_parameters.diffpruning_w["default"]["scale"].grad is not None
    model.base_model.magnitude_prune()
    model.base_model.get_diff()
    with torch.no_grad():
        base.root_parameters.diffpruning_values["default"]["scale"].fill_(2.0)
    torch.testing.assert_close(model(x), base.linear(x) * 3.0)
    assert float(base.scale) == 1.0
    with pytest.raises(FloatingPointError):
        model(x * torch.nan)
    assert float(base.scale) == 1.0, "a forward that fails leaves the base as it was"
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
        assert copied.base_model.model.root_parameters.base_layer is copied.base_model.model
    model.merge_adapter()
    assert float(base.scale) == 3.0
    model.unmerge_adapter()
    assert float(base.scale) == 1.0
    merged = model.merge_and_unload()
    assert float(merged.scale) == 3.0
    assert list(merged.state_dict()) == ["scale", "linear.weight", "linear.bias"]
    assert not merged._forward_hooks
    assert not merged._forward_pre_hooks


@pytest.mark.parametrize("config", [{"target_modules": ["linear"]}, {"exclude_modules": ["root_parameters"]}], ids=str)
def test_parameters_of_the_root_module_can_be_left_out(config):
    model = get_peft_model(Root(), DiffPruningConfig(**config))
    assert model.base_model.adapted_parameters() == {"linear.weight": 4, "linear.bias": 2}


@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found")
def test_another_tuners_adapter_is_refused(tiny_bert):
    base = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"])).base_model.model
    with pytest.raises(ValueError, match="adapter of another kind"):
        get_peft_model(base, DiffPruningConfig())


@pytest.mark.parametrize("damage", ["missing", "unknown", "size", "half", "pair"])
def test_a_file_that_does_not_fit_is_refused(pruned, tiny_bert, tmp_path, damage):
    pruned.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "layer.0" in n and "diffpruning_values" in n)
    partner = name.replace("values", "positions")
    if damage == "missing":
        tensors = {n: t for n, t in tensors.items() if "diffpruning" not in n}
    elif damage == "unknown":
        tensors[name.replace("layer.0", "layer.7")] = tensors[name].clone()
        tensors[partner.replace("layer.0", "layer.7")] = tensors[partner].clone()
    elif damage == "size":
        tensors[partner] = torch.cat([tensors[partner], tensors[partner]])
    else:
        del tensors[partner]
        if damage == "pair":
            del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged|no diff-pruning tensors|not both|belong"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)


def test_base_model_of_a_peft_model_is_the_tuner(pruned):
    assert isinstance(pruned.base_model, DiffPruningModel)


def several(base, **heads):
    """Three finished adapters with other positions and values each."""
    settings = {"target_density": 0.02, "init_weights": False, **heads}
    model = get_peft_model(base, DiffPruningConfig(**settings), adapter_name="one")
    for name in ("two", "three"):
        model.add_adapter(name, DiffPruningConfig(**settings))
    for name in ("one", "two", "three"):
        model.base_model.magnitude_prune(adapter_name=name)
    return model


def dense(model, name):
    """The diff as dense tensors, from the public contract."""
    shapes = {n.replace(".base_layer", ""): p.shape for n, p in model.base_model.model.named_parameters()}
    deltas = {}
    for key, (positions, values) in model.base_model.get_diff(name).items():
        deltas[key] = torch.zeros(shapes[key]).flatten().index_put((positions,), values).reshape(shapes[key])
    return deltas


def test_a_weighted_adapter_is_the_weighted_sum(tiny_bert, batch):
    model = several(tiny_bert(), target_modules="all-linear", modules_to_save=None, task_type=None)
    tuner = model.base_model
    tuner.add_weighted_adapter(["one", "two"], [0.5, -2.0], "both")
    one, two, both = dense(model, "one"), dense(model, "two"), dense(model, "both")
    for key in one.keys() | two.keys():
        expected = 0.5 * one.get(key, torch.zeros(())) - 2.0 * two.get(key, torch.zeros(()))
        torch.testing.assert_close(both[key], expected)
    assert tuner.phase("both") == "fixmask"
    assert model.active_adapters == ["one"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".both." in n)
    model.set_adapter("both")
    assert not torch.equal(model.eval()(**batch).logits, tiny_bert()(**batch).logits)


@pytest.mark.parametrize("combination", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_a_weighted_adapter_keeps_a_budget_and_goes_through_a_file(tiny_bert, batch, tmp_path, combination):
    model = several(tiny_bert(), target_modules="all-linear")
    tuner = model.base_model
    density = None if combination == "linear" else 0.7
    tuner.add_weighted_adapter(["one", "two"], [1.0, 0.3], "both", combination, density, target_density=0.01)
    budget = round(0.01 * tuner.num_base_parameters())
    assert tuner.num_nonzeros("both") == budget
    assert sum(tuner.peft_config["both"].nnz_pattern.values()) == budget
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    model.set_adapter("both")
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "both")
    assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


def test_a_weighted_adapter_of_adapters_on_other_modules(tiny_bert, batch):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(target_modules=["query"], init_weights=False), "one")
    model.add_adapter("two", DiffPruningConfig(target_modules=["word_embeddings"], init_weights=False))
    tuner = model.base_model
    for name in ("one", "two"):
        tuner.magnitude_prune(adapter_name=name)
    tuner.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")
    assert tuner.get_diff("both").keys() == tuner.get_diff("one").keys() | tuner.get_diff("two").keys()
    tuner.set_adapter(["one", "two"])
    expected = model.eval()(**batch).logits
    model.set_adapter("both")
    torch.testing.assert_close(model.eval()(**batch).logits, expected)


def test_heads_are_not_summed_but_taken(tiny_bert):
    model = several(tiny_bert(), task_type="SEQ_CLS")
    tuner = model.base_model
    heads = tuner.model.classifier.modules_to_save
    with torch.no_grad():
        for index, head in enumerate(heads.values()):
            head.weight.fill_(index)
    with pytest.raises(ValueError, match="heads_from="):
        tuner.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")
    with pytest.raises(ValueError, match="has no head"):
        tuner.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", heads_from="three")
    tuner.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", heads_from="two")
    assert torch.equal(heads["both"].weight, heads["two"].weight)
    assert heads["both"].weight is not heads["two"].weight


def test_adapters_that_cannot_be_combined(tiny_bert):
    model = several(tiny_bert(), target_modules="all-linear")
    model.add_adapter("young", DiffPruningConfig(target_modules="all-linear"))
    combine = model.base_model.add_weighted_adapter
    with pytest.raises(ValueError, match="already"):
        combine(["one"], [1.0], "two")
    with pytest.raises(ValueError, match="no adapter 'nobody'"):
        combine(["one", "nobody"], [1.0, 1.0], "both")
    with pytest.raises(ValueError, match=r"magnitude_prune\(adapter_name='young'\)"):
        combine(["one", "young"], [1.0, 1.0], "both")
    with pytest.raises(ValueError, match="one weight a diff"):
        combine(["one", "two"], [1.0], "both")
    with pytest.raises(ValueError, match="0 < target_density"):
        combine(["one", "two"], [1.0, 1.0], "both", target_density=0.0)
    assert "both" not in model.peft_config


def test_the_schedule_of_a_subset_starts_from_the_subset(tiny_bert, batch):
    """With a few adapted modules the density begins below 1, and lambda must pull from the first moving step."""
    model = get_peft_model(tiny_bert(), DiffPruningConfig(target_modules=["query"], target_density=0.005)).train()
    lambdas = []
    for step in range(20):
        model(**batch).loss.backward()
        lambdas.append(model.base_model.gate_step(step, 20))
        model.zero_grad()
    assert lambdas[6] > 0, lambdas


def test_a_config_can_begin_another_adapter_after_the_first_is_pruned(tiny_bert):
    config = DiffPruningConfig(**CONFIG)
    model = get_peft_model(tiny_bert(), config)
    model.base_model.magnitude_prune(0.01)
    assert (config.nnz_pattern, config.target_density) == (None, 0.02)
    model.add_adapter("next", config)
    assert model.base_model.phase("next") == "gating"
    model.add_adapter("third", config)
    model.base_model.magnitude_prune(adapter_name="next")
    assert model.base_model.phase("third") == "gating"


def test_adapter_bytes_are_those_of_the_file(tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(task_type="SEQ_CLS", target_density=0.02))
    tuner = model.base_model
    assert tuner.adapter_bytes() > 4 * 0.95 * tuner.num_base_parameters(), "in gating, an estimate of the dense diff's"
    tuner.magnitude_prune()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    size = sum(t.numel() * t.element_size() for key, t in tensors.items() if "diffpruning" in key)
    assert tuner.adapter_bytes() == size
