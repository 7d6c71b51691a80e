"""Activating and merging other adapters: in one walk as in three, and whole or not at all."""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model

from diffpeft import DiffPruningConfig
from diffpeft.sparse import inplace


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(tiny_bert, request):
    """Two finished adapters and one in gating, with a head each."""
    config = DiffPruningConfig(task_type="SEQ_CLS", target_density=0.1, init_weights=False)
    model = get_peft_model(tiny_bert().to(request.param), config, adapter_name="first")
    model.add_adapter("second", config)
    model.add_adapter("gating", config)
    for name in ("first", "second"):
        model.base_model.magnitude_prune(adapter_name=name)
    return model.eval()


def base_weights(model):
    return {name: p.detach().clone() for name, p in model.base_model.base_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state(model):
    """What a switch may change: base weights, what is active, merged, and what trains, heads included."""
    layers = model.base_model.all_layers()
    return (
        base_weights(model),
        [(layer.active_adapters, list(layer.merged_adapters)) for layer in layers],
        model.base_model.active_adapter,
        {name: p.requires_grad for name, p in model.named_parameters()},
    )


@pytest.mark.parametrize("inference_mode", [False, True])
def test_a_switch_leaves_what_unmerging_activating_and_merging_leave(model, batch, inference_mode):
    plain = base_weights(model)
    for name in ["second", "first", "gating", "second", "second"]:
        model.unmerge_adapter()
        model.base_model.set_adapter(name, inference_mode)
        model.merge_adapter()
        expected, outputs = state(model), model(**batch()).logits
        model.unmerge_adapter()
        model.base_model.set_adapter("first")
        model.merge_adapter()
        model.base_model.switch_adapter(name, inference_mode)
        assert torch.equal(model(**batch()).logits, outputs)
        found = state(model)
        assert same(found[0], expected[0])
        assert found[1:] == expected[1:]
    model.unmerge_adapter()
    assert same(base_weights(model), plain)


def test_several_adapters_are_merged_by_one_switch(tiny_bert):
    config = DiffPruningConfig(target_density=0.1, init_weights=False)
    model = get_peft_model(tiny_bert().base_model, config, adapter_name="first")
    model.add_adapter("second", config)
    plain = base_weights(model)
    model.base_model.switch_adapter(["first", "second"])  # nothing was merged
    together = base_weights(model)
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["first", "second"])
    assert same(base_weights(model), together)
    model.base_model.switch_adapter([])
    assert same(base_weights(model), plain)


def test_names_that_do_not_exist_change_nothing(model):
    model.merge_adapter()
    before = state(model)
    with pytest.raises(ValueError, match="no adapter 'third'"):
        model.base_model.switch_adapter("third")
    after = state(model)
    assert same(after[0], before[0])
    assert after[1:] == before[1:]


@pytest.mark.parametrize("verb", ["set_adapter", "switch_adapter"])
def test_heads_that_cannot_be_summed_change_nothing(model, verb):
    before = state(model)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        getattr(model.base_model, verb)(["first", "second"])
    after = state(model)
    assert same(after[0], before[0])
    assert after[1:] == before[1:]


def test_what_cannot_be_merged_leaves_the_plain_base(model):
    plain = base_weights(model)
    model.merge_adapter()
    last = [layer for layer in model.base_model.all_layers() if layer.nnz("second")][-1]
    last.diffpruning_positions["second"][next(iter(last.nnz("second")))].zero_()
    with pytest.raises(ValueError, match="never loaded"):
        model.base_model.switch_adapter("second")
    assert same(base_weights(model), plain)
    assert not any(layer.merged for layer in model.base_model.all_layers())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as nothing is merged
        model.base_model.switch_adapter("first")


@pytest.mark.parametrize("safely", [False, True])
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("at", [0, 1, 7, 20])
def test_an_interrupt_in_a_merge_loses_nothing_of_the_base(model, monkeypatch, safely, written, at):
    plain, write_at, calls = base_weights(model), inplace.write_at, []

    def interrupted(target, values, positions):
        calls.append(None)
        if len(calls) - 1 == at:
            if written:
                write_at(target, values, positions)
            raise KeyboardInterrupt
        write_at(target, values, positions)

    monkeypatch.setattr(inplace, "write_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.merge_adapter(adapter_names=["second"], safe_merge=safely)
    assert len(calls) > at
    assert not any(layer.merged for layer in model.base_model.all_layers())
    assert same(base_weights(model), plain)


@pytest.mark.parametrize("at", [0, 1, 7, 20, 40])
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("then", ["nothing", "interrupted again"])
def test_an_interrupt_in_a_switch_loses_nothing_of_the_base(model, monkeypatch, at, written, then):
    plain, write_at, calls = base_weights(model), inplace.write_at, []
    model.merge_adapter()

    def interrupted(target, values, positions):
        calls.append(None)
        if written:
            write_at(target, values, positions)
        if len(calls) - 1 == at or (then == "interrupted again" and len(calls) - 1 == at + 3):
            raise KeyboardInterrupt
        write_at(target, values, positions)

    monkeypatch.setattr(inplace, "write_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.base_model.switch_adapter("second")
    monkeypatch.undo()
    if then == "interrupted again":
        model.unmerge_adapter()
    assert len(calls) > at
    assert not any(layer.merged for layer in model.base_model.all_layers())
    assert same(base_weights(model), plain)
    model.base_model.switch_adapter("first")
    merged = base_weights(model)
    model.unmerge_adapter()
    model.merge_adapter()
    assert same(base_weights(model), merged)


def test_a_model_that_was_switched_can_be_copied_pickled_and_moved(model, tmp_path):
    plain = base_weights(model)
    model.base_model.switch_adapter("second")
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False), model.to("cpu")):
        other.base_model.switch_adapter("first")
        other.unmerge_adapter()
        assert same(base_weights(other), plain)


def test_a_weight_that_became_smaller_is_an_error(model):
    layer = next(layer for layer in model.base_model.all_layers() if (layer.nnz("second") or {}).get("weight", 0) > 5)
    layer.base_layer.weight.data = layer.base_layer.weight.data[:1].clone()
    with pytest.raises(IndexError, match=r"reaches beyond its \d+ elements"):
        model.base_model.switch_adapter("second")
    assert not any(layer.merged for layer in model.base_model.all_layers())


def test_an_interrupt_in_unmerging_can_be_made_good(model, monkeypatch):
    plain, write_at, calls = base_weights(model), inplace.write_at, []
    model.merge_adapter()

    def interrupted(target, values, positions):
        calls.append(None)
        if len(calls) == 8:
            raise KeyboardInterrupt
        write_at(target, values, positions)

    monkeypatch.setattr(inplace, "write_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.unmerge_adapter()
    model.unmerge_adapter()
    assert same(base_weights(model), plain)
