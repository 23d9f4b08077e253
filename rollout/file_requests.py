"""Requests through files: what people ask of a process that works on a directory.

A request is a file `FOLDER/ID.json`, which appears whole; the process answers with `ID.answer.json` beside it. So it
works wherever the directory is seen, and nothing listens.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from polyturn.rollout.whole_file import whole_file

ANSWER = ".answer.json"
POLL_S = 0.1


class Refused(ValueError):
    """What was asked for is not done: the message says why."""


def answer_requests(folder: Path, answer: Callable[[bytes, str], Mapping[str, Any]]) -> int:
    """Answer what is asked in a folder, the oldest first; how many requests there were.

    Args:
        answer: Does what a request, given by its bytes and the name of its file, asks for, and gives what is said of
            it; raises `ValueError` where that cannot be.
    """
    num_answered = 0
    for path in _waiting(folder):
        try:
            said: Mapping[str, Any] = answer(path.read_bytes(), path.name)
        except ValueError as error:
            said = {"refused": str(error)}
        with whole_file(path.with_name(f"{path.stem}{ANSWER}")) as file:
            file.write(orjson.dumps(said))
        path.unlink(missing_ok=True)
        num_answered += 1
    return num_answered


def ask(folder: Path, request: bytes, *, timeout_s: float, who: str) -> dict[str, Any]:
    """What is answered to a request.

    Args:
        who: Answers, for messages.

    Raises:
        Refused: it is not done.
        TimeoutError: nobody answered; the request is taken back.
    """
    folder.mkdir(exist_ok=True)
    name = uuid.uuid4().hex
    path, answered = folder / f"{name}.json", folder / f"{name}{ANSWER}"
    with whole_file(path) as file:
        file.write(request)
    deadline = time.monotonic() + timeout_s
    try:
        while not answered.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{who} did not answer within {timeout_s:g} s")
            time.sleep(POLL_S)
        answer: dict[str, Any] = orjson.loads(answered.read_bytes())
    finally:
        for left in (path, answered):
            left.unlink(missing_ok=True)
    if "refused" in answer:
        raise Refused(answer["refused"])
    return answer


def _waiting(folder: Path) -> Iterator[Path]:
    """Requests that have not been answered, the oldest first."""
    with contextlib.suppress(FileNotFoundError):
        found = [
            path for path in folder.iterdir() if path.suffix == ".json" and not path.name.endswith(ANSWER)
        ]
        yield from sorted(found, key=lambda path: path.stat().st_mtime)
