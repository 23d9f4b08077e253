"""A part that fails for good ends the run in a sentence that names it: it takes no environment's samples in silence."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import NO_ENGINE, USER_FAULT, Episode, Outcome
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, EnvironmentChoice, ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.breaker import MIN_FAILURES, Breaker, part_of
from polyturn.rollout.collection import Collection
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer, RolloutError
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall
from tests.support.play import message_play


class Sound(ToolEnv):
    @tool
    async def look(self) -> str:
        """Look."""
        return "seen"

    async def grade(self, message: AssistantMessage) -> dict[str, float]:
        return {"done": 1.0}


class Broken(Sound):
    @tool
    async def look(self) -> str:
        """Look."""
        raise ConnectionError("the archive is down")


class LookOnce:
    async def reply(self, *, messages, tools):
        if messages[-1]["role"] == "tool":
            return AssistantMessage(content="done")
        return AssistantMessage(tool_calls=(ToolCall(id="1", name="look"),))


async def test_one_environment_of_a_mixture_that_always_fails_stops_the_run():
    """In no step do half of the attempts fail, so that only its own record tells."""
    tasks = [Task.from_prompt(f"task-{number}", "go") for number in range(8)]
    tasks[7] = replace(tasks[7], environment=EnvironmentChoice(env_id="Broken"))
    limits = RolloutLimits(max_concurrent_episodes=8, retry_delay_s=0)
    player = EpisodePlayer(
        make_env=Sound,
        make_chosen=lambda _: Broken(),
        tasks=ListTasks(tasks),
        play=message_play(limits=EpisodeLimits(max_turns=3)),
        limits=limits,
        seed=0,
    )
    cursor, steps = PromptCursor(len(tasks), seed=0), 0
    attempts: list[Episode] = []
    collection = Collection(
        player=player, policy=LookOnce(), samples_per_prompt=2, on_episode=attempts.append
    )
    with pytest.raises(RolloutError) as stopped:
        while steps < 20:
            collection.count_anew()
            prompts = cursor.take(8)
            groups = await asyncio.gather(*[collection.begin(prompt) for prompt in prompts])
            assert sum(len(group.episodes) for group in groups) == 14
            assert collection.take_failures() == {"environment_fault": 6}
            for prompt in prompts:
                collection.forget(prompt)
            steps += 1
    player.close()
    assert str(stopped.value) == (
        "64 of the newest 64 attempts of the environment Broken failed, and rollout.max_failure_share allows 50%: 64 "
        "by tool 'look' of the environment Broken, the newest of them with: Broken: tool 'look' failed on task "
        "'task-7': ConnectionError: the archive is down"
    )
    failed = [episode for episode in attempts if episode.outcome is Outcome.FAILED]
    assert steps == 10 and {episode.failed_part for episode in failed} == {"tool 'look'"}
    assert all(episode.reward is None for episode in failed)


def attempt(*, fails: bool, reason: str = "environment_fault", env_id: str = "A", part: str = "") -> Episode:
    return Episode(
        episode_id="g.0.0",
        group_id="g",
        env_id=env_id,
        task_id="t",
        seed=0,
        outcome=Outcome.FAILED if fails else Outcome.COMPLETED,
        stop_reason=reason if fails else "terminated",
        reward=None if fails else 0.0,
        error="no" if fails else None,
        failed_part=part,
    )


@pytest.mark.parametrize(
    ("failed", "part"),
    [
        (attempt(fails=True, reason=NO_ENGINE), "the engines"),
        (attempt(fails=True, reason=USER_FAULT), "the simulated users of the environment A"),
        (attempt(fails=True, part="grade"), "grade of the environment A"),
        (attempt(fails=True, reason="unexpected_error"), "the code that plays the environment A"),
        (attempt(fails=True, env_id=""), "the environments"),
    ],
)
def test_parts_have_names(failed, part):
    assert part_of(failed) == part


def test_what_passes_does_not_stop_a_run():
    """All that are live may fail at once, and a part that fails as often as is allowed goes on for ever."""
    breaker = Breaker(max_failure_share=0.5, max_concurrent_episodes=100)
    for _ in range(100):
        breaker.note(attempt(fails=False))
    for _ in range(100):
        breaker.note(attempt(fails=True))
        assert breaker.complaint("A", num_live=100) is None
    breaker.note(attempt(fails=True))
    assert "101 of the newest 200 attempts" in str(breaker.complaint("A", num_live=100))
    for number in range(1000):
        breaker.note(attempt(fails=number % 2 == 0, env_id="B"))
        assert breaker.complaint("B", num_live=4) is None or number % 2 == 0
    assert breaker.complaint("B", num_live=4) is None


def test_few_failures_tell_nothing():
    breaker = Breaker(max_failure_share=0.1, max_concurrent_episodes=1)
    breaker.note(attempt(fails=False))
    for _ in range(MIN_FAILURES):
        breaker.note(attempt(fails=True))
        assert breaker.complaint("A", num_live=1) is None
    breaker.note(attempt(fails=True))
    assert breaker.complaint("A", num_live=1) is not None


def test_a_fault_keeps_the_part_that_it_had_first():
    assert EnvironmentFault("no").of("reward service a").of("grade").part == "reward service a"
