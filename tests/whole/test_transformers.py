"""Adapters in models of transformers itself, without a PeftModel around them; placement of base and adapter."""

import os
import subprocess
import sys

import peft
import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from trainers import Rows, arguments
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer

from diffpeft import DiffPruningCallback, DiffPruningConfig, DiffPruningModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter b was active which is now deleted"),
]

TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}
AUTO = {
    "bert": (AutoModelForSequenceClassification, peft.AutoPeftModelForSequenceClassification),
    "llama": (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM),
}
both = pytest.mark.parametrize("name", TASKS)
some = pytest.mark.parametrize(("name", "pruned"), [("bert", False), ("bert", True), ("llama", True)])
either_phase = pytest.mark.parametrize("pruned", [False, True], ids=["gating", "fixmask"])


def make(name):
    return ARCHITECTURES[name].make().eval()


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**ARCHITECTURES[name].inputs(3))[0]


def config(name, **kwargs):
    return DiffPruningConfig(**{"task_type": TASKS.get(name), "target_density": 0.05, **kwargs})


def trained(model, pruned, seed=0):
    """Give the model's adapter a diff as training would, and prune it or not."""
    torch.manual_seed(seed)
    tuner = DiffPruningModel.of(model)
    for parameter in (p for n, p in model.named_parameters() if "diffpruning_w" in n):
        nn.init.normal_(parameter, std=0.1)
    if pruned:
        tuner.magnitude_prune()
    return model.eval()


def native(name, pruned, seed=0, **kwargs):
    model = make(name)
    model.add_adapter(config(name, **kwargs))
    return trained(model, pruned, seed)


@pytest.fixture
def saved(tmp_path):
    """Saves a base model and an adapter for it; gives their directories and the logits that belong to them."""

    def save(name, pruned=True, **kwargs):
        make(name).save_pretrained(tmp_path / "base")
        model = get_peft_model(AUTO[name][0].from_pretrained(tmp_path / "base"), config(name, **kwargs))
        trained(model, pruned).save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "base"), str(tmp_path / "adapter"), logits(model, name)

    return save


@both
def test_add_adapter_makes_a_model_of_transformers_train_a_diff(name):
    model = make(name)
    base = logits(model, name)
    model.add_adapter(config(name))
    assert torch.equal(logits(model, name), base)
    assert model.active_adapters() == ["default"]
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("diffpruning_" in n or "modules_to_save" in n for n in trainable)
    model.train()(**ARCHITECTURES[name].inputs(3))[0].square().sum().backward()
    tuner = DiffPruningModel.of(model)
    assert (tuner.phase(), tuner.expected_density()) == ("gating", pytest.approx(0.9867, abs=1e-3))
    density = tuner.expected_density()
    for step in range(5):
        tuner.gate_step(step, 10)
    assert tuner.expected_density() < density
    assert (
        tuner.magnitude_prune().kept
        == round(0.05 * tuner.num_base_parameters())
        == sum(len(v) for v, _ in tuner.get_diff().values())
    )
    assert DiffPruningModel.of(model).phase() == "fixmask"


def test_the_stock_trainer_takes_an_added_adapter_through_all_phases(tiny_bert, tmp_path):
    model = tiny_bert()
    model.add_adapter(config("bert"))
    trainer = Trainer(
        model=model, args=arguments(tmp_path, max_steps=6), train_dataset=Rows(), callbacks=[DiffPruningCallback()]
    )
    trainer.train()
    phases = [entry["diffpruning/phase"] for entry in trainer.state.log_history if "loss" in entry]
    assert phases == ["gating"] * 2 + ["fixmask"] * 4
    trainer.save_model(tmp_path / "saved")
    fresh = tiny_bert()
    fresh.load_adapter(str(tmp_path / "saved"))
    inputs = {"input_ids": Rows().ids}
    assert torch.equal(fresh.eval()(**inputs)[0], model.eval()(**inputs)[0])


@some
def test_save_pretrained_writes_the_adapter_alone_and_load_adapter_brings_it_back(name, pruned, tmp_path):
    model = native(name, pruned)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert all("diffpruning_" in key or "classifier" in key for key in keys)
    assert any("diffpruning_w" in key for key in keys) != pruned
    assert not (tmp_path / "model.safetensors").exists()
    fresh = make(name)
    info = fresh.load_adapter(str(tmp_path))
    assert not info.missing_keys | info.unexpected_keys
    assert torch.equal(logits(fresh, name), logits(model, name))
    assert not torch.allclose(logits(fresh, name), logits(make(name), name), atol=1e-3)
    wrapped = PeftModel.from_pretrained(make(name), tmp_path)
    assert torch.equal(logits(wrapped, name), logits(model, name))


