"""The grammar of the sample world: pairs of sentences whose label follows from what their words mean.

    pair = Grammar(WORDS, random.Random(0)).make_pair("numbers", ENTAILMENT)
    pair.premise     "Four spaniels slept in the garden."
    pair.hypothesis  "At least three dogs slept."
    pair.steps       Step("Is four at least three?", True, "at_least"), Step("Must spaniels be dogs?", True, "noun")
    pair.label       1, because every step holds

A step is a question about the pair. Its answer is computed from the words, never stored beside them, so a pair cannot be labelled against its own steps.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from nli.sample.lexicon import Lexicon, a, plural

PHENOMENA = ("hypernym", "numbers", "quantifier", "negation", "passive", "time", "detail", "overlap")

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ENOUGH = (("all", "most"), ("all", "some"), ("most", "some"))
_NOT_ENOUGH = (("some", "all"), ("some", "most"), ("most", "all"), ("no", "some"), ("some", "no"), ("most", "no"))
_IMPLIED = {"managed to": True, "remembered to": True, "failed to": False, "forgot to": False, "refused to": False}
_OPEN = ("wanted to", "hoped to", "planned to")
_DAYS = (
    ("yesterday", "today"),
    ("last week", "this week"),
    ("last year", "this year"),
    ("this morning", "this evening"),
)
_FACTS = ("knew that", "saw that", "noticed that", "proved that")
_CLAIMS = ("said that", "thought that", "hoped that", "claimed that")
_SURE = ("luckily", "sadly", "indeed")
_UNSURE = ("perhaps", "maybe", "possibly")


@dataclass(frozen=True)
class Step:
    """One question that the label hangs on. `kind` names its kind, `misread` how a careless reader would put it where that differs."""

    ask: str
    holds: bool
    kind: str
    misread: str | None = None

    def answer(self, holds: bool, misread: bool = False) -> str:
        return f"{self.misread if misread and self.misread else self.ask} {'Yes' if holds else 'No'}."


@dataclass(frozen=True)
class Pair:
    """A premise and a hypothesis with the steps that decide them."""

    premise: str
    hypothesis: str
    phenomenon: str
    steps: tuple[Step, ...]

    @property
    def label(self) -> int:
        return int(all(step.holds for step in self.steps))

    @property
    def thought(self) -> str:
        """The short correct reasoning."""
        return render_thought([step.answer(step.holds) for step in self.steps], self.label)


def render_thought(answers: list[str], label: int) -> str:
    """Answered questions, what they come to, and the verdict, which in a sound thought agrees with them."""
    summary = "A part fails" if any(answer.endswith("No.") for answer in answers) else "Every part holds"
    return " ".join([*answers, f"{summary}, so it {'must' if label else 'need not'} be true."])


class Grammar:
    """Makes pairs without end from a lexicon and a source of randomness."""

    def __init__(self, words: Lexicon, rng: random.Random):
        self.words, self.rng = words, rng
        self.kind_of = {noun: kind for kind, members in words.kinds.items() for noun in members}

    def make_pair(self, phenomenon: str, label: int) -> Pair:
        """A pair of this phenomenon with this label."""
        make: Callable = getattr(self, f"_make_{phenomenon}")
        while True:
            premise, hypothesis, steps = make(bool(label))
            if premise != hypothesis and steps and all(step.holds for step in steps) == bool(label):
                return Pair(_sentence(premise), _sentence(hypothesis), phenomenon, tuple(steps))

    # What several phenomena share.

    def _choose(self, items):
        return self.rng.choice(items)

    def _chance(self, share: float) -> bool:
        return self.rng.random() < share

    def _is_a(self, lower: str, upper: str) -> bool:
        kind = self.kind_of.get(lower)
        top = {"animal": self.words.animals, "person": self.words.people}
        return lower == upper or kind == upper or kind in top.get(upper, ()) or lower in top.get(upper, ())

    def _noun_pair(self, kinds: tuple[str, ...], up: bool) -> tuple[str, str]:
        """Premise noun and hypothesis noun: ("spaniel", "dog") if up, else ("dog", "spaniel") or the siblings ("spaniel", "poodle") or ("spaniel", "bird")."""
        kind = self._choose(kinds)
        member = self._choose(self.words.kinds[kind])
        tops = [
            top for top, members in (("animal", self.words.animals), ("person", self.words.people)) if kind in members
        ]
        upper = self._choose([kind, kind, *tops])
        if up:
            return (member if upper == kind else self._choose((member, member, kind))), upper
        other = self._choose([noun for noun in (*self.words.kinds[kind], *kinds) if noun not in (member, kind)])
        return self._choose([(upper, member), (member, other)])

    def _noun_step(self, lower: str, upper: str, many: bool) -> Step:
        ask = f"Must {plural(lower)} be {plural(upper)}?" if many else f"Must {a(lower)} be {a(upper)}?"
        return Step(ask, self._is_a(lower, upper), "noun")

    def _verb_pair(self, up: bool) -> tuple[str, str]:
        kind = self._choose(list(self.words.verb_kinds))
        verb = self._choose(self.words.verb_kinds[kind])
        if up:
            return verb, kind
        other = self._choose([other for other in self.words.verb_kinds if other != kind])
        return self._choose([(kind, verb), (verb, other)])

    def _verb_step(self, verb: str, kind: str) -> Step:
        return Step(f"Has whoever {verb} also {kind}?", verb in self.words.verb_kinds.get(kind, ()), "verb")

    def _two_people(self) -> tuple[str, str]:
        pool = self.words.roles if self._chance(0.6) else self.words.names
        return tuple(self.rng.sample(pool, 2))

    def _the(self, person: str) -> str:
        return person if person in self.words.names else f"the {person}"

    def _doing(self, noun: str) -> str:
        """What this creature may do: a trout neither prays nor knits."""
        is_animal = noun in self.words.animals or noun == "animal" or self.kind_of.get(noun) in self.words.animals
        return self._choose(
            [verb for verbs in self.words.verb_kinds.values() for verb in verbs] if is_animal else self.words.doings
        )

    def _in_place(self, share: float = 1.0) -> str:
        return f" in the {self._choose(self.words.places)}" if self._chance(share) else ""

    # The phenomena. Each returns premise, hypothesis and steps, aiming at the wanted label.

    def _make_hypernym(self, up: bool):
        words, many = self.words, self._chance(0.5)
        if self._chance(0.25):
            lower, upper = self._noun_pair(words.things, up)
            subject, verb = self._choose(words.names), self._choose(words.to_things)[1]
            return (
                f"{subject} {verb} {a(lower)}{self._in_place(0.5)}",
                f"{subject} {verb} {a(upper)}",
                [self._noun_step(lower, upper, False)],
            )
        count = self._choose(("two", "three", "four", "several"))
        place, verb = (
            self._choose(words.places),
            self._choose([verb for verbs in words.verb_kinds.values() for verb in verbs]),
        )
        changed = self.rng.sample(("noun", "verb", "place"), 1 if self._chance(0.6) else 2)
        failing = None if up else self._choose(changed)
        lower = upper = self._choose(words.kinds[self._choose(words.animals + words.people)])
        hypothesis_verb, hypothesis_place = verb, self._choose(("", f" in the {place}"))
        steps = []
        if "noun" in changed:
            lower, upper = self._noun_pair(words.animals + words.people, failing != "noun")
            steps.append(self._noun_step(lower, upper, many))
        if "verb" in changed:
            verb, hypothesis_verb = self._verb_pair(failing != "verb")
            steps.append(self._verb_step(verb, hypothesis_verb))
        if "place" in changed:
            outdoors = (place in words.outdoors) == (failing != "place")
            hypothesis_place = " outdoors" if outdoors else " indoors"
            steps.append(Step(f"Is the {place}{hypothesis_place}?", (place in words.outdoors) == outdoors, "place"))
        subjects = [f"{count} {plural(noun)}" if many else a(noun) for noun in (lower, upper)]
        return f"{subjects[0]} {verb} in the {place}", f"{subjects[1]} {hypothesis_verb}{hypothesis_place}", steps

    def _make_numbers(self, up: bool):
        words = self.words
        have = self.rng.randrange(2, 10)
        need = min(9, max(2, have + self._choose((-2, -1, -1, 0, 1, 1, 2))))
        held = self._choose(("", "", "exactly ", "at least "))
        asked = self._choose(
            ("at least ", "more than ")
            if held != "exactly "
            else ("at least ", "more than ", "at most ", "fewer than ")
        )
        holds = {
            "at least ": have >= need,
            "more than ": have > need,
            "at most ": have <= need,
            "fewer than ": have < need,
        }[asked]
        step = Step(
            f"Is {held}{_NUMBERS[have - 1]} {asked}{_NUMBERS[need - 1]}?", holds, asked.strip().replace(" ", "_")
        )
        lower = upper = self._choose(words.kinds[self._choose(words.animals + words.people)])
        steps = [step]
        if self._chance(0.3) and held != "exactly ":
            lower, upper = self._noun_pair(words.animals + words.people, up or not holds)
            steps.append(self._noun_step(lower, upper, True))
        verb, place = self._doing(lower), self._in_place()
        # Fewer than five in the park may be more than five in all: an upper bound keeps its place.
        hypothesis_place = place if asked in ("at most ", "fewer than ") else self._choose(("", place))
        premise = f"{held}{_NUMBERS[have - 1]} {plural(lower)} {verb}{place}"
        return premise, f"{asked}{_NUMBERS[need - 1]} {plural(upper)} {verb}{hypothesis_place}", steps

    def _make_quantifier(self, up: bool):
        words, place = self.words, self._in_place()
        if self._chance(0.4):
            quantifier = self._choose(("all", "some", "no"))
            lower, upper = self._noun_pair(words.animals + words.people, up)
            step = self._noun_step(lower, upper, True)
            # "some" looks upwards, "all" and "no" look downwards: a claim about all dogs covers the spaniels.
            first, second = (lower, upper) if quantifier == "some" else (upper, lower)
            verb = self._doing(lower)
            return f"{quantifier} {plural(first)}{place} {verb}", f"{quantifier} {plural(second)}{place} {verb}", [step]
        have, need = self._choose(_ENOUGH if up else _NOT_ENOUGH)
        member = self._choose(words.kinds[self._choose(words.animals + words.people)])
        noun, verb = plural(member), self._doing(member)
        step = Step(f"Is {have} enough for {need}?", (have, need) in _ENOUGH, f"{have}_{need}")
        return f"{have} {noun}{place} {verb}", f"{need} {noun}{place} {verb}", [step]

    def _make_negation(self, up: bool):
        words = self.words
        base, past = self._choose(words.to_things)
        name, place = self._choose(words.names), self._in_place(0.6)
        if self._chance(0.35):
            lower, upper = self._noun_pair(words.things, up)
            step = self._noun_step(lower, upper, False)
            step = Step(step.ask, step.holds, "not_any", f"Must {a(upper)} be {a(lower)}?")
            return f"{name} did not {base} {a(upper)}{place}", f"{name} did not {base} {a(lower)}{place}", [step]
        thing = self._choose(words.kinds[self._choose(words.things)])
        how = self._choose([*_IMPLIED, *([] if up else _OPEN)])
        done = _IMPLIED.get(how, self._chance(0.5)) if up or how in _OPEN else not _IMPLIED[how]
        claim = past if done else f"did not {base}"
        step = Step(f"Does {how} {base} mean {claim}?", _IMPLIED.get(how) is done, how.split()[0])
        return f"{name} {how} {base} the {thing}{place}", f"{name} {claim} the {thing}{place}", [step]

    def _make_passive(self, up: bool):
        doer, other = self._two_people()
        verb, place = self._choose(self.words.to_people), self._in_place(0.5)
        first_passive, second_passive = self._choose(
            ((False, False), (False, True), (False, True), (True, False), (True, True))
        )
        roles = (doer, other) if up else self._choose(((other, doer), (other, doer), (self._two_people()[0], other)))

        def say(subject: str, target: str, passive: bool) -> str:
            return (
                f"{self._the(target)} was {verb} by {self._the(subject)}"
                if passive
                else f"{self._the(subject)} {verb} {self._the(target)}"
            )

        if roles[0] == roles[1] or (first_passive == second_passive and up and not place):
            return "", "", []
        changed = first_passive != second_passive
        ask = f"Premise: {doer} {verb}. Hypothesis: {roles[0]} {verb}. Is it the same?"
        misread = f"Premise: {doer} {verb}. Hypothesis: {roles[1]} {verb}. Is it the same?"
        step = Step(ask, roles[0] == doer, "voice" if changed else "roles", misread if changed else None)
        return say(doer, other, first_passive) + place, say(*roles, second_passive), [step]

    def _make_time(self, up: bool):
        if self._chance(0.4):
            first, second = self.rng.sample(self.words.names, 2)
            verb, (early, late) = self._choose(self.words.meetings), self._choose(_DAYS)
            clauses = [f"{first} {verb} {early}", f"{second} {verb} {late}"]
            self.rng.shuffle(clauses)
            order, word = ((first, second) if up else (second, first)), self._choose(("before", "after"))
            subject, mark = order if word == "before" else order[::-1]
            ask, misread = (
                f"Premise: {first} first. Hypothesis: {earlier} first. Is it the same?" for earlier in order
            )
            return " and ".join(clauses), f"{subject} {verb} {word} {mark}", [Step(ask, up, f"day_{word}", misread)]
        first, second = self.rng.sample(self.words.acts, 2)
        name, place = self._choose(self.words.names), self._in_place(0.6)
        pronoun = "she" if name in self.words.women else "he"

        def say(early: str, late: str, form: str) -> str:
            subject, mark = (late, early) if form == "after" else (early, late)
            return (
                f"{name} {subject} and then {mark}" if form == "then" else f"{name} {subject} {form} {pronoun} {mark}"
            )

        forms = self.rng.sample(("before", "after", "then"), 2)
        order = (first, second) if up else (second, first)
        ask, misread = (f"Premise: {first} first. Hypothesis: {earlier} first. Is it the same?" for earlier in order)
        return (
            say(first, second, forms[0]) + place,
            say(*order, forms[1]),
            [Step(ask, up, f"order_{forms[1]}", misread)],
        )

    def _make_detail(self, up: bool):
        words = self.words
        noun, (_, verb), thing = (
            self._choose(words.roles),
            self._choose(words.to_things),
            self._choose(words.kinds[self._choose(words.things)]),
        )
        slots = (words.person_adjectives, words.adverbs, words.thing_adjectives, words.places)
        said = [self._choose(slot) if self._chance(0.6) else None for slot in slots]
        asked = [word if word and self._chance(0.4) else None for word in said]
        if not up:
            slot = self.rng.randrange(4)
            asked[slot] = self._choose([word for word in slots[slot] if word != said[slot]])

        def say(details: list[str | None]) -> str:
            adjective, adverb, colour, place = details
            subject = " ".join(filter(None, (adjective, noun)))
            return f"the {subject} {adverb + ' ' if adverb else ''}{verb} the {colour + ' ' if colour else ''}{thing}{f' in the {place}' if place else ''}"

        kinds = ("person_adjective", "adverb", "thing_adjective", "place")
        steps = [
            Step(f"Is {word} there?", word == have, kind)
            for word, have, kind in zip(asked, said, kinds, strict=True)
            if word
        ]
        steps = steps or [Step("Is the rest there?", True, "bare")]
        steps[0] = replace(steps[0], ask=f"Premise: {', '.join(filter(None, said))}. {steps[0].ask}")
        return (say(said), say(asked), steps) if sum(map(bool, said)) > 1 else ("", "", [])

    def _make_overlap(self, up: bool):
        first, second = self.rng.sample(self.words.roles, 2)
        verb, other_verb = self.rng.sample(self.words.doings, 2)
        place = self._in_place(0.6)
        form = self._choose(("near", "and", "that", "if", "perhaps"))
        if form == "near":
            who = first if up else second
            ask = f"Premise: {first} {verb}. Hypothesis: {who} {verb}. Is it the same?"
            premise = f"the {first} {self._choose(('near', 'behind', 'beside'))} the {second} {verb}{place}"
            return (
                premise,
                f"the {who} {verb}",
                [Step(ask, who == first, "near", f"Premise: {who} {verb}. Hypothesis: {who} {verb}. Is it the same?")],
            )
        if form == "and":
            word = "and" if up else "or"
            return (
                f"the {first} {word} the {second} {verb}{place}",
                f"the {self._choose((first, second))} {verb}",
                [self._proof_step(word, up)],
            )
        if form == "that":
            word = self._choose(_FACTS if up else _CLAIMS)
            return (
                f"the {first} {word} the {second} {verb}{place}",
                f"the {second} {verb}",
                [self._proof_step(word, up)],
            )
        if form == "if":
            word, clause = (
                "because" if up else "if",
                self._choose((f"the {first} {verb}", f"the {second} {other_verb}")),
            )
            return f"{word} the {first} {verb}{place}, the {second} {other_verb}", clause, [self._proof_step(word, up)]
        word = self._choose(_SURE if up else _UNSURE)
        return f"{word} the {first} {verb}{place}", f"the {first} {verb}", [self._proof_step(word, up)]

    def _proof_step(self, word: str, holds: bool) -> Step:
        word = word.split()[0]
        return Step(f"Does the word {word} prove it?", holds, word)


def _sentence(clause: str) -> str:
    return clause[:1].upper() + clause[1:] + "."
