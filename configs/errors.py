"""What a user is told when something they wrote is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Bad input. The message is for the user: a sentence a line, with where, what, and what is right."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`, best first. Case does not count; a beginning is like the whole."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.6)
    matches += [candidate for candidate in by_lower if len(name) > 1 and candidate.startswith(name.lower())]
    return [by_lower[match] for match in dict.fromkeys(matches)][:count]


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`, did you mean 'x'?` for the nearest known name, or nothing when none is near."""
    matches = nearest(name, known, count=1)
    return f", did you mean '{prefix}{matches[0]}'?" if matches else ""
