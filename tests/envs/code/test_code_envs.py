"""The three code environments: an answer, a try after a failure, a tool with a state, many episodes at once."""

import asyncio
import json
import multiprocessing
import re
from pathlib import Path

import psutil
import pytest

import polyturn
from polyturn.envs.code.env import NO_CODE, CodeStdioEnv, CodeUnitTestsEnv
from polyturn.envs.code.grading import find_code
from polyturn.envs.code.python_env import PythonToolEnv
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.tools.python import SandboxFailed, SharedSandboxes
from polyturn.tools.sandbox import SandboxUnavailable
from polyturn.tools.types import ToolCall

DOCUMENT = Path(__file__).parents[3] / "docs" / "code.md"
IDS = ("polyturn/PythonTool-v0", "polyturn/CodeUnitTests-v0", "polyturn/CodeStdio-v0")


def play(env, policy, *, task=None, seed=1, split="train"):
    options = {"split": split} | ({} if task is None else {"task": task})
    observation, info = env.reset(seed=seed, options=options)
    messages, rewards = list(observation), 0.0
    while True:
        action = policy(messages, info["tools"]) if "tools" in info else policy(messages, env.tools)
        messages.append(action.to_message())
        observation, reward, terminated, truncated, info = env.step(action)
        messages += observation
        rewards += reward
        if terminated or truncated:
            return rewards


def fenced(code):
    return AssistantMessage(content=f"Here it is.\n```python\n{code}\n```\nDone.")


def calling(name, **arguments):
    return AssistantMessage(tool_calls=(ToolCall(id="c", name=name, arguments=arguments),))


@pytest.mark.parametrize("env_id", IDS)
def test_the_oracle_scores_one_and_chance_less(env_id):
    env = polyturn.make(env_id)
    try:
        for split in ("train", "heldout"):
            assert [play(env, env.oracle, seed=seed, split=split) for seed in range(3)] == [1.0] * 3
            assert sum(play(env, env.random_policy(seed), seed=seed, split=split) for seed in range(3)) < 3
        with pytest.raises(ValueError, match="train, heldout"):
            env.tasks("test")
    finally:
        env.close()


@pytest.mark.parametrize("env_id", IDS)
def test_bad_options_are_told_at_once(env_id):
    with pytest.raises(ValueError, match="unknown split"):
        polyturn.make(env_id, split="trian")
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        polyturn.make(env_id, timeout_s=0)


# Finding the code.


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("one\n```\na\n```\ntwo\n```py\nb\n```", "b\n"),
        ("```python\na\n```\n```json\n{}\n```", "a\n"),
        ("<think>```python\nbad\n```</think>\n  ```Python3\n  good\n  ```", "  good\n"),
        ("```python\nnever closed", None),
        ("no code", None),
        ("", None),
        ("```python inline```", None),
        ("```text\nx\n```", None),
        ("```python\n```", ""),
        ("```python\n" * 20_000, None),
    ],
)
def test_the_last_block_of_python_after_the_thinking_is_the_answer(text, code):
    assert find_code(text) == code


# Several tries.


def test_a_try_after_a_failure_is_told_of_public_tests_only():
    env = CodeUnitTestsEnv(tries=3)
    env.reset(options={"task": "unit-nearest_square"})
    observation, _, terminated, *_ = env.step(fenced("def nearest_square(number): return 1"))
    assert not terminated
    text = observation[0]["content"]
    assert text.startswith("1 of 2 tests pass. Failed:\n- nearest_square(0) == 0\n\nTry again")
    assert "1000000000000" not in text, "a hidden test"
    observation, *_ = env.step(AssistantMessage(content="I give up."))
    assert observation[0]["content"].startswith(NO_CODE)
    _, reward, terminated, _, info = env.step(fenced(env.task.metadata["canonical_solution"]))
    assert (reward, terminated, info["metrics"]) == (1.0, True, {"answers": 3.0, "tests_passed": 1.0})
    env.close()


def test_public_tests_that_pass_end_the_episode_and_hidden_ones_are_paid():
    env = CodeStdioEnv(tries=3, partial_credit=True)
    env.reset(options={"task": "stdio-best-window"})
    shown = "input()\ninput()\nprint(10)"
    _, reward, terminated, *_ = env.step(fenced(shown))
    assert (reward, terminated) == (pytest.approx(0.5), True), "two of four cases happen to have that answer"
    env.close()


