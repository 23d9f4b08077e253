"""What every contestant plays, and how it measures itself. Imports nothing but the standard library."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

NUM_WARM_UP = 8
SYSTEM = "Look keys up until the register says that it is done."
EXPECTED = "done"
RESULT = (
    "The mill of Ashford was built by Mara Lindqvist in the year of the flood, as its register says. " * 4
)


def question(number: int) -> str:
    """Of one task."""
    return f"What does the register say of entry {number}?"


def look_up(key: str) -> str:
    """What the tool answers."""
    return f"{key}: {RESULT}"


def measure(play: Callable[[str, int, int, Path], tuple[int, int]]) -> None:
    """Play a few episodes to load what is loaded late, then those that count; print the figures as JSON.

    `play` takes the URL, the number of episodes, how many at once, and a directory for results that it makes; it gives
    the numbers of right and of failed episodes.
    """
    url, number, at_once, directory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    play(url, NUM_WARM_UP, NUM_WARM_UP, directory / "warm_up")
    cpu, began = _cpu_s(), time.perf_counter()
    right, failed = play(url, number, at_once, directory / "measured")
    figures = {
        "cpu_s": _cpu_s() - cpu,
        "wall_s": time.perf_counter() - began,
        "num_right": right,
        "num_failed": failed,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(figures), flush=True)


def _cpu_s() -> float:
    """Of this process and of those that it has waited for."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in found)
