import json
import os
import subprocess
import sys

import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from diffpeft import DiffPruningConfig
from diffpeft.files.keys import base_model_key
from diffpeft.tools import export
from diffpeft.tools.export import (
    from_coo,
    from_shira,
    from_super_tuning,
    to_checkpoint,
    to_coo,
    to_super_tuning,
    to_weight_patches,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STOCK_PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
for kind, base, adapter, inputs, output in zip(*[iter(sys.argv[1:])] * 5):
    kinds = {"causal": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}
    model = PeftModel.from_pretrained(kinds[kind].from_pretrained(base), adapter).eval()
    with torch.no_grad():
        torch.save(model(**torch.load(inputs)).logits, output)
assert not any(name.startswith("diffpeft") for name in sys.modules)
"""


def architecture(name, dtype=torch.float32):
    return ARCHITECTURES[name].make().to(dtype).eval()


def pruned(base, **config):
    model = get_peft_model(base, DiffPruningConfig(**{"init_weights": False, "target_density": 0.05, **config}))
    model.base_model.magnitude_prune()
    return model.eval()


def shapes_of(model):
    return {name: p.shape for name, p in model.named_parameters()}


def heads_of(model, path):
    model.save_pretrained(path)
    return {base_model_key(key): head for key, head in load_file(path / WEIGHTS).items() if "diffpruning" not in key}


def small_diff(**sizes):
    generator = torch.Generator().manual_seed(0)
    diff, shapes = {}, {}
    for name, (shape, count) in sizes.items():
        shapes[name] = torch.Size(shape)
        where = torch.randperm(shapes[name].numel(), generator=generator)[:count].sort().values
        diff[name] = where, torch.randn(count, generator=generator)
    return diff, shapes


def equal(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True)
    )


def dense(diff, shapes):
    return {
        name: torch.zeros(shapes[name].numel()).index_put((where,), values).reshape(shapes[name])
        for name, (where, values) in diff.items()
    }


def as_super_tuning(model, path, out, **kwargs):
    """Writes a wrapped model's diff as Super-Tuning, head and all."""
    config = model.peft_config["default"]
    heads = heads_of(model, path)
    modules = config.modules_to_save if heads else None
    return to_super_tuning(model.base_model.get_diff(), model, out, heads=heads, modules_to_save=modules, **kwargs)


def test_stock_peft_gives_our_logits_from_an_exported_adapter(tmp_path):
    arguments, expected = [], []
    cases = {"llama": ("causal", "CAUSAL_LM", r".*_proj"), "bert": ("classifier", "SEQ_CLS", r".*(query|key|dense)")}
    for name, (kind, task_type, modules) in cases.items():
        here = tmp_path / name
        base = architecture(name)
        base.save_pretrained(here / "base")
        # The biases go along with their modules: without them nothing is left out.
        model = pruned(base, task_type=task_type, target_modules=modules)
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                torch.nn.init.normal_(module.modules_to_save["default"].weight)
        done = as_super_tuning(model, here / "own", here / "super", task_type=task_type, leave_out=True)
        assert done.nonzeros > 0
        assert all(key.endswith("bias") for key in done.left_out)
        # The unmerged model whose diff lacks what was left out.
        layers = {layer.module_key: layer for layer in model.modules() if hasattr(layer, "module_key")}
        for key in done.left_out:
            module, _, parameter = key.rpartition(".")
            layers[module].diffpruning_values["default"][parameter].data.zero_()
        inputs = ARCHITECTURES[name].inputs(3)
        with torch.no_grad():
            expected.append(model(**inputs).logits)
        torch.save(inputs, here / "inputs.pt")
        arguments += [kind, here / "base", here / "super", here / "inputs.pt", here / "logits.pt"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", STOCK_PEFT, *map(str, arguments)], check=True, env=environment)
    for logits, output in zip(expected, arguments[4::5], strict=True):
        torch.testing.assert_close(torch.load(output), logits, rtol=0, atol=1e-6)


def test_what_is_exported_as_super_tuning_is_read_back_without_its_padding(tmp_path):
    model = pruned(architecture("llama"), target_modules="all-linear", target_density=0.03)
    diff = model.base_model.get_diff()
    done = to_super_tuning(diff, architecture("llama"), tmp_path, "some/base", "CAUSAL_LM")
    assert done == (sum(v.numel() for _, v in diff.values()), done.padding, {})
    assert done.padding > 0
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", "CAUSAL_LM")
    stored = load_file(tmp_path / WEIGHTS)
    assert sum(t.numel() for key, t in stored.items() if key.endswith("_values")) == done.nonzeros + done.padding
    read, heads = from_super_tuning(tmp_path)
    assert equal(read, diff)
    assert heads == {}


@pytest.mark.parametrize("density", [1e-3, 0.3, 1.0])
def test_layers_of_any_density_fit_one_sparsity(tmp_path, density):
    base = torch.nn.Sequential(torch.nn.Linear(70, 10), torch.nn.Linear(10, 30), torch.nn.Linear(30, 33))
    counts = {
        f"{i}.weight": max(1, int(p.numel() * density) - i) for i, p in enumerate(base.parameters()) if p.dim() == 2
    }
    sizes = {name: (base.get_parameter(name).shape, count) for name, count in counts.items() if name in shapes_of(base)}
    diff, shapes = small_diff(**sizes)
    to_super_tuning(diff, base, tmp_path)
    stock = PeftModel.from_pretrained(base, tmp_path)
    assert equal(from_super_tuning(tmp_path).diff, diff)
    for name, delta in dense(diff, shapes).items():
        assert torch.equal(stock.get_submodule(f"base_model.model.{name[0]}").get_delta_weight("default"), delta)


def test_values_of_two_bytes_merge_to_the_same_bits_in_peft(tmp_path):
    model = pruned(architecture("llama", torch.bfloat16), target_modules="all-linear")
    model.base_model.cast_values("bfloat16")
    to_super_tuning(model.base_model.get_diff(), model, tmp_path)
    stock = PeftModel.from_pretrained(architecture("llama", torch.bfloat16), tmp_path).merge_and_unload().state_dict()
    ours = model.merge_and_unload().state_dict()
    assert all(torch.equal(ours[name], stock[name]) for name in ours)


def test_what_super_tuning_cannot_hold_is_refused_or_left_out(tmp_path):
    base = architecture("gpt2_classifier")
    diff = pruned(architecture("gpt2_classifier"), task_type="SEQ_CLS").base_model.get_diff()
    with pytest.raises(ValueError, match=r"of \d+ nonzeros are elsewhere .*transformer.*leave_out=True.*all-linear"):
        to_super_tuning(diff, base, tmp_path)
    # Its Conv1D is no nn.Linear.
    with pytest.raises(ValueError, match=r"0 nonzeros are in weights of nn.Linear"):
        to_super_tuning(diff, base, tmp_path, leave_out=True)
    assert not (tmp_path / WEIGHTS).exists()
    bert = pruned(architecture("bert"), task_type="SEQ_CLS")
    whole = bert.base_model.get_diff()
    done = to_super_tuning(whole, bert, tmp_path, leave_out=True)
    assert "bert.embeddings.word_embeddings.weight" in done.left_out
    assert from_super_tuning(tmp_path).diff.keys() == whole.keys() - done.left_out.keys()
    assert done.nonzeros + sum(done.left_out.values()) == sum(v.numel() for _, v in whole.values())


def test_a_linear_weight_that_another_module_shares_is_refused(tmp_path):
    base = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 6, bias=False), "embed": torch.nn.Embedding(6, 4)})
    base["embed"].weight = base["head"].weight
    diff, _ = small_diff(**{"head.weight": ((6, 4), 3)})
    with pytest.raises(ValueError, match=r"3 in head\.weight"):
        to_super_tuning(diff, base, tmp_path)


