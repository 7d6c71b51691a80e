"""What a PEFT user does with LoRA works with Diff Pruning: the same code runs on both, and says where they differ."""

import pickle
import warnings
from copy import deepcopy
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import BertForSequenceClassification

from diffpeft import DiffPruningConfig

OURS = ("diff_pruning", "pruned")  # in gating, in fixmask
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
both = pytest.mark.parametrize("method", ["lora", *OURS])
ours = pytest.mark.parametrize("method", OURS)


def config(method, **settings):
    settings = {"target_modules": ["query", "value"], **settings}
    if method == "lora":
        return LoraConfig(init_lora_weights=False, **settings)
    return DiffPruningConfig(**{"target_density": 0.02, "init_weights": False, **settings})


def finish(model, method, name):
    """Prune where the method says so, and give the adapter its own head, where PEFT copies the base's."""
    if method == "pruned":
        model.base_model.magnitude_prune(adapter_name=name)
    for key, p in own(model, name).items():
        if "modules_to_save" in key:
            torch.nn.init.normal_(p)


def add(model, method, name, **settings):
    model.add_adapter(name, config(method, **settings))
    finish(model, method, name)


def wrap(base, method, *names, **settings):
    """`base` with random adapters of these names, the first one active."""
    first, *others = names or ("one",)
    model = get_peft_model(base, config(method, **settings), adapter_name=first)
    finish(model, method, first)
    for name in others:
        add(model, method, name, **settings)
    return model.eval()


def layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def own(model, name):
    """Parameters of an adapter, by name."""
    return {key: p for key, p in model.named_parameters() if f".{name}." in f"{key}."}


def base_weights(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items() if "base_layer" in k}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def trainable(model):
    return {key for key, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def outputs(model, batch, *names):
    if names:
        model.base_model.set_adapter(list(names))
    return model.eval()(**batch).logits


def differ(a, b):
    return float((a - b).abs().max()) > 1e-4


@pytest.fixture
def batch(batch):
    return batch()


@pytest.fixture
def base(tiny_bert):
    """Makes a base with outputs of order one."""
    return lambda **config: tiny_bert(initializer_range=0.2, **config).eval()


@both
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_exactly_the_active_adapter_trains_whichever_was_added_last(base, method, task_type):
    model = wrap(base(), method, "one", "two", task_type=task_type)
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert trainable(model) == own(model, name).keys() != set()
        assert any("modules_to_save" in key for key in trainable(model)) == (task_type is not None)
    model.set_adapter("two", inference_mode=True)
    assert trainable(model) == set()


@both
def test_deleting_an_adapter_leaves_no_trace_and_the_others_as_they_were(base, method, batch):
    model = wrap(base(), method, "one", "two", "three", task_type="SEQ_CLS")
    expected = outputs(model, batch, "two")
    model.delete_adapter("three")
    assert model.active_adapters == ["two"]
    model.set_adapter("one")
    with pytest.warns(UserWarning, match="active which is now deleted. Setting active adapter to two"):
        model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    assert torch.equal(outputs(model, batch), expected)
    assert trainable(model) == own(model, "two").keys()
    assert not any("one" in key.split(".") or "three" in key.split(".") for key in model.state_dict())
    add(model, method, "one", task_type="SEQ_CLS")
    assert torch.equal(outputs(model, batch, "two"), expected)


@both
def test_what_cannot_be_added_set_or_deleted_leaves_the_model_as_it_was(base, method):
    model = wrap(base(), method, "one", "two")
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match=r"not found|does not exist"):
            call("nobody")
    for name, targets in (("one", ["query"]), ("three", ["nowhere"])):
        with pytest.raises(ValueError, match=r"already exists|nowhere"):
            model.add_adapter(name, config(method, target_modules=targets))
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("one")
    assert (list(model.peft_config), model.active_adapters) == (["one", "two"], ["one"])
    assert trainable(model) == own(model, "one").keys()


@ours
@pytest.mark.parametrize("call", ["set_adapter", "merge_adapter", "merge_and_unload"])
def test_the_tuner_refuses_unknown_names(base, method, call):
    names = {"adapter_name" if call == "set_adapter" else "adapter_names": ["one", "nobody"]}
    with pytest.raises(ValueError, match="nobody"):
        getattr(wrap(base(), method).base_model, call)(**names)


