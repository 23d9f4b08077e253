"""The scheduler: staleness is bounded, every prompt is trained on once, nothing wedges, and quick is not first."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Segment
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.rollout import RolloutConfig
from polyturn.envs.messages import ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.filters import keep_all, make_filter
from polyturn.rollout.groups import PromptCursor, parse_episode_id, position_of
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.order import GroupUnderWay, WindowedFifo, fifo, make_order
from polyturn.rollout.player import EpisodePlayer, RolloutError
from polyturn.rollout.scheduler import Frontier, Scheduler, StepGroups, oldest_version

TASKS = ListTasks([Task.from_prompt(f"task-{i}", "q", label="a") for i in range(1000)])
TICK = 0.0002


@dataclass(kw_only=True)
class Machine:
    """Plays episodes that take so many ticks, and says what was played by which weights."""

    ticks: Callable[[int, int], int] = lambda position, sample: 1
    reward: Callable[[int, int], float] = lambda position, sample: float(sample % 2)
    fails: Callable[[int, int, int], bool] = lambda position, sample, attempt: False
    version: int = 0
    started: list[str] = field(default_factory=list)
    journal: list[Episode] = field(default_factory=list)

    async def play(self, *, episode_id, group_id, seed, task, **_):
        _, sample, attempt = parse_episode_id(episode_id)
        position = position_of(group_id)
        self.started.append(episode_id)
        begun = self.version
        for _ in range(self.ticks(position, sample)):
            await asyncio.sleep(TICK)
        failed = self.fails(position, sample, attempt)
        return Episode(
            episode_id=episode_id,
            group_id=group_id,
            env_id="e",
            task_id=task.task_id,
            seed=seed,
            outcome=Outcome.FAILED if failed else Outcome.COMPLETED,
            stop_reason="policy_fault" if failed else "terminated",
            reward=None if failed else self.reward(position, sample),
            segments=(tokens([begun, self.version]),),
        )

    async def keep(self, episode):
        self.journal.append(episode)


def tokens(versions):
    count = len(versions)
    return Segment(
        token_ids=np.arange(count), sampled=np.ones(count), logprobs=np.zeros(count), policy_versions=versions,
        turns=np.zeros(count),
    )  # fmt: skip


def scheduler_of(machine: Machine, config: RolloutConfig, *, num_steps=10, updates=1, **options) -> Scheduler:
    limits = RolloutLimits(
        max_concurrent_episodes=config.max_concurrent_episodes, retry_delay_s=0, stall_timeout_s=20
    )
    player = EpisodePlayer(make_env=ToolEnv, tasks=TASKS, play=machine.play, limits=limits, seed=0)
    return Scheduler(
        player=player,
        policy=None,
        cursor=PromptCursor(len(TASKS), seed=0),
        config=config,
        order=options.pop("order", make_order(config)),
        keep_group=options.pop("keep_group", make_filter(config.filter)),
        num_steps=num_steps,
        updates_per_step=updates,
        keep=machine.keep,
        **options,
    )


def rollout(prompts=3, samples=2, **options) -> RolloutConfig:
    return RolloutConfig(prompts_per_step=prompts, samples_per_prompt=samples, **options)


async def train(
    machine: Machine,
    config: RolloutConfig,
    *,
    num_steps=10,
    first=0,
    updates=1,
    sync_every=1,
    ticks_of_training=3,
    **options,
) -> tuple[list[StepGroups], Frontier]:
    """A run: take, train, new weights, step after step; what each step was given."""
    scheduler = scheduler_of(
        machine, config, num_steps=num_steps, updates=updates, step=first, version=first * updates, **options
    )
    taken, engines = [], (first, first * updates)
    try:
        for step in range(first + 1, num_steps + 1):
            given = await scheduler.take()
            assert given is not None
            taken.append(given)
            for _ in range(ticks_of_training):
                await asyncio.sleep(TICK)
            if step % sync_every == 0:
                engines = (step, step * updates)
            machine.version = engines[1]
            scheduler.advance(version=step * updates, engine_step=engines[0], engine_version=engines[1])
        return taken, scheduler.frontier
    finally:
        await scheduler.close()


def positions(taken: list[StepGroups]) -> list[list[int]]:
    return [[group.prompt.position for group in step.groups] for step in taken]


def ages(taken: list[StepGroups], *, first=0, updates=1) -> list[int]:
    """In updates, of the oldest token of each step."""
    return [
        max(
            (first + index) * updates - oldest_version(episode)
            for group in step.groups
            for episode in group.episodes
        )
        for index, step in enumerate(taken)
    ]


async def test_without_staleness_a_step_is_played_by_the_weights_that_it_trains_and_by_nothing_else():
    machine = Machine(ticks=lambda position, sample: 1 + (7 * position + sample) % 5)
    taken, frontier = await train(machine, rollout(), num_steps=4)
    assert positions(taken) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert ages(taken) == [0, 0, 0, 0]
    assert [step.num_in_play for step in taken] == [0, 0, 0, 0]
    assert len(machine.started) == 4 * 3 * 2 and frontier == Frontier(position=12)


@settings(max_examples=25, deadline=None)
@given(
    staleness=st.integers(0, 4),
    prompts=st.integers(1, 4),
    updates=st.integers(1, 3),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["windowed_fifo", "fifo"]),
    concurrent=st.integers(1, 12),
    tail=st.integers(1, 25),
    sync_every=st.integers(1, 3),
)
@pytest.mark.catalogue("B45")
def test_every_prompt_is_trained_on_once_and_no_token_is_older_than_allowed(
    staleness, prompts, updates, seed, kind, concurrent, tail, sync_every
):
    draw = random.Random(seed)
    lengths = {(p, s): draw.choice([0, 1, 1, 2, tail]) for p in range(200) for s in range(2)}
    machine = Machine(ticks=lambda position, sample: lengths[position, sample])
    config = rollout(
        prompts, max_staleness=staleness, order={"kind": kind}, max_concurrent_episodes=concurrent
    )
    sync_every = min(sync_every, staleness + 1)
    taken, frontier = asyncio.run(train(machine, config, num_steps=6, updates=updates, sync_every=sync_every))
    trained = [position for step in positions(taken) for position in step]
    assert sorted(trained) == list(range(6 * prompts)), "lost or twice"
    assert all(len(step.groups) == prompts and step.num_stale == 0 for step in taken)
    assert max(ages(taken, updates=updates)) <= staleness * updates
    assert frontier == Frontier(position=6 * prompts)
    assert len(machine.started) == len(set(machine.started)) == 6 * prompts * 2
    if kind == "fifo":
        assert trained == sorted(trained)


async def test_with_staleness_the_next_step_is_played_while_this_one_is_trained():
    machine = Machine(ticks=lambda *_: 3)
    taken, _ = await train(machine, rollout(max_staleness=1), num_steps=6, ticks_of_training=12)
    assert ages(taken)[2:] == [1, 1, 1, 1], "played by the weights before"
    assert all(step.num_in_play == 3 for step in taken[:-1])


@pytest.mark.catalogue("B48")
async def test_what_takes_long_is_trained_on_as_often_as_it_is_sampled_and_hardly_later():
    """Half of the groups take twenty times as long; in the order of completion they would all come late."""
    machine = Machine(ticks=lambda position, _: 20 if position % 2 else 1)
    config = rollout(4, max_staleness=2, order={"kind": "windowed_fifo", "window": 8})
    taken, _ = await train(machine, config, num_steps=12, ticks_of_training=1)
    trained = [position for step in positions(taken) for position in step]
    assert sorted(trained) == list(range(48))
    assert fmean(position % 2 for position in trained) == 0.5
    overtaken = [
        sum(later > position for later in trained[: trained.index(position)]) for position in trained
    ]
    assert max(overtaken) < 8
    assert sum(overtaken) > 0, "nobody overtook anybody: nothing was tried"


def test_orders_choose_complete_groups_only():
    groups = [GroupUnderWay(position=index, is_complete=index not in (0, 3), age=0) for index in range(6)]
    assert fifo(groups, 2) is None and fifo(groups[1:], 2) == [1, 2]
    assert WindowedFifo(3)(groups, 2) == [1, 2]
    assert WindowedFifo(4)(groups, 3) is None and WindowedFifo(5)(groups, 3) == [1, 2, 4]


async def test_an_order_of_ones_own_is_asked_and_what_it_gives_is_checked(tmp_path):
    path = tmp_path / "orders.py"
    path.write_text(
        "def newest(groups, num_groups):\n"
        "    complete = [g.position for g in groups if g.is_complete]\n"
        "    return complete[-num_groups:] if len(complete) == len(groups) else None\n"
        "def wrong(groups, num_groups):\n    return [0] * num_groups\n"
        "def never(groups, num_groups):\n    return None\n"
        "def odd(groups):\n    return None\n"
    )

    def named(name):
        order = {"kind": "plugin", "target": f"{path}:{name}"}
        return rollout(2, max_staleness=1, on_stale="drop", order=order)

    taken, _ = await train(Machine(), named("newest"), num_steps=2)
    assert positions(taken)[0] == [2, 3]
    with pytest.raises(RolloutError, match=r"rollout\.order: it gave the positions \[0, 0\]"):
        await train(Machine(), named("wrong"))
    with pytest.raises(RolloutError, match="it waits although every group in play is complete"):
        await train(Machine(), named("never"))
    with pytest.raises(ValueError, match=r"a group order is `def order\(groups"):
        make_order(named("odd"))


async def test_a_filter_takes_groups_whose_place_the_next_prompts_take():
    machine = Machine(reward=lambda position, sample: float(sample) if position % 3 else 1.0)
    config = rollout(filter={"kind": "nonzero_deviation"})
    taken, frontier = await train(machine, config, num_steps=4)
    assert positions(taken) == [[1, 2, 4], [5, 7, 8], [10, 11, 13], [14, 16, 17]]
    assert sum(step.num_filtered["uniform"] for step in taken) == 6
    assert frontier == Frontier(position=18) and ages(taken) == [0, 0, 0, 0]


@pytest.mark.catalogue("B44")
async def test_a_filter_that_takes_everything_does_not_wedge_the_run():
    machine = Machine(reward=lambda position, sample: float(position == 7 and sample))
    config = rollout(filter={"kind": "nonzero_deviation"}, max_filtered_per_step=9)
    taken, _ = await train(machine, config, num_steps=2)
    assert [step.gave_up for step in taken] == [True, True]
    assert 7 in positions(taken)[0] and len(taken[0].groups) < 3
    assert taken[0].num_filtered == {"uniform": 9}


def test_filters_by_name_say_why():
    machine = Machine(reward=lambda position, sample: position + sample)

    async def groups():
        taken, _ = await train(machine, rollout(), num_steps=1)
        return taken[0].groups

    first, second, third = asyncio.run(groups())
    in_range = make_filter(rollout(filter={"kind": "mean_range", "low": 1, "high": 2}).filter)
    assert [in_range(group) for group in (first, second, third)] == ["too_hard", None, "too_easy"]
    wide = make_filter(rollout(filter={"kind": "nonzero_deviation", "min_spread": 1.5}).filter)
    assert wide(first) == "uniform" and keep_all(first) is None


async def test_what_a_users_filter_raises_ends_the_step():
    def broken(group):
        raise LookupError(group.group_id)

    with pytest.raises(LookupError, match="g0000000"):
        await train(Machine(), rollout(), keep_group=broken)


@pytest.mark.parametrize("on_stale", ["drop", "retry"])
async def test_what_is_left_over_becomes_stale_and_is_dropped_or_played_again(on_stale):
    machine = Machine(ticks=lambda position, sample: 40 if position == 1 else 1)
    config = rollout(oversample=1.67, on_stale=on_stale, order={"kind": "windowed_fifo", "window": 5})
    taken, frontier = await train(machine, config, num_steps=3)
    assert positions(taken)[0] == [0, 2, 3]
    assert ages(taken) == [0, 0, 0], "nothing older than allowed was trained on"
    assert sum(step.num_stale for step in taken) >= 2
    trained = {position for step in positions(taken) for position in step}
    again = [identity for identity in machine.started if identity.startswith("g00000004.0")]
    if on_stale == "retry":
        assert len(again) > 1 and again == [f"g00000004.0.{attempt}" for attempt in range(len(again))], (
            "under attempts of its own"
        )
        assert (4 in trained) == frontier.is_done(4)
    else:
        assert again == ["g00000004.0.0"] and frontier.is_done(1) and frontier.is_done(4)
        assert 4 not in trained, "complete, not needed, and too old a step later"


@settings(max_examples=15, deadline=None)
@given(staleness=st.integers(0, 3), cut=st.integers(1, 5), seed=st.integers(0, 1000))
@pytest.mark.catalogue("B45")
def test_a_run_that_was_cut_off_anywhere_trains_on_what_the_uninterrupted_one_does(staleness, cut, seed):
    draw = random.Random(seed)
    lengths = {position: draw.choice([0, 1, 3, 12]) for position in range(100)}
    config = rollout(2, max_staleness=staleness, order={"kind": "windowed_fifo", "window": 2 + 2 * staleness})
    machine = Machine(ticks=lambda position, _: lengths[position])

    async def cut_off():
        scheduler = scheduler_of(machine, config, num_steps=6)
        trained, states = [], [Frontier()]
        for step in range(1, cut + 1):
            given = await scheduler.take()
            trained.append(positions([given])[0])
            machine.version = step
            scheduler.advance(version=step, engine_step=step, engine_version=step)
            states.append(scheduler.frontier)
        await asyncio.sleep(TICK * draw.randrange(6))
        await scheduler.close()
        return trained, states

    trained, states = asyncio.run(cut_off())
    saved = draw.randrange(cut + 1)  # the newest checkpoint
    by_group: dict[str, list[Episode]] = {}
    for episode in machine.journal:
        by_group.setdefault(episode.group_id, []).append(episode)
    machine.version = saved
    kept, num_started = {episode.episode_id for episode in machine.journal}, len(machine.started)
    rest, frontier = asyncio.run(
        train(
            machine,
            config,
            num_steps=6,
            first=saved,
            frontier=states[saved],
            finished=lambda prompt: by_group.pop(prompt.group_id, []),
        )
    )
    whole = [position for step in trained[:saved] + positions(rest) for position in step]
    assert sorted(whole) == list(range(12)) and frontier == Frontier(position=12)
    assert not kept & set(machine.started[num_started:]), "what was kept was played again"


async def test_a_stop_ends_the_wait_and_what_is_under_way_is_kept():
    machine, stop = Machine(ticks=lambda *_: 30), asyncio.Event()
    scheduler = scheduler_of(machine, rollout(max_staleness=1, max_concurrent_episodes=4), stop=stop)
    waiting = asyncio.create_task(scheduler.take())
    while len(machine.started) < 4:
        await asyncio.sleep(TICK)
    stop.set()
    assert await waiting is None
    await scheduler.close(drain_s=20)
    assert len(machine.started) == 4 and len(machine.journal) == 4


async def test_failed_samples_are_dropped_and_counted_in_their_group_as_ever():
    machine = Machine(fails=lambda position, sample, attempt: position == 1 and sample == 0)
    taken, _ = await train(machine, rollout(max_staleness=2, order={"kind": "fifo"}), num_steps=2)
    group = taken[0].groups[1]
    assert (len(group.episodes), group.num_dropped, group.num_retries) == (1, 1, 2)
    with pytest.raises(RolloutError, match="every episode failed: 18 attempts failed"):
        await train(Machine(fails=lambda *_: True), rollout())


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="oversample 2 leaves groups that no step waits for"):
        rollout(oversample=2)
    with pytest.raises(ValueError, match=r"order\.window 2 is less than prompts_per_step 3"):
        rollout(order={"kind": "windowed_fifo", "window": 2})
    with pytest.raises(ValueError, match="play_while_training: false"):
        rollout(play_while_training=False)
    with pytest.raises(ValueError, match="cached prefixes of the old weights"):
        rollout(kv_after_update="keep")
    with pytest.raises(
        ConfigError, match=r"max_logprob_difference cannot hold with rollout\.kv_after_update"
    ):
        load_config("quickstart", ["rollout.max_staleness=1", "rollout.kv_after_update=keep"])
    with pytest.raises(
        ConfigError, match=r"weight_sync\.every_steps 3 leaves the engines up to 2 steps behind"
    ):
        load_config("quickstart", ["rollout.max_staleness=1", "weight_sync.every_steps=3"])


@given(st.sets(st.integers(0, 30)), st.randoms())
def test_the_frontier_knows_what_is_done_in_whatever_order(done, order):
    drawn = sorted(done)
    order.shuffle(drawn)
    frontier = Frontier()
    for position in drawn:
        frontier = frontier.with_done(position)
    assert {position for position in range(31) if frontier.is_done(position)} == done
    assert not frontier.is_done(frontier.position)