def test_without_public_tests_only_the_count_is_told(tmp_path):
    row = {
        "prompt": 'def twice(x):\n    """Double it."""\n',
        "entry_point": "twice",
        "cases": [{"args": [n], "expected": 2 * n} for n in (1, 2, 777)],
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    env = CodeUnitTestsEnv(path=path, tries=2)
    env.reset(seed=1)
    observation, *_ = env.step(fenced("def twice(x): return 2"))
    assert observation[0]["content"].startswith("1 of 3 tests pass.\n\nTry again")
    assert "777" not in observation[0]["content"]
    assert env.step(fenced("    return x + x"))[1] == 1.0
    env.close()


def test_credit_is_all_or_nothing_unless_asked_for():
    code = fenced("def nearest_square(number): return 1 if number == 2 else 0")
    for partial, reward in ((False, 0.0), (True, 2 / 7)):
        env = CodeUnitTestsEnv(partial_credit=partial)
        env.reset(options={"task": "unit-nearest_square"})
        assert env.step(code)[1] == pytest.approx(reward)
        env.close()


# Tools.


def test_run_code_is_a_new_interpreter_for_every_call():
    env = CodeStdioEnv(run_code=True)
    env.reset(options={"task": "stdio-stairs"})
    assert (
        env.step(calling("run_code", code="x = 1\nprint(input())", stdin="hello\n"))[0][0]["content"]
        == "hello"
    )
    observation, *_, info = env.step(calling("run_code", code="print(x)"))
    assert "NameError" in observation[0]["content"]
    assert not info["tool_results"][0].ok
    assert env.step(fenced(env.task.metadata["canonical_solution"]))[1] == 1.0
    env.close()
    assert CodeStdioEnv().tools == ()


def test_pythons_names_and_files_live_for_one_episode():
    env = PythonToolEnv(max_turns=20, timeout_s=3.0)

    def python(code):
        observation, *_, info = env.step(calling("python", code=code))
        return observation[0]["content"], info["tool_results"][0].ok

    env.reset(seed=1)
    assert python("x = 20\nopen('f', 'w').write('kept')") == ("(no output; print what you want to see)", True)
    assert python("print(x + 1, open('f').read())") == ("21 kept", True)
    text, ok = python("print('before')\n1 / 0")
    assert text.startswith("before\nTraceback")
    assert ("ZeroDivisionError" in text, ok) == (True, False)
    assert python("print(x)") == ("20", True), "an exception loses no names"
    text, ok = python("while True: pass")
    assert ("timeout" in text, "names are lost" in text, ok) == (True, True, False)
    assert "NameError" in python("print(x)")[0]
    assert python("print(open('f').read())") == ("kept", True)
    text, ok = python("print('x' * 20000)")
    assert "[truncated: 8,000 of 20,000 characters shown]" in text
    env.reset(seed=1)
    assert "NameError" in python("print(x)")[0]
    assert "FileNotFoundError" in python("open('f')")[0]
    assert python("import os\nos._exit(3)")[1] is False
    assert python("print('again')") == ("again", True)
    text, ok = python("print('\ud800')")
    assert ("surrogate" in text, ok) == (True, False), "half a character is the model's mistake, and is told"
    env.close()


def test_only_the_box_of_the_answer_counts():
    env = PythonToolEnv()

    def reward(content):
        env.reset(seed=1, options={"task": "train-0"})
        return env.step(AssistantMessage(content=content.replace("GOLD", env.task.label)))[1]

    assert reward(r"So \boxed{GOLD}.") == 1.0
    assert reward(r"First \boxed{1}, no: \boxed{GOLD}") == 1.0
    for text in (
        "GOLD",
        r"\boxed{}",
        r"\boxed{GOLD or 3}",
        r"\boxed{GOLD} \boxed{1}",
        r"\boxed{1e999}",
        r"\boxed{-GOLD}",
    ):
        assert reward(text) == 0.0, text
    env.close()


# What fails beneath.


def test_a_backend_that_cannot_be_had_is_a_fault(monkeypatch):
    def unavailable(name):
        raise SandboxUnavailable("user namespaces: not permitted")

    monkeypatch.setattr("polyturn.tools.python.make_backend", unavailable)
    env = CodeStdioEnv()
    env.reset(seed=1)
    with pytest.raises(EnvironmentFault, match="SandboxUnavailable: user namespaces: not permitted"):
        env.step(fenced("print(1)"))
    env = PythonToolEnv()
    env.reset(seed=1)
    with pytest.raises(EnvironmentFault, match="user namespaces"):
        env.step(calling("python", code="1"))


def test_a_sandbox_that_fails_is_a_fault_and_the_models_answer_is_not_scored(monkeypatch):
    def fail(*arguments, **options):
        raise SandboxFailed("gone")

    monkeypatch.setattr("polyturn.envs.code.grading.execute", fail)
    env = CodeStdioEnv()
    env.reset(seed=1)
    with pytest.raises(EnvironmentFault, match="SandboxFailed: gone"):
        env.step(fenced("print(1)"))
    env.close()


# Many at once.


def test_many_episodes_at_once_share_one_backend_and_nothing_else():
    async def episode(seed):
        env = PythonToolEnv()
        await env.reset_async(seed=seed)
        for code in (f"x = {seed}", "x += 1"):
            await env.step_async(calling("python", code=code))
        observation, *_ = await env.step_async(calling("python", code="print(x)"))
        reward = (await env.step_async(AssistantMessage(content=rf"\boxed{{{env.task.label}}}")))[1]
        env.close()
        return observation[0]["content"], reward

    async def play_all():
        return await asyncio.gather(*(episode(seed) for seed in range(60)))

    assert asyncio.run(play_all()) == [(str(seed + 1), 1.0) for seed in range(60)]


def test_a_forked_process_has_a_backend_of_its_own_and_leaves_its_parents_alone():
    env = CodeStdioEnv()
    assert play(env, env.oracle) == 1.0

    def in_child(results):
        results.put(play(env, env.oracle))
        env.close()

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=in_child, args=(results,))
    child.start()
    assert results.get(timeout=30) == 1.0
    child.join(30)
    assert child.exitcode == 0
    assert play(env, env.oracle) == 1.0
    env.close()


