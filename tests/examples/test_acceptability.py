"""The acceptability task of examples/: two splits without a word of content in common, and no shortcut."""

from collections import Counter, defaultdict
from typing import Any

import acceptability as task
import pytest
from acceptability.__main__ import main

Rows = list[dict[str, Any]]

TRAIN, HELD_OUT = task.make_split()
SPLITS = pytest.mark.parametrize(("name", "rows"), [("train", TRAIN), ("held_out", HELD_OUT)])


def pairs_of(rows: Rows) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The acceptable and the unacceptable row of each pair."""
    pairs = defaultdict(list)
    for row in rows:
        pairs[row["pair"]].append(row)
    assert {tuple(sorted(row["label"] for row in pair)) for pair in pairs.values()} == {(0, 1)}
    return [(pair[0], pair[1]) if pair[0]["label"] else (pair[1], pair[0]) for pair in pairs.values()]


def test_sizes() -> None:
    assert (len(TRAIN), len(HELD_OUT)) == (2400, 480)
    assert [len(rows) for rows in task.make_split(0, 40, 20)] == [40, 20]


@pytest.mark.parametrize("size", [7, -2])
def test_a_size_that_pairs_cannot_have(size: int) -> None:
    with pytest.raises(ValueError, match="even"):
        task.make_split(0, size, 0)


def test_more_than_the_templates_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "acceptability.task.PHENOMENA", {"only": lambda lex, rng: ("my baker has smiled", "my baker have smiled")}
    )
    with pytest.raises(ValueError, match="different"):
        task.make_split(0, 4, 0)


def test_the_splits_share_no_filler_and_no_sentence() -> None:
    train, held_out = task.fillers("train"), task.fillers("held_out")
    assert train
    assert held_out
    assert not train & held_out
    assert not (train | held_out) & task.FUNCTION_WORDS
    assert not {row["sentence"] for row in TRAIN} & {row["sentence"] for row in HELD_OUT}


@SPLITS
def test_every_word_is_a_filler_of_its_split_or_grammatical(name: str, rows: Rows) -> None:
    used = {word for row in rows for word in task.words(row["sentence"])}
    assert used <= task.fillers(name) | task.FUNCTION_WORDS


@SPLITS
def test_no_sentence_twice(name: str, rows: Rows) -> None:
    assert len({row["sentence"] for row in rows}) == len(rows)


@SPLITS
def test_balance(name: str, rows: Rows) -> None:
    counts = Counter((row["phenomenon"], row["label"]) for row in rows)
    assert counts == {(phenomenon, label): len(rows) // 20 for phenomenon in task.PHENOMENA for label in (0, 1)}
    assert len(task.PHENOMENA) == 10


def test_deterministic() -> None:
    assert task.make_split() == (TRAIN, HELD_OUT)
    assert task.make_split(1)[0] != TRAIN


@SPLITS
def test_a_pair_differs_in_one_word_or_in_the_order_of_its_words(name: str, rows: Rows) -> None:
    for good, bad in pairs_of(rows):
        assert good["phenomenon"] == bad["phenomenon"]
        assert good["sentence"] != bad["sentence"]
        assert good["sentence"][-1] == bad["sentence"][-1]
        right, wrong = task.words(good["sentence"]), task.words(bad["sentence"])
        assert len(right) == len(wrong)
        assert Counter(right) == Counter(wrong) or sum(a != b for a, b in zip(right, wrong, strict=True)) == 1


@SPLITS
def test_form(name: str, rows: Rows) -> None:
    for row in rows:
        sentence = row["sentence"]
        assert sentence[0].isupper()
        assert sentence[-1] in ".?"
        assert not set(sentence[:-1]) & set(".?")
        assert sentence == " ".join(sentence.split())
        assert " ?" not in sentence
        assert " ," not in sentence
        assert 4 <= len(task.words(sentence)) <= 14
    assert len({len(task.words(row["sentence"])) for row in rows}) >= 8


@pytest.mark.parametrize("seed", [0, 1])
def test_no_word_tells_the_label(seed: int) -> None:
    train, _ = task.make_split(seed)
    seen = Counter((word, row["label"]) for row in train for word in set(task.words(row["sentence"])))
    for word in {word for word, _ in seen}:
        right, wrong = seen[word, 1], seen[word, 0]
        # Five standard deviations of a fair coin.
        assert abs(right - wrong) <= 5 * (right + wrong) ** 0.5 + 1, word


def test_main_prints_samples(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert all(line.split()[1] in task.PHENOMENA for line in lines)
