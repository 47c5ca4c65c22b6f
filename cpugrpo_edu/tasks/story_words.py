"""The words of a story: people, things, and the grammar that puts them into a template.

A template is English with slots in braces:

    {A} has {n thing}. {B} gives {him} {m} more. How many {things} does {he} have?

``{A}``, ``{B}`` and ``{C}`` are names, ``{A's}`` is possessive. ``{he}``, ``{him}`` and ``{his}``
stand for A, ``{B he}`` for B, and a verb after a pronoun agrees with it: ``{he has}`` may become
"they have". ``{n}`` is a number, ``{n red thing}`` counts ("1 red apple", "2 red apples"),
``{an thing}`` has its article, ``{part k}`` and ``{times k}`` are "a third" and "3 times". A slot
with a capital letter begins a sentence.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

PEOPLE: dict[str, tuple[str, ...]] = {
    "he": (
        *("Adam", "Ben", "Daniel", "Diego", "Ethan", "Felix", "Hiro", "Ivan", "Jack", "Kofi"),
        *("Leo", "Liam", "Mateo", "Max", "Noah", "Omar", "Peter", "Raj", "Tom", "Viktor"),
    ),
    "she": (
        *("Aisha", "Anna", "Clara", "Ella", "Emma", "Fatima", "Grace", "Hannah", "Lea", "Lucy"),
        *("Maria", "Mei", "Mia", "Nina", "Olivia", "Priya", "Ruth", "Sofia", "Yuki", "Zoe"),
    ),
    "they": ("Alex", "Charlie", "Jordan", "Robin", "Sam", "Taylor"),
}
FORMS: dict[str, dict[str, str]] = {
    # as a template writes it: what it becomes
    "he": {"he": "he", "she": "she", "they": "they"},
    "him": {"he": "him", "she": "her", "they": "them"},
    "his": {"he": "his", "she": "her", "they": "their"},
}
KINDS: dict[str, tuple[str, ...]] = {
    "thing": (
        *("marble", "sticker", "pencil", "button", "seashell", "stamp", "bead", "toy car"),
        *("balloon", "crayon", "postcard", "badge", "trading card", "pebble", "eraser", "magnet"),
    ),
    "toy": (
        *("marble", "balloon", "button", "bead", "crayon", "sticker", "toy car", "block"),
        *("pencil", "candle", "paper crane", "envelope"),
    ),
    "food": (
        *("apple", "orange", "cookie", "muffin", "cracker", "strawberry", "cherry", "plum"),
        *("pretzel", "almond", "olive", "pear"),
    ),
    "fruit": (
        *("apple", "orange", "strawberry", "cherry", "plum", "pear", "peach", "lemon", "fig"),
        "apricot",
    ),
    "bake": (
        *("cookie", "muffin", "cupcake", "roll", "pretzel", "scone", "brownie", "bagel"),
        "croissant",
    ),
    "snack": (
        *("sandwich", "smoothie", "muffin", "milkshake", "pretzel", "hot dog", "ice cream cone"),
        *("salad", "waffle"),
    ),
    "good": (
        *("notebook", "mug", "poster", "puzzle", "candle", "cap", "plant", "umbrella", "towel"),
        *("paint set", "bowl", "scarf", "paperback", "toy robot", "water bottle", "flashlight"),
    ),
    "dear": (
        *("backpack", "jacket", "watch", "skateboard", "suitcase", "tent", "keyboard", "coat"),
        *("desk chair", "blender", "drone", "pair of boots"),
    ),
    "bird": ("pigeon", "crow", "sparrow", "seagull", "swallow", "starling"),
    "flower": ("rose", "tulip", "daisy", "lily", "sunflower", "daffodil"),
    "box": ("box", "bag", "basket"),
    "unit": ("mile", "kilometer"),
    "color": ("red", "blue", "green", "yellow", "white", "purple", "black", "silver"),
}
PLURALS = {
    "person": "people",
    "child": "children",
    "foot": "feet",
    "shelf": "shelves",
    "scarf": "scarves",
    "pair of boots": "pairs of boots",
}
PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth"}
_VERBS = {"has": "have", "is": "are", "was": "were", "does": "do"}
_SLOT = re.compile(r"\{([^{}]+)\}")


def plural(noun: str) -> str:
    if noun in PLURALS:
        return PLURALS[noun]
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def count(number: int, noun: str) -> str:
    """``1 apple`` or ``2 apples``."""
    return f"{number} {noun if number == 1 else plural(noun)}"


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_PLURAL_SLOTS = {plural(kind) + end: kind + end for kind in KINDS for end in ("", "2")}


class Scene:
    """The words of one story. Each is drawn when a template first asks for it, and then stays.

    ``kind`` is what the slot ``thing`` may be: a key of `KINDS`, or the noun itself. If there are
    two people (``pair``), one is "he" and one "she", so that no pronoun is ambiguous.
    """

    def __init__(self, rng: random.Random, kind: str = "thing", pair: bool = False) -> None:
        self.rng = rng
        self.kinds = {**KINDS, "thing": KINDS.get(kind, (kind,))}
        pronouns = ["he", "she"]
        rng.shuffle(pronouns)
        if not pair and rng.random() < 0.1:
            pronouns[0] = "they"
        self.pronouns = dict(zip("ABC", [*pronouns, pronouns[1]], strict=True))
        self.words: dict[str, str] = {}

    def word(self, slot: str) -> str:
        """The word of a slot such as ``A``, ``thing`` or ``thing2``."""
        if slot not in self.words:
            known = self.kinds.get(slot.rstrip("2"), ())
            choices = PEOPLE[self.pronouns[slot]] if slot in self.pronouns else known
            left = [word for word in choices if word not in self.words.values()]
            if not left:
                return slot  # a plain word
            self.words[slot] = self.rng.choice(left)
        return self.words[slot]

    def noun(self, words: list[str]) -> str:
        return " ".join(map(self.word, words))

    def fill(self, template: str, numbers: Mapping[str, int]) -> str:
        """The template with all its slots filled."""
        return _SLOT.sub(lambda slot: self._slot(slot[1], numbers), template)

    def _slot(self, slot: str, numbers: Mapping[str, int]) -> str:
        who, bare = "A", slot
        if slot.startswith(("A ", "B ")):
            who, bare = slot.split(" ", 1)
        first, *rest = bare.split()
        if (person := first.removesuffix("'s")) in self.pronouns:
            return self.word(person) + first[len(person) :]
        text = self._plain(first.lower(), rest, who, numbers)
        return text[0].upper() + text[1:] if first[0].isupper() else text

    def _plain(self, first: str, rest: list[str], who: str, numbers: Mapping[str, int]) -> str:
        if first in FORMS:
            self.word(who)
            pronoun = self.pronouns[who]
            if pronoun == "they":
                rest = [_VERBS.get(verb, verb.removesuffix("s")) for verb in rest]
            return " ".join([FORMS[first][pronoun], *rest])
        if first == "an":
            return with_article(self.noun(rest))
        if first == "part":
            return PARTS[numbers[rest[0]]]
        if first == "times":
            return "twice" if numbers[rest[0]] == 2 else f"{numbers[rest[0]]} times"
        if first in numbers:
            return count(numbers[first], self.noun(rest)) if rest else str(numbers[first])
        if first in _PLURAL_SLOTS:
            return plural(self.word(_PLURAL_SLOTS[first]))
        if first.rstrip("2") not in self.kinds:
            raise ValueError(f"no slot {first!r} in this story")
        return self.word(first)
