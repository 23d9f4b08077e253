"""Rubrics and group rewards: every raw value is recorded, weights go into the reward only."""

import asyncio
import threading

import pytest

from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, EpisodeView, ListTasks, Score, Task, as_score
from polyturn.envs.rewards.factory import read_reward
from polyturn.envs.rewards.rubric import (
    Criterion,
    EnvironmentGrade,
    Rubric,
    diversity,
    rank,
    score_group,
)
from polyturn.envs.tool_env import ToolEnv


def view(answer="a", label="a", **fields):
    task = Task.from_prompt("t", "p", label=label)
    return EpisodeView(task=task, message=AssistantMessage(content=answer), messages=(), **fields)


def part(name, weight, reward):
    return Criterion(name=name, weight=weight, reward=reward)


def test_every_raw_value_is_recorded_and_weights_are_not():
    rubric = Rubric(
        [
            part("right", 2.0, lambda episode: 1.0),
            part("long", -0.5, lambda episode: 3.0),
            part("watched", 0.0, lambda episode: 7.0),
            part("style", 0.1, lambda episode: {"terse": 1.0, "polite": 2.0}),
        ]
    )
    score = rubric(view())
    assert score.value == pytest.approx(2.0 - 1.5 + 0.3)
    assert score.parts == {
        "right": 1.0,
        "long": 3.0,
        "watched": 7.0,
        "style": 3.0,
        "style.terse": 1.0,
        "style.polite": 2.0,
    }


async def test_asynchronous_parts_are_awaited_together():
    inside, most = 0, 0

    async def slow(episode):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.01)
        inside -= 1
        return 1.0

    score = await Rubric([part(name, 1, slow) for name in "abc"] + [part("d", 1, lambda _: 2.0)])(view())
    assert (score.value, most) == (5.0, 3)


def test_a_rubric_from_a_config():
    row = {
        "kind": "rubric",
        "parts": [
            {"name": "right", "weight": 1, "reward": {"kind": "rule", "name": "exact_match"}},
            {
                "name": "tags",
                "weight": 0.2,
                "reward": {"kind": "rule", "name": "format", "options": {"tags": ["a"]}},
            },
        ],
    }
    rubric = read_reward(row)
    assert rubric(view("x", "x")) == Score(value=1.0, parts={"right": 1.0, "tags": 0.0})
    with pytest.raises(ValueError, match="exact_match: the label"):
        rubric.check_label(None)
    row["parts"][1]["name"] = "right"
    with pytest.raises(ValueError, match="two parts of the rubric have the name 'right'"):
        read_reward(row)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "1", None, {"a": float("nan")}, [1.0], {"a": "b"}]
)
def test_what_is_not_finite_is_an_error(value):
    with pytest.raises(ValueError, match="finite"):
        as_score(value)
    with pytest.raises(ValueError, match="part 'x': it must return a finite number"):
        Rubric([part("x", 1, lambda _: value)])(view())


def test_rank_and_diversity():
    assert rank([view(reward=r) for r in (3.0, 1.0, 2.0)]) == [1.0, 0.0, 0.5]
    assert rank([view(reward=r) for r in (1.0, 1.0, 0.0)]) == [0.75, 0.75, 0.0]
    assert rank([view(reward=1.0)]) == [0.5]
    assert rank([view(reward=0.0, metrics={"turns": t}) for t in (5, 9)], by="turns") == [0.0, 1.0]
    assert diversity([view(a) for a in ("Paris", "paris.", "Rome")]) == [0.5, 0.5, 1.0]
    assert diversity([view()]) == [0.0]


async def test_group_rewards_see_the_whole_group_and_are_recorded_raw():
    async def share(episodes):
        return [{"size": len(episodes), "mine": index} for index, _ in enumerate(episodes)]

    parts = [
        Criterion(name="place", weight=0.5, reward=rank),
        Criterion(name="share", weight=0.0, reward=share),
    ]
    scores = await score_group(parts, [view(reward=1.0), view(reward=0.0)])
    assert [score.value for score in scores] == [0.5, 0.0]
    assert scores[0].parts == {"place": 1.0, "share": 2.0, "share.size": 2.0, "share.mine": 0.0}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda e: 1.0,
        lambda e: [1.0],
        lambda e: {"a": 1.0},
        lambda e: [1.0, float("nan")],
        lambda e: "ab",
        lambda e: 1 / 0,
    ],
)
async def test_a_group_reward_that_fails_is_a_fault(wrong):
    with pytest.raises(EnvironmentFault, match="group reward 'g'"):
        await score_group([Criterion(name="g", weight=1.0, reward=wrong)], [view(), view()])


