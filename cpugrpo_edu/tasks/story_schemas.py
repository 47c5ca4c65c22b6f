"""The schemas of the stories: which numbers, which phrasings, which steps.

The kinds of story (change, combine, compare, equal groups, rates) are those of research on
children's word problems: Riley, Greeno and Heller 1983; Carpenter and Moser 1984. Templates are
explained in `story_words`. A text may begin with what its ``thing`` is, as in ``bake| {A} bakes
{n thing}``. In a step, ``[n * m: thing]`` becomes "3 x 4 = 12 apples", and its result is ``r1`` for
later steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


def always(n: Any) -> bool:
    return True


@dataclass(frozen=True)
class Schema:
    """One kind of story; every step must give a whole number above 1."""

    name: str
    numbers: dict[str, Sequence[int]]
    """The values each number may take."""
    texts: tuple[str, ...]
    steps: tuple[str, ...]
    where: Callable[[SimpleNamespace], bool] = always
    """What else must hold, so that the story makes sense."""
    topics: tuple[str, ...] = ()
    """What a sentence beside the point must not be about."""
    largest: float = math.inf
    """No result may be larger."""


def to(first: int, last: int, step: int = 1) -> range:
    return range(first, last + 1, step)


BILLS = (5, 10, 20, 50, 100)
MONEY, AGE, DISTANCE, TIME = ("money",), ("age",), ("distance", "time"), ("time",)

SUMS = (
    Schema(
        "add",
        {"n": to(2, 50), "m": to(2, 50)},
        (
            "What is {n} + {m}?",
            "What is {n} plus {m}?",
            "Calculate {n} + {m}.",
            "Find the sum of {n} and {m}.",
        ),
        ("[n + m].",),
    ),
    Schema(
        "subtract",
        {"n": to(5, 60), "m": to(2, 50)},
        (
            "What is {n} - {m}?",
            "What is {n} minus {m}?",
            "Calculate {n} - {m}.",
            "Subtract {m} from {n}.",
        ),
        ("[n - m].",),
    ),
    Schema(
        "multiply",
        {"n": to(2, 12), "m": to(2, 12)},
        (
            "What is {n} x {m}?",
            "What is {n} times {m}?",
            "Calculate {n} x {m}.",
            "Find the product of {n} and {m}.",
        ),
        ("[n * m].",),
    ),
    Schema(
        "divide",
        {"n": to(4, 120), "m": to(2, 12)},
        (
            "What is {n} / {m}?",
            "What is {n} divided by {m}?",
            "Calculate {n} / {m}.",
            "Divide {n} by {m}.",
        ),
        ("[n / m].",),
        lambda n: n.n > n.m,
    ),
)
"""Sums without a story."""

ONE_STEP = (
    Schema(
        "join",
        {"n": to(2, 40), "m": to(2, 30)},
        (
            "{A} has {n thing}. {B} gives {him} {m} more. How many {things} does {A} have now?",
            "{A} had {n thing} and then found {m} more. How many {things} does {A} have now?",
            "food| There are {n thing} in a bowl. {A} puts {m} more into it. How many {things} are "
            "in the bowl now?",
            "person| There are {n thing} on a train. At the next station, {m} more get on and "
            "nobody gets off. How many people are on the train now?",
        ),
        ("Now there are [n + m: thing].",),
    ),
    Schema(
        "separate",
        {"n": to(5, 50), "m": to(2, 40)},
        (
            "{A} has {n thing} and gives {m} of them to {B}. How many {things} does {A} have left?",
            "bake| {A} baked {n thing}. {His} family ate {m} of them. How many {things} are left?",
            "bird| There are {n thing} on a roof. Then {m} of them fly away. How many {things} are "
            "still on the roof?",
            "car| There are {n thing} in a parking lot. In the evening, {m} of them leave. How "
            "many cars are still there?",
        ),
        ("That leaves [n - m: thing].",),
    ),
    Schema(
        "start_unknown",
        {"n": to(2, 30), "m": to(2, 30)},
        (
            "{A} gave {m thing} to {B} and has {n} left. How many {things} did {A} have at first?",
            "After {A} lost {m thing}, {he} had {n} left. How many {things} did {he} have before?",
            "bake| {A} took some {things} to a party. The guests ate {m} of them, and {n} were "
            "left over. How many {things} did {A} take to the party?",
        ),
        ("At first there were [n + m: thing].",),
    ),
    Schema(
        "change_unknown",
        {"n": to(5, 50), "m": to(2, 40)},
        (
            "{A} had {m thing}. {B} gave {him} some more, and now {A} has {n}. How many {things} "
            "did {B} give {him}?",
            "food| There were {n thing} in a bowl this morning. Now there are {m}. How many "
            "{things} were taken?",
            "{A} wants to collect {n thing}. So far {he has} {m}. How many more {things} does {A} "
            "need?",
        ),
        ("The difference is [n - m: thing].",),
    ),
    Schema(
        "compare",
        {"n": to(5, 50), "m": to(2, 40)},
        (
            "{A} has {n thing} and {B} has {m}. How many more {things} does {A} have than {B}?",
            "fruit| {A} picked {n thing} and {B} picked {m}. How many fewer {things} did {B} pick "
            "than {A}?",
            "point| {A} scored {n thing} in a game and {B} scored {m}. By how many points did {A} "
            "win?",
            "page| {A} read {n thing} yesterday and {m} today. How many more pages did {A} read "
            "yesterday than today?",
        ),
        ("The difference is [n - m: thing].",),
    ),
    Schema(
        "more_than",
        {"n": to(3, 40), "m": to(2, 20)},
        (
            "{A} has {n thing}. {B} has {m} more than {A}. How many {things} does {B} have?",
            "fruit| {A} picked {n thing}, and {B} picked {m} more than {A}. How many {things} did "
            "{B} pick?",
            "point| {A} scored {n thing} in a game. {B} scored {m} more. How many points did {B} "
            "score?",
        ),
        ("{B} has [n + m: thing].",),
    ),
    Schema(
        "fewer_than",
        {"n": to(5, 50), "m": to(2, 20)},
        (
            "{A} has {n thing}. {B} has {m} fewer than {A}. How many {things} does {B} have?",
            "fruit| {A} picked {n thing}, and {B} picked {m} fewer than {A}. How many {things} did "
            "{B} pick?",
            "{A} has {n thing}, which is {m} more than {B} has. How many {things} does {B} have?",
        ),
        ("{B} has [n - m: thing].",),
    ),
    Schema(
        "combine",
        {"n": to(2, 40), "m": to(2, 40)},
        (
            "toy| {A} has {n color thing} and {m color2 thing}. How many {things} does {A} have in "
            "all?",
            "fruit| {A} picked {n thing} and {B} picked {m}. How many {things} did they pick "
            "together?",
            "child| There are {n} girls and {m} boys on a school bus. How many children are on the "
            "bus?",
            "flower| {A} cuts {n thing} and {B} cuts {m} for a big bouquet. How many {things} do "
            "they have for it?",
        ),
        ("Together that makes [n + m: thing].",),
    ),
    Schema(
        "groups",
        {"n": to(2, 12), "m": to(2, 12)},
        (
            "{A} has {n box} with {m thing} in each. How many {things} does {A} have in all?",
            "book| {A} has {n shelf} with {m thing} on each. How many books are on the shelves?",
            "flower| {A} plants {n row} of {m thing}. How many {things} does {A} plant?",
            "chair| In a hall there are {n row} of {m thing}. How many chairs are there?",
        ),
        ("That makes [n * m: thing].",),
    ),
    Schema(
        "sharing",
        {"n": to(4, 120), "m": to(2, 12)},
        (
            "{A} shares {n thing} equally among {m} friends. How many {things} does each friend "
            "get?",
            "player| A coach divides {n} players into {m} equal teams. How many players are on "
            "each team?",
            "food| {A} puts {n thing} into {m box}, the same number into each. How many {things} "
            "are in each {box}?",
        ),
        ("Each share is [n / m: thing].",),
        lambda n: n.n > n.m,
    ),
    Schema(
        "packing",
        {"n": to(4, 120), "m": to(2, 12)},
        (
            "food| {A} packs {n thing} into {boxes} of {m}. How many {boxes} does {A} need?",
            "{A} has {n thing} and puts {m} into each {box}. How many {boxes} does {A} fill?",
            "bake| A bakery sells {things} in {boxes} of {m}. How many {boxes} does {A} need to "
            "buy to get {n thing}?",
        ),
        ("That takes [n / m: box].",),
        lambda n: n.n > n.m,
    ),
    Schema(
        "price",
        {"n": to(2, 12), "p": to(2, 9)},
        (
            "snack| {A} buys {n thing} for ${p} each. How many dollars does {A} pay?",
            "good| One {thing} costs ${p}. How many dollars do {n thing} cost?",
            "A ticket to the museum costs ${p}. How many dollars do {n} tickets cost?",
        ),
        ("The price is [$p * n].",),
        topics=MONEY,
    ),
    Schema(
        "unit_price",
        {"n": to(2, 12), "m": to(6, 120)},
        (
            "snack| {A} paid ${m} for {n thing}, all at the same price. How many dollars did one "
            "{thing} cost?",
            "good| If {n thing} cost ${m}, how many dollars does one {thing} cost?",
            "A group of {n} friends pays ${m} for cinema tickets. How many dollars is one ticket?",
        ),
        ("One costs [$m / n].",),
        lambda n: n.m / n.n <= 9,
        MONEY,
    ),
    Schema(
        "change",
        {"p": to(3, 19), "m": (10, 20)},
        (
            "good| {A} buys {an thing} for ${p} and pays with a ${m} bill. How many dollars does "
            "{A} get back?",
            "good| {An thing} costs ${p}. {A} pays with a ${m} bill. How many dollars of change "
            "does {A} get?",
            "good| {A} had ${m} and spent ${p} on {an thing}. How many dollars does {A} have left?",
        ),
        ("That leaves [$m - $p].",),
        topics=MONEY,
    ),
    Schema(
        "expensive",
        {"p": to(25, 90), "m": to(50, 100, 10)},
        (
            "dear| {A} had ${m} and bought {an thing} for ${p}. How many dollars does {A} have "
            "left?",
            "dear| {A} has saved ${m}. {He buys} {an thing} for ${p}. How many dollars are left?",
        ),
        ("That leaves [$m - $p].",),
        topics=MONEY,
    ),
    Schema(
        "times_as_many",
        {"n": to(2, 20), "k": to(2, 6)},
        (
            "{A} has {n thing}. {B} has {times k} as many. How many {things} does {B} have?",
            "page| {A} read {n thing} yesterday and {times k} as many today. How many pages did "
            "{A} read today?",
            "fruit| {A} picked {n thing}, and {B} picked {times k} as many. How many {things} did "
            "{B} pick?",
        ),
        ("{Times k} as many is [n * k: thing].",),
    ),
    Schema(
        "fraction",
        {"n": to(4, 90), "k": to(2, 6)},
        (
            "{A} has {n thing} and gives {part k} of them to {B}. How many {things} does {B} get?",
            "student| There are {n thing} in a school club. {Part k} of them play an instrument. "
            "How many students in the club play an instrument?",
            "bake| {A} baked {n thing} and froze {part k} of them. How many {things} did {A} "
            "freeze?",
        ),
        ("{Part k} of {n} is [n / k: thing].",),
        lambda n: n.n >= 2 * n.k,
    ),
    Schema(
        "age_later",
        {"n": to(4, 60), "d": to(2, 20)},
        (
            "{A} is {n} years old. How old will {he} be in {d} years?",
            "{A} is {n} years old, and {B} is {d} years older. How old is {B}?",
            "{A} was {n} years old when {he} moved to Boston. That was {d} years ago. How old is "
            "{A} now?",
        ),
        ("The age is [n + d: year].",),
        topics=AGE,
    ),
    Schema(
        "age_before",
        {"n": to(8, 70), "d": to(2, 20)},
        (
            "{A} is {n} years old. How old was {he} {d} years ago?",
            "{A} is {n} years old, and {B} is {d} years younger. How old is {B}?",
        ),
        ("The age is [n - d: year].",),
        lambda n: n.n - n.d >= 3,
        AGE,
    ),
    Schema(
        "distance",
        {"n": to(3, 50), "m": to(3, 50)},
        (
            "{A} cycled {n unit} on Saturday and {m unit} on Sunday. How many {units} did {A} "
            "cycle in all?",
            "A hiking trail leads {n unit} from a village to a lake and {m} more from there to the "
            "next town. How many {units} long is the trail?",
        ),
        ("In all it is [n + m: unit].",),
        topics=DISTANCE,
    ),
    Schema(
        "distance_left",
        {"n": to(20, 95), "m": to(5, 80)},
        (
            "The trip to the coast is {n unit} long. {A} has already driven {m} of them. How many "
            "{units} are left?",
            "foot| A rope is {n thing} long. {A} cuts off {m thing}. How many feet long is the "
            "rest?",
        ),
        ("The rest is [n - m].",),
        topics=DISTANCE,
    ),
    Schema(
        "rate",
        {"n": to(2, 12), "m": to(2, 9)},
        (
            "page| {A} reads {n thing} a day. How many pages does {A} read in {m} days?",
            "tile| {A} can paint {n thing} in an hour. How many tiles can {he} paint in {m} hours?",
            "sit-up| {A} does {n thing} every morning. How many sit-ups is that in {m} days?",
        ),
        ("That makes [n * m: thing].",),
        topics=TIME,
    ),
    Schema(
        "speed",
        {"n": to(20, 60, 5), "m": to(2, 5)},
        (
            "A train travels at {n} miles per hour for {m} hours. How many miles does it travel?",
            "{A} drives at {n} miles per hour. How many miles does {A} drive in {m} hours?",
        ),
        ("The distance is [n * m] miles.",),
        topics=DISTANCE,
    ),
)

TWO_STEPS = (
    Schema(
        "groups_and_more",
        {"n": to(2, 9), "m": to(3, 12), "j": to(2, 20)},
        (
            "{A} has {n box} with {m thing} in each and {j} more {things} on {his} desk. How many "
            "{things} does {A} have in all?",
            "food| {A} buys {n box} of {things} with {m thing} in each. At home there are {j} "
            "more. How many {things} are there now?",
            "{A} finds {j thing} in a drawer and {n box} with {m thing} each in the attic. How "
            "many {things} does {A} find?",
        ),
        ("The {boxes} hold [n * m: thing].", "With the other {j} there are [r1 + j: thing]."),
    ),
    Schema(
        "groups_and_fewer",
        {"n": to(2, 9), "m": to(3, 12), "j": to(2, 20)},
        (
            "{A} fills {n box} with {m thing} each and gives {j} of the {things} to {B}. How many "
            "{things} does {A} have left?",
            "bake| {A} bakes {n tray} of {m thing}. {His} friends eat {j} of them. How many "
            "{things} are left?",
            "flower| {A} plants {n row} of {m thing}. In spring, {j} of them do not come up. How "
            "many {things} come up?",
        ),
        ("At first there are [n * m: thing].", "After that, [r1 - j: thing] remain."),
        lambda n: n.n * n.m - n.j >= 2,
    ),
    Schema(
        "join_separate",
        {"n": to(5, 60), "m": to(3, 40), "j": to(2, 40)},
        (
            "{A} has {n thing}. {B} gives {him} {m} more, but then {A} loses {j} of them. How many "
            "{things} does {A} have now?",
            "person| There are {n thing} on a bus. At the next stop, {m} get on and then {j} get "
            "off. How many people are on the bus now?",
            "food| There are {n thing} in a bowl. {A} adds {m} and {B} eats {j}. How many {things} "
            "are in the bowl now?",
        ),
        ("First there are [n + m: thing].", "Then there are [r1 - j: thing]."),
    ),
    Schema(
        "separate_twice",
        {"n": to(12, 80), "m": to(2, 40), "j": to(2, 40)},
        (
            "{A} has {n thing}. {He gives} {m} to {B} and {j} to {C}. How many {things} does {A} "
            "have left?",
            "bake| A baker makes {n thing}. The shop sells {m} in the morning and {j} in the "
            "afternoon. How many {things} are left in the evening?",
            "page| A book has {n thing}. {A} reads {m} on Saturday and {j} on Sunday. How many "
            "pages are left to read?",
        ),
        ("After the first part, [n - m: thing] are left.", "In the end it is [r1 - j: thing]."),
        lambda n: n.n - n.m >= 2,
    ),
    Schema(
        "buy_and_change",
        {"n": to(2, 9), "p": to(3, 12), "m": BILLS},
        (
            "snack| {A} buys {n thing} for ${p} each and pays with a ${m} bill. How many dollars "
            "of change does {A} get?",
            "good| {A} had ${m} and bought {n thing} for ${p} each. How many dollars does {A} have "
            "left?",
            "{A} takes {n} friends to the cinema and pays for their tickets, ${p} each, from the "
            "${m} in {his} wallet. How many dollars are left in the wallet?",
        ),
        ("The price is [$p * n].", "That leaves [$m - $r1]."),
        lambda n: n.m <= 4 * n.n * n.p,
        MONEY,
    ),
    Schema(
        "two_items",
        {"p": to(3, 20), "q": to(3, 20), "m": BILLS},
        (
            "good| {A} buys {an thing} for ${p} and {an thing2} for ${q}. {He pays} with a ${m} "
            "bill. How many dollars of change does {A} get?",
            "good| {An thing} costs ${p} and {an thing2} costs ${q}. How many dollars does {A} "
            "have left from ${m} after buying both?",
        ),
        ("Both cost [$p + $q].", "That leaves [$m - $r1]."),
        lambda n: n.m <= 4 * (n.p + n.q),
        MONEY,
    ),
    Schema(
        "more_and_together",
        {"n": to(3, 40), "d": to(2, 20)},
        (
            "{A} has {n thing}. {B} has {d} more than {A}. How many {things} do they have "
            "together?",
            "fruit| {A} picked {n thing}, and {B} picked {d} more than {A}. How many {things} did "
            "they pick together?",
            "page| {A} read {n thing} on Monday and {d} more than that on Tuesday. How many pages "
            "did {A} read on both days together?",
        ),
        ("The larger number is [n + d: thing].", "Together that makes [n + r1: thing]."),
    ),
    Schema(
        "fewer_and_together",
        {"n": to(6, 50), "d": to(2, 20)},
        (
            "{A} has {n thing}. {B} has {d} fewer than {A}. How many {things} do they have "
            "together?",
            "child| There are {n} girls in a choir, and {d} fewer boys than girls. How many "
            "children are in the choir?",
            "bake| A bakery sold {n thing} on Friday and {d} fewer on Saturday. How many {things} "
            "did it sell on both days together?",
        ),
        ("The smaller number is [n - d].", "Together that makes [n + r1: thing]."),
        lambda n: n.n - n.d >= 2,
    ),
    Schema(
        "times_and_together",
        {"n": to(2, 25), "k": to(2, 6)},
        (
            "{A} has {n thing}. {B} has {times k} as many. How many {things} do they have "
            "together?",
            "fruit| {A} picked {n thing}, and {B} picked {times k} as many. How many {things} did "
            "they pick together?",
            "page| {A} read {n thing} on Saturday and {times k} as many on Sunday. How many pages "
            "did {A} read on the weekend?",
        ),
        ("{Times k} as many is [n * k: thing].", "Together that makes [n + r1: thing]."),
    ),
    Schema(
        "times_and_difference",
        {"n": to(2, 25), "k": to(3, 7)},
        (
            "{A} has {n thing}. {B} has {times k} as many. How many more {things} does {B} have "
            "than {A}?",
            "point| {A} scored {n thing} in a game, and {B} scored {times k} as many. How many "
            "more points did {B} score than {A}?",
        ),
        ("{B} has [n * k: thing].", "The difference is [r1 - n: thing]."),
    ),
    Schema(
        "join_share",
        {"n": to(4, 50), "m": to(4, 50), "k": to(2, 9)},
        (
            "fruit| {A} picked {n thing} and {B} picked {m}. They put all of them into {k} "
            "baskets, the same number into each. How many {things} are in each basket?",
            "child| A class has {n} girls and {m} boys. They form {k} groups of the same size. How "
            "many children are in each group?",
        ),
        ("Together there are [n + m: thing].", "In each there are [r1 / k: thing]."),
        lambda n: n.n + n.m >= 2 * n.k,
    ),
    Schema(
        "separate_pack",
        {"n": to(10, 90), "m": to(2, 9), "k": to(2, 9)},
        (
            "bake| {A} baked {n thing} and ate {m} of them. The rest go into {boxes} of {k}. How "
            "many {boxes} does {A} need?",
            "food| {A} buys {n thing}, but {m} of them are bad. {He packs} the others into {boxes} "
            "of {k}. How many {boxes} does {A} fill?",
        ),
        ("That leaves [n - m: thing].", "They fill [r1 / k: box]."),
        lambda n: n.m <= n.n / 3 and n.n - n.m > n.k,
    ),
    Schema(
        "fraction_left",
        {"n": to(6, 96), "k": to(3, 6)},
        (
            "{A} has {n thing} and gives {part k} of them to {B}. How many {things} does {A} have "
            "left?",
            "bake| A bakery made {n thing} and sold {part k} of them before noon. How many "
            "{things} were left at noon?",
            "student| There are {n thing} in a school. {Part k} of them come by bus, and the "
            "others walk. How many students walk?",
        ),
        ("{Part k} of {n} is [n / k: thing].", "That leaves [n - r1: thing]."),
    ),
    Schema(
        "speed_and_more",
        {"n": to(30, 80, 5), "h": to(2, 6), "m": to(3, 40)},
        (
            "{A} drives at {n} miles per hour for {h} hours and then {m} more miles through the "
            "city. How many miles does {A} drive in all?",
            "A train travels at {n} miles per hour for {h} hours. Then it goes another {m} miles "
            "to its last stop. How many miles does it travel in all?",
        ),
        ("In {h} hours it is [n * h] miles.", "In all it is [r1 + m] miles."),
        topics=DISTANCE,
    ),
    Schema(
        "speed_and_rest",
        {"d": to(100, 400, 10), "n": to(30, 80, 5), "h": to(2, 6)},
        (
            "{A} wants to visit a friend who lives {d} miles away. {He drives} at {n} miles per "
            "hour. How many miles are left after {h} hours?",
            "A bus has to travel {d} miles. So far it has gone {n} miles per hour for {h} hours. "
            "How many miles does it still have to go?",
        ),
        ("In {h} hours it is [n * h] miles.", "That leaves [d - r1] miles."),
        topics=DISTANCE,
    ),
    Schema(
        "younger_later",
        {"n": to(8, 60), "d": to(2, 15), "k": to(2, 20)},
        (
            "{A} is {n} years old. {His} cousin is {d} years younger. How old will {his} cousin be "
            "in {k} years?",
            "{A} is {n} years old, and {B} is {d} years younger than {A}. How old will {B} be in "
            "{k} years?",
        ),
        ("Now that is [n - d: year].", "In {k} years it will be [r1 + k: year]."),
        lambda n: n.n - n.d >= 3,
        AGE,
    ),
    Schema(
        "times_older_later",
        {"n": to(4, 16), "k": to(3, 8), "d": to(2, 15)},
        (
            "{A} is {n} years old. {His} mother is {times k} as old. How old will {his} mother be "
            "in {d} years?",
            "{A} is {n} years old, and {his} father is {times k} as old. How old will {his} father "
            "be in {d} years?",
        ),
        ("{Times k} as old is [n * k: year].", "In {d} years it will be [r1 + d: year]."),
        lambda n: n.n + 20 <= n.n * n.k <= n.n + 40,
        AGE,
    ),
    Schema(
        "pages_left",
        {"n": to(60, 400, 5), "m": to(5, 40), "d": to(2, 9)},
        (
            "A book has {n} pages. {A} reads {m} pages a day. How many pages are left after {d} "
            "days?",
            "{A} has to learn {n} words for a test and learns {m} words a day. How many words are "
            "left to learn after {d} days?",
        ),
        ("In {d} days it is [m * d].", "That leaves [n - r1]."),
        topics=TIME,
    ),
    Schema(
        "empty_seats",
        {"n": to(4, 20), "m": to(5, 20), "j": to(10, 200)},
        (
            "A theater has {n} rows of {m} seats. People sit in {j} of the seats. How many seats "
            "are empty?",
            "A parking garage has {n} floors with {m} spaces each. There are {j} cars in it. How "
            "many more cars can park there?",
        ),
        ("In all there are [n * m].", "That leaves [r1 - j]."),
        lambda n: n.j >= n.n * n.m / 4,
    ),
    Schema(
        "weeks_of_saving",
        {"n": to(40, 150), "m": to(5, 60), "p": to(3, 15)},
        (
            "dear| {A} wants to buy {an thing} for ${n}. {He has} ${m} and can save ${p} every "
            "week. In how many weeks will {A} have enough?",
            "dear| {An thing} costs ${n}. {A} already has ${m} and earns ${p} a week with a paper "
            "route. After how many weeks can {A} buy the {thing}?",
        ),
        ("{A} still needs [$n - $m].", "That takes [$r1 / $p: week]."),
        lambda n: n.n - n.m >= 2 * n.p,
        (*MONEY, *TIME),
    ),
    Schema(
        "wage_and_tips",
        {"p": to(9, 25), "h": to(2, 9), "q": to(5, 40)},
        (
            "{A} earns ${p} an hour in a café. Yesterday {he} worked {h} hours and got ${q} in "
            "tips. How many dollars did {A} make yesterday?",
            "For babysitting, {A} gets ${p} an hour and a tip of ${q}. How many dollars does {A} "
            "get for {h} hours?",
        ),
        ("The hours bring [$p * h].", "In all it is [$r1 + $q]."),
        topics=MONEY,
    ),
    Schema(
        "minutes",
        {"h": to(2, 9), "m": to(5, 55)},
        (
            "A flight takes {h} hours and {m} minutes. How many minutes is that?",
            "{A} worked in the garden for {h} hours and {m} minutes. How many minutes did {A} "
            "work?",
            "A train ride takes {h} hours and {m} minutes. How long is it in minutes?",
        ),
        ("{h} hours are [60 * h: minute].", "With the other {m} it is [r1 + m: minute]."),
        topics=TIME,
    ),
    Schema(
        "weeks",
        {"n": to(2, 12), "k": to(2, 8)},
        (
            "{A} drinks {n} glasses of water every day. How many glasses does {A} drink in {k} "
            "weeks?",
            "{A} walks {n} miles every day. How many miles does {A} walk in {k} weeks?",
            "A bakery uses {n} bags of flour every day. How many bags does it use in {k} weeks?",
        ),
        ("{k} weeks have [7 * k: day].", "In that time it is [r1 * n]."),
        topics=DISTANCE,
    ),
)

THREE_STEPS = (
    Schema(
        "two_kinds_and_change",
        {"n": to(2, 6), "p": to(3, 12), "k": to(2, 6), "q": to(3, 12), "m": (20, 50, 100)},
        (
            "snack| {A} buys {n thing} for ${p} each and {k thing2} for ${q} each. {He pays} with "
            "a ${m} bill. How many dollars of change does {A} get?",
            "good| {A} had ${m}. {He bought} {n thing} for ${p} each and {k thing2} for ${q} each. "
            "How many dollars does {A} have left?",
        ),
        (
            "The {things} cost [$p * n].",
            "The {things2} cost [$q * k].",
            "Both cost [$r1 + $r2].",
            "That leaves [$m - $r3].",
        ),
        lambda n: n.m <= 3 * (n.n * n.p + n.k * n.q),
        MONEY,
    ),
    Schema(
        "bake_and_pack",
        {"n": to(2, 12), "m": to(4, 15), "j": to(2, 12), "k": to(2, 12)},
        (
            "bake| {A} bakes {n tray} of {m thing}. Unfortunately, {j} of them burn. The rest go "
            "into {boxes} of {k}. How many {boxes} does {A} fill?",
            "fruit| {A} brings {n crate} of {m thing} to the market, but {j} of them are bad. "
            "{He packs} the others into {boxes} of {k}. How many {boxes} does {A} fill?",
        ),
        (
            "At first there are [n * m: thing].",
            "Without the bad ones, [r1 - j: thing] remain.",
            "They fill [r2 / k: box].",
        ),
        lambda n: n.j <= n.n * n.m / 3 and n.n * n.m - n.j > n.k,
    ),
    Schema(
        "wages_and_purchase",
        {"p": to(9, 25), "h": to(2, 8), "d": to(2, 6), "q": to(20, 200)},
        (
            "dear| {A} earns ${p} an hour and works {h} hours a day. After {d} days, {he buys} "
            "{an thing} for ${q}. How many dollars are left from {his} pay?",
            "dear| {A} works {h} hours a day for {d} days and gets ${p} an hour. Then {he spends} "
            "${q} on {an thing}. How many dollars of {his} pay does {A} have left?",
        ),
        (
            "A day brings [$p * h].",
            "In {d} days it is [$r1 * d].",
            "That leaves [$r2 - $q].",
        ),
        topics=(*MONEY, *TIME),
    ),
    Schema(
        "three_people",
        {"n": to(3, 30), "d": to(2, 15), "k": to(2, 4)},
        (
            "{A} has {n thing}. {B} has {d} more than {A}, and {C} has {times k} as many as {B}. "
            "How many {things} do the three have together?",
            "fruit| {A} picked {n thing}, {B} picked {d} more than {A}, and {C} picked {times k} "
            "as many as {B}. How many {things} did the three pick in all?",
            "point| {A} scored {n thing} in a game. {B} scored {d} more than {A}, and {C} scored "
            "{times k} as many as {B}. How many points did the three score together?",
        ),
        (
            "{B} has [n + d: thing].",
            "{C} has [r1 * k: thing].",
            "{A} and {B} together have [n + r1: thing].",
            "With {C} it is [r3 + r2: thing].",
        ),
    ),
    Schema(
        "three_people_fewer",
        {"n": to(3, 25), "k": to(2, 5), "d": to(2, 20)},
        (
            "{A} has {n thing}. {B} has {times k} as many, and {C} has {d} fewer than {B}. How "
            "many {things} do the three have together?",
            "page| {A} read {n thing} on Friday, {times k} as many on Saturday, and on Sunday {d} "
            "fewer than on Saturday. How many pages did {A} read on the three days?",
        ),
        (
            "The second number is [n * k: thing].",
            "The third number is [r1 - d: thing].",
            "The first two make [n + r1: thing].",
            "All three make [r3 + r2: thing].",
        ),
        lambda n: n.n * n.k - n.d >= 2,
    ),
    Schema(
        "two_kinds_of_rows",
        {"n": to(2, 9), "m": to(3, 12), "k": to(2, 9), "j": to(3, 12), "d": to(2, 20)},
        (
            "flower| {A} plants {n row} of {m thing} and {k row} of {j thing2}. Rabbits eat {d} of "
            "the flowers. How many flowers are left?",
            "bake| {A} bakes {n tray} of {m thing} and {k tray} of {j thing2} for a party. The "
            "guests eat all but {d} of them. How many pieces do the guests eat?",
        ),
        (
            "Of the {things} there are [n * m].",
            "Of the {things2} there are [k * j].",
            "In all it is [r1 + r2].",
            "Without the {d} it is [r3 - d].",
        ),
        lambda n: n.d <= (n.n * n.m + n.k * n.j) / 2,
    ),
    Schema(
        "fraction_and_more",
        {"n": to(6, 96), "k": to(2, 6), "j": to(2, 30)},
        (
            "{A} has {n thing}. {He gives} {part k} of them to {B} and then finds {j} more. How "
            "many {things} does {A} have now?",
            "food| There are {n thing} in a bowl. {A} eats {part k} of them, and {B} puts {j} new "
            "ones into the bowl. How many {things} are in the bowl now?",
            "person| There are {n thing} at a concert. {Part k} of them leave early, but then {j} "
            "others come. How many people are there now?",
        ),
        (
            "{Part k} of {n} is [n / k: thing].",
            "That leaves [n - r1: thing].",
            "With {j} more it is [r2 + j: thing].",
        ),
    ),
    Schema(
        "two_speeds",
        {"n": to(30, 80, 5), "h": to(2, 5), "m": to(30, 80, 5), "k": to(2, 5)},
        (
            "{A} drives at {n} miles per hour for {h} hours and then at {m} miles per hour for {k} "
            "hours. How many miles does {A} drive in all?",
            "A train travels at {n} miles per hour for {h} hours. Then it travels at {m} miles per "
            "hour for {k} hours. How many miles does the train travel in all?",
        ),
        (
            "The first part is [n * h] miles.",
            "The second part is [m * k] miles.",
            "In all it is [r1 + r2] miles.",
        ),
        lambda n: n.n != n.m,
        DISTANCE,
    ),
    Schema(
        "profit",
        {"n": to(3, 20), "p": to(2, 9), "q": to(4, 15), "d": to(3, 30)},
        (
            "good| {A} buys {n thing} for ${p} each and sells them at a flea market for ${q} each. "
            "The stand costs ${d}. How many dollars does {A} earn?",
            "snack| {A} sells {n thing} for ${q} each. Making one costs ${p}, and the stand costs "
            "${d} a day. How many dollars does {A} earn that day?",
        ),
        (
            "One brings [$q - $p].",
            "All {n} bring [$r1 * n].",
            "After paying for the stand, that is [$r2 - $d].",
        ),
        topics=MONEY,
    ),
    Schema(
        "sale",
        {"p": to(20, 120, 5), "k": (10, 20, 25, 30, 40, 50), "q": to(3, 25)},
        (
            "dear| {An thing} costs ${p}. In a sale it is {k}% off. How many dollars does {A} pay "
            "for the {thing} and a gift card of ${q}?",
            "dear| {A} buys {an thing} that usually costs ${p}, with {k}% off, and pays ${q} for "
            "delivery. How many dollars does {A} pay in all?",
        ),
        (
            "{k}% of ${p} is [$p * k / 100].",
            "So it costs [$p - $r1].",
            "In all that is [$r2 + $q].",
        ),
        topics=MONEY,
    ),
    Schema(
        "party",
        {"n": to(2, 9), "m": to(6, 12), "k": to(3, 15), "j": to(2, 4)},
        (
            "{A} orders {n} pizzas, and each is cut into {m} slices. {His} {k} guests eat {j} "
            "slices each. How many slices are left?",
            "food| {A} buys {n} bags with {m thing} in each for a group of {k} children. Each "
            "child gets {j thing}. How many {things} are left?",
        ),
        ("In all there are [n * m].", "The group gets [k * j].", "That leaves [r1 - r2]."),
    ),
    Schema(
        "rest_of_a_book",
        {"n": to(80, 400, 5), "m": to(8, 40), "d": to(2, 7), "k": to(2, 9)},
        (
            "A book has {n} pages. {A} reads {m} pages a day for {d} days. Then {he wants} to "
            "finish it in {k} days, with the same number of pages each day. How many pages a day "
            "is that?",
            "{A} has to learn {n} words. {He learned} {m} words a day for {d} days. The test is in "
            "{k} days. How many words a day does {A} have to learn until then?",
        ),
        ("In {d} days it is [m * d].", "That leaves [n - r1].", "A day that is [r2 / k]."),
        lambda n: 4 <= (n.n - n.m * n.d) / n.k <= 60,
        TIME,
    ),
    Schema(
        "legs",
        {"n": to(2, 40), "m": to(2, 40)},
        (
            "There are {n} chickens and {m} cows on a farm. How many legs do the animals have in "
            "all?",
            "{A} counts {n} ducks and {m} sheep in a field. How many legs do they have altogether?",
            "In a bicycle shop there are {n} bicycles and {m} small cars for children. How many "
            "wheels do they have altogether?",
        ),
        (
            "Those with two have [2 * n].",
            "Those with four have [4 * m].",
            "In all it is [r1 + r2].",
        ),
    ),
    Schema(
        "average",
        {"n": to(3, 40), "m": to(3, 40), "j": to(3, 40)},
        (
            "point| {A} scored {n}, {m} and {j thing} in three games. How many points did {A} "
            "score on average?",
            "page| {A} read {n thing} on Monday, {m} on Tuesday and {j} on Wednesday. How many "
            "pages did {A} read per day on average?",
        ),
        (
            "The first two make [n + m].",
            "All three make [r1 + j].",
            "The average is [r2 / 3: thing].",
        ),
        lambda n: n.n != n.m,
        TIME,
    ),
    Schema(
        "three_ages",
        {"n": to(6, 40), "d": to(2, 20), "k": (2, 3)},
        (
            "{A} is {n} years old. {His} sister is {d} years older, and {his} cousin is {part k} "
            "as old as {his} sister. How old are the three together?",
            "{A} is {n} years old. {B} is {d} years older than {A}, and {C} is {part k} as old as "
            "{B}. What is the sum of their ages?",
        ),
        (
            "The second is [n + d: year] old.",
            "The third is [r1 / k: year] old.",
            "The first two make [n + r1].",
            "All three make [r3 + r2].",
        ),
        topics=AGE,
    ),
    Schema(
        "tank",
        {"n": to(100, 600, 10), "m": to(10, 200, 5), "p": to(4, 30), "k": to(3, 15)},
        (
            "A water tank holds {n} liters, and there are {m} liters in it. A pump adds {p} liters "
            "every minute. How many more liters fit in after {k} minutes?",
            "{A} fills a pool of {n} liters that already has {m} liters in it. Every minute, {p} "
            "liters flow in. How many liters are still missing after {k} minutes?",
        ),
        (
            "The new water is [p * k: liter].",
            "Then there are [m + r1: liter] in it.",
            "That leaves [n - r2: liter].",
        ),
        topics=TIME,
    ),
    Schema(
        "fence",
        {"n": to(4, 40), "m": to(3, 30), "p": to(3, 15)},
        (
            "A garden is {n} meters long and {m} meters wide. A fence costs ${p} per meter. How "
            "many dollars does a fence around the whole garden cost?",
            "{A} wants to put a fence around a field that is {n} meters long and {m} meters wide. "
            "One meter of fence costs ${p}. How many dollars does {A} need?",
        ),
        (
            "Two sides are [n + m: meter].",
            "All four are [2 * r1: meter].",
            "The fence costs [$p * r2].",
        ),
        lambda n: n.n > n.m,
        (*MONEY, *DISTANCE),
    ),
    Schema(
        "vans",
        {"n": to(5, 40), "m": to(5, 40), "k": to(4, 9), "p": to(20, 90, 5)},
        (
            "A class of {n} girls and {m} boys goes on a trip. Each van holds {k} children, and "
            "all vans are full. A van costs ${p}. How many dollars do the vans cost?",
            "For a camp, {n} boys and {m} girls sleep in tents for {k}, and every tent is full. "
            "One tent costs ${p} to rent. How many dollars do the tents cost?",
        ),
        ("Together there are [n + m: child].", "They need [r1 / k].", "The cost is [$p * r2]."),
        topics=MONEY,
    ),
)

BESIDE_THE_POINT: tuple[tuple[str, str, range], ...] = (
    # what it is about, the sentence, the values of its number
    ("age", "{A} is {x} years old.", to(18, 60)),
    ("age", "{A's} house is {x} years old.", to(5, 90)),
    ("distance", "{A} lives {x} miles from the station.", to(2, 20)),
    ("distance", "The nearest town is {x} miles away.", to(3, 40)),
    ("time", "{A} got up {x} minutes late today.", to(5, 50)),
    ("time", "The bus comes every {x} minutes.", to(5, 40)),
    ("money", "{A's} phone cost ${x}.", to(100, 600, 10)),
    ("money", "A ride on the bus costs ${x}.", to(2, 5)),
    ("count", "{A} lives on a street with {x} houses.", to(10, 90)),
    ("count", "{A} has {x} unread messages on {his} phone.", to(2, 40)),
    ("count", "There are {x} trees along the street.", to(8, 60)),
    ("weather", "It is {x} degrees outside.", to(10, 30)),
    ("weather", "It has rained on {x} days this month.", to(2, 15)),
)
"""Sentences that change nothing about the answer."""

SCHEMAS: dict[str, tuple[Schema, ...]] = {
    "basic": SUMS + ONE_STEP,
    "intermediate": TWO_STEPS,
    "advanced": THREE_STEPS,
}
