"""Intervals that cover what they should, and failures that are counted and not scored."""

from __future__ import annotations

from statistics import fmean

import numpy as np
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
from polyturn.rollout.evaluation.held_out import evaluate, evaluation_prompts, summarise
from polyturn.rollout.evaluation.statistics import (
    clustered_interval,
    interval,
    student_quantile,
    wilson_interval,
)
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer, RolloutError
from polyturn.rollout.user_faults import user_fault_share
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
    assert (result.low, result.high) == pytest.approx((0.5313, 0.8881), abs=1e-4)


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


def test_wilson_against_published_values():
    """Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


def test_student_quantiles_against_tables():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 30: 2.0423, 99: 1.9842}
    for degrees, value in table.items():
        assert student_quantile(degrees) == pytest.approx(value, rel=3e-3)


def coverage(draw, *, trials=400):
    """How often the interval contains the true mean."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(trials):
        scores, truth = draw(rng)
        low, high, _ = interval(scores)
        assert 0.0 <= low <= fmean(score for task in scores for score in task) <= high <= 1.0
        hits += low <= truth <= high
    return hits / trials


def test_coverage_with_one_sample_per_task():
    for truth in (0.05, 0.5, 0.9):
        found = coverage(lambda rng, p=truth: ([[float(rng.random() < p)] for _ in range(60)], p))
        assert 0.92 <= found <= 0.985


def test_coverage_clustered_by_task_where_the_naive_interval_fails():
    """Half of the tasks are hard, half easy; eight samples of each are anything but independent."""

    def draw(rng):
        rates = rng.beta(0.3, 0.3, size=60)
        return [[float(rng.random() < rate) for _ in range(8)] for rate in rates], 0.5

    assert 0.92 <= coverage(draw) <= 0.98
    rng = np.random.default_rng(0)
    naive_hits = 0
    for _ in range(400):
        scores, truth = draw(rng)
        flat = [score for task in scores for score in task]
        low, high = wilson_interval(sum(flat), len(flat))
        naive_hits += low <= truth <= high
    assert naive_hits / 400 < 0.75


def test_clusters_of_unequal_size():
    """By hand: the mean is 3/5, the clusters' summed residuals are 0.8 and -0.8, the factor is 2."""
    low, high = clustered_interval([[1.0, 1.0], [0.0, 1.0, 0.0]])
    half = 12.7062 * (2 * (0.8**2 + 0.8**2)) ** 0.5 / 5
    assert (low, high) == pytest.approx((0.6 - half, 0.6 + half), rel=1e-4)


def test_equal_binary_scores_still_have_an_interval():
    low, high, method = interval([[1.0] * 4] * 10)
    assert (high, method) == (1.0, "wilson")
    assert low == pytest.approx(wilson_interval(10, 10)[0])
    assert interval([[0.3]]) == (0.3, 0.3, "none")


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
