"""A tool that is too slow is an observation, recorded by tool; its environment is not played in again meanwhile."""

import threading

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.collection import play_groups
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall
from polyturn.trainer.run.metrics import tool_metrics
from tests.support.play import message_play

TASKS = ListTasks([Task.from_prompt(f"task-{i}", "question") for i in range(4)])


class Hanging(ToolEnv):
    made = 0
    release = threading.Event()

    def __init__(self):
        super().__init__()
        Hanging.made += 1

    @tool(timeout_s=0.05, cost=2.0)
    def hang(self) -> str:
        """Hang."""
        self.release.wait()
        return "late"

    @tool
    def work(self) -> str:
        """Work."""
        return "done"

    def grade(self, message):
        return {"answered": 1.0}


class Caller:
    def __init__(self, name):
        self.name = name

    async def reply(self, *, messages, tools):
        if messages[-1]["role"] == "tool":
            return AssistantMessage(content=messages[-1]["content"])
        return AssistantMessage(tool_calls=(ToolCall(id="c", name=self.name),))


async def collect(name):
    limits = RolloutLimits(max_concurrent_episodes=1, max_concurrent_tools=2, max_retries=0)
    player = message_play(limits=EpisodeLimits(max_turns=4))
    player = EpisodePlayer(make_env=Hanging, tasks=TASKS, play=player, limits=limits, seed=0)
    Hanging.made = 0
    try:
        prompts = PromptCursor(len(TASKS), seed=0).take(4)
        groups = await play_groups(player, prompts, samples_per_prompt=1, policy=Caller(name))
    finally:
        player.close()
    return [episode for group in groups for episode in group.episodes]


async def test_a_timeout_ends_no_episode_and_its_environment_is_put_aside():
    episodes = await collect("hang")
    assert [episode.reward for episode in episodes] == [1.0] * 4
    assert all("took longer than 0.05 s" in episode.messages[-1]["content"] for episode in episodes)
    assert Hanging.made == 4
    figures = tool_metrics(episodes)
    assert {
        name.removeprefix("tool/hang/"): value for name, value in figures.items() if "seconds" not in name
    } == {
        "calls": 4.0,
        "failures": 4.0,
        "timeouts": 4.0,
        "cost": 8.0,
    }
    assert figures["tool/hang/seconds_max"] >= figures["tool/hang/seconds_mean"] >= 0.05
    Hanging.release.set()


async def test_an_environment_without_one_is_played_in_again():
    episodes = await collect("work")
    assert Hanging.made == 1
    assert tool_metrics(episodes)["tool/work/failures"] == 0.0
    unknown = await collect("wrok")
    assert tool_metrics(unknown)["tool/(unknown)/failures"] == 4.0
    assert tool_metrics([]) == {}
