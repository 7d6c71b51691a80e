"""The command line on base models as they lie on disk: it finds what `from_pretrained` finds.

For each layout `diffpeft merge` gives the tensors of `merge_and_unload()` and a directory that `from_pretrained` loads.
Tried too, once: all of `ARCHITECTURES`, whose merged files have the keys and the bits of `save_pretrained`; T5 with all
its ties on disk, equal and not; the names that transformers 4 gave to the parts of Llava and Qwen2-VL.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, pruned
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForPreTraining,
    LlavaForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)
from typer.testing import CliRunner

from diffpeft.files.adapter import read_adapter, read_config
from diffpeft.tools import cli

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # heads that are not in the base are told of

WEIGHTS = "model.safetensors"
TEXT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT |= {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def classifier(name: str):
    """The architecture's model in a directory, to be loaded as a classifier of three labels."""
    return Layout(lambda path: ARCHITECTURES[name].make().save_pretrained(path), _classifier, "SEQ_CLS", name)


class Layout(NamedTuple):
    """A base model on disk, how a user loads it, and what to feed it."""

    write: Callable[[Path], object]
    load: Callable[[Path], transformers.PreTrainedModel]
    task_type: str | None
    inputs: str


def _classifier(path):
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, ignore_mismatched_sizes=True)


def _own(name, write=None, task_type=None):
    """The architecture's own class, written by `write`, by default as `save_pretrained` does."""
    write = write or (lambda path: ARCHITECTURES[name].make().save_pretrained(path))
    return Layout(write, type(ARCHITECTURES[name].make()).from_pretrained, task_type, name)


def edit(path, tensors=None, **config):
    """Change a saved model's config and, by a function of them, its tensors."""
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    if tensors is not None:
        save_file(tensors(load_file(path / WEIGHTS)), path / WEIGHTS, {"format": "pt"})


def _bare_encoder(path):
    ARCHITECTURES["bert"].make().bert.save_pretrained(path)


def _bert_pretraining(path):
    torch.manual_seed(0)
    BertForPreTraining(ARCHITECTURES["bert"].make().config).save_pretrained(path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(tensors):
        for new, name in old.items():
            tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
        return {**tensors, "bert.embeddings.position_ids": torch.arange(16).unsqueeze(0)}

    edit(path, renamed, architectures=["BertForMaskedLM"])


def _gpt2_without_prefix(path):
    model = ARCHITECTURES["gpt2"].make()
    model.save_pretrained(path)
    edit(path, lambda tensors: {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()})


def _untied_on_disk(path):
    ARCHITECTURES["llama"].make().save_pretrained(path)
    edit(path, tie_word_embeddings=True)


def _tied_twice_on_disk(path):
    ARCHITECTURES["llama_tied"].make().save_pretrained(path)
    edit(path, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})


def _equal_but_untied(path):
    _tied_twice_on_disk(path)
    edit(path, tie_word_embeddings=False)


def _pickled(path):
    model = ARCHITECTURES["bert"].make()
    model.save_pretrained(path)
    torch.save(load_file(path / WEIGHTS), path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()


def _llava():
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 8}
    vision |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"model_type": "llama", **TEXT}
    kind = LlavaForConditionalGeneration
    return kind(kind.config_class(text_config=text, vision_config=vision, image_token_index=59))


def _qwen2_vl():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    kind = Qwen2VLForConditionalGeneration
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 8}
    return kind(kind.config_class(text_config={**TEXT, "rope_scaling": rope}, vision_config=vision))


LAYOUTS = {
    "bare_encoder": Layout(_bare_encoder, _classifier, "SEQ_CLS", "bert"),
    "bert_pretraining": Layout(_bert_pretraining, _classifier, "SEQ_CLS", "bert"),
    "other_labels": classifier("bert"),
    "gpt2_without_prefix": _own("gpt2", _gpt2_without_prefix, "CAUSAL_LM"),
    "llama": _own("llama", task_type="CAUSAL_LM"),
    "llama_tied": _own("llama_tied", task_type="CAUSAL_LM"),
    "untied_on_disk": _own("llama", _untied_on_disk, "CAUSAL_LM"),
    "tied_twice_on_disk": _own("llama", _tied_twice_on_disk, "CAUSAL_LM"),
    "equal_but_untied": _own("llama", _equal_but_untied, "CAUSAL_LM"),
    "causal_as_classifier": classifier("llama"),
    "mixtral": _own("mixtral", task_type="CAUSAL_LM"),
    "qwen3_moe": _own("qwen3_moe", task_type="CAUSAL_LM"),
    "moe_as_classifier": classifier("mixtral"),
    "t5": _own("t5", task_type="SEQ_2_SEQ_LM"),
    "whisper": _own("whisper", task_type="SEQ_2_SEQ_LM"),
    "clip": _own("clip"),
    "llava": Layout(
        lambda path: _llava().save_pretrained(path), LlavaForConditionalGeneration.from_pretrained, None, "llama"
    ),
    "qwen2_vl": Layout(
        lambda path: _qwen2_vl().save_pretrained(path),
        Qwen2VLForConditionalGeneration.from_pretrained,
        "CAUSAL_LM",
        "llama",
    ),
    "shards": Layout(
        lambda path: ARCHITECTURES["mixtral"].make().save_pretrained(path, max_shard_size="20KB"),
        AutoModelForCausalLM.from_pretrained,
        "CAUSAL_LM",
        "mixtral",
    ),
    "pickled": Layout(_pickled, _classifier, "SEQ_CLS", "bert"),
}


