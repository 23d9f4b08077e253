"""FerryDesk keeps its promises, and pays for the right ticket only."""

from __future__ import annotations

import pytest
from ferry_desk.timetable import make_customer

import polyturn
from polyturn import AssistantMessage, ToolCall

ENV_ID = "ferry_desk/FerryDesk-v0"


def test_it_conforms(polyturn_check_env):
    polyturn_check_env(ENV_ID, num_tasks=32)


@pytest.fixture
def desk():
    env = polyturn.make(ENV_ID)
    env.reset(seed=0, options={"task": "customer-7"})
    yield env
    env.close()


def call(env, name, **arguments):
    message = AssistantMessage(tool_calls=(ToolCall(id="1", name=name, arguments=arguments),))
    return env.step(message)[0][0]["content"]


def say(env, text):
    observation, reward, terminated, *_ = env.step(AssistantMessage(content=text))
    return (observation[0]["content"] if observation else ""), reward, terminated


def test_the_customer_says_when_asked_and_only_once(desk):
    answer, _, terminated = say(desk, "When can you leave?")
    assert answer == f"I can leave, but not before {desk.task.label.not_before}." and not terminated
    assert say(desk, "Are you sure?") == ("", 0.0, True)


def test_another_ticket_beside_the_right_one_is_not_paid_until_it_is_cancelled(desk):
    best = desk.task.label.best
    other = next(s for s in desk.task.label.sailings if s != best and not s.sold_out)
    call(desk, "book", code=best.code)
    call(desk, "book", code=other.code)
    assert call(desk, "cancel", code=other.code) == f"Cancelled {other.code}."
    assert call(desk, "cancel", code=other.code) == f"{other.code} is not booked"
    assert say(desk, "Done.") == ("", 0.8, True)


def test_listing_all_times_is_not_telling(desk):
    call(desk, "book", code=desk.task.label.best.code)
    assert say(desk, " ".join(s.departs for s in desk.task.label.sailings))[1] == 0.8


def test_a_sold_out_sailing_cannot_be_booked():
    number = next(n for n in range(100) if any(s.sold_out for s in make_customer(n).sailings))
    env = polyturn.make(ENV_ID)
    env.reset(seed=0, options={"task": f"customer-{number}"})
    gone = next(s for s in env.task.label.sailings if s.sold_out)
    assert call(env, "book", code=gone.code) == f"{gone.code} is sold out"
    assert env.booked == []
