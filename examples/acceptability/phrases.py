"""Phrases that several templates use, filled at random from a lexicon."""

from collections.abc import Mapping
from random import Random

from acceptability.lexicon import Lexicon

Pair = tuple[str, str]
"""An acceptable and an unacceptable sentence, still without capital letter and full stop."""


def maybe(rng: Random, text: str, chance: float = 0.3) -> str:
    """The text with the given chance, else nothing."""
    return text if rng.random() < chance else ""


def swap(rng: Random, options: Mapping[str, tuple[str, ...]], right: str) -> tuple[str, str]:
    """A word of the group called `right` and one of another group."""
    wrong = rng.choice([group for group in options if group != right])
    return rng.choice(options[right]), rng.choice(options[wrong])


def a_name(lex: Lexicon, rng: Random) -> str:
    """The name of a woman or a man."""
    return rng.choice(lex.women_names + lex.men_names)


def a_person(
    lex: Lexicon, rng: Random, plural: bool = False, trait: float = 0.25, determiner: str | None = None
) -> str:
    """A noun phrase like "the tall baker"."""
    determiner = rng.choice(("the", "the", "the", "my", "our", "their")) if determiner is None else determiner
    noun = rng.choice(lex.people + lex.women + lex.men)
    return f"{determiner} {maybe(rng, rng.choice(lex.traits), trait)} {noun[plural]}"


def someone(lex: Lexicon, rng: Random) -> str:
    """A subject for a verb that does not show number."""
    return a_name(lex, rng) if rng.random() < 0.25 else a_person(lex, rng, plural=rng.random() < 0.4)


def a_thing(lex: Lexicon, rng: Random, plural: bool | None = None) -> str:
    """A noun phrase like "the heavy lamp", singular or plural at random unless `plural` says which."""
    noun = rng.choice(lex.things)[rng.random() < 0.4 if plural is None else plural]
    return f"the {maybe(rng, rng.choice(lex.looks), 0.25)} {noun}"


def opening(lex: Lexicon, rng: Random, chance: float = 0.15) -> str:
    """Sometimes "Maria said that", which leaves the rest as acceptable as it was."""
    return maybe(rng, f"{a_name(lex, rng)} {rng.choice(lex.saying)} that", chance)


def beside(rng: Random) -> str:
    """A preposition of place."""
    return rng.choice(("near", "behind", "beside"))
