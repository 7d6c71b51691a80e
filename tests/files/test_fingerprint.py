"""A base model is known again, whatever dtype it was loaded in; another one is told."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from diffpeft import DiffPruningConfig
from diffpeft.files import fingerprint


@pytest.fixture
def saved(tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(init_weights=False))
    model.base_model.magnitude_prune()
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_base_is_known_in_every_dtype(tiny_bert, saved, dtype):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        PeftModel.from_pretrained(tiny_bert().to(dtype), saved)


def test_other_weights_of_the_same_shapes_are_told(tiny_bert, saved):
    with pytest.warns(UserWarning, match=r"made from other base weights: \d+ of \d+ parameters"):
        PeftModel.from_pretrained(tiny_bert(seed=1), saved)


def test_a_base_that_was_trained_on_is_told(tiny_bert, saved):
    base = tiny_bert()
    with torch.no_grad():
        base.bert.encoder.layer[1].output.dense.weight.mul_(1.001)
    with pytest.warns(UserWarning, match=r"1 of \d+ parameters differ, \['bert.encoder.layer.1.output.dense.weight'\]"):
        PeftModel.from_pretrained(base, saved)


def test_adapters_of_one_base_side_by_side(tiny_bert, saved):
    model = PeftModel.from_pretrained(tiny_bert(), saved)
    model.load_adapter(saved, "other")
    model.set_adapter("other")
    model.load_adapter(saved, "third")


def test_sizes_of_all_kinds():
    parameters = {"empty": torch.empty(0), "scalar": torch.tensor(2.0), "large": torch.arange(100_000.0)}
    taken = fingerprint.take(parameters, parameters.get)
    assert fingerprint.differing(taken, parameters, parameters.get) == []
    parameters["scalar"] = torch.tensor(3.0)
    assert fingerprint.differing(taken, parameters, parameters.get) == ["scalar"]
    assert sum(len(text) for text in taken.values()) < 1000
