"""Digests of tasks: the same for the same contents, in every process, and another for any other."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyturn.envs.messages import EnvironmentChoice, ListTasks, Task
from polyturn.envs.tasks.order import MAX_TASKS, source_digest, task_digest

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PLAIN = Task.from_prompt("t", "what is it?", label="12", metadata={"a": 1, "b": [2.5, None]})


@given(VALUES, VALUES)
def test_other_labels_and_metadata_have_other_digests(left: Any, right: Any) -> None:
    same = repr(left) == repr(right)
    for change in (lambda value: {"label": value}, lambda value: {"metadata": {"x": value}}):
        digests = {task_digest(replace(PLAIN, **change(value))) for value in (left, right)}
        assert len(digests) == 1 or not same
        if left != right:
            assert len(digests) == 2


@pytest.mark.parametrize(
    "changed",
    [
        replace(PLAIN, task_id="u"),
        Task.from_prompt("t", "what is it", label="12", metadata=PLAIN.metadata),
        replace(PLAIN, label=12),
        replace(PLAIN, environment=EnvironmentChoice(env_id="e")),
        replace(PLAIN, environment=EnvironmentChoice(env_id="e", options={"a": 1})),
    ],
)
def test_everything_that_a_task_says_counts(changed: Task) -> None:
    assert task_digest(changed) != task_digest(PLAIN)


@pytest.mark.parametrize(
    "odd", [[10**5000], "\ud800", {1: 2, "1": 3}, {"a", "b"}, np.arange(3), object(), print, b"\xff"]
)
def test_whatever_a_label_is_it_has_a_digest(odd: Any) -> None:
    assert task_digest(replace(PLAIN, label=odd)) == task_digest(replace(PLAIN, label=odd))
    assert task_digest(replace(PLAIN, label=[odd])) != task_digest(PLAIN)


def test_the_order_of_keys_and_the_process_do_not_matter() -> None:
    other = replace(PLAIN, metadata={"b": [2.5, None], "a": 1})
    assert task_digest(other) == task_digest(PLAIN)
    script = (
        "from polyturn.envs.messages import Task; from polyturn.envs.tasks.order import task_digest\n"
        "print(task_digest(Task.from_prompt('t', 'q', label={'x', 'y', 'z'}, metadata={'f': print})))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        for _ in range(2)
    }
    assert len(found) == 1


def test_a_source_is_told_by_its_length_and_its_tasks() -> None:
    def source(count: int, changed: int | None = None) -> ListTasks:
        return ListTasks([Task.from_prompt(str(i), "x" * (i == changed), label=i) for i in range(count)])

    assert source_digest(source(50)) == source_digest(source(50))
    assert source_digest(source(50)) != source_digest(source(51))
    assert source_digest(source(50)) != source_digest(source(50, changed=17))
    assert len({source_digest(source(MAX_TASKS + 9, changed)) for changed in (None, 0, MAX_TASKS + 8)}) == 3
