"""Judges against a real server on the loopback interface: what is asked, what is read, and failures, never a number."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.deadlines import check_times
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.tasks import JudgeReward
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, EpisodeView, ListTasks, Task
from polyturn.envs.rewards.factory import make_reward
from polyturn.envs.rewards.judge import JudgeGrader, read_grade
from polyturn.envs.tool_env import ToolEnv
from tests.support.http_service import Service, serving

TASK = Task.from_prompt("t", "What is 6 * 7?", label=42)


def view(answer: str = "42") -> EpisodeView:
    message = AssistantMessage(content=answer)
    return EpisodeView(task=TASK, message=message, messages=(*TASK.messages, message.to_message()))


def says(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def config(**options: Any) -> JudgeReward:
    return JudgeReward.model_validate({"kind": "judge", "urls": ["http://127.0.0.1:1/v1"], **options})


@contextlib.contextmanager
def judge(service: Service, **options: Any) -> Iterator[JudgeGrader]:
    grader = JudgeGrader(config(urls=[f"{service.url}/v1/"], **{"max_retries": 2, **options}))
    try:
        yield grader
    finally:
        grader.close()


async def test_a_grade_is_read_and_scaled_and_the_prompt_has_its_places_filled(tmp_path):
    (tmp_path / "key").write_text("sesame\n")
    prompt = 'Q {question} A {answer} L {label} from {low} to {high}: {"json": {conversation}} {other}'
    with serving(lambda _: says("<think>score: 9</think>Not bad.\nScore: 4")) as service:
        options = {"prompt": prompt, "api_key_file": tmp_path / "key", "request": {"top_p": 0.5}}
        with judge(service, **options) as grader:
            assert await grader(view("it is {label}")) == 0.4
    (body,) = service.bodies
    conversation = "[user]\nWhat is 6 * 7?\n\n[assistant]\nit is {label}"
    assert body["messages"] == [
        {
            "role": "user",
            "content": f'Q What is 6 * 7? A it is {{label}} L 42 from 0 to 10: {{"json": {conversation}}} {{other}}',
        }
    ]
    assert (body["model"], body["temperature"], body["max_tokens"], body["top_p"]) == (
        "default",
        0.0,
        512,
        0.5,
    )
    assert service.headers[0]["authorization"] == "Bearer sesame"


@pytest.mark.parametrize(
    ("options", "reply", "grade"),
    [
        ({}, "Score: 10", 1.0),
        ({}, "score = 2.5 ... no, **Score:** 7", 0.7),
        ({}, "Score: 11", None),
        ({}, "Score: -1", None),
        ({}, "I cannot say.", None),
        ({}, "", None),
        ({"low": -1, "high": 1}, "Score: -0.5", 0.25),
        ({"pattern": r"(?i)\b(yes|no)\b", "values": {"yes": 1, "no": -1}}, "No ... YES.", 1.0),
        ({"pattern": r"(\w+)$", "values": {"yes": 1}}, "maybe", None),
        ({"pattern": r"verdict|(\d)"}, "3 verdict", None),
    ],
)
def test_what_a_reply_is_worth(options, reply, grade):
    assert read_grade(reply, config(**options)) == (None if grade is None else pytest.approx(grade))


async def test_what_may_pass_is_tried_again_and_so_is_a_reply_without_a_grade():
    replies = iter([503, says("hm"), says("Score: 5")])
    with serving(lambda _: next(replies)) as service, judge(service) as grader:
        assert await grader(view()) == 0.5
    assert len(service.bodies) == 3


FAILURES = {
    "500s": (lambda _: 500, "answered 500", 3),
    "no grade": (lambda _: says("a lovely answer"), "no grade in the judge's reply 'a lovely answer'", 3),
    "garbage": (lambda _: b"<html>", "not JSON", 1),
    "no completion": (lambda _: {"rewards": [1.0]}, "no chat completion", 1),
    "null": (lambda _: {"choices": [{"message": {"content": None}}]}, "no grade", 3),
    "refused": (lambda _: 401, "answered 401", 1),
    "hangs": (lambda _: None, "no reward within 0.5 s", 1),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_judge_that_fails_is_a_fault_and_never_a_number(name):
    reply, sentence, num_requests = FAILURES[name]
    with serving(reply) as service:
        with judge(service, deadline_s=0.5 if name == "hangs" else 20) as grader:
            with pytest.raises(EnvironmentFault, match=sentence):
                await grader(view())
    assert len(service.bodies) == num_requests


class Asked(ToolEnv):
    """Graded by whatever is given."""

    def tasks(self, split):
        return ListTasks([TASK])


async def test_an_episode_whose_judge_fails_has_no_reward_in_a_rubric_either():
    parts = [
        {"name": "right", "weight": 1, "reward": {"kind": "rule", "name": "numeric"}},
        {"name": "style", "weight": 1, "reward": {"kind": "judge", "urls": ["URL"], "max_retries": 0}},
    ]
    for reply, expected in ((says("Score: 5"), 1.5), (500, None)):
        with serving(lambda _, reply=reply: reply) as service:
            given = json.loads(json.dumps(parts).replace("URL", f"{service.url}/v1"))
            reward = make_reward(
                RunConfig.model_validate(
                    load_config("quickstart").model_dump() | {"reward": {"kind": "rubric", "parts": given}}
                ).reward
            )
            env = Asked()
            env.graded_by = reward
            await env.reset_async(options={"task": TASK})
            if expected is None:
                with pytest.raises(EnvironmentFault, match="answered 500"):
                    await env.step_async(AssistantMessage(content="42"))
            else:
                _, value, terminated, _, info = await env.step_async(AssistantMessage(content="42"))
                assert (value, terminated) == (pytest.approx(expected), True)
                assert info["reward_parts"] == {"right": 1.0, "style": 0.5}
            env.close()
            reward.parts[1].reward.close()


async def test_requests_at_once_are_bounded_and_addresses_take_turns():
    most = running = 0

    def reply(_: dict[str, Any]) -> dict[str, Any]:
        nonlocal most, running
        running += 1
        most = max(most, running)
        time.sleep(0.03)
        running -= 1
        return says("Score: 1")

    with serving(reply) as one, serving(reply) as other:
        grader = JudgeGrader(config(urls=[f"{one.url}/v1", f"{other.url}/v1"], max_concurrent_requests=3))
        grades = await asyncio.gather(*(grader(view()) for _ in range(12)))
        grader.close()
    assert grades == [0.1] * 12 and most == 3
    assert len(one.bodies) == len(other.bodies) == 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"urls": []}, "give one of them"),
        ({"judge": "j"}, "give one of them"),
        ({"pattern": "score"}, "no group"),
        ({"pattern": "("}, "pattern"),
        ({"low": 3, "high": 3}, "low 3 must be below high 3"),
        ({"urls": ["127.0.0.1/v1"]}, "urls"),
    ],
)
def test_sections_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(**options)


def test_a_deadline_that_grading_would_cut_off_is_refused():
    given = load_config("quickstart").model_dump()
    given["reward"] = {"kind": "judge", "urls": ["http://127.0.0.1:1/v1"], "deadline_s": 500}
    with pytest.raises(ConfigError, match=r"reward\.deadline_s \(500\) must be below"):
        check_times(RunConfig.model_validate(given))


async def test_a_judge_of_a_run_grades_nothing_before_it_is_served():
    grader = JudgeGrader(config(urls=[], judge="big"))
    with pytest.raises(EnvironmentFault, match="the judge 'big' is served nowhere"):
        await grader(view())
