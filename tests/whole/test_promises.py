"""What stays the same from version to version: adapter files that an earlier version saved load to the same bits.

The files in `golden/` were saved by the flat package at commit 1c33eb2, on random weights that follow from a seed; each
base model is known again by its fingerprint.
"""

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

GOLDEN = Path(__file__).parent / "golden"
FINISHED = ("float32", "bfloat16", "int8")


def base() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    others = {"num_attention_heads": 2, "max_position_embeddings": 16, "num_labels": 2}
    return BertForSequenceClassification(BertConfig(**sizes, **others))


def load(name: str) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that the base is another one
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        return PeftModel.from_pretrained(base(), str(GOLDEN / name)).eval()


def expected(name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / "expected.safetensors")
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).reshape(3, 8)).logits


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_adapter_of_the_old_version_loads_to_the_same_bits(name):
    model, told = load(name), expected(name)
    diff = model.base_model.get_diff()
    assert {key.rpartition("/")[0] for key in told} - {""} == diff.keys()
    for key, (positions, values) in diff.items():
        assert torch.equal(positions, told[f"{key}/positions"].long())
        assert torch.equal(values, told[f"{key}/values"])
    torch.testing.assert_close(logits(model), told["logits"])


def test_an_adapter_in_gating_of_the_old_version_loads_to_the_same_bits():
    model = load("gating")
    own = {
        name.replace(".default", "").replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()
    }
    stored = load_file(GOLDEN / "gating" / "adapter_model.safetensors")
    assert any("log_alpha" in name for name in stored)
    for name, tensor in stored.items():
        name = name.replace(".base_layer", "")
        name = name if name in own else name.replace("classifier", "classifier.modules_to_save")
        assert torch.equal(own[name], tensor), name
    assert model.base_model.phase() == "gating"
    torch.testing.assert_close(logits(model), expected("gating")["logits"])


@pytest.mark.parametrize("name", ["gating", *FINISHED])
def test_what_is_saved_again_is_what_was_loaded(name, tmp_path):
    load(name).save_pretrained(str(tmp_path))
    before = load_file(GOLDEN / name / "adapter_model.safetensors")
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