def test_heads_without_their_modules_are_refused(tmp_path):
    with pytest.raises(ValueError, match="modules_to_save"):
        to_super_tuning({}, architecture("bert"), tmp_path, heads={"classifier.weight": torch.zeros(2, 16)})


def trained(config, name="llama"):
    """An adapter of PEFT's own, far from its start."""
    base = architecture(name)
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # PEFT's SHiRA
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("method", ["super", "shira"])
def test_adapters_of_peft_are_read_as_the_delta_that_peft_merges(tmp_path, method, name):
    task = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}[name]
    modules = {"llama": ["q_proj", "down_proj"], "bert": ["query", "output.dense"]}[name]
    common = {"target_modules": modules, "task_type": task}
    config = SupertuningConfig(sparsity=0.9, **common) if method == "super" else ShiraConfig(r=1, **common)
    model = trained(config, name)
    model.save_pretrained(tmp_path)
    base = architecture(name)
    read = from_super_tuning(tmp_path) if method == "super" else from_shira(tmp_path, shapes_of(base))
    merged = model.merge_and_unload().state_dict()
    assert read.heads.keys() == ({"classifier.weight", "classifier.bias"} if name == "bert" else set())
    assert len(read.diff) == {"llama": 4, "bert": 6}[name]
    base.save_pretrained(tmp_path / "base")
    to_checkpoint(tmp_path / "base", read.diff, tmp_path / "merged", read.heads)
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(saved[key], merged[key]) for key in saved)


