"""MBPP's rows become tasks that its own solutions solve, and nothing else does."""

import json

import pytest

from polyturn.envs.code.env import CodeUnitTestsEnv, file_tasks
from polyturn.envs.code.mbpp import Ungradable, mbpp_task
from polyturn.envs.conformance.subject import play, policy_of
from polyturn.envs.messages import AssistantMessage, script_of

ROW = {
    "text": "Write a python function to find the first repeated character in a given string.",
    "code": "def first(str1):\r\n  for index,c in enumerate(str1):\r\n    if str1[:index+1].count(c) > 1:\r\n"
    '      return c \r\n  return "None"',
    "task_id": 602,
    "test_setup_code": "",
    "test_list": ['assert first("abcabc") == "a"', 'assert first("abc") == "None"'],
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "Benchmark.ipynb",
    "task_id": 11,
    "prompt": "Write a function that checks a number.",
    "code": "import sys\ndef check(n):\n    return sys.maxsize > n > 0",
    "test_imports": ["import math"],
    "test_list": ["assert check(int(math.pi)) == True", "assert check(sys.maxsize + 1) == False"],
}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mbpp.jsonl"
    unfit = {
        **ROW,
        "task_id": 12,
        "code": "class Pair: pass\ndef first(p): return 1",
        "test_list": ["assert first(Pair())"],
    }
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROW, SANITIZED, unfit)))
    return file


def test_rows_are_of_the_papers_splits_and_show_their_assertions(path, caplog):
    (train,), (heldout,) = (
        [*map(tasks.__getitem__, range(len(tasks)))]
        for tasks in (file_tasks(path, "unit_tests", s) for s in ("train", "heldout"))
    )
    assert (train.task_id, heldout.task_id) == ("mbpp-602", "mbpp-11")
    prompt = train.messages[-1]["content"]
    assert ROW["text"] in prompt and all(test in prompt for test in ROW["test_list"])
    assert heldout.label.test.splitlines()[:2] == ["import sys", "import math"]
    assert "mbpp.jsonl:3: the assertions name 'Pair', which is the solution's" in caplog.text


def test_the_solution_is_paid_and_another_function_is_not(path):
    for split in ("train", "heldout"):
        env = CodeUnitTestsEnv(path=path, split=split)
        task = env.tasks(split)[0]
        wrong = script_of(
            lambda: AssistantMessage(content="```python\ndef check(n): return True\nfirst = check\n```")
        )
        assert play(env, policy_of(env, "oracle"), seed=0, task=task).reward == 1.0
        assert play(env, wrong, seed=0, task=task).reward == 0.0
        env.close()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"test_list": []}, "needs 'text' .or 'prompt'., 'code' and 'test_list'"),
        ({"code": None}, "needs 'text' .or 'prompt'., 'code' and 'test_list'"),
        ({"test_list": ["assert other(1)"]}, "call no function that 'code' defines"),
        ({"test_list": ["assert first("]}, "no Python"),
    ],
)
def test_a_row_that_is_none_says_why(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        mbpp_task({**ROW, **change})
    with pytest.raises(Ungradable):
        mbpp_task({**ROW, "code": "class P: pass\ndef first(p): pass", "test_list": ["assert first(P())"]})
