"""School problems in words, made from a seed, with their solutions written as those of GSM8K (arXiv 2110.14168).

One or two steps of arithmetic with small whole numbers: what a model of some hundred million parameters can learn.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = (
    "Ana",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Farid",
    "Grace",
    "Hugo",
    "Ida",
    "Jonas",
    "Lena",
    "Maya",
    "Omar",
    "Rosa",
)
THINGS = ("apples", "marbles", "stickers", "coins", "cards", "pencils", "shells", "books", "eggs", "buttons")
BOXES = ("bags", "boxes", "baskets", "jars")


@dataclass(frozen=True, kw_only=True, slots=True)
class WordProblem:
    """A problem, how it is solved, and its answer."""

    text: str
    solution: str
    """A step a line, each with its calculation in GSM8K's marks: `3*4=<<3*4=12>>12`; then `#### 12`."""
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Words:
    """What a problem tells of."""

    name: str
    other: str
    things: str
    boxes: str


def make_word_problem(rng: random.Random) -> WordProblem:
    """One problem of a random kind."""
    name, other = rng.sample(NAMES, 2)
    words = _Words(name=name, other=other, things=rng.choice(THINGS), boxes=rng.choice(BOXES))
    text, steps = rng.choice(_KINDS)(rng, words)
    lines = [f"{said} {expression}=<<{expression}={value}>>{value}." for said, expression, value in steps]
    answer = str(steps[-1][2])
    return WordProblem(text=text, solution="\n".join([*lines, f"#### {answer}"]), answer=answer)


_Step = tuple[str, str, int]
"""What a sentence begins with, its expression, and the value."""


def _given_and_found(rng: random.Random, words: _Words) -> tuple[str, list[_Step]]:
    has, gives, finds = rng.randint(20, 60), rng.randint(3, 19), rng.randint(3, 30)
    return (
        f"{words.name} has {has} {words.things}. {words.name} gives {gives} of them to {words.other} and then finds "
        f"{finds} more. How many {words.things} does {words.name} have now?",
        [
            ("After giving some away there are", f"{has}-{gives}", has - gives),
            ("After finding more there are", f"{has - gives}+{finds}", has - gives + finds),
        ],
    )


def _packed_less_some(rng: random.Random, words: _Words) -> tuple[str, list[_Step]]:
    boxes, each, lost = rng.randint(3, 9), rng.randint(4, 12), rng.randint(2, 11)
    return (
        f"{words.name} has {boxes} {words.boxes} with {each} {words.things} in each. {words.name} loses {lost} "
        f"{words.things}. How many {words.things} are left?",
        [
            ("In all there are", f"{boxes}*{each}", boxes * each),
            ("What is left is", f"{boxes * each}-{lost}", boxes * each - lost),
        ],
    )


def _packed_and_some(rng: random.Random, words: _Words) -> tuple[str, list[_Step]]:
    boxes, each, more = rng.randint(3, 9), rng.randint(4, 12), rng.randint(2, 20)
    return (
        f"There are {each} {words.things} in each of {boxes} {words.boxes}, and {more} {words.things} on the table. "
        f"How many {words.things} are there in all?",
        [
            (f"In the {words.boxes} there are", f"{boxes}*{each}", boxes * each),
            ("In all there are", f"{boxes * each}+{more}", boxes * each + more),
        ],
    )


def _shared_and_got(rng: random.Random, words: _Words) -> tuple[str, list[_Step]]:
    friends, each, got = rng.randint(2, 8), rng.randint(3, 9), rng.randint(2, 15)
    return (
        f"{friends} friends share {friends * each} {words.things} equally. {words.name} is one of them and gets {got} "
        f"{words.things} more from {words.other}. How many {words.things} does {words.name} have?",
        [
            ("Each friend gets", f"{friends * each}/{friends}", each),
            (f"{words.name} has", f"{each}+{got}", each + got),
        ],
    )


def _times_as_many(rng: random.Random, words: _Words) -> tuple[str, list[_Step]]:
    has, times = rng.randint(3, 15), rng.randint(2, 5)
    return (
        f"{words.name} has {has} {words.things}. {words.other} has {times} times as many. How many {words.things} do "
        "they have together?",
        [
            (f"{words.other} has", f"{times}*{has}", times * has),
            ("Together they have", f"{has}+{times * has}", has + times * has),
        ],
    )


def _change(rng: random.Random, words: _Words) -> tuple[str, list[_Step]]:
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    paid = count * price + rng.randint(1, 20)
    return (
        f"{words.name} buys {count} {words.things} for {price} dollars each and pays with {paid} dollars. How many "
        f"dollars does {words.name} get back?",
        [
            ("The price of all is", f"{count}*{price}", count * price),
            ("The change is", f"{paid}-{count * price}", paid - count * price),
        ],
    )


def _weeks(rng: random.Random, words: _Words) -> tuple[str, list[_Step]]:
    a_day, weeks = rng.randint(2, 9), rng.randint(2, 5)
    return (
        f"{words.name} draws {a_day} pictures every day. How many pictures does {words.name} draw in {weeks} weeks?",
        [
            ("The number of days is", f"{weeks}*7", weeks * 7),
            ("The number of pictures is", f"{weeks * 7}*{a_day}", weeks * 7 * a_day),
        ],
    )


def _fewer(rng: random.Random, words: _Words) -> tuple[str, list[_Step]]:
    has = rng.randint(20, 60)
    fewer = rng.randint(3, 17)
    return (
        f"{words.name} collected {has} {words.things} and {words.other} collected {fewer} fewer. How many "
        f"{words.things} did they collect in all?",
        [
            (f"{words.other} collected", f"{has}-{fewer}", has - fewer),
            ("In all they collected", f"{has}+{has - fewer}", has + has - fewer),
        ],
    )


_KINDS: tuple[Callable[[random.Random, _Words], tuple[str, list[_Step]]], ...] = (
    _given_and_found,
    _packed_less_some,
    _packed_and_some,
    _shared_and_got,
    _times_as_many,
    _change,
    _weeks,
    _fewer,
)
