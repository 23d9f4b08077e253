"""The names of splits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Name = TypeVar("Name", bound=str)


def known_split(split: str, splits: Iterable[Name]) -> Name:
    """The split, if it is one of `splits`.

    Raises:
        ValueError: it is none of them; the message lists them.
    """
    names = tuple(splits)
    for name in names:
        if name == split:
            return name
    raise ValueError(f"unknown split {split!r}; the splits are {', '.join(names)}")
