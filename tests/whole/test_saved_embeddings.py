"""What PEFT adds to an adapter's file beside the diff: embeddings that were resized, targeted, or asked for.

Tried: tied and untied heads; a new row that starts otherwise at loading; save_embedding_layers True and False;
embeddings in target_modules and in modules_to_save; values in bf16 and int8; .bin files; one of two adapters; gating;
merged; resuming and the best checkpoint of a Trainer. Right before: all that save no embedding beside the diff.
"""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from trainers import arguments
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from diffpeft import DiffPruningCallback, DiffPruningConfig, last_checkpoint
from diffpeft.files.encoding import checksums_of, strip_checksum

KINDS = ("diffpruning_positions", "diffpruning_values")
IDS = torch.arange(40).reshape(2, 20)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True` and a tied layer"
)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def resized(request, tmp_path_factory):
    """Loads a model of 60 words and gives it 61; the new row is random."""
    directory = tmp_path_factory.mktemp("llama")
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=request.param)
    LlamaForCausalLM(config).save_pretrained(directory)

    def load(seed=0):
        model = LlamaForCausalLM.from_pretrained(directory)
        torch.manual_seed(seed)
        model.resize_token_embeddings(61)
        return model

    return load


def pruned(base, **config):
    model = get_peft_model(base, DiffPruningConfig(target_density=0.05, init_weights=False, **config))
    model.base_model.magnitude_prune()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("saving", [{}, {"safe_serialization": False}, {"save_embedding_layers": True}], ids=str)
def test_an_adapter_on_a_resized_vocabulary_loads_to_the_same_bits(resized, tmp_path, dtype, saving):
    model = pruned(resized())
    model.base_model.cast_values(dtype)
    model.add_adapter("other", DiffPruningConfig(init_weights=False))
    model.base_model.magnitude_prune(adapter_name="other")
    model.save_pretrained(tmp_path, selected_adapters=["default"], **saving)
    again = PeftModel.from_pretrained(resized(seed=1), tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again", **saving)
    assert torch.equal(logits(PeftModel.from_pretrained(resized(), tmp_path / "again")), logits(model))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head", "q_proj"], r".*(embed_tokens|up_proj)"], ids=str)
@pytest.mark.parametrize("gating", [True, False])
def test_embeddings_among_the_target_modules_load_to_the_same_bits(resized, tmp_path, targets, gating):
    if targets[0] == "lm_head" and resized().config.tie_word_embeddings:
        targets = [*targets, "embed_tokens"]
    config = DiffPruningConfig(target_modules=targets, target_density=0.05, init_weights=False)
    model = get_peft_model(resized(), config)
    if not gating:
        model.base_model.magnitude_prune()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(resized(), tmp_path)), logits(model))


def test_embeddings_that_hold_a_merged_diff_are_not_saved_beside_it(resized, tmp_path):
    model = pruned(resized())
    model.merge_adapter()
    with pytest.raises(ValueError, match="which hold a merged diff; call unmerge_adapter"):
        model.save_pretrained(tmp_path)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(resized(), tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_files_with_diffs_as_they_are_in_memory_load(resized, tmp_path, dtype):
    """Files of earlier versions have them for the embeddings, and the checksum of such a file is over these bytes."""
    model = pruned(resized())
    model.base_model.cast_values(dtype)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    layer = model.get_submodule("base_model.model.model.embed_tokens")
    positions, values = (next(key for key in tensors if f"embed_tokens.{k}" in key) for k in KINDS)
    tensors[positions] = strip_checksum(layer.diffpruning_positions["default"]["weight"])
    tensors[values] = layer.diffpruning_values["default"]["weight"].detach()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["diff_checksum"] = checksums_of(tensors).diff
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(logits(PeftModel.from_pretrained(resized(), tmp_path)), logits(model))


@pytest.mark.filterwarnings("ignore:adapter 'default' was made from other base weights")
def test_a_vocabulary_that_was_padded_since_is_named(resized, tmp_path):
    pruned(resized()).save_pretrained(tmp_path, save_embedding_layers=False)
    padded = resized()
    padded.resize_token_embeddings(96)
    with pytest.raises(ValueError, match=r"it was made for \d+ to 6\d rows, the model has 96: if the vocabulary was"):
        PeftModel.from_pretrained(padded, tmp_path)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_run_on_a_resized_vocabulary_resumes_and_keeps_its_best(resized, tmp_path):
    def trainer():
        model = get_peft_model(resized(), DiffPruningConfig(target_density=0.05))
        torch.manual_seed(0)
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(61, (16, 8))]
        every_other = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
        settings = arguments(tmp_path, max_steps=8, learning_rate=1e-2, **every_other, **best)
        callback = DiffPruningCallback(gating_steps=4)
        return Trainer(model, settings, train_dataset=rows, eval_dataset=rows, callbacks=[callback])

    first = trainer()
    first.train()
    assert first.state.best_model_checkpoint is not None
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert second.model.base_model.phase() == "fixmask"
    assert last_checkpoint(tmp_path) is not None