def test_the_last_lease_frees_the_backend():
    def processes():
        return {process.pid for process in psutil.Process().children(recursive=True)}

    before = processes()
    first, second = SharedSandboxes(), SharedSandboxes()
    for lease in (first, second):
        with lease.create() as sandbox:
            assert sandbox.exec("print(1)").stdout == "1\n"
    first.close()
    first.close()
    with second.create() as sandbox:
        assert sandbox.exec("print(2)").ok
    del sandbox
    second.close()
    assert processes() <= before


def test_the_environment_of_the_docs_runs():
    source = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[-1]
    names: dict = {"__name__": "documented_example"}
    exec(compile(source, str(DOCUMENT), "exec"), names)
    env = names["MyEnv"](tasks=ListTasks([Task.from_prompt("t", "Compute.")]))
    env.reset()
    assert env.step(calling("python", code="print(6 * 7)"))[0][0]["content"] == "42"
    env.close()


# Rows.


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "rows.jsonl:1: "),
        ("[]", "a task is a JSON object"),
        ('{"prompt": "x"}', "needs 'entry_point'"),
        ('{"prompt": "x", "entry_point": "f"}', "needs 'test' or 'cases'"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path, row, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(ValueError, match=words):
        CodeUnitTestsEnv(path=path)
    with pytest.raises(ValueError, match="no such task file"):
        CodeUnitTestsEnv(path=tmp_path / "missing.jsonl")


def test_plain_labels_are_tests_too_and_others_a_fault():
    stdio = Task.from_prompt("t", "Double it.", label=[{"input": "4", "output": "8"}])
    env = CodeStdioEnv(tasks=ListTasks([stdio, Task.from_prompt("bad", "?", label="8")]))
    env.reset(options={"task": "t"})
    assert env.step(fenced("print(2 * int(input()))"))[1] == 1.0
    with pytest.raises(EnvironmentFault, match=r"test cases must be a list of {input, output}, not '8'"):
        env.reset(options={"task": "bad"})
    env.close()
    unit = Task.from_prompt("t", "?", label={"entry_point": "f", "cases": [{"args": [2], "expected": 4}]})
    env = CodeUnitTestsEnv(tasks=ListTasks([unit, Task.from_prompt("bad", "?", label={"entry_point": "f"})]))
    env.reset(options={"task": "t"})
    assert env.step(fenced("def f(x): return 2 * x"))[1] == 1.0
    with pytest.raises(EnvironmentFault, match="need a 'test' or 'cases'"):
        env.reset(options={"task": "bad"})
    env.close()


def test_rows_of_livecodebench_are_read_and_pickled_ones_refused(tmp_path):
    cases = [{"input": "4\n", "output": "8\n", "testtype": "stdin"}]
    row = {"question_id": "q1", "question_content": "Double it.", "private_test_cases": json.dumps(cases)}
    row |= {"public_test_cases": json.dumps(cases), "starter_code": "n = int(input())", "difficulty": "easy"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    env = CodeStdioEnv(path=path)
    observation, _ = env.reset(seed=1)
    assert "n = int(input())" in observation[0]["content"]
    assert env.step(fenced("print(2 * int(input()))"))[1] == 1.0
    env.close()
    for wrong, words in (
        ({"private_test_cases": "eJwrSS0u"}, "private_test_cases is no JSON list"),
        ({"private_test_cases": [cases[0] | {"testtype": "functional"}]}, "of type 'functional'"),
    ):
        path.write_text(json.dumps(row | wrong) + "\n")
        with pytest.raises(ValueError, match=words):
            CodeStdioEnv(path=path)


FUNCTIONAL = [
    {"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"},
    {"input": "[]\n1", "output": "[]", "testtype": "functional"},
]
ADD_ALL = "class Solution:\n    def addAll(self, xs: List[int], k: int):\n        return [x + k for x in xs]"


@pytest.mark.parametrize("make", [CodeStdioEnv, CodeUnitTestsEnv])
def test_rows_that_call_a_method_are_graded_beside_those_that_print(tmp_path, make):
    rows = [
        {
            "question_content": "Add k to all.",
            "public_test_cases": json.dumps(FUNCTIONAL[:1]),
            "private_test_cases": json.dumps(FUNCTIONAL[1:]),
            "metadata": json.dumps({"func_name": "addAll"}),
            "starter_code": "class Solution:\n    def addAll(self, xs: List[int], k: int) -> List[int]:\n        ",
        },
        {
            "question": "Add k to all.",
            "problem_id": 7,
            "input_output": json.dumps({"fn_name": "addAll", "inputs": [[[1], 1]], "outputs": [[[2]]]}),
        },
        {
            "question": "Double each line.",
            "input_output": {"inputs": ["1\n2\n", ["3", "4"]], "outputs": ["2\n4\n", ["6", "8"]]},
        },
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    env = make(path=path, tries=2)
    doubles = "import sys\nfor line in sys.stdin:\n    print(2 * int(line))"
    for task, right in zip(env.tasks("train"), (ADD_ALL, ADD_ALL, doubles), strict=True):
        env.reset(options={"task": task.task_id})
        assert env.step(fenced("print(1)"))[1:3] == (0.0, False)
        assert env.step(fenced(right))[1] == 1.0
    assert "addAll" in env.tasks("train")[0].messages[-1]["content"]
    env.close()
    for wrong, words in (
        ({"metadata": "{}"}, "need a 'func_name'"),
        (
            {"input_output": '{"fn_name": "f", "inputs": [[1]], "outputs": []}'},
            "as many 'inputs' as 'outputs'",
        ),
        ({"input_output": '{"inputs": ["1"], "outputs": []}'}, "1 inputs, but 0 outputs"),
        ({"input_output": "{"}, "no JSON"),
    ):
        path.write_text(json.dumps(rows[0] | wrong))
        with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{words}"):
            make(path=path)


def test_labels_are_looked_at_before_a_run():
    for env in (CodeUnitTestsEnv(), CodeStdioEnv()):
        for split in ("train", "heldout"):
            for task in env.tasks(split):
                env.check_label(task.label)
        for wrong in (
            None,
            "8",
            [],
            {"entry_point": "f", "test": "def check(candidate): pass"},
            {"inputs": []},
        ):
            with pytest.raises(ValueError):
                env.check_label(wrong)
