"""Training that is not one adapter on one model in one Trainer: adapters inside modules, copies, several at once.

Right before, tried as well: deepcopy and averaged (EMA) copies of a pruned model; states saved and loaded in one phase;
models in DistributedDataParallel and torch.compile's wrapper, in which the adapter is found too.
"""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from trainers import Rows, arguments, peft_model
from transformers import Trainer

from diffpeft import DiffPruningCallback, DiffPruningConfig, DiffPruningModel


class Inside(nn.Module):
    """A module of one's own around models, whose forward returns its loss."""

    def __init__(self, *models):
        super().__init__()
        self.inner, self.other = models[0], models[-1]

    def forward(self, input_ids, labels):
        return {"loss": self.inner(input_ids, labels=labels).loss + self.other(input_ids, labels=labels).loss}


def train(model, path, callback=None):
    made = Trainer(
        model, arguments(path), train_dataset=Rows(), callbacks=[callback or DiffPruningCallback(gating_steps=8)]
    )
    made.train()
    return made


def pruned(tiny_bert, **config):
    model = peft_model(tiny_bert, init_weights=False, **config)
    model.base_model.magnitude_prune()
    return model.eval()


@pytest.mark.parametrize("by", ["peft", "transformers"])
def test_an_adapter_inside_another_module_is_found_and_trained(tiny_bert, tmp_path, by):
    if by == "peft":
        inner = peft_model(tiny_bert)
    else:
        inner = tiny_bert()
        inner.add_adapter(DiffPruningConfig(task_type="SEQ_CLS", target_density=0.02))
    model = Inside(inner)
    assert DiffPruningModel.of(nn.Sequential(model)).phase() == "gating"
    made = train(model, tmp_path)
    assert DiffPruningModel.of(inner).phase() == "fixmask"
    assert "diffpruning/phase" in made.state.log_history[0]


def test_two_adapters_in_one_module_are_named(tiny_bert, tmp_path):
    model = Inside(peft_model(tiny_bert), peft_model(tiny_bert))
    with pytest.raises(ValueError, match=r"adapters in \['inner.base_model', 'other.base_model'\], and one of them"):
        train(model, tmp_path)


def test_a_task_adapter_trains_over_a_frozen_one(tiny_bert, tmp_path):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(target_modules=["query"], init_weights=False), "language")
    model.base_model.magnitude_prune()
    before = model.base_model.get_diff("language")
    model.add_adapter("task", DiffPruningConfig(task_type="SEQ_CLS", target_density=0.02))
    model.base_model.set_adapter(["language", "task"])
    with pytest.raises(ValueError, match="2 train; say which one you mean by adapter_name=, or freeze others"):
        train(model, tmp_path)
    for name, parameter in model.named_parameters():
        if ".language" in name:
            parameter.requires_grad_(False)
    made = train(model, tmp_path)
    assert model.base_model.phase("task") == "fixmask"
    after = model.base_model.get_diff("language")
    assert all(torch.equal(before[name][1], after[name][1]) for name in before)
    assert made.state.log_history[0]["diffpruning/phase"] == "gating"


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_reference_copied_by_parameters_is_the_adapter_it_was_copied_from(tiny_bert, batch, dtype):
    """TRL copies a reference for DPO, GRPO and KTO so; positions are buffers."""
    model = pruned(tiny_bert)
    model.base_model.cast_values(dtype)
    want = model(**batch()).logits
    model.add_adapter("ref", model.peft_config["default"])
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".default" in name:
            parameters[name.replace(".default", ".ref")].data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(model(**batch()).logits, want)


def test_a_copy_that_no_adapter_has_the_values_of_says_what_to_do(tiny_bert, batch):
    model = pruned(tiny_bert)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".ref" in name:
            parameter.data.fill_(0.5)
    model.set_adapter("ref")
    with pytest.raises(ValueError, match=r"were never loaded; load the adapter again. If this is a.* ref_model="):
        model(**batch())


@pytest.mark.parametrize("phase", ["gating", "fixmask"])
def test_a_state_of_the_other_phase_says_how_to_load_it(tiny_bert, tmp_path, phase):
    made = {"gating": peft_model(tiny_bert), "fixmask": pruned(tiny_bert)}
    saved = made.pop(phase)
    other = next(iter(made.values()))
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(saved)
    accelerator.save_state(tmp_path)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(other)
    with pytest.raises(ValueError, match=rf"has adapter 'default' in {phase}, .* PeftModel.from_pretrained\(base, dir"):
        accelerator.load_state(tmp_path)
    with pytest.raises(ValueError, match=f"has adapter 'default' in {phase}"):
        other.load_state_dict(saved.state_dict(), strict=False)


def test_copies_of_a_pruned_model_are_the_same(tiny_bert, batch):
    model = pruned(tiny_bert)
    want = model(**batch()).logits
    averaged = AveragedModel(model)
    for _ in range(2):
        averaged.update_parameters(model)
    assert torch.equal(copy.deepcopy(model)(**batch()).logits, want)
    torch.testing.assert_close(averaged(**batch()).logits, want)
