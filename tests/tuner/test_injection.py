"""Shortcuts through a wrapped model, against PEFT's ways."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from diffpeft import DiffPruningConfig


@pytest.fixture
def model(tiny_bert):
    """Two finished adapters, "first" and "second", and one in gating, with a head each."""
    config = DiffPruningConfig(task_type="SEQ_CLS", target_density=0.1, init_weights=False)
    model = get_peft_model(tiny_bert(), config, adapter_name="first")
    model.add_adapter("second", config)
    model.add_adapter("gating", config)
    for name in ("first", "second"):
        model.base_model.magnitude_prune(adapter_name=name)
    return model


@pytest.mark.parametrize("names", ["first", "second", "gating", ["first", "gating"], []])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_what_trains_after_set_adapter_is_what_trains_in_peft(model, names, inference_mode):
    if isinstance(names, list) and len(names) != 1:  # heads cannot be summed
        for layer in model.base_model.all_layers():
            BaseTunerLayer.set_adapter(layer, names, inference_mode)
        expected = {n: p.requires_grad for n, p in model.named_parameters()}, layer.active_adapters
        for layer in model.base_model.all_layers():
            layer.set_adapter("second")
            layer.set_adapter(names, inference_mode)
    else:
        BaseTuner.set_adapter(model.base_model, names, inference_mode)
        expected = {n: p.requires_grad for n, p in model.named_parameters()}, [names]
        model.base_model.set_adapter("second")
        model.base_model.set_adapter(names, inference_mode)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == expected[0]
    assert all(layer.active_adapters == expected[1] for layer in model.base_model.all_layers())


def test_only_adapters_and_heads_train_as_in_peft(model):
    for parameter in model.parameters():
        parameter.requires_grad = True
    model.base_model._mark_only_adapters_as_trainable(model.base_model.model)
    ours = {n: p.requires_grad for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad = True
    BaseTuner._mark_only_adapters_as_trainable(model.base_model, model.base_model.model)
    assert ours == {n: p.requires_grad for n, p in model.named_parameters()}


def test_a_merge_adds_to_the_base_as_it_is_even_if_nobody_told(model):
    layer = next(layer for layer in model.base_model.all_layers() if (layer.nnz("first") or {}).get("weight"))
    weight = layer.base_layer.weight
    for name in ("first", "second", "first"):
        model.base_model.set_adapter(name)
        model.merge_adapter()
        model.unmerge_adapter()
    weight.data.mul_(2)  # leaves the parameter's version as it was
    before = weight.detach().clone()
    model.merge_adapter()
    values, where = layer.sparse("first", "weight").values.detach(), layer.sparse("first", "weight").positions
    assert torch.equal(weight.detach().reshape(-1)[where], before.reshape(-1)[where] + values)
    model.unmerge_adapter()
    assert torch.equal(weight, before)
