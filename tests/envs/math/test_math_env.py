"""The math environments: one answer, further attempts, a calculator, and where the problems come from."""

import json
import random
import re

import pytest

from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.math.env import calculate
from polyturn.envs.math.tasks import make_problems
from polyturn.envs.messages import AssistantMessage, Task
from polyturn.envs.registry import make
from polyturn.envs.rewards.math import MathVerifier, verify
from polyturn.tools.types import ToolCall, ToolError

IDS = ["polyturn/GSM8K-v0", "polyturn/Math-v0", "polyturn/MathCalculator-v0", "polyturn/MathRetry-v0"]
COSTLY = r"\int_0^1 \frac{x^{40}+x^{13}+1}{x^{41}+x^{17}+3x+5} dx"


def say(text: str) -> AssistantMessage:
    return AssistantMessage(content=text)


def task_of(label) -> dict:
    return {"task": Task.from_prompt("t", "What is it?", label=label)}


def play(env, script, task) -> float:
    messages, _ = env.reset(options={"task": task})
    history, total, done = list(messages), 0.0, False
    while not done:
        action = script(history, env.tools)
        observation, reward, terminated, truncated, _ = env.step(action)
        history += [action.to_message(), *observation]
        total, done = total + reward, terminated or truncated
    return total


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_oracle_is_always_right_and_chance_is_not(env_id, split):
    env = make(env_id, split=split)
    tasks = list(env.tasks(split))
    assert len(tasks) >= 100
    assert all(play(env, env.oracle, task) == 1.0 for task in tasks)
    assert sum(play(env, env.random_policy(seed), task) for seed, task in enumerate(tasks[:100])) < 3


@pytest.mark.parametrize("options", [{"made": "words", "answer_format": "any"}, {"made": "words"}])
@pytest.mark.parametrize("calculator", [False, True])
def test_the_oracle_works_a_solution_out_as_it_is_written(options, calculator):
    env = make("polyturn/Math-v0", calculator=calculator, split="heldout", **options)
    [task, *others] = env.tasks("heldout")
    assert len({task.messages[-1]["content"] for task in [task, *others]}) == 200
    assert not {t.messages[-1]["content"] for t in env.tasks("train")} & {
        t.messages[-1]["content"] for t in others
    }
    assert all(play(env, env.oracle, other) == 1.0 for other in others)
    history, actions, done = list(env.reset(options={"task": task})[0]), [], False
    while not done:
        actions.append(env.oracle(history, env.tools))
        observation, _, done, *_ = env.step(actions[-1])
        history += [actions[-1].to_message(), *observation]
    expressions = [call.arguments["expression"] for action in actions for call in action.tool_calls]
    written = re.findall(r"<<(.+?)=", task.metadata["solution"])
    if calculator:
        assert expressions == written and len(written) == 2
    else:
        assert (
            all(expression in actions[0].content for expression in written) and "<<" not in actions[0].content
        )
        assert actions[0].content.endswith(task.label if "answer_format" in options else "}.")


@pytest.mark.parametrize("env_id", IDS)
def test_train_and_heldout_share_no_problem(env_id):
    env = make(env_id)
    problems = [{task.messages[-1]["content"] for task in env.tasks(split)} for split in ("train", "heldout")]
    assert not problems[0] & problems[1]
    assert list(env.tasks("test")) == list(env.tasks("heldout"))
    with pytest.raises(ValueError, match="train, heldout"):
        env.tasks("validation")


def test_only_a_box_counts_unless_any_form_does():
    for answer_format, text, reward in (
        ("boxed", "The answer is 42.", 0.0),
        ("boxed", "\\boxed{42}", 1.0),
        ("any", "The answer is 42.", 1.0),
        ("any", "#### 42", 1.0),
        ("any", "42 or 43", 0.0),
    ):
        env = make("polyturn/Math-v0", answer_format=answer_format)
        env.reset(options=task_of("42"))
        _, got, terminated, _, info = env.step(say(text))
        assert (got, terminated) == (reward, True), (answer_format, text)
        assert info["reward_parts"] == {"correct": reward}


def test_a_wrong_answer_may_be_mended_and_earns_less():
    env = make("polyturn/MathRetry-v0")
    env.reset(options=task_of("42"))
    observation, reward, terminated, *_ = env.step(say("\\boxed{40}"))
    assert (reward, terminated) == (0.0, False)
    assert "not the right answer" in observation[0]["content"] and "2 attempts" in observation[0]["content"]
    assert "42" not in observation[0]["content"]
    observation, reward, terminated, *_ = env.step(say("\\boxed{41} or \\boxed{42}"))
    assert (reward, terminated) == (0.0, False)
    assert "one answer" in observation[0]["content"] and "last attempt" in observation[0]["content"]
    _, reward, terminated, _, info = env.step(say("\\boxed{42}"))
    assert (reward, terminated) == (0.25, True)
    assert info["metrics"]["attempts"] == 3.0


