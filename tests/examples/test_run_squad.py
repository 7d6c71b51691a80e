"""SQuAD from files to predictions: the metrics by hand, the way from text to windows and back, whole runs on a tiny model."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import run_squad
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import BertTokenizerFast

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "mat", "log", "tree", "who", "where"]
LETTERS = [mark + letter for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
QUESTIONS = [
    ("who sat ?", "The cat sat on the mat .", ["The cat", "cat"]),
    ("where ran the dog ?", "a dog ran under the log , a bird flew on the tree .", ["under the log"]),
    ("where flew a bird ?", "a dog ran under the log , a bird flew on the tree .", ["the tree", "on the tree"]),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Whole words where it knows them, letters where not."""
    file = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, ".", ",", "?", "'"]))
    return BertTokenizerFast(vocab=str(file))


def rows(questions, repeat=1):
    """SQuAD's columns, with `number` as make_windows wants it."""
    questions = questions * repeat
    return {
        "id": [f"q{i}" for i in range(len(questions))],
        "title": ["t"] * len(questions),
        "context": [context for _, context, _ in questions],
        "question": [question for question, _, _ in questions],
        "answers": [{"text": g, "answer_start": [c.index(text) for text in g]} for _, c, g in questions],
        "number": list(range(len(questions))),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, tiny_bert):
    """A model with tokenizer, and data in files named like the hub's."""
    path = tmp_path_factory.mktemp("squad")
    tiny_bert().bert.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
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


# The metrics.


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Cat!", "cat"),
        ("an apple a day", "apple day"),
        ("theatre, then another", "theatre then another"),  # no articles
        ("U.S.A.", "usa"),
        ("the-cat", "thecat"),  # punctuation goes first, and takes no space's place
        ("a\tb\n c", "b c"),
        ("«Äpfel»", "«äpfel»"),  # only ASCII is punctuation
        ("the", ""),
    ],
)
def test_normalization_is_the_official_one(text, normalized):
    assert run_squad.normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        ("the cat", "a cat!", 1.0),
        ("cat sat", "dog ran", 0.0),
        ("black cat", "cat", 2 * 0.5 * 1 / 1.5),
        ("cat cat dog", "cat dog dog", 2 / 3),  # two in common: repeated words count as often as both have them
        ("", "cat", 0.0),
        ("the", "a", 0.0),  # v1.1: nothing in common, though the match is exact
    ],
)
def test_f1_by_hand(prediction, gold, f1):
    assert run_squad.f1_score(prediction, gold) == pytest.approx(f1)


def test_metrics_take_each_questions_best_gold_answer():
    found = run_squad.squad_metrics(["the cat", "black dog", "the"], [["dog", "Cat."], ["dog", "white cat"], ["a"]])
    assert found == {"exact_match": pytest.approx(200 / 3), "f1": pytest.approx(100 * (1 + 2 / 3 + 0) / 3)}


# From text to windows and back.


@pytest.mark.parametrize("seed", range(5))
def test_best_spans_are_the_best_of_all(seed):
    random = np.random.default_rng(seed)
    start, end = random.normal(size=(2, 9))
    spans = [(i, j) for i in range(9) for j in range(i, min(9, i + 3))]
    expected = sorted(spans, key=lambda span: -(start[span[0]] + end[span[1]]))
    assert run_squad.best_spans(start, end, 5, 3) == expected[:5]
    assert run_squad.best_spans(start, end, 1000, 3) == expected


def test_best_spans_of_a_window_without_context():
    assert run_squad.best_spans(np.zeros(0), np.zeros(0), 5, 3) == []


@pytest.mark.parametrize(
    ("start", "text", "tokens"),
    [
        (4, "cat", (1, 1)),
        (0, "The cat sat", (0, 2)),
        (5, "at s", (1, 2)),  # parts of tokens
        (8, "sat on", None),  # goes beyond the window
        (20, "x", None),
    ],
)
def test_tokens_of_an_answer(start, text, tokens):
    offsets = [[0, 3], [4, 7], [8, 11]]
    assert run_squad.answer_tokens({"text": [text], "answer_start": [start]}, offsets) == tokens
    assert run_squad.answer_tokens({"text": [text], "answer_start": [start]}, []) is None


def windows_of(data, tokenizer, **changes):
    args = run_squad.DataArguments(**{"max_seq_length": 16, "max_query_length": 6, "doc_stride": 4, **changes})
    columns = run_squad.make_windows(data, tokenizer, args)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], args


