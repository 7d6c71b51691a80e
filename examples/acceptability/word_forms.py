"""Templates whose unacceptable sentence has a wrong form of a word."""

from random import Random

from acceptability.lexicon import Lexicon
from acceptability.phrases import Pair, a_name, a_person, a_thing, beside, maybe, opening, someone, swap

DETERMINERS = {
    "one": ("this", "this", "that", "that", "every"),
    "many": ("these", "these", "those", "those", "several"),
}
"""Determiners that show number."""


def agreement(lex: Lexicon, rng: Random) -> Pair:
    """The verb agrees with its subject, not with a noun between them."""
    plural = rng.random() < 0.5
    other = plural if rng.random() < 0.25 else not plural
    determiner = rng.choice((None, *(("these", "these", "several") if plural else ("this", "this", "every"))))
    subject = a_person(lex, rng, plural, trait=0.15, determiner=determiner)
    kind = rng.choice((*["pronoun"] * 4, "noun", "noun", "prepositional", "relative"))
    if kind == "pronoun":
        subject = rng.choice(("they", "we") if plural else ("he", "she"))
    elif kind == "prepositional":
        subject += f" {beside(rng)} the {rng.choice(lex.places)[other]}"
    elif kind == "relative":
        subject = f"{a_person(lex, rng, plural, trait=0, determiner=determiner or 'the')} that"
        subject += f" {a_person(lex, rng, other, trait=0, determiner='the')} {rng.choice(lex.social).past}"
    if kind != "relative":
        subject = f"{opening(lex, rng)} {subject}"
    time, place = rng.choice(lex.times), f"{beside(rng)} the {rng.choice(lex.places)[other]}"
    if kind == "prepositional":
        place = rng.choice(lex.traits)
    verb = rng.choice(lex.intransitive)
    negation = maybe(rng, "not", 0 if determiner == "every" else 0.3)
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
    right, wrong = swap(rng, DETERMINERS, "many" if plural else "one")
    start = f"{someone(lex, rng)} {rng.choice(lex.transitive + lex.strong).past}"
    time, look = rng.choice(lex.times), rng.choice(lex.looks)
    variant = rng.choice(("subject", "subject", "subject", "pronoun", "pronoun", "object"))
    if variant == "subject":
        thing = rng.random() < 0.5
        noun = rng.choice(lex.things if thing else lex.people + lex.women + lex.men)[plural]
        verb, be = rng.choice(lex.intransitive), ("are", "were") if plural else ("is", "was")
        predicates = [look, f"{beside(rng)} the {rng.choice(lex.places).one}"]
        if not thing:
            predicates = [rng.choice(lex.traits), verb.ing]
        end = f"{rng.choice(be)} {rng.choice(predicates)}"
        return f"{right} {noun} {end}", f"{wrong} {noun} {end}"
    if variant == "pronoun":
        end = f"{look} {'ones' if plural else 'one'} {maybe(rng, time)}"
        return f"{start} {right} {end}", f"{start} {wrong} {end}"
    forms, adjective, end = rng.choice(lex.things), maybe(rng, look), maybe(rng, time)
    good = f"{start} {right} {adjective} {forms[plural]} {end}"
    if rng.random() < 0.5:
        return good, f"{start} {wrong} {adjective} {forms[plural]} {end}"
    return good, f"{start} {right} {adjective} {forms[not plural]} {end}"


def reflexive(lex: Lexicon, rng: Random) -> Pair:
    """A reflexive agrees with the subject of its own clause."""
    subjects = {
        "himself": ("he", f"the {rng.choice(lex.men).one}", rng.choice(lex.men_names)),
        "herself": ("she", f"the {rng.choice(lex.women).one}", rng.choice(lex.women_names)),
        "themselves": ("they", f"the {rng.choice(lex.people).many}", a_person(lex, rng, True)),
    }
    right, wrong = rng.sample(list(subjects), 2)
    pronoun, *nouns = subjects[right]
    subject = pronoun if rng.random() < 0.75 else rng.choice(nouns)
    if " " in subject and rng.random() < 0.25:
        subject += f" {beside(rng)} {rng.choice(subjects[wrong][1:])}"
    else:
        subject = f"{opening(lex, rng, 0.2)} {subject}"
    tenses = (("", "past"), ("", "past"), ("would", "base"), ("should", "base"), ("had", "participle"))
    auxiliary, form = rng.choice(tenses)
    start = f"{subject} {auxiliary} {getattr(rng.choice(lex.reflexive), form)}"
    end = maybe(rng, rng.choice(lex.times), 0.5)
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
        start = f"the {maybe(rng, rng.choice(lex.looks))} {rng.choice(lex.things)[plural]} {rng.choice(passive[good])}"
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
    time = "" if auxiliary in ("have", "has", "are", "is") else maybe(rng, rng.choice(lex.times))
    # Nor an intransitive participle with "be": "is gone" is an older perfect.
    if not strong and "ing" not in (right, wrong) and rng.random() < 0.3:
        verb, end = rng.choice(lex.intransitive), time
    else:
        verb, end = rng.choice(lex.strong if strong else lex.transitive + lex.strong), f"{a_thing(lex, rng)} {time}"
    start = f"{a_person(lex, rng, plural)} {auxiliary}"
    if auxiliary not in ("", "did not"):
        start += f" {maybe(rng, 'not', 0.15)}"
    return f"{start} {getattr(verb, right)} {end}", f"{start} {getattr(verb, wrong)} {end}"