def test_a_deleted_adapter_holds_no_memory(base, batch):
    model = wrap(base(), "pruned", "one", "two")
    outputs(model, batch, "one")
    model.set_adapter("two")
    model.delete_adapter("one")
    assert not any(key[0] == "one" for layer in layers(model) for key in layer._sparse)


@both
def test_diffs_of_several_active_adapters_add_in_any_order(base, method, batch):
    model, plain = wrap(base(), method, "one", "two"), base().state_dict()
    total = {key: value.clone() for key, value in plain.items()}
    for name in ("one", "two"):
        merged = deepcopy(model).merge_and_unload(adapter_names=[name]).state_dict()
        for key in total:
            total[key] += merged[key] - plain[key]
    expected = base()
    expected.load_state_dict(total)
    actual = outputs(model, batch, "one", "two")
    assert model.active_adapters == ["one", "two"]
    assert trainable(model) == own(model, "one").keys() | own(model, "two").keys()
    torch.testing.assert_close(actual, expected(**batch).logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(actual, outputs(model, batch, "two", "one"), atol=1e-5, rtol=1e-4)
    assert differ(actual, outputs(model, batch, "one"))


def test_gating_and_finished_adapters_train_together_and_are_saved(base, batch, tmp_path):
    model = wrap(base(), "pruned", "old")
    add(model, "diff_pruning", "young")
    model.base_model.set_adapter(["old", "young"])
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(2):
        model.train()(**batch).loss.backward()
        model.base_model.gate_step(step, 4, adapter_name="young")
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved <= own(model, "old").keys() | own(model, "young").keys() == trainable(model)
    assert {key for key in trainable(model) if "log_alpha" not in key} <= moved
    assert [model.base_model.phase(name) for name in ("old", "young")] == ["fixmask", "gating"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "young", adapter_name="young")
    loaded.load_adapter(tmp_path / "old", "old")
    for names in (["old"], ["young"], ["old", "young"]):
        assert torch.equal(outputs(loaded, batch, *names), outputs(model, batch, *names))


@both
def test_disabled_the_model_is_the_base_and_nothing_trains(base, method, batch):
    model, plain = wrap(base(), method, "one", "two"), outputs(base(), batch)
    active = outputs(model, batch)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), plain)
        with model.disable_adapter():
            assert torch.equal(outputs(model, batch), plain)
        assert torch.equal(outputs(model, batch), plain), "the inner context does not enable"
        assert not model(**batch).loss.requires_grad
        assert trainable(model) == set()
    assert torch.equal(outputs(model, batch), active)
    assert differ(active, plain)
    assert trainable(model) == own(model, "one").keys()
    model.merge_adapter()
    with model.disable_adapter():  # unmerges; LoRA only up to rounding
        torch.testing.assert_close(outputs(model, batch), plain, atol=1e-6 * (method == "lora"), rtol=0)


@ours
def test_an_adapter_loaded_for_inference_stays_frozen_through_disabling(base, method, tmp_path):
    wrap(base(), method, "default").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path)
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == set()


SITUATIONS = {
    "fresh": lambda model: None,
    "switched": lambda model: model.set_adapter("two"),
    "two active": lambda model: model.base_model.set_adapter(["one", "two"]),
    "frozen": lambda model: model.set_requires_grad("one", False),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "both merged": lambda model: model.merge_adapter(adapter_names=["two", "one"]),
    "the inactive one merged": lambda model: model.merge_adapter(adapter_names=["two"]),
    "unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "deleted": lambda model: (model.set_adapter("two"), model.delete_adapter("one")),
    "partly overlapping": lambda model: model.set_adapter("three"),
}


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize("situation", SITUATIONS)
@ours
def test_status_is_loras_in_every_field(base, method, situation, task_type):
    if (situation, task_type) == ("two active", "SEQ_CLS"):
        pytest.skip("PEFT itself cannot have two heads active at a time")
    found = []
    for kind in ("lora", method):
        model = wrap(base(), kind, "one", "two", task_type=task_type)
        if situation == "partly overlapping":
            add(model, kind, "three", task_type=task_type, target_modules=["key", "query"])
        SITUATIONS[situation](model)
        status, of_layers = asdict(model.get_model_status()), [asdict(layer) for layer in model.get_layer_status()]
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert status.pop("trainable_params") == count == model.get_nb_trainable_parameters()[0]
        assert status.pop("total_params") == sum(p.numel() for p in model.parameters())
        names = status.pop("adapter_model_type"), {*status.pop("peft_types").values()}
        assert names == (("LoraModel", {"LORA"}) if kind == "lora" else ("DiffPruningModel", {"DIFFPRUNING"}))
        kinds = {layer.pop("module_type") for layer in of_layers} - {"ModulesToSaveWrapper"}
        assert kinds == ({"lora.Linear"} if kind == "lora" else {"DiffPruningLayer"})
        found.append((status, of_layers))
    assert found[1] == found[0]


