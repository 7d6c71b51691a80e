"""States that follow each other in ways that nobody planned: they end right, or are refused."""

import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffpeft import DiffPruningConfig


def finished(base, name="default", **config):
    model = get_peft_model(base, DiffPruningConfig(**{"target_density": 0.05, "init_weights": False, **config}), name)
    model.base_model.magnitude_prune(adapter_name=name)
    return model.eval()


@torch.no_grad()
def first(model, inputs):
    return model.eval()(**inputs)[0]


@pytest.mark.parametrize("name", ["deberta_v2", "mamba", "t5", "bart", "gpt2", "vit"])
def test_disabling_a_merged_adapter_gives_the_base(name):
    """Also where parameters are read without running their module, which could be before anything unmerges."""
    make, inputs_of, _ = ARCHITECTURES[name]
    inputs = inputs_of(3)
    model = finished(make().requires_grad_(False))
    with model.disable_adapter():
        expected = first(model, inputs)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(first(model, inputs), expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_one_end_of_a_tie_is_the_same_beside_one_on_both():
    make, inputs_of, _ = ARCHITECTURES["gpt2"]
    model = finished(make(), "one", target_modules=["wte"])
    alone = first(model, inputs_of(3))
    model.add_adapter("both", DiffPruningConfig(target_modules=["wte", "lm_head"], init_weights=False))
    assert torch.equal(first(model, inputs_of(3)), alone)
    with pytest.raises(ValueError, match="leaves alone"):
        model.merge_adapter()
    model.set_adapter("both")
    assert not torch.equal(first(model, inputs_of(3)), alone)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_the_end_of_a_tie_that_holds_no_diff_is_refused():
    model = finished(ARCHITECTURES["gpt2"].make(), "one", target_modules=["wte"])
    with pytest.raises(ValueError, match="name both modules"):
        model.add_adapter("head", DiffPruningConfig(target_modules=["lm_head"]))


class Twins(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_a_module_with_two_names_is_wrapped_under_both():
    model, x = finished(Twins(), target_density=0.5), torch.randn(2, 4)
    unmerged = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), unmerged)
    base = model.unload()
    assert type(base.a) is nn.Linear
    assert base.b is base.a


def test_switching_while_disabled_trains_the_new_one_afterwards(tiny_bert):
    model = get_peft_model(tiny_bert(), DiffPruningConfig(), adapter_name="one")
    model.add_adapter("two", DiffPruningConfig())
    with model.disable_adapter():
        model.set_adapter("two")
    trains = {
        name.split(".")[-2 if "diffpruning" in name else 0] for name, p in model.named_parameters() if p.requires_grad
    }
    assert any(".two." in name for name, p in model.named_parameters() if p.requires_grad and "diffpruning_w" in name)
    assert not any(
        ".one." in name for name, p in model.named_parameters() if p.requires_grad and "diffpruning_w" in name
    ), trains


class Checkpointed(nn.Module):
    """Fails on demand after its checkpointed part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, fail=False):
        x = checkpoint(self.inner, x, use_reentrant=False)
        if fail:
            raise FloatingPointError
        return x


def test_a_pass_that_fails_does_not_change_the_replay_of_the_one_before():
    config = DiffPruningConfig(target_density=0.5, init_weights=False, init_log_alpha=0.0)
    gradients = []
    for fails in (False, True):
        torch.manual_seed(0)
        model, x = get_peft_model(Checkpointed(), config).train(), torch.randn(3, 4)
        loss = model(x).square().sum()
        if fails:
            with pytest.raises(FloatingPointError):
                model(x, fail=True)
        loss.backward()
        gradients.append(next(p.grad for n, p in model.named_parameters() if "diffpruning_w" in n))
    assert torch.equal(*gradients)


def test_merging_one_adapter_for_good_keeps_its_head(tiny_bert, batch):
    model = finished(tiny_bert(), "one", task_type="SEQ_CLS")
    model.add_adapter("two", DiffPruningConfig(task_type="SEQ_CLS", init_weights=False))
    heads = model.base_model.model.classifier.modules_to_save
    with torch.no_grad():
        heads["two"].bias.fill_(7.0)
    model.set_adapter("two")
    expected = first(model, {"input_ids": batch()["input_ids"]})
    model.set_adapter("one")
    merged = model.merge_and_unload(adapter_names=["two"])
    torch.testing.assert_close(first(merged, {"input_ids": batch()["input_ids"]}), expected)


def test_two_heads_cannot_both_stay(tiny_bert):
    model = finished(tiny_bert(), "one", task_type="SEQ_CLS")
    model.add_adapter("two", DiffPruningConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="one can stay"):
        model.merge_and_unload(adapter_names=["one", "two"])


def test_values_that_were_cast_train_on_and_are_saved_as_they_are(tiny_bert, batch, tmp_path):
    model = finished(tiny_bert(), target_modules="all-linear")
    model.base_model.cast_values("bfloat16")
    model.save_pretrained(tmp_path / "cast")
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path / "cast", is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    before = {key: values for key, (_, values) in model.base_model.get_diff().items()}
    model(**batch()).loss.backward()
    optimizer.step()
    assert any(not torch.equal(values, before[key]) for key, (_, values) in model.base_model.get_diff().items())
    model.save_pretrained(tmp_path / "trained")
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "trained")
    assert torch.equal(loaded.eval()(**batch()).logits, model.eval()(**batch()).logits)


def test_a_refused_file_leaves_the_adapter_as_it_was(tiny_bert, batch, tmp_path):
    model = finished(tiny_bert())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(bytes(data))
    model.base_model.cast_values("bfloat16")
    before, pattern = model(**batch()).logits, model.peft_config["default"].nnz_pattern
    with pytest.raises(ValueError, match="damaged"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(**batch()).logits, before)
    assert model.peft_config["default"].nnz_pattern == pattern


def test_a_file_of_other_dtype_over_an_adapter_that_exists(tiny_bert, batch, tmp_path):
    model = finished(tiny_bert())
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path)
    model.base_model.cast_values("bfloat16")
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model.eval()(**batch()).logits, expected)


def test_one_config_for_two_models(tiny_bert):
    config = DiffPruningConfig(task_type="SEQ_CLS")
    one, two = (get_peft_model(tiny_bert(seed=seed), config) for seed in (0, 1))
    prints = [model.peft_config["default"].base_fingerprint for model in (one, two)]
    assert prints[0] != prints[1]
    assert config.base_fingerprint is None


def test_an_adapter_of_a_rounded_base_knows_the_exact_one(tiny_bert, tmp_path):
    finished(tiny_bert().to(torch.bfloat16)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_bert(), tmp_path)  # warnings are errors


def test_mixed_batches_after_another_adapter_wraps_more():
    make, inputs_of, _ = ARCHITECTURES["gpt2"]
    model = finished(make(), "one", target_modules=["c_attn"])
    names = ["one", "__base__", "one"]
    before = model(**inputs_of(3), adapter_names=names).logits
    model.add_adapter("two", DiffPruningConfig(target_modules=["c_attn", "c_fc"], init_weights=False))
    model.eval()
    assert torch.equal(model(**inputs_of(3), adapter_names=names).logits, before)
    ids = inputs_of(3)["input_ids"]
    model.generation_config.num_beams = 2
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(input_ids=ids, adapter_names=["one", "two", "__base__"], **settings).shape == (
        3,
        ids.shape[1] + 3,
    )


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_saving_embeddings_that_hold_the_diff_is_refused(tmp_path):
    model = finished(ARCHITECTURES["llama"].make(), target_modules=["embed_tokens", "q_proj"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\) first"):
        model.save_pretrained(tmp_path)