def test_a_lora_part_and_lost_indices_are_refused(tmp_path):
    trained(SupertuningConfig(target_modules=["q_proj"], sparsity=0.9, r=2)).save_pretrained(tmp_path / "supra")
    with pytest.raises(ValueError, match="r=2: LoRA's part is dense"):
        from_super_tuning(tmp_path / "supra")
    with pytest.warns(UserWarning, match="save_precomputed_indices=False"):
        model = trained(SupertuningConfig(target_modules=["q_proj"], sparsity=0.9, save_precomputed_indices=False))
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"no supertuning_indices.*save_precomputed_indices=True"):
        from_super_tuning(tmp_path / "bare")
    with pytest.raises(ValueError, match="'SUPERTUNING', not 'SHIRA'"):
        from_shira(tmp_path / "bare", {})
    shapes = shapes_of(architecture("llama"))
    trained(ShiraConfig(r=1, target_modules=["q_proj"], random_seed=1)).save_pretrained(tmp_path / "shira")
    tensors = load_file(tmp_path / "shira" / WEIGHTS)
    with pytest.raises(ValueError, match="outside of"):
        from_shira(tmp_path / "shira", {name: torch.Size((2, 2)) for name in shapes})
    with pytest.raises(ValueError, match="no parameter of the base model"):
        from_shira(tmp_path / "shira", {})
    kept = {key: tensor for key, tensor in tensors.items() if "indices" not in key}
    save_file(kept, tmp_path / "shira" / WEIGHTS)
    with pytest.raises(ValueError, match=r"no shira_indices.*a seed"):
        from_shira(tmp_path / "shira", shapes)
    with pytest.raises(ValueError, match="is missing"):
        from_super_tuning(tmp_path / "nowhere")


def test_coo_holds_indices_of_every_rank_and_is_read_back_equal(tmp_path):
    diff, shapes = small_diff(scalar=((), 1), bias=((9,), 4), weight=((5, 7), 8), conv=((3, 2, 4), 6))
    to_coo(diff, shapes, tmp_path / "diff.safetensors")
    tensors = load_file(tmp_path / "diff.safetensors")
    for name, (_, values) in diff.items():
        indices = tensors[f"{name}.indices"]
        assert indices.dtype == torch.int32
        assert indices.shape == (len(shapes[name]), values.numel())
        coo = torch.sparse_coo_tensor(indices, tensors[f"{name}.values"], shapes[name], check_invariants=True)
        assert torch.equal(coo.to_dense(), dense(diff, shapes)[name])
    read, read_shapes = from_coo(tmp_path / "diff.safetensors")
    assert equal(read, diff)
    assert read_shapes == shapes


def test_coo_takes_int64_where_int32_cannot_hold_an_index(tmp_path):
    shapes = {"wide": torch.Size((2, 2**31 + 1))}
    diff = {"wide": (torch.tensor([0, 2**31, 2**32 + 1]), torch.ones(3))}
    to_coo(diff, shapes, tmp_path / "diff.safetensors")
    assert load_file(tmp_path / "diff.safetensors")["wide.indices"].tolist() == [[0, 0, 1], [0, 2**31, 2**31]]
    assert equal(from_coo(tmp_path / "diff.safetensors")[0], diff)


def test_a_diff_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="strictly increasing"):
        to_coo({"a": (torch.tensor([1, 0]), torch.ones(2))}, {"a": torch.Size((2, 3))}, tmp_path / "diff.safetensors")


def test_a_file_without_shapes_is_no_coo(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "diff.safetensors")
    with pytest.raises(ValueError, match="no shapes"):
        from_coo(tmp_path / "diff.safetensors")


