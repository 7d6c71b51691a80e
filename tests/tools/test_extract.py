import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from diffpeft import DiffPruningModel
from diffpeft.files.adapter import read_adapter
from diffpeft.tools.extract import extract_diff

transformers.utils.logging.disable_progress_bar()


def tuned(base, scale=0.02):
    """The same model after a fine-tuning that changed everything."""
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += scale * torch.randn_like(parameter)
    return base


def as_directory(model, path, shard="5GB"):
    model.save_pretrained(path, max_shard_size=shard)
    return path


def dense(finetuned, base):
    return {n: p.float() - dict(base.named_parameters())[n].float() for n, p in finetuned.named_parameters()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_goes_through_a_file_and_comes_back_as_it_was_tuned(name, tmp_path):
    make = ARCHITECTURES[name].make
    finetuned = tuned(make())
    found = extract_diff(make(), finetuned, 1.0, tmp_path)
    model = PeftModel.from_pretrained(make(), tmp_path)
    assert found.total == model.base_model.num_base_parameters()
    assert (found.only_in_base, found.differing_buffers) == ([], [])
    merged = dict(model.merge_and_unload().named_parameters())
    for key, parameter in finetuned.named_parameters():
        ulp = torch.finfo(torch.float32).eps * parameter.abs()
        assert bool(((merged[key] - parameter).abs() <= ulp).all()), key


@pytest.mark.parametrize("name", ["bert", "vit", "clip", "llama_tied", "resnet", "wav2vec2"])
def test_a_bf16_model_comes_back_to_the_bit_from_directories(name, tmp_path):
    make = ARCHITECTURES[name].make
    finetuned = tuned(make()).bfloat16()
    base, new = as_directory(make().bfloat16(), tmp_path / "base"), as_directory(finetuned, tmp_path / "new", "20KB")
    extract_diff(base, new, 1.0, tmp_path / "adapter")
    model = PeftModel.from_pretrained(make().bfloat16(), tmp_path / "adapter")
    merged = dict(model.merge_and_unload().named_parameters())
    assert all(torch.equal(merged[key], parameter) for key, parameter in finetuned.named_parameters())


def test_the_diff_is_the_global_top_k(tiny_bert):
    base, finetuned = tiny_bert(), tuned(tiny_bert())
    found = extract_diff(base, finetuned, 0.01)
    deltas = {n: d for n, d in dense(finetuned, base).items() if not n.startswith("classifier")}
    total = sum(d.numel() for d in deltas.values())
    assert (found.total, found.kept, found.density) == (total, round(0.01 * total), found.kept / total)
    threshold = torch.cat([d.abs().flatten() for d in deltas.values()]).sort(descending=True).values[found.kept - 1]
    for name, delta in deltas.items():
        where = torch.nonzero(delta.abs().flatten() >= threshold).squeeze(1)
        assert found.per_parameter[name] == (len(where), delta.numel())
        if len(where):
            assert torch.equal(found.diff[name][0], where)
            assert torch.equal(found.diff[name][1], delta.flatten()[where])
    assert found.heads.keys() == {"classifier.weight", "classifier.bias"}


def test_shards_a_single_file_and_memory_give_the_same(tiny_bert, tmp_path):
    base, finetuned = tiny_bert(), tuned(tiny_bert())
    shards = as_directory(finetuned, tmp_path / "shards", "30KB")
    assert (shards / "model.safetensors.index.json").exists()
    results = [
        extract_diff(old, new, 0.01)
        for old in (base, as_directory(base, tmp_path / "base"))
        for new in (finetuned, shards, as_directory(finetuned, tmp_path / "single"))
    ]
    for other in results[1:]:
        assert other.diff.keys() == results[0].diff.keys()
        for key, pair in other.diff.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, results[0].diff[key], strict=True))
        assert other[1:4] + other[5:] == results[0][1:4] + results[0][5:]


@pytest.mark.parametrize("in_files", [True, False], ids=["files", "memory"])
def test_a_bare_backbone_is_the_base_of_a_task_model(tiny_bert, batch, tmp_path, in_files):
    base, finetuned = tiny_bert().bert, tuned(tiny_bert()).eval()
    backbone, task = base, finetuned
    if in_files:
        backbone, task = as_directory(base, tmp_path / "base"), as_directory(finetuned, tmp_path / "new")
    found = extract_diff(backbone, task, 1.0, tmp_path / "adapter")
    assert all(key.startswith("bert.") for key in found.diff)
    loading = AutoPeftModelForSequenceClassification
    if in_files:
        loaded = loading.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**batch()).logits, finetuned(**batch()).logits)


