"""Throughput of dialects: characters per second of ours and of SGLang's detectors on the same texts, in one run.

    python benchmarks/parsing.py [--short]

Texts are turns of a policy: one call behind a sentence, eight calls, a call whose argument is a file of 20,000
characters, prose without a call, a long thought before a call. Each detector reads the texts in its own format, made
anew for every text as SGLang's server does; the adapter is our dialect around it, with its checks for what was lost.
Rounds alternate between the readers; a figure is the processor time of the best one: other load only adds.

`adapter_share` is the adapter's time over the bare detector's, `ours_over_sglang` the speed of our Hermes dialect over
that of SGLang's Hermes detector, both of all texts together. `growth` is ours per character at 64 times the calls over
that at 4, 1.0 where time is linear. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

from polyturn.agents.dialects import HermesDialect, JSONDialect, PythonDialect, SGLangDialect
from polyturn.agents.dialects.sglang_formats import FORMATS
from polyturn.tools.types import ToolSpec

SCHEMA = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
TOOLS = (ToolSpec(name="search", description="Search the knowledge base.", parameters=SCHEMA),)
PARSERS = ("hermes", "qwen25", "qwen3_coder", "glm45", "kimi_k2", "deepseekv31", "mistral", "llama3")
SENTENCE = "The mill of Ashford was built in the year of the flood, as its register says. "
LINE = "    total = sum(price for _, price in rows)\n"
OURS = {
    "hermes": (HermesDialect(), FORMATS["hermes"].example),
    "json": (JSONDialect(), FORMATS["llama3"].example),
    "pythonic": (PythonDialect(), '[NAME(KEY="VALUE")]'),
}


def texts_of(example: str) -> dict[str, str]:
    """The turns in one format."""

    def call(value: str) -> str:
        # The last of these replaces nothing that the first put there.
        return example.replace("VALUE", value).replace("NAME", "search").replace("KEY", "query")

    code = LINE * (20_000 // len(LINE))
    written = json.dumps(code)[1:-1] if '"VALUE"' in example else code
    return {
        "one call": SENTENCE + "\n" + call("Ida Holloway"),
        "eight calls": "\n".join(call(f"Ida {number}") for number in range(8)),
        "a file": call(written),
        "prose": SENTENCE * 20,
        "thought": f"<think>{SENTENCE * 60}</think>\n" + call("Ida Holloway"),
    }


def characters_per_s(readers: dict[str, Callable[[str], object]], text: str, rounds: int) -> dict[str, float]:
    """Characters per second of each reader, the best of alternating rounds."""
    repeats = max(1, 20_000 // len(text))
    best = dict.fromkeys(readers, float("inf"))
    for _ in range(rounds):
        for name, read in readers.items():
            started = time.thread_time()
            for _ in range(repeats):
                read(text)
            best[name] = min(best[name], (time.thread_time() - started) / repeats)
    return {name: len(text) / seconds for name, seconds in best.items()}


def growth(rounds: int) -> float:
    """Our Hermes dialect per character of 256 calls over that of 4."""
    example = FORMATS["hermes"].example + "\n"
    few, many = (
        characters_per_s({"ours": HermesDialect().parse}, example * number, rounds)["ours"]
        for number in (4, 256)
    )
    return few / many


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--short", action="store_true", help="fewer rounds")
    rounds = 5 if arguments.parse_args().short else 30
    speeds: dict[str, dict[str, float]] = {}
    for parser in PARSERS:
        adapter = SGLangDialect(parser)
        bare = adapter.bare_parser(TOOLS)
        readers: dict[str, Callable[[str], object]] = {
            f"sglang:{parser}": lambda text, adapter=adapter: adapter.parse(text, tools=TOOLS),
            f"{parser} bare": bare,
        }
        if parser == "hermes":
            readers["hermes"] = OURS["hermes"][0].parse
        for what, text in texts_of(FORMATS[parser].example).items():
            for name, speed in characters_per_s(readers, text, rounds).items():
                speeds.setdefault(name, {})[what] = speed
    for name in ("json", "pythonic"):
        dialect, example = OURS[name]
        texts = texts_of(example)
        if name == "pythonic":
            texts["eight calls"] = "[" + texts["eight calls"].replace("]\n[", ", ")[1:]
        speeds[name] = {
            what: characters_per_s({name: dialect.parse}, text, rounds)[name] for what, text in texts.items()
        }
    width = max(map(len, speeds))
    print(
        " " * width,
        *(f"{what:>12}" for what in next(iter(speeds.values()))),
        " million characters per second",
    )
    for name, by_text in speeds.items():
        print(f"{name:{width}}", *(f"{speed / 1e6:12.2f}" for speed in by_text.values()))

    def over(one: str, other: str) -> float:
        return statistics.geometric_mean(speeds[one][what] / speeds[other][what] for what in speeds[one])

    result = {
        "ours_over_sglang": round(over("hermes", "hermes bare"), 2),
        "adapter_share": round(
            statistics.geometric_mean(over(f"{parser} bare", f"sglang:{parser}") for parser in PARSERS), 2
        ),
        "growth": round(growth(rounds), 2),
        "million_characters_per_s": {
            name: {what: round(speed / 1e6, 2) for what, speed in by_text.items()}
            for name, by_text in speeds.items()
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
