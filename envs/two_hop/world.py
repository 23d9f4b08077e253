"""A synthetic knowledge base: people, their employers, the towns of those, and the words that names are made of."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from polyturn.tools.search.corpus import Passage

Pool = Literal["demonstration", "train", "heldout"]

POOL_OF_RESIDUE: tuple[Pool, ...] = ("demonstration", "train", "demonstration", "heldout")
"""Pool of the combination (i, j), by (i + j) modulo 4: every part occurs in every pool."""

_FIRST_NAMES = (
    "Ada Alma Anton Aron Bella Boris Carla Clara Cora Dora Edda Elin Elma Emil Erik Esther Eva Felix Fiona Frida "
    "Gerda Greta Gustav Hanna Hector Heidi Helga Hugo Ida Ines Inga Irma Ivan Jonas Julia Karin Karla Klara Lars "
    "Lea Lena Linda Linus Lotta Lucas Magda Mara Marco Maria Marta Mira Nadia Nils Nina Nora Olga Oskar Otto Paula "
    "Petra Rita Robin Rosa Ruben Selma Silas Simon Sofia Stella Sven Tara Tessa Thea Tilda Tomas Vera Viktor Viola "
    "Walter Wilma Xenia Yara Yvonne Zelda"
)
FIRST_NAMES = tuple(_FIRST_NAMES.split())

_STEMS = "Lind Hall Sand Nord Wester Ek Dahl Stern Falk Gran Rosen Sol"
LAST_NAME_STEMS = tuple(_STEMS.split())
LAST_NAME_ENDINGS = ("qvist", "man", "gren", "strom", "feld", "berg", "mark", "lund")

EMPLOYER_STEMS = ("Hollo", "Brad", "Pem", "Win", "Har", "Ald", "Cres", "Fen", "Gar", "Kirk", "Mel", "Thorn")
EMPLOYER_ENDINGS = ("way", "more", "ton", "ley", "combe", "stock")
_TRADES = (
    "Mills Foundry Press Bank Brewery Shipyard Glassworks Pottery Dairy Bakery Printers Motors Textiles Chemicals "
    "Timber Papers Optics Instruments Publishing Railways"
)
EMPLOYER_TRADES = tuple(_TRADES.split())

TOWN_STEMS = ("Lud", "Ash", "Carn", "Dun", "Elm", "Grim", "Hex", "Keld", "Lang", "Mor", "Pen", "Rad")
TOWN_ENDINGS = ("ford", "wick", "bury", "mouth", "ham", "dale", "port", "haven")


def pooled_pairs(firsts: Sequence[str], seconds: Sequence[str], pool: Pool) -> list[str]:
    """The names `first second` whose combination belongs to `pool`, in a fixed order."""
    return [
        f"{first} {second}"
        for (i, first), (j, second) in product(enumerate(firsts), enumerate(seconds))
        if POOL_OF_RESIDUE[(i + j) % len(POOL_OF_RESIDUE)] == pool
    ]


def last_names() -> list[str]:
    """All last names, stems and endings combined."""
    return [stem + ending for stem, ending in product(LAST_NAME_STEMS, LAST_NAME_ENDINGS)]


def employer_words() -> list[str]:
    """All first words of employer names."""
    return [stem + ending for stem, ending in product(EMPLOYER_STEMS, EMPLOYER_ENDINGS)]


def people_names(pool: Pool) -> list[str]:
    """All full names of people in `pool`."""
    return pooled_pairs(FIRST_NAMES, last_names(), pool)


def employer_names(pool: Pool) -> list[str]:
    """All employer names in `pool`."""
    return pooled_pairs(employer_words(), EMPLOYER_TRADES, pool)


def town_names() -> list[str]:
    """All towns, shared by every pool."""
    return [stem + ending for stem, ending in product(TOWN_STEMS, TOWN_ENDINGS)]


EMPLOYER_PHRASES = ("works for {e}", "is employed by {e}", "has a job at {e}", "earns a living with {e}")
BIRTH_PHRASES = ("was born in {t}", "grew up in {t}", "comes from {t}", "went to school in {t}")
HABIT_PHRASES = ("plays the {x}", "owns an old {x}", "once lost a {x}", "likes to paint a {x}")
HABIT_WORDS = ("violin", "clock", "kite", "map", "drum", "boat", "lamp", "coin")

BASE_PHRASES = ("is based in {t}", "has its head office in {t}", "is run from {t}", "keeps its seat in {t}")
BRANCH_PHRASES = (
    "opened its first shop in {t}",
    "sells mostly to {t}",
    "has a warehouse in {t}",
    "buys wood from {t}",
)
STORY_PHRASES = ("was founded by {p}", "was once owned by {p}", "is known for its {x}", "lost a {x} to {p}")

TOWN_PHRASES = (
    "lies on a river",
    "has a small harbour",
    "holds a market in spring",
    "is known for its bridge",
)
TOWN_TIE_PHRASES = (
    "once gave a medal to {p}",
    "gets its bread from {e}",
    "was painted by {p}",
    "likes to praise {e}",
)

QUESTION_PHRASES = (
    "In which town is the employer of {p} based?",
    "Where is the employer of {p} based?",
    "Which town is home to the employer of {p}?",
    "{p} works for a firm. In which town is it based?",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question that takes two searches, with the chain of facts that answers it."""

    id: str
    text: str
    person: str
    employer: str
    town: str
    birth_town: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSize:
    """How many entities each pool of a world has."""

    num_people: int = 1500
    num_employers: int = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Passages in index order, and the questions of each pool."""

    seed: int
    passages: tuple[Passage, ...]
    questions: dict[Pool, tuple[Question, ...]]


def make_world(
    seed: int, *, size: WorldSize | None = None, pools: Sequence[Pool] = ("train", "heldout")
) -> World:
    """Generate the world of `seed`, with people and employers of each of `pools`.

    Raises:
        ValueError: a pool has fewer names than `size` asks for.
    """
    size = size or WorldSize()
    rng = random.Random(f"two-hop world {seed}")
    towns = town_names()
    texts: list[tuple[str, str]] = []
    questions: dict[Pool, tuple[Question, ...]] = {}
    everyone: list[str] = []
    all_employers: list[str] = []
    for pool in pools:
        people = _draw(rng, people_names(pool), size.num_people, f"people of pool {pool!r}")
        employers = _draw(rng, employer_names(pool), size.num_employers, f"employers of pool {pool!r}")
        seats = {employer: rng.choice(towns) for employer in employers}
        asked = []
        for index, person in enumerate(people):
            employer = rng.choice(employers)
            birth_town = _other(rng, towns, seats[employer])
            texts.append((person, _person_text(rng, person, employer, birth_town)))
            asked.append(
                Question(
                    id=f"{pool}-{index}",
                    text=rng.choice(QUESTION_PHRASES).format(p=person),
                    person=person,
                    employer=employer,
                    town=seats[employer],
                    birth_town=birth_town,
                )
            )
        texts += [(name, _employer_text(rng, name, seat, towns, people)) for name, seat in seats.items()]
        questions[pool] = tuple(asked)
        everyone += people
        all_employers += employers
    texts += [(town, _town_text(rng, town, everyone, all_employers)) for town in towns]
    rng.shuffle(texts)
    passages = tuple(Passage(id=str(i), title=title, text=text) for i, (title, text) in enumerate(texts))
    return World(seed=seed, passages=passages, questions=questions)


def _draw(rng: random.Random, names: list[str], count: int, what: str) -> list[str]:
    if not 0 < count <= len(names):
        raise ValueError(f"a world can have 1 to {len(names)} {what}, not {count}")
    return rng.sample(names, count)


def _other(rng: random.Random, towns: Sequence[str], but: str) -> str:
    while (town := rng.choice(towns)) == but:
        pass
    return town


def _sentences(rng: random.Random, name: str, pronoun: str, predicates: list[str]) -> str:
    """The predicates in random order; the first sentence names its subject, the others may use a pronoun."""
    rng.shuffle(predicates)
    subjects = [name] + [rng.choice((name, pronoun)) for _ in predicates[1:]]
    return " ".join(
        f"{subject} {predicate}." for subject, predicate in zip(subjects, predicates, strict=True)
    )


def _person_text(rng: random.Random, person: str, employer: str, birth_town: str) -> str:
    predicates = [
        rng.choice(EMPLOYER_PHRASES).format(e=employer),
        rng.choice(BIRTH_PHRASES).format(t=birth_town),
    ]
    if rng.random() < 0.3:
        predicates.append(rng.choice(HABIT_PHRASES).format(x=rng.choice(HABIT_WORDS)))
    return _sentences(rng, person, rng.choice(("He", "She")), predicates)


def _employer_text(
    rng: random.Random, employer: str, seat: str, towns: Sequence[str], people: Sequence[str]
) -> str:
    predicates = [
        rng.choice(BASE_PHRASES).format(t=seat),
        rng.choice(BRANCH_PHRASES).format(t=_other(rng, towns, seat)),
    ]
    if rng.random() < 0.3:
        story = rng.choice(STORY_PHRASES)
        predicates.append(story.format(p=rng.choice(people), x=rng.choice(HABIT_WORDS)))
    return _sentences(rng, employer, "It", predicates)


def _town_text(rng: random.Random, town: str, people: Sequence[str], employers: Sequence[str]) -> str:
    tie = rng.choice(TOWN_TIE_PHRASES).format(p=rng.choice(people), e=rng.choice(employers))
    return _sentences(rng, town, "It", [rng.choice(TOWN_PHRASES), tie])
