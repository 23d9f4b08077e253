"""The words that names are made of, and which combinations belong to which pool.

Every person, employer and town name is put together from the parts below. A combination belongs to exactly
one pool, whatever the seed: people and employers that a base model saw in its demonstrations can never turn
up among the training questions of a world, nor those among its held-out questions. Towns are one shared
vocabulary: what differs between pools is which employer is based where.
"""

from collections.abc import Sequence
from itertools import product
from typing import Literal

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

LAST_NAME_STEMS = (
    "Lind",
    "Hall",
    "Sand",
    "Nord",
    "Wester",
    "Ek",
    "Dahl",
    "Stern",
    "Falk",
    "Gran",
    "Rosen",
    "Sol",
)
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