def test_attempts_without_decay_and_attempts_used_up():
    env = make("polyturn/Math-v0", max_attempts=2)
    for answers, reward in (("41 42", 1.0), ("41 43", 0.0), ("42", 1.0)):
        env.reset(options=task_of("42"))
        steps = [env.step(say(f"\\boxed{{{answer}}}")) for answer in answers.split()]
        assert [step[2] for step in steps] == [False] * (len(steps) - 1) + [True]
        assert sum(step[1] for step in steps) == reward


def test_the_calculator_is_a_tool_whose_mistakes_can_be_mended():
    env = make("polyturn/MathCalculator-v0")
    env.reset(options=task_of("108"))
    results = []
    for expression in ("(48 + 24) * 3 / 2", "2 +", "9**9**9"):
        call = ToolCall(id="c", name="calculator", arguments={"expression": expression})
        observation, reward, terminated, _, info = env.step(AssistantMessage(tool_calls=(call,)))
        assert (reward, terminated) == (0.0, False)
        results.append((info["tool_results"][0].ok, observation[0]["content"]))
    assert results[0] == (True, "108")
    assert [ok for ok, _ in results[1:]] == [False, False]
    assert "too large" in results[2][1]
    assert env.step(say("\\boxed{108}"))[1] == 1.0


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1/3 + 1/6", "0.5"),
        ("7/3", "7/3 (about 2.33333333333)"),
        ("sqrt(16) * 2^10", "4096"),
        ("15% * 80", "12"),
        ("5!", "120"),
        ("sin(30°)", "0.5"),
        ("log(1000)", "3"),
        ("1,234 + 1", "1235"),
        ("0.1 + 0.2", "0.3"),
        ("-2^2", "-4"),
        ("100 \u00d7 3 \u00f7 4", "75"),
        ("2^200", "1.60693804426e+60"),
        ("48/2=", "24"),
    ],
)
def test_the_calculator_calculates(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1/0",
        "x + 1",
        "__import__('os')",
        "9**9**9",
        "1" * 501,
        "10^{10^{10}}",
        "sqrt(-1)",
        "(((",
        "1e999",
        "100000!",
        r"\sum_{k=1}^{900}" * 12 + "k",
    ],
)
def test_the_calculator_refuses_in_words(expression):
    with pytest.raises(ToolError, match=r"\w{4}"):
        calculate(expression)


def test_an_answer_that_costs_too_much_is_wrong_and_counted():
    with MathVerifier(cpu_s=0.2) as verifier:
        verifier.warm()
        env = make("polyturn/Math-v0", verifier=verifier)
        env.reset(options=task_of("1"))
        *_, info = env.step(say(rf"\boxed{{{COSTLY}}}"))
        assert info["reward_parts"] == {"correct": 0.0}
        assert info["metrics"] == {"attempts": 1.0, "verdict_too_costly": 1.0}
    env.reset(options=task_of("1"))
    assert env.step(say(r"\boxed{2}"))[4]["metrics"] == {"attempts": 1.0, "verdict_number": 1.0}


def test_a_verifier_that_finds_nothing_out_is_a_fault():
    with MathVerifier(num_workers=1, cpu_s=60, wall_s=0.1) as verifier:
        env = make("polyturn/Math-v0", verifier=verifier)
        env.reset(options=task_of("1"))
        with pytest.raises(EnvironmentFault, match="could not be compared with the label: timeout"):
            env.step(say(rf"\boxed{{{COSTLY}}}"))


@pytest.mark.parametrize("label", [42, 42.0, "42", ["41", "42"], [41, 42]])
def test_a_label_may_be_a_number_or_a_list_of_right_answers(label):
    env = make("polyturn/Math-v0")
    env.reset(options=task_of(label))
    assert env.step(say(r"\boxed{42}"))[1] == 1.0
    env.reset(options=task_of(label))
    assert env.step(say(r"\boxed{43}"))[1] == 0.0
    env.unwrapped.check_label(label)


@pytest.mark.parametrize(
    "label",
    ["((", r"\begin{cases} x=1 \\ y=2", "", None, True, [], float("nan"), r"\frac{1}{0}", "10^{10^{10}}!"],
)
def test_a_label_that_no_answer_can_be_paid_for_is_named(label):
    with pytest.raises(ValueError, match=r"must be|cannot|can be read|no value|bounds"):
        make("polyturn/Math-v0").unwrapped.check_label(label)