def load_patches(tensors, patches):
    """What vLLM's `load_checkpoint_weight_patches` does: NaN stands for elements that stay as they are."""
    for name, indices, values, shape in patches:
        assert indices.dtype == torch.int32
        assert values.dtype == tensors[name].dtype
        assert shape == tuple(tensors[name].shape)
        flat = torch.full((tensors[name].numel(),), float("nan"), dtype=values.dtype)
        patch = flat.index_copy(0, indices.long(), values).view(shape)
        tensors[name] = torch.where(patch.isnan(), tensors[name], patch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama_tied", "bert", "bloom"])
def test_a_merged_checkpoint_is_what_merging_saves_to_the_bit(tmp_path, monkeypatch, name, dtype):
    monkeypatch.setattr(export.checkpoint, "MAX_SHARD_BYTES", 9000)
    architecture(name, dtype).save_pretrained(tmp_path / "base", max_shard_size="9kB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "pytorch_model.bin").write_text("old weights")
    auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    model = pruned(auto.from_pretrained(tmp_path / "base"), task_type="SEQ_CLS" if name == "bert" else "CAUSAL_LM")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(3)
    diff, heads = model.base_model.get_diff(), heads_of(model, tmp_path / "own")
    patches = list(to_weight_patches(diff, tmp_path / "base"))
    to_checkpoint(str(tmp_path / "base"), diff, tmp_path / "of_directory", heads)
    model.merge_and_unload().save_pretrained(tmp_path / "merged", max_shard_size="9kB")
    expected = shards(tmp_path / "merged")
    assert equal_tensors(shards(tmp_path / "of_directory"), expected)
    files = {file.name for file in (tmp_path / "of_directory").iterdir() if file.suffix != ".safetensors"}
    left = {"pytorch_model.bin"}
    assert files == {file.name for file in (tmp_path / "base").iterdir() if file.suffix != ".safetensors"} - left
    assert len([*(tmp_path / "of_directory").glob("*.safetensors")]) > 1
    loaded = auto.from_pretrained(tmp_path / "of_directory").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
    patched = shards(tmp_path / "base")
    load_patches(patched, patches)
    patched.update(heads)
    assert equal_tensors(patched, expected)


def shards(directory):
    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


def equal_tensors(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left
    )


def test_names_in_the_files_that_differ_from_the_models_are_found(tmp_path):
    architecture("bert").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    older = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for key, tensor in load_file(file).items()}
    save_file(older, file, metadata={"format": "pt"})
    diff, _ = small_diff(**{"bert.embeddings.LayerNorm.weight": ((16,), 3)})
    assert [patch.name for patch in to_weight_patches(diff, tmp_path / "base")] == ["bert.embeddings.LayerNorm.gamma"]
    to_checkpoint(tmp_path / "base", diff, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert [key for key in older if not torch.equal(older[key], merged[key])] == ["bert.embeddings.LayerNorm.gamma"]


def test_a_tied_tensor_is_changed_under_each_of_its_names_in_the_files(tmp_path):
    architecture("llama_tied").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    diff, _ = small_diff(**{"model.embed_tokens.weight": ((60, 16), 30)})
    names = {patch.name for patch in to_weight_patches(diff, tmp_path / "base")}
    assert names == {"model.embed_tokens.weight", "lm_head.weight"}
    to_checkpoint(tmp_path / "base", diff, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_experts_that_loading_fuses_are_written_one_by_one(tmp_path):
    architecture("mixtral").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = pruned(architecture("mixtral"))
    diff = model.base_model.get_diff()
    to_checkpoint(tmp_path / "base", diff, tmp_path / "out")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert equal_tensors(shards(tmp_path / "out"), shards(tmp_path / "merged"))
    patched = shards(tmp_path / "base")
    for patch in to_weight_patches(diff, tmp_path / "base"):
        assert patched[patch.name].shape == patch.full_shape
        patched[patch.name].view(-1)[patch.indices.long()] = patch.values
    assert equal_tensors(patched, shards(tmp_path / "merged"))


def test_a_checkpoint_is_refused_whole_or_written_whole(tmp_path):
    architecture("bert", torch.float16).save_pretrained(tmp_path / "base")
    huge = {"bert.pooler.dense.bias": (torch.tensor([1]), torch.tensor([1e6]))}
    with pytest.raises(ValueError, match=r"not finite in torch.float16"):
        to_checkpoint(tmp_path / "base", huge, tmp_path / "out")
    with pytest.raises(ValueError, match=r"use its own base model|lacks 1 parameters .*classifier\.weight"):
        to_checkpoint(tmp_path / "base", {}, tmp_path / "out", {"classifier.bias": torch.zeros(7)})
    with pytest.raises(ValueError, match="is there already"):
        to_checkpoint(tmp_path / "base", {}, tmp_path / "base")
    with pytest.raises(ValueError, match="not finite"):
        list(to_weight_patches(huge, tmp_path / "base"))
    assert [file.name for file in tmp_path.iterdir()] == ["base"]
