"""Whether the prompts of a run leave room for an answer, as far as that can be seen before anything starts."""

from __future__ import annotations

import logging
from pathlib import Path

from polyturn.envs.tasks import ListTasks, Task, TaskSource

logger = logging.getLogger(__name__)


def check_prompts(source: TaskSource, *, tokenizer_path: Path, max_tokens: int) -> None:
    """Count the prompts of tasks in memory that alone fill `max_tokens`, the template and the tools aside.

    A source that is read from disk is not looked at: what is too long there fails when it is played, and is counted.

    Raises:
        ValueError: no prompt of the source leaves room for an answer.
    """
    if not isinstance(source, ListTasks) or not tokenizer_path.is_file():
        return
    # A token takes a byte at least, so nearly all prompts are known to be short without being tokenised.
    long = [task for task in (source[i] for i in range(len(source))) if _num_bytes(task) >= max_tokens]
    if not long:
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    counts = {task.task_id: len(tokenizer.encode(_text(task), add_special_tokens=False).ids) for task in long}
    too_long = {task_id: count for task_id, count in counts.items() if count >= max_tokens}
    if not too_long:
        return
    task_id, count = next(iter(too_long.items()))
    found = (
        f"{len(too_long):,} of {len(source):,} prompts leave no room for an answer in max_tokens_per_episode="
        f"{max_tokens:,}, such as that of task {task_id!r} with {count:,} tokens"
    )
    if len(too_long) == len(source):
        raise ValueError(f"{found}; raise environment.max_tokens_per_episode, or shorten them")
    logger.warning("%s: their episodes will fail and be counted", found)


def _text(task: Task) -> str:
    return "\n".join(message["content"] for message in task.messages)


def _num_bytes(task: Task) -> int:
    return len(_text(task).encode("utf-8", "replace"))
