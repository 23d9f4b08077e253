"""Tasks: the problems of an environment, and where they come from."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args

from polyturn.envs.messages import Message, Role

_ROW_KEYS = ("id", "prompt", "answer", "label", "metadata")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One problem: the messages that pose it, and what the grader needs."""

    task_id: str
    messages: tuple[Message, ...]
    label: Any = None
    """The right answer, or whatever the environment grades against. Never shown to the policy."""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_prompt(
        cls, task_id: str, prompt: str, *, label: Any = None, metadata: Mapping[str, Any] | None = None
    ) -> Task:
        """A task that one user message poses."""
        message: Message = {"role": "user", "content": prompt}
        return cls(task_id=task_id, messages=(message,), label=label, metadata=metadata or {})


class TaskSource(Protocol):
    """Tasks by position. Position i is the same task in every process."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Task:
        """The task at `index`. Raises `IndexError` outside 0 <= index < len."""
        ...


class ListTasks:
    """Tasks held in memory.

    Raises:
        ValueError: there are none, or two share an id.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            raise ValueError("a task source needs at least one task")
        self._tasks = tuple(tasks)
        self._index = {task.task_id: index for index, task in enumerate(self._tasks)}
        if len(self._index) != len(self._tasks):
            twice = next(t.task_id for i, t in enumerate(self._tasks) if self._index[t.task_id] != i)
            raise ValueError(f"two tasks have the id {twice!r}")

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int, /) -> Task:
        return self._tasks[index]

    def find(self, task_id: str) -> Task:
        """The task with that id.

        Raises:
            ValueError: there is none.
        """
        if task_id not in self._index:
            near = difflib.get_close_matches(task_id, self._index, n=1, cutoff=0.5)
            raise ValueError(f"no task {task_id!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        return self._tasks[self._index[task_id]]


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