def run(*arguments):
    """Run a command; its output. An error of the command is raised."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def logits(model, inputs):
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output.logits if "logits" in output else output.logits_per_text


def adapter_of(base, **config):
    """A finished adapter whose heads have moved too."""
    model = pruned(base, **config)
    for head in [one for one in model.modules() if isinstance(one, ModulesToSaveWrapper)]:
        for parameter in head.modules_to_save["default"].parameters():
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging:UserWarning")  # PEFT
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_command_finds_what_from_pretrained_finds(name, tmp_path):
    layout = LAYOUTS[name]
    base, adapter, merged, again = (tmp_path / one for one in ("base", "adapter", "merged", "again"))
    layout.write(base)
    (base / "tokenizer.json").write_text("{}")
    adapter_of(layout.load(base), task_type=layout.task_type).save_pretrained(adapter)
    run("merge", adapter, merged)
    expected = PeftModel.from_pretrained(layout.load(base), adapter).merge_and_unload()
    loaded = type(expected).from_pretrained(merged)
    mine = loaded.state_dict()
    assert all(torch.equal(mine[key], tensor) for key, tensor in expected.state_dict().items())
    inputs = ARCHITECTURES[layout.inputs].inputs(2)
    assert torch.equal(logits(loaded, inputs), logits(expected, inputs))
    expected.save_pretrained(tmp_path / "expected")
    stored = load_file(tmp_path / "expected" / WEIGHTS)
    shards = [load_file(file) for file in merged.glob("*.safetensors")]
    assert stored.keys() <= {key for shard in shards for key in shard}
    told = json.loads((merged / "config.json").read_text())
    assert told["architectures"] == [type(expected).__name__]
    assert loaded.config.num_labels == expected.config.num_labels
    assert (merged / "tokenizer.json").exists()
    run("verify", adapter)
    assert read_adapter(adapter)[1].keys() == read_config(adapter).nnz_pattern.keys()
    assert "adapter" in run("inspect", adapter).replace("\n", "")
    if name in ("bare_encoder", "mixtral"):
        run("export", adapter, tmp_path / "coo", "--to", "coo")
        run("combine", adapter, "-o", tmp_path / "combined")
    if name != "gpt2_without_prefix":  # which has no nn.Linear
        run("export", adapter, tmp_path / "super", "--to", "super-tuning", "--leave-out")
    task_type = ("--task-type", layout.task_type) if layout.task_type else ()
    run("extract", base, merged, again, "--density", 0.5, *task_type)
    extracted = PeftModel.from_pretrained(layout.load(base), again).merge_and_unload()
    torch.testing.assert_close(logits(extracted, inputs), logits(expected, inputs), rtol=1e-4, atol=1e-5)


def test_parameters_that_the_base_lacks_are_told(tmp_path):
    """from_pretrained draws them at random, so that no merged model could be the one that was trained."""
    BertForMaskedLM(ARCHITECTURES["bert"].make().config).save_pretrained(tmp_path / "base")
    adapter_of(_classifier(tmp_path / "base"), task_type="SEQ_CLS").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"differ or are not there, \['bert\.pooler\.dense"):
        run("merge", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match=r"lacks 2 parameters of BertForSequenceClassification, \['bert\.pooler"):
        run("merge", tmp_path / "adapter", tmp_path / "out", "--force")


def test_weights_of_further_modules_of_a_sentence_transformer_are_copied(tmp_path):
    _bare_encoder(tmp_path / "base")
    for folder in ("2_Dense", "onnx"):
        (tmp_path / "base" / folder).mkdir()
        save_file({"x": torch.ones(2)}, tmp_path / "base" / folder / WEIGHTS)
    adapter_of(_classifier(tmp_path / "base"), task_type="SEQ_CLS").save_pretrained(tmp_path / "adapter")
    run("merge", tmp_path / "adapter", tmp_path / "out")
    assert {file.parent.name for file in (tmp_path / "out").rglob("*.safetensors")} == {"out", "2_Dense"}