def pronoun_case(lex: Lexicon, rng: Random) -> Pair:
    """A pronoun is nominative as a subject, and accusative as the object of a verb or a preposition."""
    nominative, accusative = rng.choice((("I", "me"), ("he", "him"), ("she", "her"), ("they", "them"), ("we", "us")))
    verb, time = rng.choice(lex.social).past, rng.choice(lex.times)
    action = rng.choice((f"{rng.choice(lex.transitive).past} {a_thing(lex, rng)}", rng.choice(lex.intransitive).past))
    if rng.random() < 0.5:
        right, wrong = nominative, accusative
        before, after = rng.choice(
            [
                ("", f"{verb} {a_person(lex, rng)} {maybe(rng, time)}"),
                ("", f"{action} {time}"),
                (f"{a_name(lex, rng)} {rng.choice(lex.saying)} that", f"{action} {maybe(rng, time)}"),
                (f"{a_person(lex, rng, trait=0, determiner='the')} that", f"{verb} {action}"),
            ]
        )
    else:
        right, wrong = accusative, nominative
        before, after = rng.choice(
            [
                (f"{someone(lex, rng)} {verb}", time),
                (f"{opening(lex, rng, 0.6)} {someone(lex, rng)} {verb}", ""),
                (f"{someone(lex, rng)} {action} {beside(rng)}", maybe(rng, time)),
                (f"{someone(lex, rng)} {rng.choice(lex.transitive).past} {a_thing(lex, rng)} for", maybe(rng, time)),
            ]
        )
    return f"{before} {right} {after}", f"{before} {wrong} {after}"


def quantifier(lex: Lexicon, rng: Random) -> Pair:
    """The quantifiers "many" and "few" go with a countable noun, "much" with a mass noun."""
    countable = rng.random() < 0.5
    noun = f"{maybe(rng, rng.choice(lex.looks), 0.2)} {rng.choice(lex.things).many}" if countable else ""
    noun = noun or rng.choice(lex.stuff)
    verb, subject, time = rng.choice(lex.getting), someone(lex, rng), maybe(rng, rng.choice(lex.times))
    be = rng.choice(("are", "were") if countable else ("is", "was"))
    frame = rng.choice(("too", "so", "how", "how", "not", "as"))
    few = ("many", "few") if frame in ("too", "so") else ("many",)
    right, wrong = swap(rng, {"count": few, "mass": ("much",)}, "count" if countable else "mass")
    there = rng.random() < 0.8
    place = f"{beside(rng)} the {rng.choice(lex.places).one}"
    if frame == "how":
        before, after = "how", f"{noun} {rng.choice(('did', 'will', 'can'))} {subject} {verb.base} {time}?"
        if there:
            after = f"{noun} {be} there {place}?"
    elif frame == "as" and not there:
        before, after = f"{subject} {verb.past} as", f"{noun} as {a_person(lex, rng)}"
    elif there:
        before, after = f"{opening(lex, rng)} there {be} {frame}", f"{noun} {maybe(rng, place, 0.8)}"
        if frame == "as":
            after = f"{noun} {place} as {beside(rng)} the {rng.choice(lex.places).one}"
    elif frame == "not":
        before, after = f"{subject} {rng.choice(('did', 'will'))} not {verb.base}", f"{noun} {time}"
    else:
        before, after = f"{subject} {verb.past} {frame}", f"{noun} {time}"
    return f"{before} {right} {after}", f"{before} {wrong} {after}"
