"""Questions and their gold answers, in the files in which FlashRAG and Search-R1 publish them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyturn.envs.border import read_rows
from polyturn.envs.messages import ListTasks, Task

_COLUMNS = ("id", "question", "golden_answers", "data_source", "reward_model")
"""Those of Search-R1's Parquet files that say something that is not said twice."""


@functools.lru_cache(maxsize=16)
def read_questions(path: str, data_source: str | None = None) -> ListTasks:
    """The questions of a file: rows `{"question": ..., "golden_answers": [...], "id"?, "data_source"?}`.

    JSONL as FlashRAG writes its sets, or Parquet as Search-R1 does, where the gold answers may also stand in
    `reward_model.ground_truth.target`. Ids of rows with a `data_source` begin with that.

    Args:
        data_source: Of rows that name one, those of this alone; None: all.

    Raises:
        ValueError: there is no such file, or `path:line: ...` a row that is not of this form, or no row is of that set.
    """
    tasks, sources = [], set()
    for number, row in read_rows(path, "question", columns=_COLUMNS):
        source = row.get("data_source")
        sources.add(str(source))
        if data_source is None or source in (None, data_source):
            tasks.append(_question(path, number, row))
    if not tasks:
        if data_source is not None and sources:
            raise ValueError(
                f"{path}: there is no data_source {data_source!r}; there are {', '.join(sorted(sources))}"
            )
        raise ValueError(f"{path}: the file holds no question")
    try:
        return ListTasks(tasks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _question(path: str, number: int, row: Mapping[str, Any]) -> Task:
    where = f"{path}:{number}"
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise ValueError(f"{where}: a row needs a text as 'question'")
    golds = row.get("golden_answers")
    if golds is None:
        golds = _target(row.get("reward_model"))
    if not isinstance(golds, list) or not golds or not all(isinstance(gold, str) for gold in golds):
        raise ValueError(f"{where}: 'golden_answers' must be a list of texts, with one at least")
    name = row.get("id")
    task_id = f"{Path(path).stem}-{number}" if name is None else str(name)
    if row.get("data_source"):
        task_id = f"{row['data_source']}-{task_id}"
    said = ("id", "question", "golden_answers", "reward_model")
    rest = {key: value for key, value in row.items() if key not in said}
    return Task.from_prompt(task_id, row["question"], label=tuple(golds), metadata=rest)


def _target(reward_model: Any) -> Any:
    """Search-R1's place for gold answers beside `golden_answers`."""
    truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    target = truth.get("target") if isinstance(truth, Mapping) else None
    return [target] if isinstance(target, str) else target
