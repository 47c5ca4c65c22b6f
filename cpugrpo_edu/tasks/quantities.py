"""Read a single number with its scale word and unit, exactly.

``18 thousand`` is 18000: a scale word is part of the number, never its unit. ``3x``, ``4 pm``
and ``5x²`` are no numbers, because what follows them is no unit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from cpugrpo_edu.tasks.spelling import fold

MAX_NUMBER_CHARS = 40
"""A longer number is not read as a number, which bounds the cost of exact arithmetic."""

_CURRENCY = "$€£¥₹"
_RAISED = str.maketrans("²³", "23")
_DIGITS = r"(?:[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?:\ [0-9]{3})+)(?![0-9])|[0-9]+)"
_VALUE = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_WORD = r"°?[^\W\d_]+(?:[²³]|\^[23])?"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?|(?:negative|minus)\ )\ ?(?P<before>[{_CURRENCY}%]?)\ ?(?P<inner_sign>[+-]?)
    (?P<value>{_VALUE})
    (?:\ (?P<top>[0-9]+)/(?P<bottom>[0-9]+)|\ ?/\ ?(?P<denominator>[0-9]+))?
    (?P<rest>.*)""",
    re.VERBOSE | re.IGNORECASE,
)
_UNIT = re.compile(rf"(?P<gap>\ ?)(?P<unit>[%°{_CURRENCY}]|{_WORD}(?:/{_WORD})?)?")

SCALES = {
    "hundred": Fraction(100),
    "thousand": Fraction(10**3),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
    "dozen": Fraction(12),
    "score": Fraction(20),
    "k": Fraction(10**3),
    "mn": Fraction(10**6),
    "bn": Fraction(10**9),
    "tn": Fraction(10**12),
    "half": Fraction(1, 2),
    "halves": Fraction(1, 2),
    "quarter": Fraction(1, 4),
    **{
        word: Fraction(1, parts)
        for parts, word in enumerate(
            ("third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"), start=3
        )
    },
    "hundredth": Fraction(1, 100),
    "thousandth": Fraction(1, 1000),
    "millionth": Fraction(1, 10**6),
}
"""Words that multiply the number before them; all may have a plural s."""

CAPITALS = {"M": Fraction(10**6), "B": Fraction(10**9)}
"""Scales that only a capital letter marks: 5M is five million, 5m five metres."""

MEASURES = {
    spelling: names.split()[0]
    for names in (
        "mm millimetre millimeter",
        "cm centimetre centimeter",
        "m metre meter",
        "km kilometre kilometer",
        "in inch inches",
        "ft foot feet",
        "yd yard",
        "mi mile",
        "mg milligram",
        "g gram gramme",
        "kg kilogram kilo kilogramme",
        "lb",
        "oz ounce",
        "ml millilitre milliliter",
        "l litre liter",
        "gal gallon",
        "s sec second",
        "min minute",
        "h hr hour",
        "day",
        "week",
        "month",
        "year yr",
        "cent ¢",
        "$ dollar usd",
        "€ euro eur",
        "£ gbp",
        "¥ yen jpy",
        "₹ rupee inr",
        "% percent",
        "°c celsius",
        "°f fahrenheit",
    )
    for spelling in names.split()
}
"""Units of which two different ones never mean the same; every other word may follow a number."""

NOT_UNITS = (
    "am pm bc bce ad pi tau sqrt root sin cos tan log ln exp mod or and plus minus times point "
    "squared cubed zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy "
    "eighty ninety mil half halves"
)
NO_UNITS = set(NOT_UNITS.split())
"""Words after a number that make it another one, or none."""


@dataclass(frozen=True)
class Quantity:
    """A number; ``unit`` is its measure if that is known, ``name`` the x of ``x = 42``."""

    value: Fraction
    unit: str = ""
    name: str = ""

    def same(self, other: Quantity) -> bool:
        """Equal in value, and no contradiction in unit or name; a missing one fits all."""
        fits = all(
            not (mine and theirs) or mine == theirs
            for mine, theirs in ((self.unit, other.unit), (self.name, other.name))
        )
        return fits and self.value == other.value


def parse_number(text: str) -> Fraction | None:
    """The exact value of a single number; None if the text is anything else.

    Accepts signs, thousands separators (``1,000`` and ``1 000``, but not ``1,00``), decimals,
    fractions (``1/2``, ``1 1/2``), scale words (``18 thousand``, ``5M``), a currency or percent
    sign, one unit, and ``x = 42``. A percent sign is a unit: ``18%`` is 18. Rejects exponents,
    ``nan`` and ``inf``.
    """
    quantity = read_quantity(text)
    return None if quantity is None else quantity.value


def read_quantity(text: str) -> Quantity | None:
    """The number that a stated answer is; None if it is anything else."""
    *sides, last = fold(text).split("=")
    quantity = _read(last.strip())
    if quantity is None or not sides:
        return quantity
    return _end_of_chain([side.strip() for side in sides], quantity)


