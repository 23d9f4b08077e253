"""Task sources, and what a malformed file says."""

import json

import pytest

from polyturn.envs.rewards import exact_match, normalise_answer
from polyturn.envs.tasks import JsonlTasks, ListTasks, Task


def write(tmp_path, *lines):
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_rows_become_tasks(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    path = write(
        tmp_path,
        {"id": "q1", "prompt": "What is 2 + 2?", "answer": "4", "metadata": {"level": 1}},
        "",
        {"prompt": messages, "label": ["because", "why not"]},
    )
    tasks = JsonlTasks(path)
    assert len(tasks) == 2
    assert tasks[0] == Task.from_prompt("q1", "What is 2 + 2?", label="4", metadata={"level": 1})
    assert tasks[1].task_id == "tasks-3"
    assert tasks[1].messages == tuple(messages)
    assert tasks.find("q1") == tasks[0]
    with pytest.raises(ValueError, match="no task 'q2', did you mean 'q1'"):
        tasks.find("q2")


GOOD = {"id": "1", "prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": "p", "answer"', r"tasks\.jsonl:2: not valid JSON: .* at column"),
        ("[" * 100_000, r"tasks\.jsonl:2: not valid JSON"),
        ("[1]", r":2: a task is a JSON object, not list"),
        ({"promt": "p", "answer": "a"}, r":2: unknown key 'promt', did you mean 'prompt'\?"),
        ({"answer": "a"}, r":2: missing key 'prompt'"),
        ({"prompt": "p"}, r":2: a task has one of 'answer' and 'label'"),
        ({"prompt": "p", "answer": "a", "label": "b"}, r":2: a task has one of 'answer' and 'label'"),
        (
            {"prompt": "p", "answer": "a", "zz": 1},
            r":2: unknown key 'zz', further fields go under 'metadata'",
        ),
        ({"prompt": 3, "answer": "a"}, r":2: 'prompt' must be a text or a list of messages"),
        (
            {"prompt": [{"role": "robot", "content": ""}], "answer": "a"},
            r":2: prompt\[0\] must have a 'role'",
        ),
        ({"prompt": [{"role": "user"}], "answer": "a"}, r":2: prompt\[0\] must have a text as 'content'"),
        ({"prompt": "p", "answer": "a", "metadata": []}, r":2: 'metadata' must be an object"),
        ({"id": 1, "prompt": "p", "answer": "a"}, r":2: line 1 already has the id '1'"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, row, words):
    with pytest.raises(ValueError, match=words):
        JsonlTasks(write(tmp_path, GOOD, row))


def test_missing_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such task file"):
        JsonlTasks(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no task"):
        JsonlTasks(write(tmp_path, ""))
    with pytest.raises(ValueError, match="at least one task"):
        ListTasks([])
    with pytest.raises(ValueError, match="two tasks have the id 'x'"):
        ListTasks([Task.from_prompt("x", "p"), Task.from_prompt("x", "q")])


def test_exact_match_normalises_as_squad_does():
    assert normalise_answer(" The  Town, of Ashford! ") == "town of ashford"
    assert exact_match("ashford.", "Ashford") == 1.0
    assert exact_match("Ash ford", "Ashford") == 0.0
    assert exact_match("b", ["a", "B"]) == 1.0
    assert exact_match("theatre", "atre") == 0.0
