"""Parts of a source: `path@[a:b]`."""

from __future__ import annotations

import re

from polyturn.envs.tasks.types import Task, TaskSource, no_such_task, where_of

_SLICE = re.compile(r"(?P<path>.*)@\[(?P<inside>.*)\]", re.DOTALL)
_BOUNDS = re.compile(r"\s*(?P<first>-?[0-9][0-9_]*)?\s*:\s*(?P<last>-?[0-9][0-9_]*)?\s*")


def split_slice(text: str) -> tuple[str, slice | None]:
    """The path and the slice of `path@[a:b]`. As in Python, ends may be negative or left out.

    Raises:
        ValueError: what stands after `@` is no slice.
    """
    found = _SLICE.fullmatch(text)
    if found is None:
        if "@[" in text or text.endswith("@"):
            raise ValueError(f"{text!r}: a slice is written path@[first:end], as in tasks.jsonl@[0:100]")
        return text, None
    bounds = _BOUNDS.fullmatch(found["inside"])
    if bounds is None:
        raise ValueError(
            f"{text!r}: '[{found['inside']}]' is no slice: two whole numbers around a colon, as in [0:100], [:-50]"
        )
    first, last = (None if end is None else int(end) for end in (bounds["first"], bounds["last"]))
    return found["path"], slice(first, last)


class SlicedTasks:
    """A run of tasks of another source.

    Raises:
        ValueError: it would be empty.
    """

    def __init__(self, source: TaskSource, part: slice, *, name: str = "the source") -> None:
        self.source = source
        self._range = range(len(source))[part]
        if not self._range:
            shown = f"[{_end(part.start)}:{_end(part.stop)}]"
            raise ValueError(f"{name}: the slice {shown} holds none of its {len(source):,} tasks")

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int, /) -> Task:
        if not 0 <= index < len(self._range):
            raise IndexError(f"there is no task {index}, the slice has {len(self._range)}")
        return self.source[self._range[index]]

    def where(self, index: int) -> str:
        """Where a task stands, for messages."""
        return where_of(self.source, self._range[index])

    def find(self, task_id: str) -> Task:
        """The task with that id. Raises `ValueError` if there is none in the slice."""
        for index in range(len(self)):
            if self[index].task_id == task_id:
                return self[index]
        raise no_such_task(task_id)


def _end(bound: int | None) -> str:
    return "" if bound is None else str(bound)
