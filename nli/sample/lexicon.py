"""The words of the sample world, and which of them the training split never sees.

    WORDS.kinds["dog"] == ("spaniel", "poodle", "terrier", "collie", "beagle")     a beagle is a dog, and a dog is an animal
    TRAIN_WORDS.kinds["dog"] == ("spaniel", "poodle", "terrier", "collie")         "beagle" waits for dev and test

In the tables a bar separates the words of all splits from the words held out for dev and test.
"""

from dataclasses import dataclass, fields

_ANIMALS = {
    "dog": "spaniel poodle terrier collie | beagle",
    "bird": "sparrow robin crow owl | heron",
    "fish": "trout salmon carp | herring",
    "insect": "ant wasp moth | beetle",
}
_THINGS = {
    "fruit": "apple pear plum cherry | peach",
    "vegetable": "carrot onion potato | turnip",
    "flower": "rose tulip daisy | orchid",
    "tool": "hammer saw drill | rake",
    "vehicle": "car bus van | tractor",
    "instrument": "violin flute drum guitar | trumpet",
}
_PEOPLE = {
    "musician": "pianist drummer violinist | guitarist",
    "athlete": "runner boxer swimmer | skater",
    "craftsman": "tailor potter carpenter | weaver",
}
_ROLES = (
    "doctor sailor farmer teacher baker pilot nurse judge lawyer guard waiter singer | plumber dancer soldier hunter"
)
_WOMEN = "Anna Clara Emma Grace Julia Laura Maria Nora Rosa Sarah | Helen Paula Vera"
_MEN = "Ben David Frank Henry Jack Leo Martin Oscar Peter Tom | Simon Victor Walter"
_OUTDOORS = "garden park field forest meadow yard | orchard valley"
_INDOORS = "kitchen library cellar office bedroom hall | attic classroom"
_PERSON_ADJECTIVES = "tall old young happy tired rich | shy clever"
_THING_ADJECTIVES = "red blue green heavy small new | yellow cheap"
_ADVERBS = "quickly quietly slowly calmly | gladly"
_RESTING = "slept dozed napped | snoozed"
_MOVING = "ran walked jumped crawled | danced"
_NOISY = "shouted sang coughed laughed | whistled"
_ACTS = "swam ate cooked read wept smiled prayed waited | knitted yawned"
_MEETINGS = "arrived left returned called paid | resigned"
_TO_PEOPLE = "helped thanked followed praised watched pushed greeted blamed visited | hugged warned rescued"
_TO_THINGS = "buy/bought sell/sold wash/washed hide/hid find/found lift/lifted paint/painted steal/stole | borrow/borrowed drop/dropped clean/cleaned"


@dataclass(frozen=True)
class Lexicon:
    """All the words that one split may use."""

    kinds: dict[str, tuple[str, ...]]
    animals: tuple[str, ...]
    things: tuple[str, ...]
    people: tuple[str, ...]
    roles: tuple[str, ...]
    women: tuple[str, ...]
    men: tuple[str, ...]
    outdoors: tuple[str, ...]
    indoors: tuple[str, ...]
    person_adjectives: tuple[str, ...]
    thing_adjectives: tuple[str, ...]
    adverbs: tuple[str, ...]
    verb_kinds: dict[str, tuple[str, ...]]
    acts: tuple[str, ...]
    meetings: tuple[str, ...]
    to_people: tuple[str, ...]
    to_things: tuple[tuple[str, str], ...]

    @property
    def places(self) -> tuple[str, ...]:
        return self.outdoors + self.indoors

    @property
    def names(self) -> tuple[str, ...]:
        return self.women + self.men

    @property
    def doings(self) -> tuple[str, ...]:
        """Every intransitive verb in the past tense."""
        return self.acts + tuple(verb for verbs in self.verb_kinds.values() for verb in verbs)


def _build_lexicon(with_held_out: bool) -> Lexicon:
    def words(table: str) -> tuple[str, ...]:
        return tuple((table.replace("|", " ") if with_held_out else table.split("|")[0]).split())

    kinds = {kind: words(table) for kind, table in {**_ANIMALS, **_THINGS, **_PEOPLE}.items()}
    return Lexicon(
        kinds=kinds,
        animals=tuple(_ANIMALS),
        things=tuple(_THINGS),
        people=tuple(_PEOPLE),
        roles=words(_ROLES),
        women=words(_WOMEN),
        men=words(_MEN),
        outdoors=words(_OUTDOORS),
        indoors=words(_INDOORS),
        person_adjectives=words(_PERSON_ADJECTIVES),
        thing_adjectives=words(_THING_ADJECTIVES),
        adverbs=words(_ADVERBS),
        verb_kinds={"rested": words(_RESTING), "moved": words(_MOVING), "made noise": words(_NOISY)},
        acts=words(_ACTS),
        meetings=words(_MEETINGS),
        to_people=words(_TO_PEOPLE),
        to_things=tuple(tuple(pair.split("/")) for pair in words(_TO_THINGS)),
    )


WORDS = _build_lexicon(with_held_out=True)
TRAIN_WORDS = _build_lexicon(with_held_out=False)

_PLURALS = {
    "fish": "fish",
    "trout": "trout",
    "salmon": "salmon",
    "carp": "carp",
    "herring": "herring",
    "daisy": "daisies",
    "cherry": "cherries",
}
_PLURALS |= {"potato": "potatoes", "peach": "peaches", "craftsman": "craftsmen", "bus": "buses", "person": "people"}


def plural(noun: str) -> str:
    """The plural, "cherries" for "cherry"."""
    return _PLURALS.get(noun, noun + "s")


def a(noun: str) -> str:
    """The noun with its article, "an owl" for "owl"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def held_out_words() -> frozenset[str]:
    """The words, singular and plural, that dev and test may use and train may not."""

    def flatten(value) -> set[str]:
        if isinstance(value, str):
            return {value}
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return set().union(*(flatten(item) for item in items))

    everything, seen = (
        set().union(*(flatten(getattr(words, field.name)) for field in fields(words))) for words in (WORDS, TRAIN_WORDS)
    )
    held_out = everything - seen
    nouns = {noun for members in WORDS.kinds.values() for noun in members}
    return frozenset(held_out | {plural(noun) for noun in held_out & nouns} - {plural(noun) for noun in seen & nouns})
