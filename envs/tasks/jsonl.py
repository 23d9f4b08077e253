"""Tasks of JSONL files."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, get_args

from polyturn.envs.messages import Message, Role
from polyturn.envs.tasks.types import ListTasks, Task

_ROW_KEYS = ("id", "prompt", "answer", "label", "metadata")


class JsonlTasks(ListTasks):
    """Tasks of a JSONL file: rows `{"prompt": str or messages, "answer" or "label": ..., "id"?, "metadata"?}`.

    A row without an id is named after the file and its line.

    Raises:
        ValueError: `path:line: ...` for a row that cannot be read; a file that is missing or empty.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such task file")
        tasks: list[Task] = []
        lines: dict[str, int] = {}
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{self.path}:{number}"
                task = _parse_row(line, where, default_id=f"{self.path.stem}-{number}")
                if task.task_id in lines:
                    raise ValueError(
                        f"{where}: line {lines[task.task_id]} already has the id {task.task_id!r}"
                    )
                lines[task.task_id] = number
                tasks.append(task)
        if not tasks:
            raise ValueError(f"{self.path}: the file holds no task")
        super().__init__(tasks)


def _parse_row(line: bytes, where: str, *, default_id: str) -> Task:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a task is a JSON object, not {type(row).__name__}")
    for key in row:
        if key not in _ROW_KEYS:
            near = difflib.get_close_matches(key, _ROW_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "further fields go under 'metadata'"
            raise ValueError(f"{where}: unknown key {key!r}, {hint}")
    if "prompt" not in row:
        raise ValueError(f"{where}: missing key 'prompt'; the keys are {', '.join(row) or 'none'}")
    if ("answer" in row) == ("label" in row):
        raise ValueError(f"{where}: a task has one of 'answer' and 'label'; the keys are {', '.join(row)}")
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: 'metadata' must be an object, not {type(metadata).__name__}")
    return Task(
        task_id=str(row.get("id", default_id)),
        messages=_parse_prompt(row["prompt"], where),
        label=row["answer"] if "answer" in row else row["label"],
        metadata=metadata,
    )


def _parse_prompt(prompt: Any, where: str) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(
            f"{where}: 'prompt' must be a text or a list of messages, not {json.dumps(prompt)[:60]}"
        )
    messages: list[Message] = []
    for index, message in enumerate(prompt):
        if not isinstance(message, dict) or message.get("role") not in get_args(Role):
            raise ValueError(f"{where}: prompt[{index}] must have a 'role' of {', '.join(get_args(Role))}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: prompt[{index}] must have a text as 'content'")
        messages.append(message)  # type: ignore[arg-type]
    return tuple(messages)