def test_status_of_layers_without_nonzeros_and_beside_a_gating_adapter(base, capsys):
    model = wrap(base(), "pruned", target_density=5e-5)
    add(model, "diff_pruning", "young")
    model.print_trainable_parameters()
    assert "trainable params: 1 " in capsys.readouterr().out
    model.merge_adapter()
    status = model.get_model_status()
    assert (status.merged_adapters, status.requires_grad) == (["one"], {"one": True, "young": False})
    assert status.devices == {"one": ["cpu"], "young": ["cpu"]}


@both
def test_two_loaded_adapters_bring_their_own_heads(base, method, batch, tmp_path):
    model = wrap(base(), method, "one", task_type="SEQ_CLS")  # finds its head
    add(model, method, "two", modules_to_save=["pooler", "classifier"])
    expected = {name: outputs(model, batch, name) for name in ("one", "two")}
    assert differ(*expected.values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "one", adapter_name="one")
    loaded.load_adapter(tmp_path / "two", "two")
    for name in ("two", "one", "two"):
        loaded.set_adapter(name)
        assert torch.equal(outputs(loaded, batch), expected[name])
    with loaded.disable_adapter():
        assert torch.equal(outputs(loaded, batch), outputs(base(), batch))


TARGETS = [
    {"target_modules": ["query", "output.dense", "word_embeddings"]},
    {"target_modules": ["bert.encoder.layer.1.attention.self.key", "pooler.dense"]},
    {"target_modules": r".*\.layer\.\d\.attention\.(self|output)\.(key|dense)"},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "task_type": "SEQ_CLS", "exclude_modules": ["query", "pooler.dense"]},
    {"target_modules": ["query", "value"], "exclude_modules": r".*layer\.0\..*"},
    {"target_modules": ["query", "dense"], "layers_to_transform": [1]},
    {"target_modules": ["query", "dense"], "layers_to_transform": 0, "layers_pattern": "layer"},
]


@ours
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_match_what_loras_do(base, method, targets):
    found = []
    for kind in (method, "lora"):
        model = wrap(base(), kind, **deepcopy(targets))
        found.append({key for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)})
    assert found[0] == found[1] != set()


@both
@pytest.mark.parametrize("safe", [True, False])
def test_selected_adapters_are_saved_in_folders_of_their_names(base, method, batch, tmp_path, safe):
    model = wrap(base(), method, "one", "two", "three")
    expected = outputs(model, batch, "two")
    model.save_pretrained(tmp_path, selected_adapters=["one", "two"], safe_serialization=safe)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"one", "two"}
    assert (tmp_path / "two" / ("adapter_model.safetensors" if safe else "adapter_model.bin")).exists()
    loaded = PeftModel.from_pretrained(base(), tmp_path / "two", adapter_name="other")
    assert torch.equal(outputs(loaded, batch), expected)
    assert trainable(loaded) == set()
    loaded.load_adapter(tmp_path / "one", "more", is_trainable=True)
    assert trainable(loaded) == own(loaded, "more").keys()
    assert loaded.active_adapters == ["other"]
    with pytest.raises(ValueError, match="selected"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])
    given_config = PeftConfig.from_pretrained(tmp_path / "one")
    given = PeftModel.from_pretrained(base(), tmp_path / "one", "given", config=given_config, is_trainable=True)
    assert trainable(given) == own(given, "given").keys()
    assert torch.equal(outputs(given, batch), outputs(model, batch, "one"))


@both
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_loading_and_running_without_gradients(base, method, batch, tmp_path, mode):
    model = wrap(base(), method, "default")
    model.save_pretrained(tmp_path)
    with mode():
        loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
        expected = model(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)
        loaded.merge_adapter()
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=1e-4)
    model.train()(**batch).loss.backward()


@pytest.mark.parametrize("pair", [("lora", "diff_pruning"), ("diff_pruning", "lora")], ids=str)
def test_an_adapter_of_another_method_is_refused(base, pair):
    with pytest.raises(ValueError, match="different peft types"):
        wrap(base(), pair[0]).add_adapter("two", config(pair[1]))
    with pytest.raises(ValueError, match="DIFFPRUNING"):
        get_peft_model(base(), config("diff_pruning"), mixed=True)


