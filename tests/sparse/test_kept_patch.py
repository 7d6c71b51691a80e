"""Patches that are prepared once: the same bits as those made anew, whatever happens to the tensors in between."""

import copy
import gc

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from diffpeft import DiffPruningConfig
from diffpeft.sparse import exchange
from diffpeft.sparse.functions import Patch
from diffpeft.sparse.kept_patch import KeptPatch, PatchSlot

pytestmark = pytest.mark.skipif(exchange._loops() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def diffs(dtype=torch.float32, seed=0):
    """A matrix and a bias with a few places each, and none."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape, count in (((30, 20), 150), ((30,), 3), ((7,), 0)):
        weight = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        at = torch.randperm(weight.numel(), generator=generator)[:count].sort().values
        made.append((weight, nn.Parameter(torch.randn(count, generator=generator)), at))
    return made


def weights(some):
    return [weight.detach().clone() for weight, _, _ in some]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_does_what_a_patch_does(dtype):
    own = diffs(dtype)
    plain, slot = weights(own), PatchSlot()
    for _ in range(3):
        with Patch(own):
            expected = weights(own)
        with slot.patch(own):
            assert same(weights(own), expected)
            assert not same(weights(own), plain)
        assert same(weights(own), plain)
        own[0][1].data.mul_(2)  # values that train


def test_it_is_made_once_and_again_when_something_moves():
    own, slot = diffs(), PatchSlot()
    first = slot.patch(own)
    assert slot.patch(own) is first
    own[0][0].data = own[0][0].data.clone()
    second = slot.patch(own)
    assert second is not first
    own[0][1].data = own[0][1].data.clone()
    assert slot.patch(own) is not second
    assert slot.patch(diffs(torch.float64)) is not None
    assert slot.patch([(weight.half(), *rest) for weight, *rest in own[:1]] + own[1:]) is None, "of two dtypes"
    assert slot.patch([(own[0][0].t(), *own[0][1:])]) is None, "not in one piece"
    assert slot.patch(own[:1]) is not None
    own[0][0].data = own[0][0].data.t()  # at the same address
    assert slot.patch(own[:1]) is None


def test_what_moves_away_is_not_kept_alive():
    own, slot = diffs(), PatchSlot()
    with slot.patch(own):
        pass
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in own[0]]
    assert not any(storage.expired() for storage in storages)
    own.clear()
    gc.collect()
    assert all(storage.expired() for storage in storages)


def test_copies_are_made_anew():
    own, slot = diffs(), PatchSlot()
    slot.patch(own)
    for other in (copy.deepcopy(slot), copy.copy(slot)):
        assert other._patch is None


def test_errors_and_interrupts_put_everything_back(monkeypatch):
    own = diffs()
    plain, patch = weights(own), PatchSlot().patch(own)
    with pytest.raises(KeyboardInterrupt), patch:
        raise KeyboardInterrupt
    assert same(weights(own), plain)
    with pytest.raises(RuntimeError, match="within itself"), patch, patch:
        pass
    assert same(weights(own), plain)

    def interrupted(loop, calls):
        def run(*args):
            calls.append(1)
            loop(*args)
            if len(calls) == 1:
                raise KeyboardInterrupt

        return run

    loop = patch._loop
    patch._loop = interrupted(loop, [])  # right after it has written
    with pytest.raises(KeyboardInterrupt), patch:
        pass
    assert same(weights(own), plain)
    patch._loop = loop
    patch.__enter__()
    expected = weights(own)
    patch._loop = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # before it puts back
    with pytest.raises(KeyboardInterrupt):
        patch.__exit__()
    patch._loop = loop
    with patch:
        assert same(weights(own), expected)
    assert same(weights(own), plain)


def test_a_place_that_is_not_there_changes_nothing():
    own = diffs()
    own[1][2][-1] = 30
    plain = weights(own)
    with pytest.raises(IndexError, match="30 elements of its parameter"), PatchSlot().patch(own):
        pass
    assert same(weights(own), plain)


# In a model


@pytest.fixture
def model(tiny_bert):
    """Two finished adapters; layers that take themselves for parts of a large model."""
    config = DiffPruningConfig(target_density=0.1, init_weights=False)
    model = get_peft_model(tiny_bert().base_model, config, adapter_name="first")
    model.add_adapter("second", config)
    for name in ("first", "second"):
        model.base_model.magnitude_prune(adapter_name=name)
    for layer in model.base_model.all_layers():
        layer.fused = True
    return model.eval()


@pytest.fixture
def entered(monkeypatch):
    """How often a kept patch was entered."""
    calls, enter = [], KeptPatch.__enter__
    monkeypatch.setattr(KeptPatch, "__enter__", lambda patch: calls.append(patch) or enter(patch))
    return calls


@torch.no_grad()
def outputs(model, batch, kept=True):
    for layer in model.base_model.all_layers():
        layer.fused = kept
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    return model(**inputs).last_hidden_state


def cast(model):
    model.base_model.model.to(torch.bfloat16)


def replace_weights(model):
    for layer in model.base_model.all_layers():
        for parameter in layer.base_layer.parameters(recurse=False):
            parameter.data = parameter.data * 1.5


def replace_values(model):
    for layer in model.base_model.all_layers():
        for name in layer.nnz("first"):
            layer.diffpruning_values["first"][name] = nn.Parameter(layer.kept_values("first", name).detach() * 3)


CHANGES = {
    "nothing": lambda model: None,
    "another adapter": lambda model: model.set_adapter("second"),
    "cast": cast,
    "other weights": replace_weights,
    "other values": replace_values,
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "an adapter anew": lambda model: (
        model.set_adapter("second"),
        model.delete_adapter("first"),
        model.add_adapter("first", DiffPruningConfig(target_density=0.2, init_weights=False)),
        model.base_model.magnitude_prune(adapter_name="first"),
        model.set_adapter("first"),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_passes_are_those_of_patches_made_anew(model, batch, entered, change):
    before = {name: p.detach().clone() for name, p in model.base_model.base_parameters()}
    assert torch.equal(outputs(model, batch), outputs(model, batch, kept=False))
    assert entered
    change(model)
    assert torch.equal(outputs(model.eval(), batch), outputs(model, batch, kept=False))
    assert torch.equal(outputs(model, batch), outputs(model, batch, kept=False))
    if change in (CHANGES["nothing"], CHANGES["another adapter"], CHANGES["an adapter anew"]):
        assert all(torch.equal(p, before[name]) for name, p in model.base_model.base_parameters())


def test_a_copied_model_has_patches_of_its_own(model, batch, tmp_path):
    expected = outputs(model, batch)
    torch.save(model, tmp_path / "model.pt")
    others = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
    for other in others:
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)
        assert torch.equal(outputs(other, batch), outputs(other, batch, kept=False))
    assert torch.equal(outputs(model, batch), expected)


def test_small_models_do_without(model, batch, entered):
    outputs(model, batch, kept=False)
    assert not entered


def test_without_a_compiler_patches_are_made_anew(model, batch, monkeypatch, entered):
    expected = outputs(model, batch)
    entered.clear()
    monkeypatch.setattr(exchange, "_loops", lambda: None)
    replace_weights(model)
    assert not torch.equal(outputs(model, batch), expected)
    assert torch.equal(outputs(model, batch), outputs(model, batch, kept=False))
    assert not entered
