"""Templates whose unacceptable sentence has a wrong structure: order, objects or scope."""

from random import Random

from acceptability.lexicon import Lexicon
from acceptability.phrases import Pair, a_person, a_thing, beside, maybe, opening, someone


def inversion(lex: Lexicon, rng: Random) -> Pair:
    """The auxiliary comes before the subject in a question, and after it in an embedded one."""
    plural = rng.random() < 0.5
    subject = a_person(lex, rng, plural)
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
        rest += f" {a_thing(lex, rng)}"
    elif question != "when" and auxiliary not in ("has", "have"):
        rest += f" {maybe(rng, rng.choice(lex.times))}"
    straight, inverted = f"{subject} {auxiliary} {rest}", f"{auxiliary} {subject} {rest}"
    if embedded:
        start = f"{someone(lex, rng)} {rng.choice(lex.knowing)} {question}"
        return f"{start} {straight}", f"{start} {inverted}"
    return f"{question} {inverted}?", f"{question} {straight}?"


def argument_structure(lex: Lexicon, rng: Random) -> Pair:
    """A verb has the objects that it takes, once each, and the recipient first."""
    subject, time = someone(lex, rng), rng.choice(lex.times)
    auxiliary, form = rng.choice((("", "past"), ("", "past"), ("would", "base"), ("had", "participle")))
    variant = rng.choice((*["recipient"] * 3, *["clause"] * 3, "transitive"))
    if variant == "recipient":
        start = f"{opening(lex, rng)} {subject} {auxiliary} {getattr(rng.choice(lex.giving), form)}"
        recipient, thing, end = rng.choice(("me", "him", "her", "them", "us")), a_thing(lex, rng), maybe(rng, time)
        return f"{start} {recipient} {thing} {end}", f"{start} {thing} {recipient} {end}"
    if variant == "clause":  # "knew what she had repaired", "*knew what she had repaired it"
        inner = rng.choice(("he", "she", "they", "we", "I", a_person(lex, rng, rng.random() < 0.4, trait=0)))
        before, after = f"{subject} {rng.choice(lex.knowing)}", f"{inner} had {rng.choice(lex.transitive).participle}"
        if rng.random() < 0.5:
            return f"{before} what {after}", f"{before} that {after}"
        thing = rng.choice(("it", "them", a_thing(lex, rng)))
        return f"{before} that {after} {thing}", f"{before} what {after} {thing}"
    start = f"{subject} {auxiliary}"
    with_object, without = (getattr(rng.choice(verbs), form) for verbs in (lex.transitive, lex.intransitive))
    if rng.random() < 0.5:
        end = f"{a_thing(lex, rng)} {maybe(rng, time)}"
        return f"{start} {with_object} {end}", f"{start} {without} {end}"
    return f"{start} {without} {time}", f"{start} {with_object} {time}"


def polarity(lex: Lexicon, rng: Random) -> Pair:
    """A negation has scope over "any" and "ever"; "neither" follows a negative clause, and "so" a positive one."""
    plural = rng.random() < 0.5
    nouns = f"{maybe(rng, rng.choice(lex.looks), 0.25)} {rng.choice(lex.things).many}"
    person, other = (a_person(lex, rng, plural, determiner="", trait=0.2) for _ in range(2))
    verb, doing = rng.choice(lex.transitive + lex.strong), rng.choice(lex.intransitive)
    have = "have" if plural else "has"
    variant = rng.choice(("object", "relative", "ever", "tag"))
    if variant == "object":
        middle, end = f"did not {verb.base}", maybe(rng, rng.choice(lex.times))
        return f"the {person} {middle} any {nouns} {end}", f"any {person} {middle} the {nouns} {end}"
    if variant == "relative":
        parts = (f"the {person} who {have}", f"{doing.participle} {have}", f"{verb.participle} any {nouns}")
        return f"{parts[0]} {parts[1]} not {parts[2]}", f"{parts[0]} not {parts[1]} {parts[2]}"
    if variant == "ever":
        middle, end = f"{other} {rng.choice(lex.social).past}", f"{have} ever {doing.participle}"
        return f"no {person} that the {middle} {end}", f"the {person} that no {middle} {end}"
    negative = rng.random() < 0.5
    subject, did = someone(lex, rng), f"did not {doing.base}" if negative else doing.past
    right, wrong = ("neither", "so") if negative else ("so", "neither")
    start, end = f"{subject} {did}, and", f"did the {other}"
    return f"{start} {right} {end}", f"{start} {wrong} {end}"


def word_order(lex: Lexicon, rng: Random) -> Pair:
    """An adjective precedes its noun, no adverb parts verb and object, "not" follows the auxiliary, "all" leads."""
    plural = rng.random() < 0.5
    variant = rng.choice(("adjective", "adjective", "adverb", "adverb", "not", "all"))
    verb = rng.choice(lex.transitive)
    action = rng.choice((f"{verb.past} {a_thing(lex, rng)}", rng.choice(lex.intransitive).past))
    time = maybe(rng, rng.choice(lex.times))
    if variant == "adjective":
        determiner = rng.choice(("the", "my", "our"))
        if rng.random() < 0.6:
            start, noun, adjective = determiner, rng.choice(lex.people)[plural], rng.choice(lex.traits)
            end = f"{action} {time}"
        else:
            start = f"{someone(lex, rng)} {action} {beside(rng)} the"
            noun, adjective, end = rng.choice(lex.places)[plural], rng.choice(lex.kinds), time
        return f"{start} {adjective} {noun} {end}", f"{start} {noun} {adjective} {end}"
    if variant == "adverb":
        start, adverb, end = (
            f"{opening(lex, rng)} {someone(lex, rng)}",
            rng.choice(lex.manners),
            f"the {rng.choice(lex.things)[plural]}",
        )
        return f"{start} {adverb} {verb.past} {end} {time}", f"{start} {verb.past} {adverb} {end} {time}"
    if variant == "not":
        start = f"{opening(lex, rng)} {a_person(lex, rng, plural)}"
        modal, was = rng.choice(("will", "could", "should")), ("were" if plural else "was")
        auxiliary, form = rng.choice(((modal, verb.base), ("had", verb.participle), (was, verb.ing)))
        end = f"{a_thing(lex, rng)} {time}"
        return f"{start} {auxiliary} not {form} {end}", f"{start} not {auxiliary} {form} {end}"
    determiner = rng.choice(("the", "my", "our"))
    rest = f"{a_person(lex, rng, True, determiner='')} {action} {time}"
    return f"all {determiner} {rest}", f"{determiner} all {rest}"