def test_a_backbone_tuned_from_a_task_model_is_aligned_too(tiny_bert):
    found = extract_diff(tiny_bert(), tuned(tiny_bert()).bert, 0.01)
    assert "embeddings.word_embeddings.weight" in found.diff
    assert found.only_in_base == ["classifier.weight", "classifier.bias"]
    assert found.heads == {}


def test_what_only_the_base_has_is_told_and_what_only_the_tuned_model_has_is_saved_whole(tiny_bert, tmp_path):
    base, finetuned = BertForMaskedLM(tiny_bert().config), tuned(tiny_bert())
    base.bert.load_state_dict(tiny_bert().bert.state_dict(), strict=False)
    found = extract_diff(base, finetuned, 0.01, tmp_path)
    assert "cls.predictions.transform.dense.weight" in found.only_in_base
    assert {key.rsplit(".", 1)[0] for key in found.heads} == {"classifier", "bert.pooler.dense"}
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).merge_and_unload()
    assert all(torch.equal(loaded.state_dict()[key], head) for key, head in found.heads.items())


def test_heads_of_another_shape_are_saved_whole_and_a_resized_backbone_is_refused(tiny_bert):
    found = extract_diff(tiny_bert(), tuned(tiny_bert(num_labels=3)), 0.01)
    assert found.heads["classifier.weight"].shape == (3, 32)
    with pytest.raises(ValueError, match=r"word_embeddings.weight is \(100, 32\) in .* and \(101, 32\) .*resize_token"):
        extract_diff(tiny_bert(), tuned(tiny_bert(vocab_size=101)), 0.01)


def test_the_adapter_loads_with_transformers_alone_and_trains_on(tiny_bert, batch, tmp_path):
    finetuned = tuned(tiny_bert()).eval()
    extract_diff(tiny_bert(), finetuned, 1.0, tmp_path, task_type="SEQ_CLS")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    model = tiny_bert()
    model.load_adapter(str(tmp_path))
    torch.testing.assert_close(model.eval()(**batch()).logits, finetuned(**batch()).logits)
    assert DiffPruningModel.of(model).phase() == "fixmask"
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True)
    before = model.base_model.get_diff()
    model(**batch()).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    after = model.base_model.get_diff()
    assert all(torch.equal(before[key][0], after[key][0]) for key in before)
    assert any(not torch.equal(before[key][1], after[key][1]) for key in before)


def test_entries_that_do_not_differ_are_not_kept(tiny_bert):
    finetuned = tiny_bert()
    with torch.no_grad():
        finetuned.bert.pooler.dense.bias += 1.0
    found = extract_diff(tiny_bert(), finetuned, 0.01)
    assert (found.kept, found.diff.keys()) == (32, {"bert.pooler.dense.bias"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_values_of_fewer_bytes(tiny_bert, tmp_path, dtype):
    found = extract_diff(tiny_bert(), tuned(tiny_bert()), 0.01, tmp_path, value_dtype=dtype)
    stored = [t for k, t in load_file(tmp_path / "adapter_model.safetensors").items() if "_values." in k]
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in stored)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).base_model.get_diff()
    _, read, _ = read_adapter(tmp_path, {n: p.shape for n, p in tiny_bert().named_parameters()})
    for key, (_, values) in found.diff.items():
        assert torch.equal(loaded[key][1], values)
        assert torch.equal(read[key][1], values)


def test_buffers_that_differ_are_told(tmp_path):
    make = ARCHITECTURES["resnet"].make
    finetuned = tuned(make())
    finetuned.resnet.embedder.embedder.normalization.running_mean += 1
    name = "resnet.embedder.embedder.normalization.running_mean"
    assert extract_diff(make(), finetuned, 0.01).differing_buffers == [name]
    base, new = as_directory(make(), tmp_path / "base"), as_directory(finetuned, tmp_path / "new")
    assert extract_diff(base, new, 0.01).differing_buffers == [name]