@both
def test_adapters_side_by_side_are_set_disabled_and_deleted(name, tmp_path):
    base, expected = logits(make(name), name), {}
    for adapter, pruned in (("a", False), ("b", True)):
        model = native(name, pruned, seed=ord(adapter))
        model.save_pretrained(tmp_path / adapter)
        expected[adapter] = logits(model, name)
    model = make(name)
    model.add_adapter(config(name), "fresh")
    for adapter in "ab":
        model.load_adapter(str(tmp_path / adapter), adapter)
    for adapter in "ab":
        model.set_adapter(adapter)
        assert model.active_adapters() == [adapter]
        assert torch.equal(logits(model, name), expected[adapter])
        assert DiffPruningModel.of(model).phase() == {"a": "gating", "b": "fixmask"}[adapter]
    model.disable_adapters()
    assert torch.equal(logits(model, name), base)
    model.enable_adapters()
    model.delete_adapter(["fresh", "b"])
    model.set_adapter("a")
    assert list(model.peft_config) == ["a"]
    assert not any(".b." in n for n, _ in [*model.named_parameters(), *model.named_buffers()])
    assert torch.equal(logits(model, name), expected["a"])
    model.delete_adapter("a")
    assert torch.equal(logits(model, name), base)
    assert DiffPruningModel.of(model) is None


@either_phase
def test_an_adapter_loaded_to_be_trained_goes_on_in_its_phase(pruned, tmp_path):
    native("bert", pruned).save_pretrained(tmp_path)
    frozen, going_on = make("bert"), make("bert")
    frozen.load_adapter(str(tmp_path))
    going_on.load_adapter(str(tmp_path), is_trainable=True)
    for model, trainable in ((frozen, False), (going_on, True)):
        assert {p.requires_grad for n, p in model.named_parameters() if "diffpruning_" in n} == {trainable}
        assert DiffPruningModel.of(model).phase() == ("fixmask" if pruned else "gating")


def test_a_file_without_a_parameters_values_is_refused_by_transformers_too(tmp_path):
    native("bert", True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[next(key for key in tensors if "diffpruning_values" in key)]
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = make("bert")
    with pytest.raises(ValueError, match="values"):  # noqa: PT012
        model.load_adapter(str(tmp_path))
        logits(model, "bert")


# PEFT's injection


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(60, 8), nn.LayerNorm(8), nn.Linear(8, 4))


@pytest.mark.parametrize("name", ["plain", "bert"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@either_phase
def test_injection_and_state_dict_reproduce_an_adapter(name, low_cpu_mem_usage, pruned):
    def base():
        return plain() if name == "plain" else make(name)

    def run(model):
        return model.eval()(torch.arange(60)) if name == "plain" else logits(model, name)

    model = trained(inject_adapter_in_model(config(name), base()), pruned)
    state_dict = peft.get_peft_model_state_dict(model)
    for other in (model.peft_config["default"], config(name)):  # of the same phase, and of gating
        fresh = inject_adapter_in_model(other, base(), "other", low_cpu_mem_usage=low_cpu_mem_usage)
        assert any(p.is_meta for p in fresh.parameters()) == low_cpu_mem_usage
        result = peft.set_peft_model_state_dict(fresh, state_dict, "other", low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.unexpected_keys
        assert torch.equal(run(fresh), run(model))
    assert not torch.allclose(run(model), run(base()), atol=1e-3)


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency:RuntimeWarning")
def test_injection_accepts_a_pruned_adapters_state_dict_as_the_guide():
    model = native("bert", True, target_density=0.002)
    state_dict = peft.get_peft_model_state_dict(model)
    fresh = inject_adapter_in_model(model.peft_config["default"], make("bert"), state_dict=state_dict)
    peft.set_peft_model_state_dict(fresh, state_dict)
    assert torch.equal(logits(fresh, "bert"), logits(model, "bert"))


# Loading by a directory's name, and placement


@some
def test_auto_classes_find_the_base_and_the_adapter(name, pruned, saved):
    _, adapter, expected = saved(name, pruned)
    auto, auto_peft = AUTO[name]
    model = auto_peft.from_pretrained(adapter)
    assert torch.equal(logits(model, name), expected)
    model = auto.from_pretrained(adapter)
    assert not isinstance(model, PeftModel)
    assert torch.equal(logits(model, name), expected)
    assert DiffPruningModel.of(model).phase() == ("fixmask" if pruned else "gating")


@some
def test_low_memory_loading_equals_the_ordinary(name, pruned, saved):
    base, adapter, expected = saved(name, pruned)
    options = {"low_cpu_mem_usage": True, "torch_device": "cpu"}
    model = PeftModel.from_pretrained(AUTO[name][0].from_pretrained(base), adapter, **options)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert torch.equal(logits(model, name), expected)
    model = get_peft_model(AUTO[name][0].from_pretrained(base), config(name))
    model.load_adapter(adapter, "other", **options)
    model.set_adapter("other")
    assert torch.equal(logits(model, name), expected)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}], ids=str)
