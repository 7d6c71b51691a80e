"""The words of the task: grammatical ones that both splits use, and the disjoint lexicons of the two splits."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple


def _words(entries: str) -> tuple[str, ...]:
    return tuple(entries.split())


FUNCTION_WORDS = frozenset(
    _words(
        """
        all and any as every few how many much no one ones several so that the there these this those too
        i me he him she her it they them we us my our their himself herself themselves
        be been being is are was were has have had do does did will would can could should must
        not ever neither what when where why who near behind beside for in on after before during
        """
    )
)
"""The words, in lower case, that both splits may use."""


class Noun(NamedTuple):
    """The forms of a noun."""

    one: str
    many: str


class Verb(NamedTuple):
    """The forms of a verb."""

    base: str
    third: str
    past: str
    participle: str
    ing: str


def _with_s(word: str) -> str:
    """The plural of a regular noun, or the third person of a verb."""
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|ch|sh)$", word) else "s")


def _noun(entry: str) -> Noun:
    """The forms of a noun, from "lamp" or "man/men"."""
    one, _, many = entry.partition("/")
    return Noun(one, many or _with_s(one))


def _verb(entry: str) -> Verb:
    """The forms of a verb, from "carry" or "take/took/taken"."""
    base, *irregular = entry.split("/")
    stem = base
    if re.search(r"[^e]e$", base):
        stem = base[:-1]
    elif re.fullmatch(r"[^aeiou]+[aeiou][^aeiouwxy]", base):
        stem = base + base[-1]
    regular = (base[:-1] + "ied") if re.search(r"[^aeiou]y$", base) else stem + "ed"
    past, participle = irregular or (regular, regular)
    return Verb(base, _with_s(base), past, participle, stem + "ing")


def _nouns(entries: str) -> tuple[Noun, ...]:
    return tuple(_noun(entry) for entry in entries.split())


def _verbs(entries: str) -> tuple[Verb, ...]:
    return tuple(_verb(entry) for entry in entries.split())


@dataclass(frozen=True)
class Lexicon:
    """Content words that fill the templates of one split."""

    women_names: tuple[str, ...]
    men_names: tuple[str, ...]
    people: tuple[Noun, ...]
    women: tuple[Noun, ...]
    men: tuple[Noun, ...]
    things: tuple[Noun, ...]
    """Movable, countable."""
    stuff: tuple[str, ...]
    """Mass nouns."""
    places: tuple[Noun, ...]
    times: tuple[str, ...]
    """Phrases that go with any tense."""
    intransitive: tuple[Verb, ...]
    """Things people do, never with an object."""
    transitive: tuple[Verb, ...]
    """Things people do to a thing, never without it."""
    strong: tuple[Verb, ...]
    """Things people do to a thing, the past unlike the participle."""
    getting: tuple[Verb, ...]
    """Things people do to an amount of something."""
    giving: tuple[Verb, ...]
    """Things people do to someone and a thing."""
    social: tuple[Verb, ...]
    """Things people do to people."""
    reflexive: tuple[Verb, ...]
    """Things people do to themselves."""
    saying: tuple[str, ...]
    """In the past tense, before "that"."""
    knowing: tuple[str, ...]
    """In the past tense, before "what"; not verbs of asking, which some dialects follow with an inversion."""
    traits: tuple[str, ...]
    """Adjectives for people."""
    looks: tuple[str, ...]
    """Adjectives for things."""
    kinds: tuple[str, ...]
    """Adjectives for places."""
    manners: tuple[str, ...]
    """Adverbs."""


LEXICONS = {
    "train": Lexicon(
        women_names=_words("Maria Anna Julia Emma Lucy Diana"),
        men_names=_words("Peter David Martin Simon Henry Oscar"),
        people=_nouns(
            "baker driver teacher student doctor farmer singer lawyer neighbor sailor tourist dancer soldier reporter"
            " manager scientist"
        ),
        women=_nouns("queen aunt girl niece"),
        men=_nouns("king uncle boy nephew"),
        things=_nouns("lamp basket bottle chair ladder camera guitar umbrella blanket key book shirt"),
        stuff=_words("rice sand butter furniture luggage honey soap money"),
        places=_nouns("station bridge school church market hotel castle hospital"),
        times=("in the morning", "after lunch", "during the summer", "on Sunday"),
        intransitive=_verbs(
            "smile sleep/slept/slept sneeze yawn arrive giggle kneel/knelt/knelt hesitate faint disappear"
        ),
        transitive=_verbs("bury grab remove repair display bring/brought/brought store destroy mention ruin"),
        strong=_verbs("take/took/taken shake/shook/shaken draw/drew/drawn choose/chose/chosen"),
        getting=_verbs("bring/brought/brought take/took/taken send/sent/sent carry sell/sold/sold"),
        giving=_verbs("bring/brought/brought send/sent/sent sell/sold/sold promise"),
        social=_verbs("admire thank help follow meet/met/met call"),
        reflexive=_verbs("praise blame introduce admire"),
        saying=_words("said reported"),
        knowing=_words("knew discovered remembered"),
        traits=_words("tall old young famous clever friendly"),
        looks=_words("heavy new red expensive small"),
        kinds=_words("old small famous beautiful"),
        manners=_words("quickly quietly suddenly secretly calmly"),
    ),
    "held_out": Lexicon(
        women_names=_words("Sarah Laura Helen Alice Rachel"),
        men_names=_words("Thomas Robert Daniel George Paul"),
        people=_nouns(
            "artist pilot writer engineer visitor gardener musician dentist clerk carpenter poet professor banker"
        ),
        women=_nouns("woman/women sister princess waitress actress"),
        men=_nouns("man/men brother prince waiter actor"),
        things=_nouns("box table mirror suitcase knife/knives clock carpet candle wallet bicycle violin hat"),
        stuff=_words("bread milk flour salt jewelry equipment gold"),
        places=_nouns("museum library river tower theater lake restaurant"),
        times=("in the evening", "before dinner", "during the winter", "on Friday"),
        intransitive=_verbs("laugh cough snore frown apologize vanish shiver sigh chuckle tremble"),
        transitive=_verbs("reject purchase damage replace fetch obtain examine locate inspect describe"),
        strong=_verbs("hide/hid/hidden break/broke/broken steal/stole/stolen throw/threw/thrown"),
        getting=_verbs("buy/bought/bought fetch purchase find/found/found obtain"),
        giving=_verbs("buy/bought/bought give/gave/given lend/lent/lent offer"),
        social=_verbs("greet invite watch protect chase visit"),
        reflexive=_verbs("criticize defend respect describe"),
        saying=_words("claimed announced"),
        knowing=_words("learned forgot explained"),
        traits=_words("polite wealthy cheerful honest short lazy"),
        looks=_words("large blue cheap dusty green"),
        kinds=_words("large modern quiet popular"),
        manners=_words("eagerly proudly immediately reluctantly deliberately"),
    ),
}


def words(sentence: str) -> list[str]:
    """The words of a sentence, in lower case, without punctuation."""
    return re.findall(r"[a-z]+", sentence.lower())


def fillers(split: str) -> frozenset[str]:
    """Every content word, in each of its forms and in lower case, that may fill a template in "train" or "held_out"."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        else:
            for part in value:
                yield from strings(part)

    lexicon = LEXICONS[split]
    entries = strings([getattr(lexicon, field.name) for field in fields(lexicon)])
    return frozenset(word for entry in entries for word in words(entry)) - FUNCTION_WORDS
