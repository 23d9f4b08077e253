"""The probe: a line for each task as soon as it is known, none twice, and failures that are no difficulty."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import Episode
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.agents.policy import PolicyFault
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.rewards import exact_match
from polyturn.envs.tasks.order import task_digest
from polyturn.envs.tasks.rates import Difficulty, read_difficulties
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout import probe as probe_module
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer
from polyturn.rollout.probe import DifficultyFile, ProbeResult, left_to_probe, probe
from tests.support.play import message_play

TASKS = ListTasks([Task.from_prompt(f"task-{i}", f"Say {i}", label=str(i)) for i in range(6)])


class Parrot(ToolEnv):
    def grade(self, message):
        return {"correct": exact_match(message.content, self.task.label)}


class Policy:
    """Task 0 is never solved, 1 every second time, 2 always; 3 fails every time, 4 in its first attempts."""

    def __init__(self) -> None:
        self.num_plays = dict.fromkeys(range(6), 0)

    def __call__(self, messages, tools):
        number = int(messages[0]["content"].removeprefix("Say "))
        self.num_plays[number] += 1
        play = self.num_plays[number]
        if number == 3 or (number == 4 and play <= 4):
            raise PolicyFault("gone")
        right = number in (2, 4) or (number == 1 and play % 2 == 0)
        return AssistantMessage(content=str(number if right else "wrong"))


async def run(
    indices: list[int], write, *, seen: list[Episode] | None = None, at_once: int = 2
) -> list[Episode]:
    seen = [] if seen is None else seen
    player = EpisodePlayer(
        make_env=Parrot,
        tasks=TASKS,
        play=message_play(limits=EpisodeLimits()),
        limits=RolloutLimits(max_retries=1, retry_delay_s=0, max_concurrent_episodes=at_once),
        seed=0,
    )
    try:
        await probe(
            player=player,
            policy=ScriptedPolicy(Policy()),
            task_indices=indices,
            samples_per_task=4,
            success_reward=1.0,
            write=write,
            on_episode=seen.append,
        )
    finally:
        player.close()
    return seen


def line(index: int, num_episodes: int, num_successes: int) -> Difficulty:
    mean = num_successes / num_episodes if num_episodes else 0.0
    return Difficulty(
        task_id=f"task-{index}",
        digest=task_digest(TASKS[index]),
        num_episodes=num_episodes,
        num_successes=num_successes,
        mean_reward=mean,
    )


@pytest.mark.parametrize("at_once", [2, 1024])
async def test_every_task_has_one_line_and_failures_are_no_difficulty(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(probe_module, "TASKS_AT_ONCE", at_once)
    lines: list[Difficulty] = []
    seen = await run([0, 1, 2, 3, 4], lines.append)
    # Of task 4 the four samples fail once, and survive when they are played again.
    expected = [line(0, 4, 0), line(1, 4, 2), line(2, 4, 4), line(3, 0, 0), line(4, 4, 4)]
    assert sorted(lines, key=lambda found: found.task_id) == expected
    assert len(seen) == 4 * 3 + 8 + 8
    assert ProbeResult.of(lines) == ProbeResult(num_tasks=4, num_unknown=1, never=1, sometimes=1, always=2)


async def test_a_line_is_written_as_soon_as_its_task_is_known() -> None:
    seen: list[Episode] = []
    written_after: list[int] = []
    await run([0, 1, 2], lambda found: written_after.append(len(seen)), seen=seen, at_once=1)
    assert written_after == [4, 8, 12]


def test_what_is_known_is_not_played_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "difficulties.jsonl"
    assert left_to_probe(TASKS, 4, path) == [0, 1, 2, 3]
    with DifficultyFile(path) as file:
        for found in (line(0, 4, 0), line(2, 4, 4), line(3, 0, 0)):
            file.write(found)
    assert left_to_probe(TASKS, 100, path) == [1, 3, 4, 5], "of task 3 nothing is known"
    changed = ListTasks([Task.from_prompt("task-0", "Say it differently", label="0")])
    assert left_to_probe(changed, 1, path) == [0]
    with path.open("ab") as torn:
        torn.write(b'{"task_id": "task-4", "dig')
    with DifficultyFile(path) as file:
        file.write(line(4, 4, 1))
    assert read_difficulties(path) == [line(0, 4, 0), line(2, 4, 4), line(4, 4, 1)]