def test_windows_cover_the_context_and_share_the_stride(tokenizer):
    data = rows(QUESTIONS)
    windows, _ = windows_of(data, tokenizer)
    assert [window["example"] for window in windows] == sorted(window["example"] for window in windows)
    several = [window for window in windows if window["example"] == 1]
    assert len(several) > 1
    for number, context in enumerate(data["context"]):
        covered = [tuple(span) for window in windows if window["example"] == number for span in window["offsets"]]
        words = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert set(covered) == {tuple(span) for span in words}
    for left, right in pairwise(several):
        assert left["offsets"][-4:] == right["offsets"][:4]
    assert all(len(window["input_ids"]) <= 16 for window in windows)


def test_labels_are_the_answer_where_the_window_holds_it(tokenizer):
    data = rows(QUESTIONS)
    windows, _ = windows_of(data, tokenizer)
    holding = dict.fromkeys(data["number"], 0)
    for window in windows:
        answer = data["answers"][window["example"]]["text"][0]
        tokens = window["input_ids"][window["start_positions"] : window["end_positions"] + 1]
        if window["start_positions"]:
            assert tokenizer.decode(tokens) == answer.lower()
            holding[window["example"]] += 1
        else:
            assert window["end_positions"] == 0
            assert answer.lower() not in tokenizer.decode(window["input_ids"][window["context_start"] :])
    assert min(holding.values()) >= 1
    assert sum(holding.values()) < len(windows)


def logits_of(windows, length=16, low=0.0):
    return np.full((len(windows), length), low, np.float32), np.full((len(windows), length), low, np.float32)


def test_labels_as_logits_give_the_gold_answers(tokenizer):
    """There and back: what the model is taught to say is counted as right."""
    data = rows(QUESTIONS)
    windows, args = windows_of(data, tokenizer)
    start, end = logits_of(windows)
    for number, window in enumerate(windows):
        start[number, window["start_positions"]] = end[number, window["end_positions"]] = 5
    answers = run_squad.best_answers(data["context"], windows, (start, end), args)
    assert [ranked[0]["text"] for ranked in answers] == [golds["text"][0] for golds in data["answers"]]


def test_answers_over_several_windows(tokenizer):
    """The best span of any window wins; a text that two windows find is one answer; the question never answers."""
    data = rows(QUESTIONS[1:2])
    windows, args = windows_of(data, tokenizer, max_seq_length=18, n_best_size=3, max_answer_length=2)
    assert len(windows) == 2
    context = data["context"][0]
    words = [[context[left:right] for left, right in window["offsets"]] for window in windows]
    shared = next(word for word in words[1] if words[0].count(word) == words[1].count(word) == 1)
    start, end = logits_of(windows, 18, low=-10.0)
    for window, score in ((0, 1.0), (1, 2.0)):
        place = windows[window]["context_start"] + words[window].index(shared)
        start[window, place] = end[window, place] = score
    start[:, 1] = end[:, 1] = 50  # in the question
    first = windows[0]["context_start"]
    start[0, first], end[0, first + 2] = 3, 3  # longer than max_answer_length
    (ranked,) = run_squad.best_answers(data["context"], windows, (start, end), args)
    assert ranked[0]["text"] == shared
    assert (ranked[0]["start_logit"], ranked[0]["end_logit"]) == (2.0, 2.0)
    assert len(ranked) == len({answer["text"] for answer in ranked}) == 3
    assert sum(answer["probability"] for answer in ranked) == pytest.approx(1)
    scores = [answer["start_logit"] + answer["end_logit"] for answer in ranked]
    assert scores == sorted(scores, reverse=True)
    assert ranked[1]["probability"] / ranked[0]["probability"] == pytest.approx(np.exp(scores[1] - scores[0]))


def test_an_empty_context_has_an_empty_answer(tokenizer):
    data = rows([("who ?", "", [""])])
    windows, args = windows_of(data, tokenizer)
    (ranked,) = run_squad.best_answers(data["context"], windows, logits_of(windows), args)
    assert [answer["text"] for answer in ranked] == [""]


def test_long_questions_are_cut(tokenizer):
    windows, _ = windows_of(rows([("  " + "where " * 30, QUESTIONS[0][1], ["cat"])]), tokenizer)
    assert windows[0]["context_start"] == 1 + 6 + 1
    assert all(window["offsets"] for window in windows)


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