_NAME = re.compile(r"[^\W\d_](?:[^\d=;,/*+-]*[^\W\d_])?\W{0,2}")
_EXPRESSION = re.compile(r"(?:[^\W\d_]+ ?|[0-9.+*/×÷·()$€£%^ -]|,[0-9]{3})+")


def _end_of_chain(sides: list[str], quantity: Quantity) -> Quantity | None:
    """``x = 42`` and ``12 + 30 = 42`` state 42; ``41 = 42`` and ``3 or x = 42`` state nothing."""
    name = ""
    for side in sides:
        number = _read(side)
        if number is not None:
            if not number.same(quantity):
                return None
        elif _NAME.fullmatch(side) and " or " not in side:
            name = side.casefold() if len(side) == 1 else name
        elif not _EXPRESSION.fullmatch(side) or re.search(r"\b(?:or|and)\b", side):
            return None
    return Quantity(quantity.value, quantity.unit, name)


def leading_quantity(text: str) -> str:
    """``42 apples`` of ``42 apples in total``: a number and a unit that only words follow.

    The text itself if it does not begin with a number, or if a word after it could change it.
    """
    folded = fold(text)
    match = _NUMBER.fullmatch(folded)
    if match is None:
        return text
    words = [(m.end(), m[0].strip(",.!;:()*")) for m in re.finditer(r"\S+", match["rest"])]
    said = {word.casefold() for _, word in words if word}
    if said & NO_UNITS or not all(re.sub("['-]", "", word).isalpha() for word in said):
        return text
    for end, _ in words[1::-1]:  # a scale and a unit, or one of them
        short = folded[: match.start("rest") + end].strip(",.!;:()*")
        if _read(short) is not None:
            return short
    return text if words else folded


def _read(folded: str) -> Quantity | None:
    match = _NUMBER.fullmatch(folded)
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    value, top, bottom = match["value"], match["top"], match["bottom"]
    denominator = match["denominator"] or "1"
    if len(folded[: match.start("rest")]) > MAX_NUMBER_CHARS or not int(denominator):
        return None
    if match["denominator"] and " " in value:  # 1 100/2 could be two things
        return None
    number = Fraction(re.sub("[, ]", "", value)) / int(denominator)
    if top is not None:  # 1 1/2
        if "." in value or not int(top) < int(bottom):
            return None
        number += Fraction(int(top), int(bottom))
    scaled = _scale_and_unit(match["rest"])
    if scaled is None:
        return None
    scale, unit = scaled
    negative = match["sign"].strip().casefold() in ("-", "negative", "minus")
    negative |= match["inner_sign"] == "-"
    return Quantity(-scale * number if negative else scale * number, unit or match["before"])


def _scale_and_unit(rest: str) -> tuple[Fraction, str] | None:
    """What follows a number: its scale, 1 without one, and its known measure, "" without one."""
    scale = Fraction(1)
    first = re.match(r" ?([^\W\d_]+)(?=[ $€£¥₹%]|$)", rest)
    if first is not None and (found := _scale_of(first[1])) is not None:
        scale, rest = found, rest[first.end() :]
    match = _UNIT.fullmatch(rest)
    if match is None:
        return None
    measure = _measure_of(match["unit"] or "", glued=not match["gap"])
    return None if measure is None else (scale, measure)


def _scale_of(word: str) -> Fraction | None:
    if word in CAPITALS:
        return CAPITALS[word]
    word = word.casefold()
    return SCALES.get(word, SCALES.get(word.removesuffix("s")) if len(word) > 3 else None)


def _measure_of(unit: str, glued: bool) -> str | None:
    """The canonical measure, "" for another unit word, None for what is no unit.

    A single letter that is no measure is a symbol (``3x``), as are two or three that stick to
    the number (``3ab``).
    """
    found = [_measure(part, least=4 if glued else 2) for part in unit.split("/") if part]
    if None in found:
        return None
    return "/".join(filter(None, found)) if all(found) else ""


def _measure(word: str, least: int) -> str | None:
    """The canonical measure, "" for another word of at least ``least`` letters, None otherwise."""
    power = re.search(r"[²³]$|\^[23]$", word)
    base = word[: power.start()] if power else word
    symbol = len(base) == 1 and base.isupper() and base != "L"  # 5 M is not 5 m
    lower = base.casefold()
    measure = MEASURES.get(lower) or MEASURES.get(lower.removesuffix("s"))
    if measure is not None and not symbol:
        return measure + (power[0][-1].translate(_RAISED) if power else "")
    if word == "°":
        return ""
    plain = not power and lower.isalpha() and len(lower) >= least
    return "" if plain and lower not in NO_UNITS and _scale_of(base) is None else None