class Half(ToolEnv):
    """Grades everything one half in two parts."""

    def grade(self, message):
        return {"a": 0.25, "b": 0.25}


def play(env, answer="x"):
    env.reset()
    return env.step(AssistantMessage(content=answer))


TASKS = ListTasks([Task.from_prompt("t", "p", label="x")])


def test_a_reward_takes_the_place_of_the_grade():
    env = Half(tasks=TASKS)
    assert play(env)[1] == 0.5
    env.graded_by = read_reward("exact_match")
    _, reward, terminated, _, info = play(env)
    assert (reward, terminated, info["reward_parts"]) == (1.0, True, {"exact_match": 1.0})
    assert play(env, "y")[1] == 0.0


def test_a_tasks_own_reward_goes_before_all():
    task = Task(
        task_id="t", messages=({"role": "user", "content": "p"},), label="x", reward=lambda episode: 0.75
    )
    env = Half(tasks=ListTasks([task]))
    env.graded_by = read_reward("exact_match")
    assert play(env)[4]["reward_parts"] == {"reward": 0.75}


def test_a_rubric_may_contain_the_environments_own_grade():
    env = Half(tasks=TASKS)
    env.graded_by = Rubric([part("own", 2.0, EnvironmentGrade()), part("one", 1.0, lambda _: 1.0)])
    _, reward, _, _, info = play(env)
    assert reward == 2.0
    assert info["reward_parts"] == {"own": 0.5, "own.a": 0.25, "own.b": 0.25, "one": 1.0}


def test_a_reward_sees_the_whole_conversation_and_the_metrics():
    seen = []

    class Counting(Half):
        def begin(self, task):
            self.metrics["begun"] = 1.0
            return task.messages

    env = Counting(tasks=TASKS)
    env.graded_by = lambda episode: seen.append(episode) or 1.0
    play(env, "my answer")
    assert [message["content"] for message in seen[0].messages] == ["p", "my answer"]
    assert (seen[0].answer, seen[0].label, seen[0].metrics) == ("my answer", "x", {"begun": 1.0})


@pytest.mark.parametrize(
    "broken", [lambda e: float("nan"), lambda e: None, lambda e: 1 / 0, lambda e: {"a": "b"}]
)
def test_a_reward_that_fails_is_a_fault_and_no_zero(broken):
    env = Half(tasks=TASKS)
    env.graded_by = broken
    with pytest.raises(EnvironmentFault, match="reward failed on task 't'"):
        play(env)


async def test_asynchronous_rewards_run_in_step_and_in_step_async():
    async def later(episode):
        await asyncio.sleep(0)
        return 0.25

    env = Half(tasks=TASKS)
    env.graded_by = later
    assert (await asyncio.to_thread(play, env))[1] == 0.25
    env.graded_by = Rubric([part("later", 2.0, later)])
    assert (await asyncio.to_thread(play, env))[1] == 0.5
    await env.reset_async()
    assert (await env.step_async(AssistantMessage(content="x")))[1] == 0.5


async def test_a_part_that_never_returns_is_bounded_by_name_and_one_that_exits_is_a_fault(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr("polyturn.envs.rewards.rubric.MAX_LOST", 2)

    async def quick(episode):
        return 1.0

    def slow(episode):
        release.wait()
        return 1.0

    def exits(episode):
        return next(iter(()))

    graded = Rubric(
        [Criterion(name="quick", weight=1.0, reward=quick), Criterion(name="slow", weight=1.0, reward=slow)]
    )
    for _ in range(2):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await graded(view("x"))
    with pytest.raises(RuntimeError, match="2 calls of the part 'slow' never returned"):
        await graded(view("x"))
    release.set()
    while True:
        try:
            assert (await graded(view("x"))).value == 2.0
            break
        except RuntimeError:
            await asyncio.sleep(0.01)
    broken = Rubric(
        [Criterion(name="quick", weight=1.0, reward=quick), Criterion(name="exits", weight=1.0, reward=exits)]
    )
    env = Half(tasks=TASKS)
    env.graded_by = broken
    await env.reset_async()
    with pytest.raises(EnvironmentFault, match="StopIteration"):
        async with asyncio.timeout(10):
            await env.step_async(AssistantMessage(content="x"))
