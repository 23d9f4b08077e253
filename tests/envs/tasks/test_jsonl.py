"""Task sources, and what a malformed file says."""

import json
import subprocess
import sys

import pytest

from polyturn.envs.messages import EnvironmentChoice, ListTasks, Task
from polyturn.envs.rewards.rules import make_rule
from polyturn.envs.tasks import JsonlTasks, RowKeys, RowReader, files


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


def test_a_label_may_be_missing_where_the_source_says_so(tmp_path):
    path = write(tmp_path, {"prompt": "p"}, {"prompt": "q", "answer": "a"})
    tasks = JsonlTasks(path, reader=RowReader(RowKeys(needs_label=False)))
    assert [task.label for task in (tasks[0], tasks[1])] == [None, "a"]


def test_keys_may_be_named_otherwise(tmp_path):
    path = write(tmp_path, {"uid": 7, "question": "p", "gold": "a", "info": {"k": 1}, "level": 3})
    keys = {"id": "uid", "prompt": "question", "label": "gold", "metadata": "info"}
    kept = JsonlTasks(path, reader=RowReader(RowKeys(**keys, others="keep")))[0]
    assert (kept.task_id, kept.messages[0]["content"], kept.label) == ("7", "p", "a")
    assert kept.metadata == {"level": 3, "k": 1}
    assert JsonlTasks(path, reader=RowReader(RowKeys(**keys, others="drop")))[0].metadata == {"k": 1}
    with pytest.raises(ValueError, match=r"tasks\.jsonl:1: unknown key 'level'"):
        JsonlTasks(path, reader=RowReader(RowKeys(**keys)))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"prompt": "questoin"}, r":1: missing key 'questoin', did you mean 'question'\?"),
        ({"prompt": "zzz"}, r":1: missing key 'zzz'; the keys are question, gold"),
        ({"prompt": "question", "label": "golf"}, r":1: missing key 'golf', did you mean 'gold'\?"),
    ],
)
def test_a_key_that_no_row_has_is_named_with_the_nearest(tmp_path, keys, words):
    path = write(tmp_path, {"question": "p", "gold": "a"})
    with pytest.raises(ValueError, match=words):
        JsonlTasks(path, reader=RowReader(RowKeys(**keys, others="drop")))


def test_rows_may_name_environment_and_reward(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "p", "answer": "a", "environment": "polyturn/SingleTurn-v0", "reward": "f1"},
        {"prompt": "p", "answer": "1", "environment": "small", "reward": "near"},
        {"prompt": "p", "answer": "1"},
    )
    small = EnvironmentChoice(env_id="polyturn/TwoHopSearch-v0", options={"num_people": 9})
    usual = RowReader(
        environment=EnvironmentChoice(env_id="usual"),
        environments={
            "polyturn/SingleTurn-v0": EnvironmentChoice(env_id="polyturn/SingleTurn-v0"),
            "small": small,
        },
        rewards={"f1": make_rule("f1"), "near": make_rule("numeric", {"absolute": 0.5})},
    )
    first, second, third = list(map(JsonlTasks(path, reader=usual).__getitem__, range(3)))
    assert first.environment == EnvironmentChoice(env_id="polyturn/SingleTurn-v0")
    assert second.environment.options == {"num_people": 9}
    assert third.environment.env_id == "usual"
    assert (first.reward.name, second.reward.absolute, third.reward) == ("f1", 0.5, None)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"environment": "polyturn/TwoHopSerch-v0"},
            r":2: 'environment': there is no environment 'polyturn/TwoHopSerch-v0'; did you mean",
        ),
        (
            {"environment": {"id": "polyturn/TwoHopSearch-v0", "opts": {}}},
            r":2: 'environment': unknown key 'opts'",
        ),
        ({"environment": 3}, r":2: 'environment': name an environment by its id"),
        (
            {"reward": "exactmatch"},
            r":2: 'reward': there is no reward rule 'exactmatch'; did you mean 'exact_match'",
        ),
        ({"reward": {"kind": "rubrik"}}, r":2: 'reward': .*'rubrik'"),
        ({"reward": {"name": "f1", "options": {"anser": "tag"}}}, r":2: 'reward': .* did you mean 'answer'"),
    ],
)
def test_what_a_trusted_row_describes_wrongly_is_named_by_line(tmp_path, row, words):
    trusted = RowReader(trusted=True)
    with pytest.raises(ValueError, match=words):
        JsonlTasks(write(tmp_path, GOOD, {"id": "2", "prompt": "p", "answer": "a", **row}), reader=trusted)


def test_long_integers_keep_all_their_digits(tmp_path):
    assert JsonlTasks(write(tmp_path, {"prompt": "p", "answer": 10**30 + 1}))[0].label == 10**30 + 1


def test_lines_are_found_across_chunks_and_blank_lines_are_counted(tmp_path, monkeypatch):
    """With chunks of a few bytes every line lies across a border."""
    rows = [{"prompt": "p" * (index % 7), "answer": str(index)} for index in range(60)]
    lines = [json.dumps(row) for row in rows]
    for index in (59, 31, 30, 7, 0):
        lines.insert(index, "  \t" if index % 2 else "")
    path = write(tmp_path, *lines, "")
    for chunk in (1, 5, 8, 64, 8 << 20):
        monkeypatch.setattr(files, "_CHUNK", chunk)
        tasks = JsonlTasks(path)
        assert [tasks[index].label for index in range(len(tasks))] == [row["answer"] for row in rows]
        numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
        assert [tasks[index].task_id for index in range(60)] == [f"tasks-{number}" for number in numbers]
        with pytest.raises(IndexError):
            tasks[60]
        with pytest.raises(IndexError):
            tasks[-1]


def test_only_the_first_rows_are_checked_where_that_is_asked_for(tmp_path):
    path = write(tmp_path, GOOD, {"id": "2", "prompt": "p", "answer": "a"}, {"prompt": 3})
    tasks = JsonlTasks(path, check_rows=2)
    assert len(tasks) == 3
    with pytest.raises(ValueError, match=r":3: "):
        tasks[2]
    with pytest.raises(ValueError, match=r":3: "):
        JsonlTasks(path, check_rows=3)


def test_a_million_rows_open_in_bounded_memory(tmp_path):
    """16 bytes a row and a few chunks, where the file has 100 bytes a row; in a process of its own, for its peak."""
    path = tmp_path / "million.jsonl"
    row = b'{"id": "%07d", "prompt": "How much is one more than %07d?", "answer": "%07d"}' + b" " * 20 + b"\n"
    with path.open("wb") as file:
        for start in range(0, 1_000_000, 10_000):
            file.write(b"".join(row % (i, i, i + 1) for i in range(start, start + 10_000)))
    program = (
        "import resource, sys\n"
        "from polyturn.envs.tasks import JsonlTasks\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "import polyturn.envs.tasks.files\n"
        "before = peak()\n"
        "tasks = JsonlTasks(sys.argv[1], check_rows=100)\n"
        "labels = [tasks[index].label for index in range(0, 1_000_000, 1009)]\n"
        "assert labels == [f'{index + 1:07d}' for index in range(0, 1_000_000, 1009)]\n"
        "print(len(tasks), (peak() - before) * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    number, grown = map(int, done.stdout.split())
    assert number == 1_000_000
    assert path.stat().st_size > 100_000_000
    assert grown < 64 << 20
