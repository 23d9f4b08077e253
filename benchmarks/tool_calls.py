"""Microseconds of a tool's call, and of reading its arguments in the two ways there are, in one run.

The first tool is that of `docs/tools.md`: a dataclass, an enumeration and a bounded number. "strict types" is pydantic
reading all arguments in one go; "schema, then types" checks them against the JSON schema and then makes the values one
by one, as calls are read of which strict types cannot tell. The second tool takes a text and a number, which need
neither.

The rows alternate in rounds; a figure is the median over rounds of CPU time, which other work on the machine changes
little.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from pydantic import Field

from polyturn import tool
from polyturn.tools.arguments import ArgumentChecker
from polyturn.tools.tool import Tool, as_tool
from polyturn.tools.toolset import Toolset
from polyturn.tools.types import ToolCall


class Unit(Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


@dataclass
class Place:
    town: str
    country: str = "NO"


@tool
def forecast(
    place: Place,
    unit: Unit = Unit.CELSIUS,
    days: Annotated[int, "How many days ahead.", Field(ge=1, le=14)] = 3,
) -> dict[str, list[int]]:
    """The weather of the next days.

    Args:
        place: Where.
        unit: Of the temperatures.
    """
    del place, unit
    return {"highs": [20] * days}


@tool
def search(query: str, top_k: int = 3) -> str:
    """Search."""
    return query * top_k


FORECAST = {"place": {"town": "Oslo"}, "unit": "F", "days": 2}
SEARCH = {"query": "who wrote it", "top_k": 2}


def call_of(name: str, arguments: Mapping[str, Any]) -> Callable[[], object]:
    toolset, call = Toolset([forecast, search]), ToolCall(id="call_0", name=name, arguments=arguments)
    assert toolset.call(call).ok
    return lambda: toolset.call(call)


def strictly(made: Tool, arguments: Mapping[str, Any]) -> Callable[[], object]:
    types = made.types
    assert types is not None and types.read(arguments) is not None
    return lambda: types.read(arguments)


def by_schema(made: Tool, arguments: Mapping[str, Any]) -> Callable[[], object]:
    types, checker = made.types, ArgumentChecker(made.spec.name, made.spec.parameters, made.types)
    assert types is not None
    return lambda: (checker.complaint(arguments), types.convert(arguments))


def measure(rows: Mapping[str, Callable[[], object]], *, num_rounds: int, round_s: float) -> dict[str, float]:
    """Microseconds of CPU time for each row."""
    counts: dict[str, int] = {}
    for name, work in rows.items():
        started = time.process_time()
        for _ in range(100):
            work()
        counts[name] = max(5, int(round_s / max((time.process_time() - started) / 100, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in rows}
    gc.collect()
    gc.disable()
    for _ in range(num_rounds):
        for name, work in rows.items():
            started = time.process_time()
            for _ in range(counts[name]):
                work()
            times[name].append((time.process_time() - started) / counts[name] * 1e6)
    gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="rounds in which the rows alternate")
    parser.add_argument("--round-seconds", type=float, default=0.05, help="how long each row runs in a round")
    parser.add_argument("--short", action="store_true", help="8 rounds of 0.02 s")
    arguments = parser.parse_args()
    num_rounds, round_s = (8, 0.02) if arguments.short else (arguments.rounds, arguments.round_seconds)
    rows = {
        "forecast, the whole call": call_of("forecast", FORECAST),
        "forecast, strict types": strictly(as_tool(forecast), FORECAST),
        "forecast, schema, then types": by_schema(as_tool(forecast), FORECAST),
        "search, the whole call": call_of("search", SEARCH),
    }
    microseconds = measure(rows, num_rounds=num_rounds, round_s=round_s)
    for name, value in microseconds.items():
        print(f"  {name:<30} {value:8.2f} us")
    ratio = microseconds["forecast, schema, then types"] / microseconds["forecast, strict types"]
    print(f"  strict types take 1/{ratio:.0f} of the time")
    print(
        json.dumps(
            {"us": {name: round(value, 3) for name, value in microseconds.items()}, "ratio": round(ratio, 1)}
        )
    )


if __name__ == "__main__":
    main()
