"""Measures reasoning-gym's scorers: `python -m polyturn.envs.adapters.reasoning_gym.measure [DATASET...]`.

Each dataset, with its default options, is asked for items and given answers that deserve nothing. The defects found
are printed as JSON, in the form of `defects.json`.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from polyturn.envs.adapters.bounded import BoundedCalls, CallFailed, CallTimedOut
from polyturn.envs.adapters.reasoning_gym import peer

PROBES = {
    "the empty answer": "",
    "nonsense": "flibber wozzle quonk",
    "'I do not know'": "I do not know",
    "'inf'": "inf",
    "'-inf'": "-inf",
    "'1e999'": "1e999",
    "'nan'": "nan",
    "'null'": "null",
    "'True'": "quonk True",
    "an empty list": "[]",
    "the digits 1 to 4 multiplied": "1*2*3*4",
    "all numbers up to 100": " ".join(map(str, range(101))),
}
"""Answers that no task of reasoning-gym has."""

HARD = {
    "a power tower": "9**9**9**9",
    "a power tower in brackets": "[9**9**9**9]",
    "a huge exponent": "1e999999999",
    "a long number": "9" * 5000,
    "deep brackets": "(" * 2000 + "1" + ")" * 2000,
    "a long word": "a" * 5000 + "!",
    "many lines": "1\n" * 2500,
}
"""Answers that are hard to score."""

_MARK = "quonkmark"
_CODE = (f"{_MARK}(1)", f"[{_MARK}(1)]", f"[[{_MARK}(1)]]", f"['{_MARK}']", f"{_MARK}")
_FUNCTION = "polyturn.envs.adapters.reasoning_gym.measure:measured"


def measured(dataset: str, index: int, answer: str | None) -> dict[str, Any]:
    """In a worker: what an answer (None: the right one) is paid, and whether the scorer ran it as code."""
    ran: list[str] = []
    entry = peer.item(dataset, "{}", index)
    if entry["answer"] is None:
        return {"answer": None, "score": None, "ran": False}
    right = entry["answer"].strip()
    text = (
        right
        if answer is None
        else answer.replace("{question}", entry["question"]).replace("{answer}", right)
    )
    if answer == _ONE_MORE:
        text = str(int(right) + 1) if right.lstrip("-").isdecimal() else "quonk"
    _watch(ran)
    try:
        score, raised = peer.score(dataset, "{}", index, text), None
    except Exception as error:  # noqa: BLE001  whatever the scorer raises is what is measured
        score, raised = None, type(error).__name__
    finally:
        _watch(None)
    return {"answer": entry["answer"], "score": score, "raised": raised, "ran": bool(ran)}


_watching: list[list[str] | None] = []


def _watch(ran: list[str] | None) -> None:
    """Note in `ran` each piece of code with the mark in it that is run from now on; None: no longer."""
    if not _watching:
        _watching.append(None)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if _watching[0] is not None and event in ("exec", "compile") and _MARK in _names(arguments[0]):
                _watching[0].append(event)

        sys.addaudithook(hook)
    _watching[0] = ran


def _names(code: Any) -> str:
    if isinstance(code, (str, bytes)):
        return str(code)
    return f"{getattr(code, 'co_names', '')} {getattr(code, 'co_consts', '')}"


def defects_of(dataset: str, calls: BoundedCalls, *, num_items: int = 3) -> list[str]:
    """What is wrong with a dataset's items and scorer, in words; empty where nothing was found."""
    paid: dict[str, None] = {}
    raised: dict[str, None] = {}
    other: dict[str, None] = {}
    for index in range(num_items):
        for what, answer in _answers(hard=index == 0):
            if answer in HARD.values() and _HANGS in other:
                continue
            try:
                seen = calls(dataset, index, answer)
            except CallTimedOut:
                other[_HANGS] = None
            except CallFailed as error:
                return [f"cannot make its items: {str(error)[:120]}"]
            else:
                if seen["answer"] is None:
                    return ["has items without an answer"]
                if answer is None and seen["score"] != 1.0:
                    other[f"pays its own answer {seen['score']}"] = None
                elif answer is not None and seen["answer"].strip() != answer.strip():
                    paid.update({what: None} if (seen["score"] or 0.0) >= 1.0 else {})
                if seen["raised"]:
                    raised[f"{seen['raised']} on {what}"] = None
                if seen["ran"]:
                    other["runs the answer as code"] = None
    defects = list(other)
    defects += [f"pays in full for {_few(paid)}"] if paid else []
    return defects + ([f"raises {_few(raised)}"] if raised else [])


def _few(items: Iterable[str]) -> str:
    first, rest = list(items)[:4], list(items)[4:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")


_ONE_MORE = "{answer} + 1"
_HANGS = "hangs on a power tower or the like"


def _answers(*, hard: bool) -> list[tuple[str, str | None]]:
    answers: list[tuple[str, str | None]] = [("its own answer", None), ("its question", "{question}")]
    answers += [
        ("one more than its answer", _ONE_MORE),
        ("its answer in other words", "quonk {answer} quonk"),
    ]
    answers += [*PROBES.items(), *(("code", text) for text in _CODE)]
    return answers + (list(HARD.items()) if hard else [])


def main(datasets: Sequence[str]) -> None:
    """Measure the named datasets, or all."""
    calls = BoundedCalls(_FUNCTION, num_processes=1, deadline_s=3.0)
    listing = {}
    for name in datasets or peer.names():
        if found := defects_of(name, calls):
            listing[name] = found
        print(f"{name}: {'; '.join(found) or 'sound'}", file=sys.stderr)
    calls.close()
    print(json.dumps({"version": importlib.metadata.version("reasoning-gym"), "datasets": listing}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