@either_phase
def test_a_dispatched_base_model_takes_an_adapter_and_trains_it(device_map, pruned, saved):
    base, adapter, expected = saved("bert", pruned)
    model = AUTO["bert"][0].from_pretrained(base, device_map=device_map)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    assert torch.equal(logits(model, "bert"), expected)
    model.train()(**ARCHITECTURES["bert"].inputs(3), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def offloaded(base, folder):
    """A Llama with its first layer on disk, and the device map that says so."""
    names = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"]
    device_map = {"lm_head": "cpu", **{f"model.{name}": "disk" if "0" in name else "cpu" for name in names}}
    return AutoModelForCausalLM.from_pretrained(base, device_map=device_map, offload_folder=folder), device_map


@either_phase
def test_an_offloaded_base_model_that_is_wrapped_runs_an_adapter(pruned, saved, tmp_path):
    base, adapter, expected = saved("llama", pruned)
    model = get_peft_model(offloaded(base, tmp_path)[0], config("llama"))
    assert sum(p.is_meta for p in model.parameters()) > 8
    assert torch.equal(logits(model, "llama"), logits(make("llama"), "llama"))
    model.load_adapter(adapter, "other")
    model.set_adapter("other")
    assert torch.equal(logits(model, "llama"), expected)


@either_phase
def test_an_adapter_is_dispatched_with_an_offloaded_base_model(pruned, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # peft 0.21 writes its copy of what is on disk below the working directory
    base, adapter, expected = saved("llama", pruned)
    model, device_map = offloaded(base, tmp_path)
    device_map = {f"base_model.model.{block}": device for block, device in device_map.items()}
    model = PeftModel.from_pretrained(model, adapter, device_map=device_map, offload_dir=str(tmp_path / "more"))
    assert torch.equal(logits(model, "llama"), expected)


@either_phase
def test_transformers_loads_an_adapter_right_into_an_offloaded_model_or_not_at_all(pruned, saved, tmp_path):
    base, adapter, expected = saved("llama", pruned)
    model, _ = offloaded(base, tmp_path)
    try:
        model.load_adapter(adapter)
        got = logits(model, "llama")
    except ValueError:
        return
    assert torch.equal(got, expected)


def test_merging_a_tied_embedding_without_its_head_keeps_outputs_or_is_refused():
    model = get_peft_model(make("llama_tied"), config("llama", exclude_modules=["lm_head"]))
    expected = logits(trained(model, True), "llama_tied")
    try:
        model.merge_adapter()
    except ValueError:
        return
    assert torch.allclose(logits(model, "llama_tied"), expected, atol=1e-5)


# Without `import diffpeft`

PROGRAM = """
import sys
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification as Auto
base, adapter = sys.argv[1:]
ways = {
    "PeftConfig": lambda: PeftConfig.from_pretrained(adapter),
    "PeftModel": lambda: PeftModel.from_pretrained(Auto.from_pretrained(base), adapter),
    "AutoPeftModel": lambda: AutoPeftModelForSequenceClassification.from_pretrained(adapter),
    "load_adapter": lambda: Auto.from_pretrained(base).load_adapter(adapter),
    "AutoModel": lambda: Auto.from_pretrained(adapter),
}
for _ in range(2):
    for name, way in ways.items():
        try:
            way()
            print(name, "loads")
        except Exception as error:
            print(name, repr(error))
    import diffpeft
"""


def test_without_the_import_peft_knows_no_diffpruning_and_with_it_all_ways_load(saved):
    base, adapter, _ = saved("bert")
    command = [sys.executable, "-c", PROGRAM, base, adapter]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    ways = ("PeftConfig", "PeftModel", "AutoPeftModel", "load_adapter", "AutoModel")
    before, after = [f"{way} KeyError('DIFFPRUNING')" for way in ways], [f"{way} loads" for way in ways]
    assert done.stdout.splitlines() == before + after
