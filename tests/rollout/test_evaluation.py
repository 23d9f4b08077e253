"""Failures on held-out tasks are counted and not scored."""

from __future__ import annotations

import pytest

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import Outcome
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.agents.policy import PolicyFault
from polyturn.envs.faults import UserFault
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.rewards import exact_match
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.collection import play_groups
from polyturn.rollout.evaluation.held_out import evaluate, evaluation_prompts, mean_metrics, summarise
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer, RolloutError
from polyturn.rollout.user_faults import user_fault_share
from tests.support.evaluations import episode
from tests.support.play import message_play

TASKS = ListTasks([Task.from_prompt(f"task-{i}", f"Say {i}", label=str(i)) for i in range(20)])


class Parrot(ToolEnv):
    def grade(self, message):
        return {"correct": exact_match(message.content, self.task.label)}


def make_player():
    return EpisodePlayer(
        make_env=Parrot,
        tasks=TASKS,
        play=message_play(limits=EpisodeLimits()),
        limits=RolloutLimits(max_retries=1, retry_delay_s=0),
        seed=0,
    )


def number_in(messages):
    return int(messages[0]["content"].removeprefix("Say "))


async def run(script, **options):
    player = make_player()
    try:
        return await evaluate(player=player, policy=ScriptedPolicy(script), **options)
    finally:
        player.close()


async def test_mean_interval_and_counts():
    def script(messages, tools):
        number = number_in(messages)
        return AssistantMessage(content=str(number if number < 15 else 0))

    result = await run(script, num_tasks=100)
    assert (result.num_tasks, result.num_episodes, result.num_failed) == (20, 20, 0)
    assert (result.mean, result.method, result.mean_turns) == (0.75, "wilson", 1.0)
    assert (result.low, result.high) == pytest.approx((0.5313, 0.8949), abs=1e-4)


@pytest.mark.catalogue("B43")
async def test_failures_are_excluded_and_counted():
    """The five tasks that fail would have been wrong: they must not lower the mean."""

    def script(messages, tools):
        number = number_in(messages)
        if number >= 15:
            raise PolicyFault("gone")
        return AssistantMessage(content=str(number))

    attempts = []
    result = await run(script, num_tasks=20, samples_per_task=2, on_episode=attempts.append)
    assert (result.mean, result.num_tasks, result.num_episodes, result.num_failed) == (1.0, 15, 30, 10)
    assert sum(episode.outcome is Outcome.FAILED for episode in attempts) == 20
    assert result.low < 0.8, "fifteen right answers do not prove perfection"


async def test_an_evaluation_without_survivors_has_no_result():
    def script(messages, tools):
        raise PolicyFault("gone")

    with pytest.raises(RolloutError, match="gone"):
        await run(script, num_tasks=4)


async def test_tasks_and_seeds_are_the_same_every_time():
    first, second = [], []
    for kept in (first, second):
        await run(lambda messages, tools: AssistantMessage(content="1"), num_tasks=7, on_episode=kept.append)

    def identities(kept):
        return sorted((episode.episode_id, episode.task_id, episode.seed) for episode in kept)

    assert identities(first) == identities(second)
    assert {episode.task_id for episode in first} == {f"task-{i}" for i in range(7)}


class Talks(Parrot):
    """The customer of every third task breaks its script, that of every fifth cannot be played."""

    def begin(self, task):
        number = int(task.label)
        if number % 5 == 0:
            raise UserFault("the simulated user cannot speak")
        self.metrics["user_broke_script"] = float(number % 3 == 0)
        return task.messages


async def test_failures_of_simulated_users_are_told_from_those_of_the_policy():
    """Of 16 that are played 5 have a user that broke its script; the policy fails on 3, 6, 9, 7 and 8."""
    tasks, attempts = ListTasks([TASKS[i] for i in range(20)]), []
    player = EpisodePlayer(
        make_env=Talks,
        tasks=tasks,
        play=message_play(limits=EpisodeLimits()),
        limits=RolloutLimits(max_retries=1, retry_delay_s=0),
        seed=0,
    )

    def script(messages, tools):
        number = number_in(messages)
        return AssistantMessage(content="x" if number in (3, 6, 9, 7, 8) else str(number))

    groups = await play_groups(
        player,
        evaluation_prompts(20),
        samples_per_prompt=1,
        policy=ScriptedPolicy(script),
        on_episode=attempts.append,
    )
    player.close()
    result = summarise(groups)
    assert (result.num_episodes, result.num_failed, result.num_user_faults) == (16, 4, 8)
    assert result.user_fault_share == 3 / 5
    assert result.metrics == {"user_broke_script": 5 / 16}
    assert {a.stop_reason for a in attempts if a.outcome is Outcome.FAILED} == {"user_fault"}
    metrics = pytest.importorskip("polyturn.trainer.run.metrics", reason="training is not installed")
    assert metrics.user_metrics(groups) == {"user/fault_share": 0.6, "user/failed_attempts": 8.0}
    assert metrics.user_metrics([]) == {}
    assert user_fault_share(()) is None


@pytest.mark.parametrize(
    ("values", "mean"), [((1e308, 1e308), 1e308), ((0.1, 0.2, 0.6), 0.3), ((-1e308, 1e308), 0.0)]
)
def test_large_metrics_have_a_mean(values: tuple[float, ...], mean: float) -> None:
    episodes = [episode(0, number, 1.0, metrics={"counted": value}) for number, value in enumerate(values)]
    assert mean_metrics([*episodes, episode(1, 0, 1.0, metrics={})]) == {"counted": pytest.approx(mean)}
