"""The parts of run_squad.py by hand: metrics, from text to windows, and from logits back to answers."""

from itertools import pairwise

import numpy as np
import pytest
import run_squad
from squad_data import QUESTIONS, rows

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


def windows_of(data, squad_tokenizer, **changes):
    args = run_squad.DataArguments(**{"max_seq_length": 16, "max_query_length": 6, "doc_stride": 4, **changes})
    columns = run_squad.make_windows(data, squad_tokenizer, args)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], args


def test_windows_cover_the_context_and_share_the_stride(squad_tokenizer):
    data = rows(QUESTIONS)
    windows, _ = windows_of(data, squad_tokenizer)
    assert [window["example"] for window in windows] == sorted(window["example"] for window in windows)
    several = [window for window in windows if window["example"] == 1]
    assert len(several) > 1
    for number, context in enumerate(data["context"]):
        covered = [tuple(span) for window in windows if window["example"] == number for span in window["offsets"]]
        words = squad_tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert set(covered) == {tuple(span) for span in words}
    for left, right in pairwise(several):
        assert left["offsets"][-4:] == right["offsets"][:4]
    assert all(len(window["input_ids"]) <= 16 for window in windows)


def test_labels_are_the_answer_where_the_window_holds_it(squad_tokenizer):
    data = rows(QUESTIONS)
    windows, _ = windows_of(data, squad_tokenizer)
    holding = dict.fromkeys(data["number"], 0)
    for window in windows:
        answer = data["answers"][window["example"]]["text"][0]
        tokens = window["input_ids"][window["start_positions"] : window["end_positions"] + 1]
        if window["start_positions"]:
            assert squad_tokenizer.decode(tokens) == answer.lower()
            holding[window["example"]] += 1
        else:
            assert window["end_positions"] == 0
            assert answer.lower() not in squad_tokenizer.decode(window["input_ids"][window["context_start"] :])
    assert min(holding.values()) >= 1
    assert sum(holding.values()) < len(windows)


def logits_of(windows, length=16, low=0.0):
    return np.full((len(windows), length), low, np.float32), np.full((len(windows), length), low, np.float32)


def test_labels_as_logits_give_the_gold_answers(squad_tokenizer):
    """There and back: what the model is taught to say is counted as right."""
    data = rows(QUESTIONS)
    windows, args = windows_of(data, squad_tokenizer)
    start, end = logits_of(windows)
    for number, window in enumerate(windows):
        start[number, window["start_positions"]] = end[number, window["end_positions"]] = 5
    answers = run_squad.best_answers(data["context"], windows, (start, end), args)
    assert [ranked[0]["text"] for ranked in answers] == [golds["text"][0] for golds in data["answers"]]


def test_answers_over_several_windows(squad_tokenizer):
    """The best span of any window wins; a text that two windows find is one answer; the question never answers."""
    data = rows(QUESTIONS[1:2])
    windows, args = windows_of(data, squad_tokenizer, max_seq_length=18, n_best_size=3, max_answer_length=2)
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


def test_an_empty_context_has_an_empty_answer(squad_tokenizer):
    data = rows([("who ?", "", [""])])
    windows, args = windows_of(data, squad_tokenizer)
    (ranked,) = run_squad.best_answers(data["context"], windows, logits_of(windows), args)
    assert [answer["text"] for answer in ranked] == [""]


def test_long_questions_are_cut(squad_tokenizer):
    windows, _ = windows_of(rows([("  " + "where " * 30, QUESTIONS[0][1], ["cat"])]), squad_tokenizer)
    assert windows[0]["context_start"] == 1 + 6 + 1
    assert all(window["offsets"] for window in windows)
