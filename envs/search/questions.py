"""Questions with their answers: those of the two-hop world, or a file like NQ's and HotpotQA's."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyturn.envs.tasks import ListTasks, Task
from polyturn.envs.two_hop.env import build_world
from polyturn.envs.two_hop.names import Pool
from polyturn.envs.two_hop.world import WorldSize

SPLITS: tuple[Pool, ...] = ("train", "heldout")


@functools.lru_cache(maxsize=8)
def world_questions(seed: int, size: WorldSize, split: Pool) -> ListTasks:
    """The two-hop questions of a world, each with its town as the answer."""
    questions = build_world(seed, size).questions[split]
    return ListTasks([Task.from_prompt(q.id, q.text, label=(q.town,)) for q in questions])


@functools.lru_cache(maxsize=8)
def read_questions(path: str) -> ListTasks:
    """The rows `{"question": ..., "golden_answers": [...], "id"?}` of a JSONL file, as FlashRAG writes NQ and HotpotQA.

    Raises:
        ValueError: there is no such file, or `path:line: ...` a row that is not of this form.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path}: no such question file")
    with file.open("rb") as lines:
        tasks = [
            _read_row(line, f"{path}:{number}", default_id=f"{file.stem}-{number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    if not tasks:
        raise ValueError(f"{path}: the file holds no question")
    try:
        return ListTasks(tasks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_row(line: bytes, where: str, *, default_id: str) -> Task:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        raise ValueError(f"{where}: a row needs a text as 'question'")
    golds = row.get("golden_answers")
    if not isinstance(golds, list) or not golds or not all(isinstance(gold, str) for gold in golds):
        raise ValueError(f"{where}: 'golden_answers' must be a list of texts, with one at least")
    rest = {key: value for key, value in row.items() if key not in ("id", "question", "golden_answers")}
    return Task.from_prompt(
        str(row.get("id", default_id)), row["question"], label=tuple(golds), metadata=rest
    )


def question_of(task: Task) -> str:
    """What a task asks: its last user message."""
    return next(message["content"] for message in reversed(task.messages) if message["role"] == "user")


def golds_of(task: Task) -> Sequence[str]:
    """The answers that count as right.

    Raises:
        ValueError: the task's label is no text and no list of texts.
    """
    return read_golds(task.label)


def read_golds(label: Any) -> Sequence[str]:
    """The answers that a label counts as right.

    Raises:
        ValueError: it is no text and no list of texts, or none of them can be given as an answer.
    """
    golds = (label,) if isinstance(label, str) else label
    if not isinstance(golds, (list, tuple)) or not golds or not all(isinstance(gold, str) for gold in golds):
        raise ValueError(f"the label must be a text or a list of texts, not {label!r:.200}")
    if not any(gold.strip() for gold in golds):
        raise ValueError("the label is empty, so no answer can be right")
    return golds
