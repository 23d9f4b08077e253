"""What happens to the engines of a run, for people and programs: sentences, a log, who is there now, and figures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from polyturn.rollout.whole_file import whole_file


class EngineLog:
    """Writes `engines.jsonl`, an event a line, and `engines.json`, the engines as they are; keeps a step's figures."""

    def __init__(self, directory: Path, tell: Callable[[str], None]) -> None:
        """`tell` shows a sentence to people."""
        self._events = directory / "engines.jsonl"
        self._standing = directory / "engines.json"
        self._tell = tell
        self._counts: Counter[str] = Counter()
        self._longest: dict[str, float] = {}

    def note(self, event: str, sentence: str, **details: Any) -> None:
        """Something happened to an engine."""
        line = {"time": time.time(), "event": event, "sentence": sentence, **details}
        with self._events.open("ab") as file:
            file.write(orjson.dumps(line) + b"\n")
        self._tell(sentence)

    def stand(self, engines: Sequence[Mapping[str, Any]]) -> None:
        """What engines there are from now on."""
        with whole_file(self._standing) as file:
            file.write(orjson.dumps({"time": time.time(), "engines": engines}, option=orjson.OPT_INDENT_2))

    def count(self, figure: str) -> None:
        """One more of them in this step."""
        self._counts[figure] += 1

    def took(self, figure: str, seconds: float) -> None:
        """The longest of a step is kept."""
        self._longest[figure] = max(seconds, self._longest.get(figure, 0.0))

    def take_figures(self) -> dict[str, float]:
        """Counts and longest times since the last call."""
        row = {figure: float(count) for figure, count in self._counts.items()} | self._longest
        self._counts, self._longest = Counter(), {}
        return row