async def test_episodes_run_in_an_event_loop():
    env = make("polyturn/MathRetry-v0")
    await env.reset_async(options=task_of(r"\sqrt{8}"))
    assert (await env.step_async(say(r"\boxed{\sqrt{2}}")))[2] is False
    _, reward, terminated, *_ = await env.step_async(say(r"\boxed{2\sqrt{2}}"))
    assert (reward, terminated) == (0.5, True)


def test_any_file_of_problems_and_answers(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"problem": f"What is {n}+{n}?", "answer": 2 * n} for n in range(100)]
    rows += [{"question": "Half of 1?", "solution": "It is $\\boxed{\\frac12}$."}]
    path.write_text("\n".join(map(json.dumps, rows)))
    env = make("polyturn/Math-v0", path=str(path), heldout_fraction=0.3)
    train, heldout = env.tasks("train"), env.tasks("heldout")
    assert len(train) + len(heldout) == 101
    assert 15 < len(heldout) < 45
    half = [task for task in [*train, *heldout] if "Half" in task.messages[-1]["content"]]
    assert half[0].label == r"\frac12"
    random.Random(0).shuffle(rows)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(map(json.dumps, rows)))
    again = make("polyturn/Math-v0", path=str(shuffled), heldout_fraction=0.3).tasks("heldout")
    assert {t.messages[-1]["content"] for t in again} == {t.messages[-1]["content"] for t in heldout}


def test_a_folder_in_the_form_of_gsm8k(tmp_path):
    for name, answer in (("train", "#### 1,200"), ("test", "#### 7")):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"question": "How many?", "answer": f"So\n{answer}"})
        )
    env = make("polyturn/GSM8K-v0", path=str(tmp_path))
    assert [env.tasks(split)[0].label for split in ("train", "test")] == ["1,200", "7"]
    env.reset(options={"split": "train"})
    assert env.step(say("#### 1200"))[1] == 1.0


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "1: not valid JSON"),
        ("[1]", "1: a problem is a JSON object"),
        ('{"problem": "p"}', "missing key 'answer'"),
        ('{"answer": "1"}', "missing key 'problem'"),
        ('{"problem": "p", "answer": ["1"]}', "must be a text or a number"),
        ('{"problem": "p", "answer": ""}', "the answer is empty"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, row, complaint):
    path = tmp_path / "bad.jsonl"
    path.write_text(row)
    with pytest.raises(ValueError, match=complaint):
        make("polyturn/Math-v0", path=str(path)).tasks("train")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_attempts": 0}, "max_attempts"),
        ({"attempt_decay": 0.0}, "attempt_decay"),
        ({"heldout_fraction": 1.0}, "heldout_fraction"),
        ({"answer_format": "latex"}, "boxed or any"),
        ({"split": "dev"}, "train, heldout"),
        ({"num_problems": 0}, "num_problems"),
        ({"max_tries": 2}, "max_tries"),
    ],
)
def test_bad_options_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        make("polyturn/GSM8K-v0", **options)


def test_problems_made_from_a_seed_are_the_same_again_and_their_answers_differ():
    assert make_problems.__wrapped__(3, 50, 20) == make_problems.__wrapped__(3, 50, 20)
    assert make_problems(3, 50, 20) != make_problems(4, 50, 20)
    problems = make_problems(0, 500, 200)["train"]
    assert len({answer for _, answer in problems}) > 250
    most_common = max((sum(other == answer for _, other in problems) for _, answer in problems))
    assert most_common < 25
    with pytest.raises(ValueError, match="different problems"):
        make_problems(0, 10**6, 1)


def test_the_made_answers_are_right():
    problems = dict(make_problems(0, 500, 200)["train"])
    checked = 0
    for problem, answer in problems.items():
        if problem.startswith("Compute $"):
            checked += verify(
                problem.removeprefix("Compute $").removesuffix("$."), answer, mode="boxed"
            ).correct
        elif problem.startswith("Simplify $"):
            checked += verify(
                problem.removeprefix("Simplify $").removesuffix("$."), answer, mode="boxed"
            ).correct
        elif problem.startswith("Expand $"):
            checked += verify(
                problem.removeprefix("Expand $").removesuffix("$."), answer, mode="boxed"
            ).correct
    assert checked == sum(problem.startswith(("Compute", "Simplify", "Expand")) for problem in problems)
    assert checked > 80


def test_a_label_that_names_no_answer_is_a_fault():
    env = make("polyturn/Math-v0")
    with pytest.raises(Exception, match="the label must be a number or a text"):
        env.reset(options=task_of(None))
