"""Rows of the task: filled templates, with labels."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from acceptability.lexicon import LEXICONS, Lexicon, fillers, words
from acceptability.phrases import Pair
from acceptability.sentence_structure import argument_structure, inversion, polarity, word_order
from acceptability.word_forms import agreement, determiner_noun, pronoun_case, quantifier, reflexive, verb_form

LENGTH = (4, 14)
"""The fewest and the most words of a sentence."""

PHENOMENA: dict[str, Callable[[Lexicon, Random], Pair]] = {
    template.__name__: template
    for template in (
        agreement,
        determiner_noun,
        reflexive,
        inversion,
        argument_structure,
        polarity,
        verb_form,
        word_order,
        pronoun_case,
        quantifier,
    )
}
"""Templates by name, in the order in which they take turns."""


def _sentence(text: str) -> str:
    text = " ".join(text.split()).replace(" ?", "?")
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")


def _rows(split: str, size: int, seed: int, phenomena: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a split, in pairs whose content words all differ and whose length is in `LENGTH`, shuffled."""
    if size < 0 or size % 2:
        raise ValueError(f"the size of a split must be even, it is made of pairs; got {size}")
    rng = Random(f"{seed} {split}")
    templates = [(name, PHENOMENA[name]) for name in phenomena]
    content = fillers(split)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    failures = 0
    while len(rows) < size:
        pair = len(rows) // 2
        phenomenon, template = templates[pair % len(templates)]
        good, bad = (_sentence(text) for text in template(LEXICONS[split], rng))
        used = [word for word in words(good) if word in content]
        if {good, bad} & seen or len(set(used)) < len(used) or not LENGTH[0] <= len(words(good)) <= LENGTH[1]:
            failures += 1
            if failures > 50 * size + 1000:
                raise ValueError(f"the templates do not make {size} different sentences")
            continue
        seen.update((good, bad))
        for sentence, label in ((good, 1), (bad, 0)):
            rows.append({"sentence": sentence, "label": label, "phenomenon": phenomenon, "pair": pair})
    rng.shuffle(rows)
    return rows


def make_split(
    seed: int = 0,
    train_size: int = 2400,
    held_out_size: int = 480,
    phenomena: Sequence[str] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training and the held-out rows of the given phenomena, by default of all, each shuffled.

    A row has "sentence", "label" (1 acceptable, 0 not), "phenomenon" (a key of `PHENOMENA`) and "pair", a number that
    it shares with the other sentence of its minimal pair and with no other row of its split.
    """
    names = tuple(PHENOMENA) if phenomena is None else phenomena
    return _rows("train", train_size, seed, names), _rows("held_out", held_out_size, seed, names)