def test_models_that_cannot_be_compared(tiny_bert, tmp_path):
    base = tiny_bert()
    with pytest.raises(ValueError, match="nothing to extract"):
        extract_diff(base, tiny_bert())
    broken = tuned(tiny_bert())
    broken.bert.pooler.dense.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.bias: finetuned - base is NaN or infinite"):
        extract_diff(base, broken)
    with pytest.raises(ValueError, match=r"lacks .* use the base that it was tuned from"):
        extract_diff(ARCHITECTURES["gpt2"].make(), base)
    for density, message in ((0.0, "leaves nothing"), (2.0, "no share"), (1e-9, "is 0 nonzeros")):
        with pytest.raises(ValueError, match=message):
            extract_diff(base, tuned(tiny_bert()), density)
    with pytest.raises(ValueError, match="value_dtype='int7' is not known"):
        extract_diff(base, tuned(tiny_bert()), value_dtype="int7")
    broken = tuned(tiny_bert())
    broken.bert.pooler.dense.bias.data[3] = 1e6
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.bias: differences are beyond float16"):
        extract_diff(base, broken, value_dtype="float16")


def test_directories_that_cannot_be_read(tiny_bert, tmp_path):
    with pytest.raises(ValueError, match=r"has no model\.safetensors; write it with from_pretrained"):
        extract_diff(tmp_path, tiny_bert())
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
        extract_diff(tmp_path, tiny_bert())
    shards = as_directory(tiny_bert(), tmp_path / "shards", "30KB")
    next(shards.glob("*00002*")).unlink()
    with pytest.raises(ValueError, match=r"has no model-00002"):
        extract_diff(shards, tiny_bert())
    (shards / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        extract_diff(shards, tiny_bert())
    (as_directory(tiny_bert(), tmp_path / "whole") / "config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        extract_diff(tiny_bert(), tmp_path / "whole")


def test_output_layers_that_are_tied_in_one_of_the_two_models(tmp_path):
    """transformers goes by the tensors, whatever the config says of them. Tried too: models in memory, as directories.

    A base that ties what the fine-tuned model does not can hold no diff of both; the other way round it has two.
    """
    tied, untied = (as_directory(ARCHITECTURES[name].make(), tmp_path / name) for name in ("llama_tied", "llama"))
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for base, new in ((tied, untied), (ARCHITECTURES["llama_tied"].make(), ARCHITECTURES["llama"].make())):
        with pytest.raises(ValueError, match=r"lm_head\.weight'\] differ in .* and are one tensor in"):
            extract_diff(base, new, 0.5, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    wanted = ARCHITECTURES["llama_tied"].make().state_dict()
    for base, new in ((untied, tied), (ARCHITECTURES["llama"].make(), ARCHITECTURES["llama_tied"].make())):
        extract_diff(base, new, 1.0, tmp_path / "adapter", task_type="CAUSAL_LM")
        merged = PeftModel.from_pretrained(ARCHITECTURES["llama"].make(), tmp_path / "adapter").merge_and_unload()
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


MEASURE = """
import resource, sys, time
from torch import nn
from diffpeft.tools.extract import extract_diff
extract_diff(nn.Linear(4, 4), nn.Linear(4, 4), 1.0, sys.argv[3])  # code that is loaded when it first runs
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak of the imports
level, start = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize(), time.monotonic()
found = extract_diff(sys.argv[1], sys.argv[2], 0.005, sys.argv[3])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(peak - level, found.kept, time.monotonic() - start)
"""
# A process counts what its parent held when it was started: a small one stands between.
BETWEEN = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_few_tensors_however_many_there_are(tmp_path):
    size, count = 2_621_440, 20
    for name in ("base", "new"):
        shards, files = 5, {}
        (tmp_path / name).mkdir()
        for shard in range(shards):
            keys = [f"layers.{i}.weight" for i in range(shard, count, shards)]
            file = f"model-0000{shard + 1}-of-00005.safetensors"
            save_file({key: torch.randn(size) for key in keys}, tmp_path / name / file)
            files.update(dict.fromkeys(keys, file))
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    command = [
        sys.executable,
        "-c",
        BETWEEN,
        "-c",
        MEASURE,
        *(str(tmp_path / name) for name in ("base", "new", "adapter")),
    ]
    # Tensors this small would come from a heap that keeps what is freed; those of real models go back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown, kept, seconds = run.stdout.split()[-3:]
    print(f"{int(grown) / (4 * size):.2f} tensors, {float(seconds):.1f} s")
    assert int(kept) == round(0.005 * size * count)
    assert int(grown) < 5 * 4 * size, "holds more than the pair that it compares"