@pytest.mark.filterwarnings("ignore:Already found")
def test_peft_warns_of_lora_around_our_layers(base):
    """Nothing of ours is asked then. The other way round is refused, see test_model.py."""
    with pytest.warns(UserWarning, match="You are trying to modify a model with PEFT for a second time"):
        get_peft_model(wrap(base(), "diff_pruning").base_model.model, config("lora"), adapter_name="two")


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_base_after_2000_merges(base, method, dtype):
    model = wrap(base(num_hidden_layers=1).to(dtype), method, target_modules=["query"])
    before = base_weights(model)
    for _ in range(50 if method == "lora" else 2000):
        model.merge_adapter()
        model.unmerge_adapter()
    assert same(before, base_weights(model)) == (method != "lora"), "LoRA subtracts, and drifts in any dtype"


@ours
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_sequence_of_merges_restores_every_bit(base, method, dtype):
    names = ["one", "two", "three"]
    model = wrap(base(num_hidden_layers=1).to(dtype), method, *names, target_modules=["query"])
    before = base_weights(model)

    @settings(max_examples=25)
    @given(st.lists(st.one_of(st.none(), st.lists(st.sampled_from(names), unique=True)), max_size=6))
    def check(sequence):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of adapters that are merged already
            for subset in sequence:
                model.unmerge_adapter() if subset is None else model.merge_adapter(adapter_names=subset)
            model.unmerge_adapter()
        assert same(before, base_weights(model))

    check()


@both
def test_merging_again_warns_and_does_nothing(base, method, batch):
    model = wrap(base(), method, "one", "two")
    expected = outputs(model, batch, "one", "two")
    model.merge_adapter(adapter_names=["two"])
    once = base_weights(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(adapter_names=["two"])
    assert same(once, base_weights(model))
    with pytest.warns(UserWarning, match="additionally merging one"):
        model.merge_adapter(adapter_names=["one"])
    torch.testing.assert_close(outputs(model, batch), expected, atol=1e-5, rtol=1e-4)


@both
@pytest.mark.parametrize("damage", ["nan", "overflow"])
def test_a_safe_merge_refuses_what_is_not_finite(base, method, damage):
    model = wrap(base().half(), method, target_modules=["layer.1.attention.self.query", "layer.0.attention.self.value"])
    last = layers(model)[-1]
    with torch.no_grad():
        for p in last.parameters():
            if p.requires_grad:
                p.fill_(float("nan") if damage == "nan" else 35.0 if method == "lora" else 10000.0)
        last.base_layer.weight.fill_(60000.0)  # LoRA's diff is 8 * 35 * 35
    before = base_weights(model)
    with pytest.raises(ValueError, match=r"NaN|infinite"):
        model.merge_adapter(safe_merge=True)
    # LoRA refuses layer by layer and leaves the earlier ones merged.
    assert same(before, base_weights(model)) == (method != "lora")
    assert any(layer.merged for layer in layers(model)) == (method == "lora")


@pytest.mark.parametrize("situation", ["length", "training", "merged", "unknown", "nan"])
def test_errors_begin_with_loras_sentence(base, batch, situation):
    """So what catches LoRA's errors by their text catches ours."""
    texts = []
    for method in ("lora", *OURS):
        model, names = wrap(base(), method), ["one"] * 4
        if situation == "merged":
            model.merge_adapter()
        for p in own(model, "one").values() if situation == "nan" else ():
            torch.nn.init.constant_(p, torch.nan)
        names = {"length": names[1:], "unknown": ["nobody", "one", "zed", "one"]}.get(situation, names)
        model.train(situation == "training")
        call = {"safe_merge": True} if situation == "nan" else {**batch, "adapter_names": names}
        with pytest.raises(ValueError, match=r"adapter") as caught:
            (model.merge_adapter if situation == "nan" else model)(**call)
        texts.append(str(caught.value))
    assert all(text.startswith(texts[0].rstrip(".")) for text in texts), texts


def test_the_config_that_a_model_was_made_from_stays_the_callers(base):
    """PEFT keeps the object itself and notes its own findings in it."""
    given = config("diff_pruning")
    before = given.to_dict()
    models = [get_peft_model(base(), given) for _ in range(2)]
    held = [model.peft_config["default"] for model in models]
    assert given.to_dict() == before
    assert len({id(given), *map(id, held)}) == 3


@both
def test_switching_tasks_of_a_merged_model_there_and_back(base, method, batch):
    model = wrap(base(), method, "one", "two")
    expected = {name: outputs(model, batch, name) for name in ("one", "two")}
    model.merge_adapter()
    for name in ("one", "two", "one", "two"):
        model.unmerge_adapter()
        model.set_adapter(name)
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, batch), expected[name], atol=1e-6, rtol=1e-5)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("one")
    torch.testing.assert_close(outputs(model, batch), expected["one"], atol=1e-6, rtol=1e-5)


