"""A curriculum under the scheduler: it hears of each group once, and a resumed run draws what it would have drawn."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Segment
from polyturn.configs.schema.curriculum import CurriculumConfig
from polyturn.configs.schema.rollout import RolloutConfig
from polyturn.envs.messages import ListTasks, Task
from polyturn.envs.tasks import make_curriculum
from polyturn.envs.tasks.order import task_digest
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.filters import make_filter
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.order import make_order
from polyturn.rollout.player import EpisodePlayer
from polyturn.rollout.scheduler import Frontier, Scheduler
from polyturn.rollout.store import TrajectoryStore
from polyturn.rollout.worker import _Journals

TASKS = ListTasks([Task.from_prompt(str(i), f"q{i}", label="a") for i in range(12)])
DIFFICULTY = {"kind": "difficulty", "low": 0.2, "high": 0.8, "explore": 0.3, "min_tasks": 1}
Heard = list[tuple[int, int]]
"""Positions that a curriculum heard of, with the number of rewards."""


def episode(
    episode_id: str, group_id: str, task: Task, reward: float, *, group_reward: float = 0.0, version: int = 0
) -> Episode:
    segment = Segment(
        token_ids=[1, 2],
        sampled=[False, True],
        logprobs=np.zeros(2),
        policy_versions=[-1, version],
        turns=np.zeros(2),
    )
    return Episode(
        episode_id=episode_id,
        group_id=group_id,
        env_id="e",
        task_id=task.task_id,
        task_digest=task_digest(task),
        seed=0,
        outcome=Outcome.COMPLETED,
        stop_reason="terminated",
        reward=reward + group_reward,
        group_reward=group_reward or None,
        segments=(segment,),
    )


class Run:
    """Steps of three groups of four, from the state of another one on."""

    def __init__(self, state: dict[str, Any] | None = None, **rollout: Any) -> None:
        config = RolloutConfig(prompts_per_step=3, samples_per_prompt=4, **rollout)
        curriculum = make_curriculum(CurriculumConfig.model_validate({"sampler": DIFFICULTY}), TASKS, seed=1)
        self.cursor = PromptCursor(len(TASKS), seed=1, order=curriculum)
        frontier = Frontier()
        self.step = 0
        if state is not None:
            assert self.cursor.curriculum is not None
            self.cursor.curriculum.restore(state["curriculum"])
            frontier = Frontier(position=state["position"], ahead=tuple(state["ahead"]))
            self.step = state["step"]
        self.heard: Heard = []
        self._hear()
        self.scheduler = Scheduler(
            player=EpisodePlayer(
                make_env=ToolEnv, tasks=TASKS, play=self.play, limits=RolloutLimits(), seed=0
            ),
            policy=None,  # type: ignore[arg-type]
            cursor=self.cursor,
            config=config,
            order=make_order(config),
            keep_group=make_filter(config.filter),
            num_steps=100,
            updates_per_step=1,
            step=self.step,
            version=self.step,
            frontier=frontier,
        )

    async def play(self, *, episode_id: str, group_id: str, task: Task, **_: Any) -> Episode:
        """Of the four samples of a task, 0 to 4 are right by its number; a group reward of 5 is no success."""
        version = self.step
        await asyncio.sleep(0)
        sample = int(episode_id.split(".")[1])
        right = float(sample < int(task.task_id) % 5)
        return episode(episode_id, group_id, task, right, group_reward=5.0, version=version)

    def _hear(self) -> None:
        assert self.cursor.curriculum is not None
        observe = self.cursor.curriculum.observe

        def note(position: int, rewards: list[float]) -> None:
            assert all(reward in (0.0, 1.0) for reward in rewards), "as the task paid it"
            self.heard.append((position, len(rewards)))
            observe(position, rewards)

        self.cursor.curriculum.observe = note  # type: ignore[method-assign, assignment]

    async def train(self, num_steps: int) -> list[list[str]]:
        """The tasks of the next steps."""
        found = []
        for _ in range(num_steps):
            taken = await self.scheduler.take()
            assert taken is not None
            self.step += 1
            found.append([group.episodes[0].task_id for group in taken.groups])
            self.scheduler.advance(version=self.step, engine_step=self.step, engine_version=self.step)
        return found

    def state(self) -> dict[str, Any]:
        frontier, curriculum = self.scheduler.frontier, self.scheduler.curriculum
        assert curriculum is not None
        kept = {
            "step": self.step,
            "position": frontier.position,
            "ahead": frontier.ahead,
            "curriculum": curriculum.state(),
        }
        return json.loads(json.dumps(kept))


@pytest.mark.parametrize("cut", [1, 4, 9])
async def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(cut: int) -> None:
    whole, first = Run(), Run()
    expected = await whole.train(16)
    before = await first.train(cut)
    second = Run(first.state())
    assert before + await second.train(16 - cut) == expected
    for run in (whole, first, second):
        await run.scheduler.close()


@pytest.mark.parametrize("torn", [False, True])
async def test_what_was_drawn_behind_the_checkpoint_is_drawn_again_after_a_crash(
    tmp_path: Path, torn: bool
) -> None:
    """By what is known then the sampler would draw other tasks: rewards of the groups ahead are not in the state."""
    path, first = tmp_path / "draws.jsonl", Run(max_staleness=2)
    curriculum = first.cursor.curriculum
    assert curriculum is not None
    curriculum.keep_draws(path)
    await first.train(2)
    state = first.state()
    await first.train(3)
    begun = {
        position: first.cursor.at(position).task_index
        for position in map(int, first.state()["curriculum"]["open"])
    }
    await first.scheduler.close()
    if torn:
        path.write_bytes(path.read_bytes() + b"[99,")
    second = Run(state, max_staleness=2)
    assert second.cursor.curriculum is not None
    second.cursor.curriculum.keep_draws(path)
    again = {position: second.cursor.at(position).task_index for position in sorted(begun)}
    assert again == begun and len(begun) > 6
    anew = Run(state, max_staleness=2)
    assert {position: anew.cursor.at(position).task_index for position in sorted(begun)} != begun
    for run in (second, anew):
        await run.scheduler.close()


async def test_most_groups_are_of_the_band_once_it_is_known() -> None:
    run = Run()
    await run.train(10)
    later = [task for step in await run.train(20) for task in step]
    # Of the twelve tasks, those with 1, 2 or 3 right of 4 are in the band: 0.7 + 0.3 * 7 / 12 of the draws.
    share = sum(int(task) % 5 in (1, 2, 3) for task in later) / len(later)
    assert 0.75 < share < 0.98
    await run.scheduler.close()


async def test_every_draw_is_heard_of_once_also_what_is_filtered_and_played_ahead() -> None:
    run = Run(max_staleness=2, filter={"kind": "nonzero_deviation"}, max_filtered_per_step=1000)
    await run.train(12)
    heard = [position for position, _ in run.heard]
    assert len(set(heard)) == len(heard) > 36
    done = run.scheduler.frontier
    assert sorted(heard) == [*range(done.position), *done.ahead]
    assert all(count == 4 for _, count in run.heard)
    open_now = set(run.state()["curriculum"]["open"])
    assert open_now and not open_now & set(map(str, heard))
    await run.scheduler.close()


async def test_what_is_kept_of_another_task_is_passed_over(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path)
    cursor = PromptCursor(len(TASKS), seed=1, order=make_curriculum(CurriculumConfig(), TASKS, seed=1))
    prompt = cursor.at(0)
    mine, other = TASKS[prompt.task_index], TASKS[(prompt.task_index + 1) % 12]
    for sample, task in enumerate((mine, other, mine)):
        store.journal(1, episode(f"{prompt.group_id}.{sample}.0", prompt.group_id, task, 1.0))
    kept = _Journals(store, prompts_per_step=3, tasks=TASKS).finished(prompt)
    assert [one.episode_id for one in kept] == [f"{prompt.group_id}.{sample}.0" for sample in (0, 2)]
    every = _Journals(store, prompts_per_step=3).finished(prompt)
    assert len(every) == 3, "where the order is fixed, another task is a mistake that is told"
    store.close()


async def test_prompts_that_depend_on_results_are_not_drawn_ahead_of_time() -> None:
    run = Run()
    assert run.cursor.peek_at(5, 3) == []
    fixed = PromptCursor(len(TASKS), seed=1)
    assert fixed.curriculum is None
    assert [prompt.position for prompt in fixed.peek_at(5, 3)] == [5, 6, 7]
    assert run.cursor.at(0).position == 0
    await run.scheduler.close()
