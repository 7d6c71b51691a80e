"""The example as a user runs it: on a small model and small files of the hub's layout."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file
from transformers import BertTokenizerFast

WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "under",
    "mat",
    "log",
    "tree",
    "big",
    "small",
    "red",
    "blue",
]
FILE = Path(__file__).parents[2] / "examples" / "run_glue.py"


@pytest.fixture(scope="module")
def run_glue():
    spec = importlib.util.spec_from_file_location("run_glue", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_glue"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_bert):
    """A model with tokenizer, and data of two tasks."""
    path = tmp_path_factory.mktemp("glue")
    tiny_bert().bert.save_pretrained(path / "model")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (path / "vocab.txt").write_text("\n".join(special + WORDS))
    BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path / "model")
    random = np.random.default_rng(0)
    label = ClassLabel(names=["no", "yes"])
    for task, kind in (("mrpc", label), ("stsb", Value("float32"))):
        features = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": kind})
        for split, count in (("train", 48), ("validation", 16)):
            sentences = [" ".join(random.choice(WORDS, 5)) for _ in range(2 * count)]
            labels = [int(i % 2) if task == "mrpc" else float(i % 6) for i in range(count)]
            rows = {"sentence1": sentences[:count], "sentence2": sentences[count:], "label": labels}
            (path / "data" / task).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(rows, features).to_parquet(path / "data" / task / f"{split}.parquet")
    return path


def options(folder, output, **changes):
    defaults = {
        "task_name": "mrpc",
        "data_dir": str(folder / "data"),
        "model_name_or_path": str(folder / "model"),
        "output_dir": str(output),
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
    return {**defaults, **changes}


def run(run_glue, monkeypatch, arguments, as_yaml=None):
    if as_yaml:
        as_yaml.write_text(yaml.safe_dump(arguments))
        argv = [str(as_yaml)]
    else:
        argv = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *argv])
    run_glue.main()
    return json.loads((Path(arguments["output_dir"]) / "all_results.json").read_text())


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_three_phases_and_their_results(run_glue, folder, tmp_path, monkeypatch, task):
    result = run(run_glue, monkeypatch, options(folder, tmp_path, task_name=task))
    metrics = {"mrpc": {"accuracy", "f1"}, "stsb": {"pearson", "spearmanr"}}[task]
    for phase in ("gated", "pruned", "fixmask"):
        assert metrics <= set(result[phase])
    assert result["nnz"] == round(0.02 * result["base_parameters"])
    assert result["density"] == pytest.approx(0.02, rel=1e-3)
    assert result["adapter_bytes"] == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert set(result["seconds"]) == {"gating", "pruning", "fixmask"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for name, t in tensors.items() if "values" in name) == result["nnz"]


def test_a_yaml_file_says_the_same_as_the_command_line(run_glue, folder, tmp_path, monkeypatch):
    first = run(run_glue, monkeypatch, options(folder, tmp_path / "a"))
    second = run(run_glue, monkeypatch, options(folder, tmp_path / "b"), as_yaml=tmp_path / "run.yaml")
    for phase in ("gated", "pruned", "fixmask"):
        assert first[phase] == second[phase]


@pytest.mark.parametrize("method", ["magnitude", "full", "head"])
def test_baselines(run_glue, folder, tmp_path, monkeypatch, method):
    result = run(run_glue, monkeypatch, options(folder, tmp_path, method=method))
    assert ("nnz" in result) == (method == "magnitude")
    assert 0 <= result["fixmask" if method == "magnitude" else method]["accuracy"] <= 1


def test_an_output_directory_that_holds_an_adapter_is_kept(run_glue, folder, tmp_path, monkeypatch):
    run(run_glue, monkeypatch, options(folder, tmp_path))
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match=r"already holds .*--overwrite"):
        run(run_glue, monkeypatch, options(folder, tmp_path))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    run(run_glue, monkeypatch, options(folder, tmp_path, overwrite=True, seed=7))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != before


def test_a_train_file_without_the_tasks_columns(run_glue, folder, tmp_path, monkeypatch):
    for split in ("train", "validation"):
        (tmp_path / "data" / "rte").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "data" / "rte" / f"{split}.parquet")
    changes = {"task_name": "rte", "data_dir": str(tmp_path / "data")}
    with pytest.raises(SystemExit, match=r"has the columns \['text', 'label'\], but needs"):
        run(run_glue, monkeypatch, options(folder, tmp_path / "out", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_name": "imdb"}, "'imdb' is no GLUE task"),
        ({"method": "lora"}, "'lora' is not known"),
        ({"task_name": "wnli"}, "--data_dir lacks"),
    ],
)
def test_wrong_arguments(run_glue, folder, tmp_path, monkeypatch, changes, message):
    with pytest.raises(SystemExit, match=message):
        run(run_glue, monkeypatch, options(folder, tmp_path, **changes))


def test_hub_names_reach_the_hub(run_glue, folder, tmp_path, monkeypatch):
    """Without --data_dir the official data set is asked for by name; here a stand-in answers."""
    asked = []

    def stand_in(*args, **kwargs):
        from datasets import load_dataset

        asked.append((args, kwargs))
        files = {split: str(folder / "data" / "mrpc" / f"{split}.parquet") for split in ("train", "validation")}
        return load_dataset("parquet", data_files=files)

    monkeypatch.setattr(run_glue, "load_dataset", stand_in)
    arguments = options(folder, tmp_path)
    del arguments["data_dir"]
    run(run_glue, monkeypatch, arguments)
    assert asked == [(("nyu-mll/glue", "mrpc"), {})]


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers(folder, tmp_path, launcher):
    arguments = options(folder, tmp_path, max_steps=4)
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FILE.parents[1])}
    command = [sys.executable, *launcher, str(FILE), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "all_results.json").read_text())
    assert result["nnz"] == round(0.02 * result["base_parameters"])


def test_metrics_are_glues(run_glue):
    """Against values worked out by hand."""
    logits = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # predicts 1, 0, 1, 1
    labels = np.array([1, 0, 0, 1])
    assert run_glue.compute_metrics("rte", logits, labels) == {"accuracy": 0.75}
    assert run_glue.compute_metrics("mrpc", logits, labels) == {"accuracy": 0.75, "f1": pytest.approx(0.8)}
    expected = (2 * 1 - 1 * 0) / (3 * 2 * 2 * 1) ** 0.5  # (TP TN - FP FN) / sqrt of the margins
    assert run_glue.compute_metrics("cola", logits, labels)["matthews_correlation"] == pytest.approx(expected)
    scores = run_glue.compute_metrics("stsb", np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 4.0]))
    assert scores["pearson"] == pytest.approx(13 / 14)
    assert scores["spearmanr"] == pytest.approx(1.0)
