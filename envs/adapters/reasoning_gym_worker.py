"""The side that runs reasoning-gym: in a worker process, where its hangs, crashes and random state stay.

`python -m polyturn.envs.adapters.reasoning_gym_worker [DATASET...]` measures its scorers: each dataset, with its
default options, is asked for items and given answers that deserve nothing. The defects found are printed as JSON, in
the form of `reasoning_gym_defects.json`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import random
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from polyturn.envs.adapters.bounded import BoundedCalls, CallFailed, CallTimedOut


def serve(method: str, *arguments: Any) -> Any:
    """Answer one call of the adapter."""
    methods: Mapping[str, Callable[..., Any]] = {"names": names, "check": check, "item": item, "score": score}
    return methods[method](*arguments)


def names() -> list[str]:
    """All datasets that the package registers."""
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def check(dataset: str, config: str) -> None:
    """Raises whatever the dataset raises at its options."""
    _dataset(dataset, config, 0)


def item(dataset: str, config: str, seed: int) -> dict[str, Any]:
    """`question` and `answer` (None where the package gives no answer) of the item of that seed."""
    entry = _entry(dataset, config, seed)
    return {"question": entry["question"], "answer": entry["answer"]}


def score(dataset: str, config: str, seed: int, answer: str) -> float:
    """What the dataset's scorer pays for an answer."""
    entry = _entry(dataset, config, seed)
    _reseed(dataset, seed)
    return float(_dataset(dataset, config, seed).score_answer(answer, entry))


@functools.lru_cache(maxsize=64)
def _dataset(name: str, config: str, seed: int) -> Any:
    import reasoning_gym

    _reseed(name, seed)
    # One item each: some datasets make all of theirs at once, and item i of seed s is item 0 of seed s + i in most.
    return reasoning_gym.create_dataset(name, seed=seed, size=1, **json.loads(config))


@functools.lru_cache(maxsize=64)
def _entry(dataset: str, config: str, seed: int) -> dict[str, Any]:
    made = _dataset(dataset, config, seed)
    _reseed(dataset, seed)
    return made[0]


def _reseed(dataset: str, seed: int) -> None:
    """Datasets that draw from the global generators must not depend on what was drawn before."""
    mixed = zlib.crc32(f"{dataset}/{seed}".encode())
    random.seed(mixed)
    np.random.seed(mixed)


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
_ONE_MORE = "{answer} + 1"
_HANGS = "hangs on a power tower or the like"
_FUNCTION = "polyturn.envs.adapters.reasoning_gym_worker:measured"


def measured(dataset: str, index: int, answer: str | None) -> dict[str, Any]:
    """In a worker: what an answer (None: the right one) is paid, and whether the scorer ran it as code."""
    ran: list[str] = []
    entry = item(dataset, "{}", index)
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
        paid, raised = score(dataset, "{}", index, text), None
    except Exception as error:  # noqa: BLE001  whatever the scorer raises is what is measured
        paid, raised = None, type(error).__name__
    finally:
        _watch(None)
    return {"answer": entry["answer"], "score": paid, "raised": raised, "ran": bool(ran)}


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
    for name in datasets or names():
        if found := defects_of(name, calls):
            listing[name] = found
        print(f"{name}: {'; '.join(found) or 'sound'}", file=sys.stderr)
    calls.close()
    print(json.dumps({"version": importlib.metadata.version("reasoning-gym"), "datasets": listing}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
