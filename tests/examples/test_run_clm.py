"""Language modelling from files: blocks by hand, perplexity, whole runs on a tiny model."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import run_clm
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LINE = "the cat sat on the mat and the dog ran under the log\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer of bytes, and text in files."""
    path = tmp_path_factory.mktemp("clm")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=64, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(path / "model")
    for split, lines in (("train", 40), ("validation", 8)):
        (path / f"{split}.txt").write_text(LINE * lines)
        Dataset.from_dict({"text": [LINE] * lines, "other": [0] * lines}).to_parquet(path / f"{split}.parquet")
    return path


def options(folder, output, kind="txt", **changes):
    defaults = {
        "train_file": str(folder / f"train.{kind}"),
        "validation_file": str(folder / f"validation.{kind}"),
        "model_name_or_path": str(folder / "model"),
        "output_dir": str(output),
        "block_size": 32,
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "target_density": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return {name: value for name, value in {**defaults, **changes}.items() if value is not None}


def run(monkeypatch, arguments, as_yaml=None):
    if as_yaml:
        as_yaml.write_text(yaml.safe_dump(arguments))
        argv = [str(as_yaml)]
    else:
        argv = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["run_clm.py", *argv])
    run_clm.main()
    return json.loads((Path(arguments["output_dir"]) / "all_results.json").read_text())


def test_texts_become_blocks():
    texts = [[1, 2, 3], [], [4], [5, 6, 7, 8], [9]]
    assert run_clm.group_texts(texts, 4) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert run_clm.group_texts(texts, 3) == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert run_clm.group_texts(texts, 9) == [list(range(1, 10))]
    assert run_clm.group_texts(texts, 10) == run_clm.group_texts([], 4) == []


def test_metrics_by_hand():
    """The token at a place predicts the next one: of 2 x 2 here three are right."""
    prediction = SimpleNamespace(
        predictions=np.array([[2, 3, 9], [5, 0, 9]]),
        label_ids=np.array([[1, 2, 3], [4, 5, 6]]),
        losses=np.array([math.log(2), math.log(8)]),
    )
    assert run_clm.compute_metrics(prediction) == {"perplexity": pytest.approx(4), "accuracy": 0.75}
    logits = torch.eye(3)[None]
    assert run_clm.largest(logits, None).equal(run_clm.largest((logits, None), None))
    assert run_clm.largest(logits, None).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_three_phases_and_their_results(folder, tmp_path, monkeypatch, kind):
    changes = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    result = run(monkeypatch, options(folder, tmp_path, kind, **changes), tmp_path / "run.yaml")
    for phase in ("gated", "pruned", "fixmask"):
        assert result[phase]["perplexity"] == pytest.approx(math.exp(result[phase]["loss"]), rel=1e-5)
        assert 0 <= result[phase]["accuracy"] <= 1
    assert result["nnz"] == round(0.02 * result["base_parameters"])
    assert result["density"] == pytest.approx(0.02, rel=1e-3)
    assert result["adapter_bytes"] == (tmp_path / "adapter_model.safetensors").stat().st_size
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for name, t in tensors.items() if "values" in name) == result["nnz"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_perplexity" in entry] == [0, 3, 6]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_text_and_parquet_say_the_same(folder, tmp_path, monkeypatch):
    """Line breaks stay, so the files hold the same tokens: none of the text is lost but the last part of a block."""
    first = run(monkeypatch, options(folder, tmp_path / "a", "txt"))
    second = run(monkeypatch, options(folder, tmp_path / "b", "parquet"))
    assert first["fixmask"] == second["fixmask"]


def test_it_learns(folder, tmp_path, monkeypatch):
    changes = {"max_steps": 60, "learning_rate": 3e-3, "target_density": 0.1, "max_eval_samples": 4}
    changes["fixmask_learning_rate"] = 1e-2  # ten times learning_rate, the default, is unstable on a model this small
    result = run(monkeypatch, options(folder, tmp_path, **changes))
    assert result["gated"]["perplexity"] < 50
    assert result["fixmask"]["perplexity"] < 0.7 * result["gated"]["perplexity"]


@pytest.mark.parametrize("method", ["magnitude", "full"])
def test_baselines(folder, tmp_path, monkeypatch, method):
    result = run(monkeypatch, options(folder, tmp_path, method=method, max_train_samples=7, max_eval_samples=5))
    assert ("nnz" in result) == (method == "magnitude")
    assert result["fixmask" if method == "magnitude" else method]["perplexity"] < 300


def test_hub_names_reach_the_hub(folder, tmp_path, monkeypatch):
    """--dataset_name is asked for with its configuration; here a stand-in answers."""
    load, asked = run_clm.load_dataset, []

    def stand_in(*args, **kwargs):
        asked.append((args, kwargs))
        return load("parquet", data_files={s: str(folder / f"{s}.parquet") for s in ("train", "validation")})

    monkeypatch.setattr(run_clm, "load_dataset", stand_in)
    names = {"dataset_name": "Salesforce/wikitext", "dataset_config_name": "wikitext-2-raw-v1"}
    run(monkeypatch, options(folder, tmp_path, train_file=None, validation_file=None, max_steps=2, **names))
    assert asked == [(tuple(names.values()), {})]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "head"}, "'head' is not known; use one of diff_pruning, magnitude, full"),
        ({"validation_file": None}, "do not say which text; pass --dataset_name, or both"),
        ({"dataset_name": "wikitext"}, "do not say which text"),
        ({"train_file": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"validation_file": "gone.md"}, "gone.md: no such file"),
        ({"text_column": "body"}, r"no train split with a column 'body'.*choose --text_column"),
        ({"block_size": 65}, "block_size=65 is more than the 64 positions of the model; use 64 or less"),
    ],
)
def test_wrong_arguments(folder, tmp_path, monkeypatch, changes, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, options(folder, tmp_path, **changes))


def test_files_of_a_kind_and_of_a_size(folder, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"must both be \.txt or both be \.parquet"):
        run(monkeypatch, options(folder, tmp_path, validation_file=str(folder / "validation.parquet")))
    (tmp_path / "short.txt").write_text("the cat")
    with pytest.raises(SystemExit, match="block_size=32 is more than the validation text has tokens"):
        run(monkeypatch, options(folder, tmp_path, validation_file=str(tmp_path / "short.txt")))


def test_the_kept_configuration_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path(run_clm.__file__).parent / "configs" / "clm.yaml"
    monkeypatch.setattr(sys, "argv", ["run_clm.py", str(file)])
    _, data_args, diff_args, args = run_clm.parse_arguments(run_clm.DataArguments)
    assert (data_args.dataset_name, diff_args.target_density) == ("Salesforce/wikitext", 0.005)
    assert args.eval_strategy == "epoch"
