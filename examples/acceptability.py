"""A small linguistic-acceptability task: is this English sentence acceptable or not?

It has the shape of CoLA and the minimal pairs of BLiMP, but no text of either: the word lists and the templates below
were written for this project and come under its licence, Apache-2.0. Each template makes a pair, an acceptable
sentence (label 1) and a minimally different unacceptable one (label 0): one word exchanged, or the same words in
another order. Ten phenomena (`PHENOMENA`) contribute equally, and both sentences of a pair are in the same split.

Two things keep the task from being solved by looking words up:

* the templates are crossed (a singular subject with "smiles" and "*smile", a plural one with "smile" and "*smiles"), so
  no word tells the label, whatever the phenomenon;
* the training and the held-out sentences are filled from disjoint lexicons (`LEXICONS`): they share the templates and
  the grammatical words (`FUNCTION_WORDS`), and no noun, name, verb, adjective or adverb.

`make_split` is deterministic in its seed. Run as a script, this prints twenty samples.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any, NamedTuple

LENGTH = (4, 14)
"""The fewest and the most words of a sentence."""


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
    """From "lamp", or "man/men"."""
    one, _, many = entry.partition("/")
    return Noun(one, many or _with_s(one))


def _verb(entry: str) -> Verb:
    """From "carry", or "take/took/taken"."""
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
    """What fills the templates of one split."""

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

DETERMINERS = {
    "one": ("this", "this", "that", "that", "every"),
    "many": ("these", "these", "those", "those", "several"),
}
"""Determiners that show number."""

Pair = tuple[str, str]
"""An acceptable and an unacceptable sentence, as yet without capital and full stop."""


def _maybe(rng: Random, text: str, chance: float = 0.3) -> str:
    return text if rng.random() < chance else ""


def _swap(rng: Random, options: Mapping[str, tuple[str, ...]], right: str) -> tuple[str, str]:
    """A word of the group called `right` and one of another group."""
    wrong = rng.choice([group for group in options if group != right])
    return rng.choice(options[right]), rng.choice(options[wrong])


def _name(lex: Lexicon, rng: Random) -> str:
    return rng.choice(lex.women_names + lex.men_names)


def _person(lex: Lexicon, rng: Random, plural: bool = False, trait: float = 0.25, determiner: str | None = None) -> str:
    """A noun phrase like "the tall baker"."""
    determiner = rng.choice(("the", "the", "the", "my", "our", "their")) if determiner is None else determiner
    noun = rng.choice(lex.people + lex.women + lex.men)
    return f"{determiner} {_maybe(rng, rng.choice(lex.traits), trait)} {noun[plural]}"


def _someone(lex: Lexicon, rng: Random) -> str:
    """A subject for a verb that does not show number."""
    return _name(lex, rng) if rng.random() < 0.25 else _person(lex, rng, plural=rng.random() < 0.4)


def _thing(lex: Lexicon, rng: Random, plural: bool | None = None) -> str:
    noun = rng.choice(lex.things)[rng.random() < 0.4 if plural is None else plural]
    return f"the {_maybe(rng, rng.choice(lex.looks), 0.25)} {noun}"


def _opening(lex: Lexicon, rng: Random, chance: float = 0.15) -> str:
    """Sometimes "Maria said that", which leaves the rest as acceptable as it was."""
    return _maybe(rng, f"{_name(lex, rng)} {rng.choice(lex.saying)} that", chance)


def _beside(rng: Random) -> str:
    return rng.choice(("near", "behind", "beside"))


def agreement(lex: Lexicon, rng: Random) -> Pair:
    """The verb agrees with its subject, not with a noun between them."""
    plural = rng.random() < 0.5
    other = plural if rng.random() < 0.25 else not plural
    determiner = rng.choice((None, *(("these", "these", "several") if plural else ("this", "this", "every"))))
    subject = _person(lex, rng, plural, trait=0.15, determiner=determiner)
    kind = rng.choice((*["pronoun"] * 4, "noun", "noun", "prepositional", "relative"))
    if kind == "pronoun":
        subject = rng.choice(("they", "we") if plural else ("he", "she"))
    elif kind == "prepositional":
        subject += f" {_beside(rng)} the {rng.choice(lex.places)[other]}"
    elif kind == "relative":
        subject = f"{_person(lex, rng, plural, trait=0, determiner=determiner or 'the')} that"
        subject += f" {_person(lex, rng, other, trait=0, determiner='the')} {rng.choice(lex.social).past}"
    if kind != "relative":
        subject = f"{_opening(lex, rng)} {subject}"
    time, place = rng.choice(lex.times), f"{_beside(rng)} the {rng.choice(lex.places)[other]}"
    if kind == "prepositional":
        place = rng.choice(lex.traits)
    verb = rng.choice(lex.intransitive)
    negation = _maybe(rng, "not", 0 if determiner == "every" else 0.3)
    one, many, rest = rng.choice(
        [
            ("is", "are", f"{negation} {verb.ing}"),
            ("is", "are", f"{negation} {rng.choice(lex.traits)}"),
            ("is", "are", f"{negation} {place}"),
            ("was", "were", f"{verb.ing} {time}"),
            ("was", "were", f"{negation} {rng.choice(lex.traits)}"),
            ("was", "were", f"{negation} {place}"),
            ("has", "have", f"{negation} {verb.participle}"),
            rng.choice([("does", "do", f"not {verb.base}"), (verb.third, verb.base, time)]),
        ]
    )
    right, wrong = (many, one) if plural else (one, many)
    return f"{subject} {right} {rest}", f"{subject} {wrong} {rest}"


def determiner_noun(lex: Lexicon, rng: Random) -> Pair:
    """A determiner and its noun, or "one", agree in number, an adjective between them or not."""
    plural = rng.random() < 0.5
    right, wrong = _swap(rng, DETERMINERS, "many" if plural else "one")
    start = f"{_someone(lex, rng)} {rng.choice(lex.transitive + lex.strong).past}"
    time, look = rng.choice(lex.times), rng.choice(lex.looks)
    variant = rng.choice(("subject", "subject", "subject", "pronoun", "pronoun", "object"))
    if variant == "subject":
        thing = rng.random() < 0.5
        noun = rng.choice(lex.things if thing else lex.people + lex.women + lex.men)[plural]
        verb, be = rng.choice(lex.intransitive), ("are", "were") if plural else ("is", "was")
        predicates = [look, f"{_beside(rng)} the {rng.choice(lex.places).one}"]
        if not thing:
            predicates = [rng.choice(lex.traits), verb.ing]
        end = f"{rng.choice(be)} {rng.choice(predicates)}"
        return f"{right} {noun} {end}", f"{wrong} {noun} {end}"
    if variant == "pronoun":
        end = f"{look} {'ones' if plural else 'one'} {_maybe(rng, time)}"
        return f"{start} {right} {end}", f"{start} {wrong} {end}"
    forms, adjective, end = rng.choice(lex.things), _maybe(rng, look), _maybe(rng, time)
    good = f"{start} {right} {adjective} {forms[plural]} {end}"
    if rng.random() < 0.5:
        return good, f"{start} {wrong} {adjective} {forms[plural]} {end}"
    return good, f"{start} {right} {adjective} {forms[not plural]} {end}"


def reflexive(lex: Lexicon, rng: Random) -> Pair:
    """A reflexive agrees with the subject of its own clause."""
    subjects = {
        "himself": ("he", f"the {rng.choice(lex.men).one}", rng.choice(lex.men_names)),
        "herself": ("she", f"the {rng.choice(lex.women).one}", rng.choice(lex.women_names)),
        "themselves": ("they", f"the {rng.choice(lex.people).many}", _person(lex, rng, True)),
    }
    right, wrong = rng.sample(list(subjects), 2)
    pronoun, *nouns = subjects[right]
    subject = pronoun if rng.random() < 0.75 else rng.choice(nouns)
    if " " in subject and rng.random() < 0.25:
        subject += f" {_beside(rng)} {rng.choice(subjects[wrong][1:])}"
    else:
        subject = f"{_opening(lex, rng, 0.2)} {subject}"
    tenses = (("", "past"), ("", "past"), ("would", "base"), ("should", "base"), ("had", "participle"))
    auxiliary, form = rng.choice(tenses)
    start = f"{subject} {auxiliary} {getattr(rng.choice(lex.reflexive), form)}"
    end = _maybe(rng, rng.choice(lex.times), 0.5)
    return f"{start} {right} {end}", f"{start} {wrong} {end}"


def inversion(lex: Lexicon, rng: Random) -> Pair:
    """The auxiliary comes before the subject in a question, and after it in an embedded one."""
    plural = rng.random() < 0.5
    subject = _person(lex, rng, plural)
    embedded = rng.random() < 0.5
    auxiliaries = {
        "base": ("could", "would") if embedded else ("did", "did", "will", "can", "should"),
        "participle": ("had", "had" if embedded else ("have" if plural else "has")),
        "ing": ("were" if plural else "was",),
    }
    form = rng.choice(list(auxiliaries))
    auxiliary = rng.choice(auxiliaries[form])
    question = rng.choice(("what", "what", "who", "when", "where", "why"))
    verb = rng.choice({"what": lex.transitive, "who": lex.social}.get(question, lex.intransitive + lex.transitive))
    rest = getattr(verb, form)
    if verb in lex.transitive and question != "what":
        rest += f" {_thing(lex, rng)}"
    elif question != "when" and auxiliary not in ("has", "have"):
        rest += f" {_maybe(rng, rng.choice(lex.times))}"
    straight, inverted = f"{subject} {auxiliary} {rest}", f"{auxiliary} {subject} {rest}"
    if embedded:
        start = f"{_someone(lex, rng)} {rng.choice(lex.knowing)} {question}"
        return f"{start} {straight}", f"{start} {inverted}"
    return f"{question} {inverted}?", f"{question} {straight}?"


def argument_structure(lex: Lexicon, rng: Random) -> Pair:
    """A verb has the objects that it takes, once each, and the recipient first."""
    subject, time = _someone(lex, rng), rng.choice(lex.times)
    auxiliary, form = rng.choice((("", "past"), ("", "past"), ("would", "base"), ("had", "participle")))
    variant = rng.choice((*["recipient"] * 3, *["clause"] * 3, "transitive"))
    if variant == "recipient":
        start = f"{_opening(lex, rng)} {subject} {auxiliary} {getattr(rng.choice(lex.giving), form)}"
        recipient, thing, end = rng.choice(("me", "him", "her", "them", "us")), _thing(lex, rng), _maybe(rng, time)
        return f"{start} {recipient} {thing} {end}", f"{start} {thing} {recipient} {end}"
    if variant == "clause":  # "knew what she had repaired", "*knew what she had repaired it"
        inner = rng.choice(("he", "she", "they", "we", "I", _person(lex, rng, rng.random() < 0.4, trait=0)))
        before, after = f"{subject} {rng.choice(lex.knowing)}", f"{inner} had {rng.choice(lex.transitive).participle}"
        if rng.random() < 0.5:
            return f"{before} what {after}", f"{before} that {after}"
        thing = rng.choice(("it", "them", _thing(lex, rng)))
        return f"{before} that {after} {thing}", f"{before} what {after} {thing}"
    start = f"{subject} {auxiliary}"
    with_object, without = (getattr(rng.choice(verbs), form) for verbs in (lex.transitive, lex.intransitive))
    if rng.random() < 0.5:
        end = f"{_thing(lex, rng)} {_maybe(rng, time)}"
        return f"{start} {with_object} {end}", f"{start} {without} {end}"
    return f"{start} {without} {time}", f"{start} {with_object} {time}"


def polarity(lex: Lexicon, rng: Random) -> Pair:
    """A negation has scope over "any" and "ever"; "neither" follows a negative clause, and "so" a positive one."""
    plural = rng.random() < 0.5
    nouns = f"{_maybe(rng, rng.choice(lex.looks), 0.25)} {rng.choice(lex.things).many}"
    person, other = (_person(lex, rng, plural, determiner="", trait=0.2) for _ in range(2))
    verb, doing = rng.choice(lex.transitive + lex.strong), rng.choice(lex.intransitive)
    have = "have" if plural else "has"
    variant = rng.choice(("object", "relative", "ever", "tag"))
    if variant == "object":
        middle, end = f"did not {verb.base}", _maybe(rng, rng.choice(lex.times))
        return f"the {person} {middle} any {nouns} {end}", f"any {person} {middle} the {nouns} {end}"
    if variant == "relative":
        parts = (f"the {person} who {have}", f"{doing.participle} {have}", f"{verb.participle} any {nouns}")
        return f"{parts[0]} {parts[1]} not {parts[2]}", f"{parts[0]} not {parts[1]} {parts[2]}"
    if variant == "ever":
        middle, end = f"{other} {rng.choice(lex.social).past}", f"{have} ever {doing.participle}"
        return f"no {person} that the {middle} {end}", f"the {person} that no {middle} {end}"
    negative = rng.random() < 0.5
    subject, did = _someone(lex, rng), f"did not {doing.base}" if negative else doing.past
    right, wrong = ("neither", "so") if negative else ("so", "neither")
    start, end = f"{subject} {did}, and", f"did the {other}"
    return f"{start} {right} {end}", f"{start} {wrong} {end}"


def verb_form(lex: Lexicon, rng: Random) -> Pair:
    """A modal is followed by a base form, "have" by a participle, "be" by a form in -ing."""
    plural = rng.random() < 0.5
    if rng.random() < 0.5:  # "has been repaired", "*has being repaired"
        passive = {
            "be": ("will", "can", "should", "must"),
            "been": ("had", "have" if plural else "has"),
            "being": ("were", "are") if plural else ("was", "is"),
        }
        good, bad = rng.sample(list(passive), 2)
        start = f"the {_maybe(rng, rng.choice(lex.looks))} {rng.choice(lex.things)[plural]} {rng.choice(passive[good])}"
        end = rng.choice(lex.transitive + lex.strong).participle
        return f"{start} {good} {end}", f"{start} {bad} {end}"
    auxiliaries = {
        "base": ("will", "would", "should", "must", "could", "did not"),
        "participle": ("had", "have" if plural else "has"),
        "ing": ("were", "are") if plural else ("was", "is"),
    }
    strong = rng.random() < 0.15
    if strong:  # "took", "*taken"; "has taken", "*has took"
        right, wrong = rng.sample(("past", "participle"), 2)
    else:
        other = rng.choice(("base", "participle"))
        right, wrong = rng.sample((other, rng.choice(("ing", "ing", "participle" if other == "base" else "base"))), 2)
    auxiliary = rng.choice(auxiliaries.get(right, ("",)))
    # With a time, "has" is doubtful and "is" means a plan.
    time = "" if auxiliary in ("have", "has", "are", "is") else _maybe(rng, rng.choice(lex.times))
    # Nor an intransitive participle with "be": "is gone" is an older perfect.
    if not strong and "ing" not in (right, wrong) and rng.random() < 0.3:
        verb, end = rng.choice(lex.intransitive), time
    else:
        verb, end = rng.choice(lex.strong if strong else lex.transitive + lex.strong), f"{_thing(lex, rng)} {time}"
    start = f"{_person(lex, rng, plural)} {auxiliary}"
    if auxiliary not in ("", "did not"):
        start += f" {_maybe(rng, 'not', 0.15)}"
    return f"{start} {getattr(verb, right)} {end}", f"{start} {getattr(verb, wrong)} {end}"


def word_order(lex: Lexicon, rng: Random) -> Pair:
    """An adjective precedes its noun, no adverb parts verb and object, "not" follows the auxiliary, "all" leads."""
    plural = rng.random() < 0.5
    variant = rng.choice(("adjective", "adjective", "adverb", "adverb", "not", "all"))
    verb = rng.choice(lex.transitive)
    action = rng.choice((f"{verb.past} {_thing(lex, rng)}", rng.choice(lex.intransitive).past))
    time = _maybe(rng, rng.choice(lex.times))
    if variant == "adjective":
        determiner = rng.choice(("the", "my", "our"))
        if rng.random() < 0.6:
            start, noun, adjective = determiner, rng.choice(lex.people)[plural], rng.choice(lex.traits)
            end = f"{action} {time}"
        else:
            start = f"{_someone(lex, rng)} {action} {_beside(rng)} the"
            noun, adjective, end = rng.choice(lex.places)[plural], rng.choice(lex.kinds), time
        return f"{start} {adjective} {noun} {end}", f"{start} {noun} {adjective} {end}"
    if variant == "adverb":
        start, adverb, end = (
            f"{_opening(lex, rng)} {_someone(lex, rng)}",
            rng.choice(lex.manners),
            f"the {rng.choice(lex.things)[plural]}",
        )
        return f"{start} {adverb} {verb.past} {end} {time}", f"{start} {verb.past} {adverb} {end} {time}"
    if variant == "not":
        start = f"{_opening(lex, rng)} {_person(lex, rng, plural)}"
        modal, was = rng.choice(("will", "could", "should")), ("were" if plural else "was")
        auxiliary, form = rng.choice(((modal, verb.base), ("had", verb.participle), (was, verb.ing)))
        end = f"{_thing(lex, rng)} {time}"
        return f"{start} {auxiliary} not {form} {end}", f"{start} not {auxiliary} {form} {end}"
    determiner = rng.choice(("the", "my", "our"))
    rest = f"{_person(lex, rng, True, determiner='')} {action} {time}"
    return f"all {determiner} {rest}", f"{determiner} all {rest}"


def pronoun_case(lex: Lexicon, rng: Random) -> Pair:
    """A pronoun is nominative as a subject, and accusative as the object of a verb or a preposition."""
    nominative, accusative = rng.choice((("I", "me"), ("he", "him"), ("she", "her"), ("they", "them"), ("we", "us")))
    verb, time = rng.choice(lex.social).past, rng.choice(lex.times)
    action = rng.choice((f"{rng.choice(lex.transitive).past} {_thing(lex, rng)}", rng.choice(lex.intransitive).past))
    if rng.random() < 0.5:
        right, wrong = nominative, accusative
        before, after = rng.choice(
            [
                ("", f"{verb} {_person(lex, rng)} {_maybe(rng, time)}"),
                ("", f"{action} {time}"),
                (f"{_name(lex, rng)} {rng.choice(lex.saying)} that", f"{action} {_maybe(rng, time)}"),
                (f"{_person(lex, rng, trait=0, determiner='the')} that", f"{verb} {action}"),
            ]
        )
    else:
        right, wrong = accusative, nominative
        before, after = rng.choice(
            [
                (f"{_someone(lex, rng)} {verb}", time),
                (f"{_opening(lex, rng, 0.6)} {_someone(lex, rng)} {verb}", ""),
                (f"{_someone(lex, rng)} {action} {_beside(rng)}", _maybe(rng, time)),
                (f"{_someone(lex, rng)} {rng.choice(lex.transitive).past} {_thing(lex, rng)} for", _maybe(rng, time)),
            ]
        )
    return f"{before} {right} {after}", f"{before} {wrong} {after}"


def quantifier(lex: Lexicon, rng: Random) -> Pair:
    """The quantifiers "many" and "few" go with a countable noun, "much" with a mass noun."""
    countable = rng.random() < 0.5
    noun = f"{_maybe(rng, rng.choice(lex.looks), 0.2)} {rng.choice(lex.things).many}" if countable else ""
    noun = noun or rng.choice(lex.stuff)
    verb, subject, time = rng.choice(lex.getting), _someone(lex, rng), _maybe(rng, rng.choice(lex.times))
    be = rng.choice(("are", "were") if countable else ("is", "was"))
    frame = rng.choice(("too", "so", "how", "how", "not", "as"))
    few = ("many", "few") if frame in ("too", "so") else ("many",)
    right, wrong = _swap(rng, {"count": few, "mass": ("much",)}, "count" if countable else "mass")
    there = rng.random() < 0.8
    place = f"{_beside(rng)} the {rng.choice(lex.places).one}"
    if frame == "how":
        before, after = "how", f"{noun} {rng.choice(('did', 'will', 'can'))} {subject} {verb.base} {time}?"
        if there:
            after = f"{noun} {be} there {place}?"
    elif frame == "as" and not there:
        before, after = f"{subject} {verb.past} as", f"{noun} as {_person(lex, rng)}"
    elif there:
        before, after = f"{_opening(lex, rng)} there {be} {frame}", f"{noun} {_maybe(rng, place, 0.8)}"
        if frame == "as":
            after = f"{noun} {place} as {_beside(rng)} the {rng.choice(lex.places).one}"
    elif frame == "not":
        before, after = f"{subject} {rng.choice(('did', 'will'))} not {verb.base}", f"{noun} {time}"
    else:
        before, after = f"{subject} {verb.past} {frame}", f"{noun} {time}"
    return f"{before} {right} {after}", f"{before} {wrong} {after}"


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


def _sentence(text: str) -> str:
    text = " ".join(text.split()).replace(" ?", "?")
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")


def _rows(split: str, size: int, seed: int, phenomena: Sequence[str]) -> list[dict[str, Any]]:
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


def main() -> None:
    """Print twenty samples: label, phenomenon, sentence."""
    train, _ = make_split()
    for row in train[:20]:
        print(f"{row['label']}  {row['phenomenon']:<19} {row['sentence']}")


if __name__ == "__main__":
    main()
