"""Saving and loading: damage to any bit of a file is noticed, whoever loads it."""

import copy
import json
import pickle
import random

import pytest
import torch
from adapter_files import POOLER, WEIGHTS, copy_of, put
from architectures import pruned
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from diffpeft import DiffPruningConfig
from diffpeft.files import encoding

DENSITY = 0.02


@pytest.mark.parametrize("seed", range(40))
def test_a_file_with_a_flipped_bit_is_refused_or_means_the_same(saved, tiny_bert, batch, tmp_path, seed):
    """Bits of the header too: some of them only change the order of its entries or a blank."""
    directory, model = saved
    file = copy_of(directory, tmp_path)
    data = bytearray(file.read_bytes())
    place = random.Random(seed).randrange(len(data))
    data[place] ^= 1 << (seed % 8)
    file.write_bytes(bytes(data))
    try:
        loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    except Exception:  # safetensors, PEFT and we each have errors of our own
        return
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits), f"byte {place}"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, tiny_bert, tmp_path, share):
    file = copy_of(saved[0], tmp_path)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(Exception, match=r"."):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)


def test_values_that_training_changed_get_a_new_checksum(saved, tiny_bert, tmp_path, batch):
    model = PeftModel.from_pretrained(tiny_bert(), saved[0], is_trainable=True)
    model(**batch())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert torch.equal(loaded.eval()(**batch()).logits, model.eval()(**batch()).logits)


def test_saving_what_was_loaded_and_never_run_does_not_hide_damage(saved, tiny_bert, tmp_path):
    model = PeftModel.from_pretrained(tiny_bert(), saved[0])
    with torch.no_grad():
        layer = model.base_model.model.bert.embeddings.word_embeddings
        layer.diffpruning_values["default"]["weight"].add_(1.0)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight.*checksum"):
        model.save_pretrained(tmp_path)


def test_transformers_loads_with_the_same_checks(saved, tiny_bert, batch, tmp_path):
    file = copy_of(saved[0], tmp_path)
    data = bytearray(file.read_bytes())
    data[-1000] ^= 4
    file.write_bytes(bytes(data))
    model = tiny_bert()
    model.load_adapter(str(tmp_path))  # fills tensors and asks nobody
    with pytest.raises(ValueError, match="checksum"):
        model(**batch())


