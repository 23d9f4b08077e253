"""A run that is killed at any moment and goes on: the real scheduler, journals and trajectory files, in virtual time.

`benchmarks/kill_points.py` kills real processes; here a life ends between two events of the loop, dozens of times in
seconds.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Segment
from polyturn.configs.schema.rollout import RolloutConfig
from polyturn.envs.messages import ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.filters import make_filter
from polyturn.rollout.groups import PromptCursor, episode_id, position_of
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.order import make_order
from polyturn.rollout.player import EpisodePlayer
from polyturn.rollout.scheduler import Frontier, Scheduler
from polyturn.rollout.simulator.clock import run_virtually
from polyturn.rollout.store import TrajectoryStore

TASKS = ListTasks([Task.from_prompt(f"task-{i}", "q", label="a") for i in range(500)])
PROMPTS, SAMPLES, NUM_STEPS = 3, 2, 30


class Player(EpisodePlayer):
    """Episodes that take a second, and seldom many; every play of one is told from every other by its only token."""

    def __init__(self, run: Run) -> None:
        limits = RolloutLimits(retry_delay_s=0)
        super().__init__(make_env=ToolEnv, tasks=TASKS, play=None, limits=limits, seed=0)
        self.run = run

    async def play(self, prompt, sample, attempt, *, policy, slots, fork):
        del policy, slots, fork
        self.run.num_played += 1
        identity, serial = episode_id(prompt.group_id, sample, attempt), self.run.num_played
        version, draws = self.run.version, random.Random(f"{identity}/{serial}")
        await asyncio.sleep(draws.lognormvariate(0, 1))
        return Episode(
            episode_id=identity,
            group_id=prompt.group_id,
            env_id="e",
            task_id=f"task-{prompt.position}",
            seed=serial,
            outcome=Outcome.COMPLETED,
            stop_reason="terminated",
            reward=float(sample % 2),
            segments=(
                Segment(
                    token_ids=np.array([serial]), sampled=[True], logprobs=[0.0], policy_versions=[version],
                    turns=[0],
                ),
            ),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class State:
    """What a checkpoint holds."""

    step: int = 0
    frontier: Frontier = field(default_factory=Frontier)


@dataclass(kw_only=True)
class Run:
    """What stays when a life of the run ends: its directory, and what the test knows of it."""

    directory: Path
    config: RolloutConfig
    checkpoint: State = field(default_factory=State)
    version: int = 0
    num_played: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    """The play of each episode that stood in a journal when a life ended."""

    async def live(self) -> None:
        """From the checkpoint to the end, as the driver does it."""
        store = TrajectoryStore(self.directory)
        state = self.checkpoint
        self.version = state.step

        def number_of(position: int) -> int:
            return position // PROMPTS + 1

        async def keep(episode: Episode) -> None:
            store.journal(number_of(position_of(episode.group_id)), episode)

        scheduler = Scheduler(
            player=Player(self),
            policy=None,
            cursor=PromptCursor(len(TASKS), seed=0),
            config=self.config,
            order=make_order(self.config),
            keep_group=make_filter(self.config.filter),
            num_steps=NUM_STEPS,
            updates_per_step=1,
            step=state.step,
            version=state.step,
            frontier=state.frontier,
            finished=lambda prompt: [
                episode
                for episode in store.journaled(number_of(prompt.position))
                if episode.group_id == prompt.group_id
            ],
            keep=keep,
        )
        try:
            for step in range(state.step + 1, NUM_STEPS + 1):
                taken = await scheduler.take()
                await asyncio.sleep(0.3)  # scores
                store.write_step(step, [episode for group in taken.groups for episode in group.episodes])
                await asyncio.sleep(0.7)  # trains
                scheduler.advance(version=step, engine_step=step, engine_version=step)
                self.version = step
                reached = State(step=step, frontier=scheduler.frontier)
                await asyncio.sleep(0.2)  # writes the checkpoint
                self.checkpoint = reached
                await asyncio.sleep(0.05)
                store.forget(reached.frontier.position // PROMPTS)
        finally:
            store.close()

    async def live_for(self, seconds: float) -> bool:
        """Whether the run came to its end before it was killed."""
        life = asyncio.create_task(self.live())
        await asyncio.wait([life], timeout=seconds)
        if life.done():
            await life
            return True
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return False


@pytest.mark.parametrize(("staleness", "order"), [(0, "fifo"), (2, "windowed_fifo")])
def test_a_run_that_is_killed_at_any_moment_trains_every_sample_once(
    tmp_path: Path, staleness: int, order: str
) -> None:
    config = RolloutConfig(
        prompts_per_step=PROMPTS,
        samples_per_prompt=SAMPLES,
        max_staleness=staleness,
        order={"kind": order},
    )
    run, draws = Run(directory=tmp_path, config=config), random.Random(f"{staleness}/{order}")
    num_kills, step_before = 0, 0
    while not run_virtually(run.live_for(draws.uniform(0.1, 6))):
        num_kills += 1
        journals = (int(path.stem.removeprefix("step_")) for path in tmp_path.glob("journal/*.journal"))
        store = TrajectoryStore(tmp_path)
        run.kept |= {e.episode_id: e.seed for number in journals for e in store.journaled(number)}
        store.close()
        assert run.checkpoint.step >= step_before
        step_before = run.checkpoint.step
    store = TrajectoryStore(tmp_path)
    trained = [episode for step in store.steps() for episode in store.read_step(step)]
    store.close()
    assert num_kills >= 12
    assert Counter(episode.episode_id for episode in trained) == Counter(
        f"g{position:08d}.{sample}.0" for position in range(NUM_STEPS * PROMPTS) for sample in range(SAMPLES)
    )
    assert all(run.kept.get(episode.episode_id, episode.seed) == episode.seed for episode in trained)