@both
@pytest.mark.parametrize("names", [None, ["two"], ["one", "two"]], ids=str)
def test_merging_for_good_gives_the_plain_model(base, method, batch, names):
    model, plain = wrap(base(), method, "one", "two", task_type=None), base()
    expected = outputs(model, batch, *(names or ["one"]))
    merged = model.merge_and_unload(adapter_names=names, safe_merge=True)
    assert type(merged) is type(plain)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(outputs(merged, batch), expected, atol=1e-5, rtol=1e-4)
    kept = deepcopy(merged.state_dict())
    unloaded = wrap(merged, method, "one", "two", task_type="SEQ_CLS").unload()  # a warning would fail the test
    changed = {key for key, value in unloaded.state_dict().items() if not torch.equal(value, kept[key])}
    assert changed == {"classifier.weight", "classifier.bias"}, "PEFT leaves the active adapter's head in place"


@both
@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(base, method, batch, copy):
    model = wrap(base(), method, "one", "two")
    expected = {name: outputs(model, batch, name) for name in ("one", "two")}
    copied = copy(model)
    for name in expected:
        assert torch.equal(outputs(copied, batch, name), expected[name])
    assert copied.active_adapters == ["two"]
    assert trainable(copied) == trainable(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(1.0)
    copied.delete_adapter("one")
    for name in expected:
        assert torch.equal(outputs(model, batch, name), expected[name])


@both
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("way", ["base", "base, no autocast", "model.to", "from_pretrained"])
def test_adapters_of_a_half_precision_base_are_fp32(base, method, batch, tmp_path, dtype, way):
    if way == "from_pretrained":
        base().save_pretrained(tmp_path)
        model = wrap(BertForSequenceClassification.from_pretrained(tmp_path, dtype=dtype), method)
    elif way == "model.to":
        model = wrap(base(), method).to(dtype)
    else:
        plain = base().to(dtype)
        model = get_peft_model(plain, config(method), adapter_name="one", autocast_adapter_dtype=way == "base").eval()
    dtypes = {p.dtype for p in own(model, "one").values()}
    # LoRA's follow the base where its user says so, which w's and gates' small updates would not survive.
    assert dtypes == ({dtype} if method == "lora" and way in ("base, no autocast", "model.to") else {torch.float32})
    assert {v.dtype for v in base_weights(model).values()} == {dtype}
    unmerged = outputs(model, batch)
    assert unmerged.dtype == dtype
    model.merge_adapter()
    if method == "lora":  # adds activations, so that merging rounds elsewhere
        torch.testing.assert_close(outputs(model, batch), unmerged, atol=0.1, rtol=0.1)
    else:
        assert torch.equal(outputs(model, batch), unmerged)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_under_autocast(base, method, batch, dtype):
    model = wrap(base().to(dtype), method).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    gradients = [p.grad for p in own(model, "one").values()]
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)


@both
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_equal_with_checkpointing(base, method, batch, use_reentrant):
    found = []
    for checkpointing in (False, True):
        model = wrap(base(hidden_dropout_prob=0.3), method).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(**batch).loss.backward()
        found.append({key: p.grad for key, p in own(model, "one").items() if p.grad is not None})
    assert found[0].keys() == own(model, "one").keys()
    assert same(*found)


@pytest.mark.parametrize("first", [None, "all-linear", ["query"]], ids=str)
def test_all_linear_means_the_same_beside_another_adapter(base, first):
    alone = get_peft_model(base(), DiffPruningConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    beside = get_peft_model(base(), DiffPruningConfig(target_modules=first, task_type="SEQ_CLS"), adapter_name="one")
    beside.add_adapter("two", DiffPruningConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert beside.base_model.adapted_parameters("two") == alone.base_model.adapted_parameters()