def test_heads_that_transformers_loaded_are_checked_at_the_first_forward(saved, tiny_bert, batch, tmp_path):
    file = copy_of(saved[0], tmp_path)
    tensors = load_file(file)
    tensors["base_model.model.classifier.bias"].view(torch.uint8)[1] ^= 16
    save_file(tensors, file, metadata={"format": "pt"})
    model = tiny_bert()
    model.load_adapter(str(tmp_path))
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        with pytest.raises(ValueError, match=r"heads of adapter 'default', \['classifier.*are damaged or were changed"):
            one(**batch())
    with pytest.raises(ValueError, match="checksum of the heads"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("of_file", ["float32", "bfloat16"])
def test_heads_that_a_loader_has_cast_are_not_taken_for_damaged(saved, tiny_bert, batch, tmp_path, dtype, of_file):
    model = PeftModel.from_pretrained(tiny_bert(), saved[0])
    model.base_model.model.classifier.to(getattr(torch, of_file))
    model.save_pretrained(tmp_path)
    native = tiny_bert().to(getattr(torch, dtype))
    native.load_adapter(str(tmp_path))
    for _ in range(2):
        native(**batch())
    with torch.no_grad():  # what happens after the first forward is the user's affair
        native.classifier.modules_to_save["default"].weight.add_(1)
    native(**batch())


def test_an_adapter_that_is_deleted_before_its_first_use_is_not_missed(saved, tiny_bert, batch):
    model = tiny_bert()
    model.load_adapter(str(saved[0]))
    model.delete_adapter("default")
    model(**batch())


def test_an_adapter_that_transformers_saves_over_another_loads(saved, tiny_bert, batch, tmp_path):
    copy_of(saved[0], tmp_path)
    model = tiny_bert()
    model.load_adapter(str(tmp_path))
    with torch.no_grad():
        model.classifier.modules_to_save["default"].weight.fill_(3)
    model.peft_config["default"].heads_checksum = None
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert torch.equal(loaded.eval()(**batch()).logits, model.eval()(**batch()).logits)


def test_a_newer_format_is_refused(saved, tiny_bert, tmp_path):
    copy_of(saved[0], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "format_version": 3}))
    with pytest.raises(ValueError, match=r"format version 3.*install a newer"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_neither_saved_nor_loaded(saved, tiny_bert, tmp_path, value):
    model = pruned(tiny_bert(), target_density=DENSITY)
    with torch.no_grad():
        model.base_model.model.bert.pooler.dense.diffpruning_values["default"]["weight"][3] = value
    with pytest.raises(ValueError, match=r"pooler\.dense\.weight.*NaN or infinite"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS).exists()
    file = copy_of(saved[0], tmp_path)
    values = load_file(file)[POOLER.format("values")]
    values[3] = value
    positions = saved[1].base_model.get_diff()["bert.pooler.dense.weight"][0]
    put(file, encoding.add_checksum(encoding.pack(positions, 32 * 32), values, "bert.pooler.dense.weight"), values)
    with pytest.raises(ValueError, match=r"pooler\.dense\.weight.*NaN or infinite"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_values_of_fewer_bytes(tiny_bert, batch, tmp_path, dtype):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(target_density=DENSITY, init_weights=False)).eval()
    tuner = model.base_model
    with pytest.raises(ValueError, match="gating"):
        tuner.cast_values(dtype)
    tuner.magnitude_prune()
    with pytest.raises(ValueError, match="int7"):
        tuner.cast_values("int7")
    exact = {key: values for key, (_, values) in tuner.get_diff().items()}
    model.save_pretrained(tmp_path / "four")
    for name in ("fewer", "twice"):  # what is cast already does not change
        tuner.cast_values(dtype)
        model.save_pretrained(tmp_path / name)
    for key, (_, values) in tuner.get_diff().items():
        if dtype == "int8":
            scale = exact[key].abs().max() / 127
            assert torch.equal(values, (exact[key] / scale).round() * scale)
        else:
            assert torch.equal(values, exact[key].to(getattr(torch, dtype)).float())
    four, fewer, twice = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("four", "fewer", "twice"))
    assert fewer == twice
    payloads = [
        sum(t.numel() * t.element_size() for key, t in load_file(tmp_path / name / WEIGHTS).items() if "diffpr" in key)
        for name in ("four", "fewer")
    ]
    scales = 4 * len(exact) if dtype == "int8" else 0
    assert payloads[0] - payloads[1] == (4 - getattr(torch, dtype).itemsize) * tuner.num_nonzeros() - scales
    assert tuner.adapter_bytes() == payloads[1]
    assert len(fewer) < len(four)
    logits = model(**batch()).logits
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "fewer").eval()
    loaded.save_pretrained(tmp_path / "before use")
    assert torch.equal(loaded(**batch()).logits, logits)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "before use" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes() == fewer
    native = tiny_bert()
    native.load_adapter(str(tmp_path / "fewer"))
    assert torch.equal(native.eval()(**batch()).logits, logits)
    native.save_pretrained(tmp_path / "native")
    assert (tmp_path / "native" / WEIGHTS).read_bytes() == fewer
    loaded.merge_adapter()
    assert torch.allclose(loaded(**batch()).logits, logits, atol=1e-6)


def test_values_beyond_half_precision_are_refused(tiny_bert):
    model = pruned(tiny_bert(), target_density=DENSITY)
    with torch.no_grad():
        model.base_model.model.bert.pooler.dense.diffpruning_values["default"]["weight"][3] = 1e6
    with pytest.raises(ValueError, match="beyond float16"):
        model.base_model.cast_values("float16")


def test_a_name_that_is_used_again_is_checked_as_the_new_adapter(tiny_bert, batch, tmp_path):
    """Right before: names used again after a pass; a load that failed in between, also in PEFT's classes."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(pruned(tiny_bert(), task_type="SEQ_CLS", target_density=0.02).eval())
        models[seed].save_pretrained(tmp_path / str(seed))
    base = tiny_bert().eval()
    base.load_adapter(str(tmp_path / "0"), adapter_name="task")
    base.delete_adapter("task")
    base(**batch())  # what was to be checked of the deleted adapter is forgotten
    base.load_adapter(str(tmp_path / "0"), adapter_name="task")
    base.delete_adapter("task")
    base.load_adapter(str(tmp_path / "1"), adapter_name="task")
    base.set_adapter("task")
    assert torch.equal(base.eval()(**batch()).logits, models[1](**batch()).logits)


def test_an_adapter_without_nonzeros_loads(saved, tiny_bert, batch, tmp_path):
    model = PeftModel.from_pretrained(tiny_bert(), saved[0]).eval()
    model.base_model.add_weighted_adapter(["default", "default"], [1, -1], "none")
    model.save_pretrained(tmp_path, selected_adapters=["none"])
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "none").eval()
    assert again.base_model.num_nonzeros() == 0
    with model.disable_adapter():
        hidden = model.base_model.model.bert(batch()["input_ids"]).last_hidden_state
    assert torch.equal(again.base_model.model.bert(batch()["input_ids"]).last_hidden_state, hidden)


def test_what_no_reader_would_accept_is_not_written(saved, tiny_bert, tmp_path):
    """Heads that are not finite too; before, such a file was written over a good one."""
    model = PeftModel.from_pretrained(tiny_bert(), saved[0])
    with torch.no_grad():
        model.get_submodule("base_model.model.classifier.modules_to_save.default").weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"head classifier\.weight has NaN or infinite values"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
