"""SQuAD from files to predictions: whole runs on a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import run_squad
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from squad_data import QUESTIONS, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory, squad_tokenizer, tiny_bert):
    """A model with tokenizer, and data in files named like the hub's."""
    path = tmp_path_factory.mktemp("squad")
    tiny_bert().bert.save_pretrained(path / "model")
    squad_tokenizer.save_pretrained(path / "model")
    (path / "data").mkdir()
    for split, repeat in (("train", 16), ("validation", 4)):
        data = Dataset.from_dict(rows(QUESTIONS, repeat)).remove_columns("number")
        data.to_parquet(path / "data" / f"{split}-00000-of-00001.parquet")
    return path


def options(folder, output, **changes):
    defaults = {
        "data_dir": str(folder / "data"),
        "model_name_or_path": str(folder / "model"),
        "output_dir": str(output),
        "max_seq_length": 16,
        "max_query_length": 6,
        "doc_stride": 4,
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


def run(monkeypatch, arguments, as_yaml=None):
    if as_yaml:
        as_yaml.write_text(yaml.safe_dump(arguments))
        argv = [str(as_yaml)]
    else:
        argv = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["run_squad.py", *argv])
    run_squad.main()
    return json.loads((Path(arguments["output_dir"]) / "all_results.json").read_text())


# Whole runs.


def test_three_phases_and_their_results(folder, tmp_path, monkeypatch):
    result = run(monkeypatch, options(folder, tmp_path))
    for phase in ("gated", "pruned", "fixmask"):
        assert {"exact_match", "f1", "loss"} <= set(result[phase])
    assert result["nnz"] == round(0.02 * result["base_parameters"])
    assert result["density"] == pytest.approx(0.02, rel=1e-3)
    assert result["adapter_bytes"] == (tmp_path / "adapter_model.safetensors").stat().st_size
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for name, t in tensors.items() if "values" in name) == result["nnz"]
    assert any("qa_outputs" in name for name in tensors)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "QUESTION_ANS"
    best = json.loads((tmp_path / "predictions.json").read_text())
    ranked = json.loads((tmp_path / "nbest_predictions.json").read_text())
    assert best == {name: answers[0]["text"] for name, answers in ranked.items()}
    assert list(best) == [f"q{i}" for i in range(12)]
    found = run_squad.squad_metrics(best.values(), [golds for _, _, golds in QUESTIONS * 4])
    assert found == {name: pytest.approx(result["fixmask"][name]) for name in ("exact_match", "f1")}


def test_it_learns_and_ends_with_the_best_of_fixmask(folder, tmp_path, monkeypatch):
    changes = {"max_steps": 40, "gating_steps": 20, "save_strategy": "steps", "save_steps": 10, "learning_rate": 1e-2}
    changes |= {
        "eval_strategy": "steps",
        "eval_steps": 10,
        "eval_on_start": True,
        "save_total_limit": 1,
        "fixmask_learning_rate": 1e-2,
    }
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "f1", "greater_is_better": True}
    result = run(monkeypatch, options(folder, tmp_path, target_density=0.2, **changes), tmp_path / "run.yaml")
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    scores = {entry["step"]: entry["eval_f1"] for entry in state["log_history"] if "eval_f1" in entry}
    assert sorted(scores) == [0, 10, 20, 30, 40]
    assert result["fixmask"]["f1"] == max(scores[step] for step in (20, 30, 40))
    assert result["fixmask"]["f1"] > max(60, scores[0] + 30)


def test_windows_keep_their_order_where_training_groups_by_length(folder, tmp_path, monkeypatch):
    found = [
        run(monkeypatch, options(folder, tmp_path / name, method="head", learning_rate=1e-20, **changes))
        for name, changes in (("random", {}), ("grouped", {"train_sampling_strategy": "group_by_length"}))
    ]
    answers = [json.loads((tmp_path / name / "nbest_predictions.json").read_text()) for name in ("random", "grouped")]
    assert answers[0] == answers[1]
    assert found[0]["head"] == found[1]["head"]


@pytest.mark.parametrize("method", ["magnitude", "full", "head"])
def test_baselines(folder, tmp_path, monkeypatch, method):
    result = run(monkeypatch, options(folder, tmp_path, method=method, max_train_samples=7, max_eval_samples=5))
    assert ("nnz" in result) == (method == "magnitude")
    assert 0 <= result["fixmask" if method == "magnitude" else method]["f1"] <= 100
    assert list(json.loads((tmp_path / "predictions.json").read_text())) == ["q0", "q3", "q6", "q8", "q11"]


def test_hub_names_reach_the_hub(folder, tmp_path, monkeypatch):
    """Without --data_dir the official data set is asked for by name; here a stand-in answers."""
    load, asked = run_squad.load_dataset, []

    def stand_in(*args, **kwargs):
        asked.append((args, kwargs))
        return load("parquet", data_dir=str(folder / "data"))

    monkeypatch.setattr(run_squad, "load_dataset", stand_in)
    arguments = options(folder, tmp_path, max_steps=2)
    del arguments["data_dir"]
    run(monkeypatch, arguments)
    assert asked == [(("rajpurkar/squad",), {})]


def broken(path, train, validation=None):
    """A directory with these columns as train, and, if there are any, these as validation."""
    for split, columns in (("train", train), ("validation", validation)):
        if columns:
            Dataset.from_dict(columns).to_parquet(path / f"{split}.parquet")
    return {"data_dir": str(path)}


def test_data_that_it_is_not_for(folder, tmp_path, monkeypatch):
    good = rows(QUESTIONS)
    unanswerable = {**good, "answers": [*good["answers"][:2], {"text": [], "answer_start": []}]}
    for name, (train, validation), message in (
        (
            "v2",
            (good, unanswerable),
            r"1 of 3 questions of the validation split have no answer, as in SQuAD v2; .*v1\.1",
        ),
        ("split", (good, None), r"has the splits \['train'\], but needs validation"),
        ("columns", ({"text": ["a"]}, {"text": ["a"]}), r"the train split has the columns \['text'\], but needs"),
    ):
        (tmp_path / name).mkdir()
        changes = broken(tmp_path / name, train, validation)
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, options(folder, tmp_path / "out", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "'lora' is not known; use one of diff_pruning, magnitude, full, head"),
        ({"doc_stride": 8}, r"max_seq_length=16 does not hold .*use max_seq_length > 17"),
        ({"doc_stride": -1}, "doc_stride >= 0"),
        ({"max_seq_length": 33}, "max_seq_length=33 is more than the 32 positions of the model; use 32 or less"),
        ({"n_best_size": 0}, "n_best_size=0 leaves no answer"),
        ({"data_dir": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_arguments(folder, tmp_path, monkeypatch, changes, message):
    with pytest.raises((SystemExit, FileNotFoundError), match=message):
        run(monkeypatch, options(folder, tmp_path, **changes))


def test_an_output_directory_that_holds_an_adapter_is_kept(folder, tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"already holds adapter_config.json; .*--overwrite"):
        run(monkeypatch, options(folder, tmp_path))


def test_the_kept_configuration_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path(run_squad.__file__).parent / "configs" / "squad.yaml"
    monkeypatch.setattr(sys, "argv", ["run_squad.py", str(file)])
    _, data_args, diff_args, args = run_squad.parse_arguments(run_squad.DataArguments)
    assert (data_args.max_seq_length, diff_args.target_density) == (384, 0.01)
    assert args.load_best_model_at_end
    assert args.greater_is_better
