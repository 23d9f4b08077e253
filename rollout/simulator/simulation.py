"""A run in virtual time: the real scheduler, orders, filters and routing over mock engines.

The trainer is a number of seconds. The run goes on behind the steps that are looked at, so that they are of its middle.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from polyturn.agents.deadlines import EpisodeLimits, EpisodeTime, Slots
from polyturn.agents.episode import Episode, EpisodeTimings, Outcome
from polyturn.agents.forking import Fork
from polyturn.agents.ledger import Segment
from polyturn.agents.policy import Generation, Policy, SamplingParams, TokenPolicy, policy_of_episode
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.messages import ListTasks, Task
from polyturn.envs.registry import make
from polyturn.rollout.engines.fleet import EngineFleet, Overload
from polyturn.rollout.filters import make_filter
from polyturn.rollout.groups import Prompt, PromptCursor, episode_id, position_of
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.order import make_order
from polyturn.rollout.player import EpisodePlayer
from polyturn.rollout.scheduler import Scheduler, StepGroups
from polyturn.rollout.simulator.clock import run_virtually
from polyturn.rollout.simulator.engine import EngineCounts, SimulatedEngine
from polyturn.rollout.simulator.rates import Rates
from polyturn.rollout.simulator.workload import EpisodeShape, Workload

FOREVER_S = 1e12
"""Deadlines of single requests are no matter of scheduling: none passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFigures:
    """One step of a simulated run."""

    wait_s: float
    """For which the trainer waited for groups."""
    train_s: float
    sync_s: float
    num_sampled: int
    num_tokens: int
    """Prompts and observations included."""
    tokens_by_age: Mapping[int, int]
    """Sampled tokens by how many steps their weights are older than those that are trained."""
    lengths: tuple[float, ...]
    """Sampled tokens of each episode."""
    rewards: tuple[float, ...]
    positions: tuple[int, ...]
    num_filtered: int
    num_stale: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.wait_s + self.train_s + self.sync_s


@dataclass(kw_only=True, slots=True)
class SimulatedRun:
    """What came of a run."""

    steps: list[StepFigures] = field(default_factory=list)
    engines: list[EngineCounts] = field(default_factory=list)
    episode_s: list[float] = field(default_factory=list)
    """Of every episode, from its first request to its end."""
    drawn: dict[int, list[EpisodeShape]] = field(default_factory=dict)
    """What was begun, by position: the sampled distribution."""
    total_s: float = 0.0


def simulate(config: RunConfig, rates: Rates, workload: Workload, *, num_steps: int) -> SimulatedRun:
    """Play and train `num_steps` steps. Raises as the scheduler does."""
    return run_virtually(_Simulation(config, rates, workload, num_steps).run())


class _SimulatedPlayer(EpisodePlayer):
    """Plays episodes of a workload, in no environment and no thread."""

    def __init__(self, config: RunConfig, workload: Workload, run: SimulatedRun) -> None:
        super().__init__(
            make_env=lambda: make(config.environment.id),
            tasks=ListTasks([Task.from_prompt("simulated", "")]),
            play=_never,
            # What waits for long is a figure of the simulation, not a failure in it.
            limits=replace(RolloutLimits.from_config(config), queue_timeout_s=None, stall_timeout_s=None),
            seed=config.seed,
        )
        self.prompts: dict[int, int] = {}
        """Tokens of the prompts in play, by position."""
        self._num_samples = config.rollout.samples_per_prompt
        self._workload = workload
        self._run = run
        self._episode_limits = EpisodeLimits(timeout_s=FOREVER_S, request_timeout_s=FOREVER_S)

    async def play(
        self,
        prompt: Prompt,
        sample: int,
        attempt: int,
        *,
        policy: Policy,
        slots: Slots,
        fork: Fork | None = None,
    ) -> Episode:
        """One attempt: requests and tool calls in turn."""
        assert fork is None, "a simulated episode branches from no other"
        shape = self._workload(position=prompt.position, sample=sample, attempt=attempt)
        self.prompts[prompt.position] = shape.num_prompt
        if not attempt:
            self._run.drawn.setdefault(prompt.position, []).append(shape)
        clock = EpisodeTime.of(self._episode_limits, slots)
        identity = np.int32(prompt.position * self._num_samples + sample)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            with policy_of_episode(_token_policy(policy)) as own_policy:
                pieces, num_tokens, generate_s = await _turns(shape, identity, own_policy, clock)
        finally:
            clock.end()
        total_s = loop.time() - began
        self._run.episode_s.append(total_s)
        return Episode(
            episode_id=episode_id(prompt.group_id, sample, attempt),
            group_id=prompt.group_id,
            env_id="simulated",
            task_id="simulated",
            seed=0,
            outcome=Outcome.COMPLETED,
            stop_reason="terminated",
            reward=shape.reward,
            num_turns=len(shape.turns),
            metrics={"num_sampled": shape.num_sampled, "num_tokens": num_tokens, **_by_version(pieces)},
            segments=(_segment([version for version, _ in pieces]),),
            timings=EpisodeTimings(
                generate_s=generate_s, tools_s=sum(turn.tool_s for turn in shape.turns), total_s=total_s
            ),
        )


async def _never(**_: object) -> Episode:
    raise AssertionError("a simulated player plays by itself")


def _token_policy(policy: Policy) -> TokenPolicy:
    assert isinstance(policy, EngineFleet)
    return policy


async def _turns(
    shape: EpisodeShape, identity: np.int32, policy: TokenPolicy, clock: EpisodeTime
) -> tuple[list[tuple[int, int]], int, float]:
    """Play the turns: versions with their sampled tokens, tokens in all, and the seconds of the requests."""
    loop = asyncio.get_running_loop()
    pieces: list[tuple[int, int]] = []
    num_context, generate_s = shape.num_prompt, 0.0
    for turn in shape.turns:
        prompt_ids: npt.NDArray[np.int32] = np.broadcast_to(identity, num_context)
        sampling = SamplingParams(max_tokens=turn.num_sampled)
        asked = loop.time()

        async def ask(
            prompt_ids: npt.NDArray[np.int32] = prompt_ids, sampling: SamplingParams = sampling
        ) -> Generation:
            return await policy.generate(prompt_ids=prompt_ids, sampling=sampling)

        generation = await clock.request(ask)
        generate_s += loop.time() - asked
        for version, run in itertools.groupby(generation.policy_versions.tolist()):
            pieces.append((version, len(list(run))))
        num_context += turn.num_sampled
        if turn.tool_s or turn.num_observed:
            await clock.environment(partial(asyncio.sleep, turn.tool_s))
        num_context += turn.num_observed
    return pieces, num_context, generate_s


def _by_version(pieces: Sequence[tuple[int, int]]) -> dict[str, float]:
    found: Counter[str] = Counter()
    for version, count in pieces:
        found[f"version/{version}"] += count
    return {name: float(count) for name, count in found.items()}


def _segment(versions: Sequence[int]) -> Segment:
    """One token for each piece that one version sampled: so much the scheduler looks at."""
    length = len(versions)
    return Segment(
        token_ids=np.zeros(length, dtype=np.int32),
        sampled=np.ones(length, dtype=np.bool_),
        logprobs=np.zeros(length, dtype=np.float32),
        policy_versions=np.array(versions, dtype=np.int32),
        turns=np.zeros(length, dtype=np.int16),
    )


class _OneAfterTheOther:
    """A router that looks at nothing."""

    def __init__(self, engines: Sequence[TokenPolicy]) -> None:
        self._engines = itertools.cycle(engines)

    async def generate(self, *, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams) -> Generation:
        return await next(self._engines).generate(prompt_ids=prompt_ids, sampling=sampling)


class _Simulation:
    """The driver's loop, as `trainer/run/loop.py` goes through it."""

    def __init__(self, config: RunConfig, rates: Rates, workload: Workload, num_steps: int) -> None:
        self._config = config
        self._rates = rates
        self._num_steps = num_steps
        self._result = SimulatedRun()
        self._player = _SimulatedPlayer(config, workload, self._result)

    async def run(self) -> SimulatedRun:
        """All steps."""
        config, loop = self._config, asyncio.get_running_loop()
        rollout = config.rollout
        engines = [
            SimulatedEngine(
                self._rates.engine,
                prompts=self._player.prompts,
                samples_per_prompt=rollout.samples_per_prompt,
            )
            for _ in range(config.engines.num_engines)
        ]
        scheduler = Scheduler(
            player=self._player,
            policy=self._fleet(engines),
            cursor=PromptCursor(1, seed=config.seed),
            config=rollout,
            order=make_order(rollout),
            keep_group=make_filter(rollout.filter),
            num_steps=self._num_steps + 1 + rollout.max_staleness,
            updates_per_step=1,
        )
        synced = 0
        for step in range(1, self._num_steps + 1):
            began = loop.time()
            taken = await scheduler.take()
            assert taken is not None, "nobody stops a simulation"
            waited = loop.time()
            await self._train(taken, engines, scheduler)
            trained = loop.time()
            if step % config.weight_sync.every_steps == 0:
                await self._sync(engines, step)
                synced = step
            scheduler.advance(version=step, engine_step=synced, engine_version=synced)
            self._result.steps.append(
                figures_of(taken, step - 1, (waited - began, trained - waited, loop.time() - trained))
            )
        self._result.total_s = loop.time()
        self._result.engines = [engine.counts for engine in engines]
        await scheduler.close()
        return self._result

    def _fleet(self, engines: Sequence[SimulatedEngine]) -> EngineFleet:
        router = self._config.engines.router
        if router.policy in ("round_robin", "random"):
            return EngineFleet([_OneAfterTheOther(engines)])
        return EngineFleet(
            engines,
            sticky=router.policy in ("sticky", "cache_aware"),
            overload=Overload(ratio=router.overload_ratio, margin=router.overload_margin),
            clock=asyncio.get_running_loop().time,
        )

    async def _train(
        self, taken: StepGroups, engines: Sequence[SimulatedEngine], scheduler: Scheduler
    ) -> None:
        num_tokens = sum(
            int(episode.metrics["num_tokens"]) for group in taken.groups for episode in group.episodes
        )
        seconds = self._rates.trainer.step_s(num_tokens)
        if self._config.rollout.play_while_training:
            await asyncio.sleep(seconds)
            return
        may_request = scheduler.collection.slots.may_request
        may_request.clear()
        for engine in engines:
            engine.pause()
        await asyncio.sleep(seconds)
        for engine in engines:
            engine.go_on()
        may_request.set()

    async def _sync(self, engines: Sequence[SimulatedEngine], version: int) -> None:
        for engine in engines:
            engine.pause()
        await asyncio.sleep(self._rates.trainer.sync_s)
        for engine in engines:
            engine.renew(version=version, keeps_kv=self._config.rollout.kv_after_update == "keep")
            engine.go_on()


def figures_of(taken: StepGroups, version: int, seconds: tuple[float, float, float]) -> StepFigures:
    """The figures of a step that is trained from `version` on; `seconds` of waiting, training and sync."""
    episodes = [episode for group in taken.groups for episode in group.episodes]
    by_age: Counter[int] = Counter()
    for episode in episodes:
        for name, count in episode.metrics.items():
            if name.startswith("version/"):
                by_age[version - int(name.removeprefix("version/"))] += int(count)
    return StepFigures(
        wait_s=seconds[0],
        train_s=seconds[1],
        sync_s=seconds[2],
        num_sampled=sum(by_age.values()),
        num_tokens=sum(int(episode.metrics["num_tokens"]) for episode in episodes),
        tokens_by_age=dict(by_age),
        lengths=tuple(episode.metrics["num_sampled"] for episode in episodes),
        rewards=tuple(episode.reward or 0.0 for episode in episodes),
        positions=tuple(position_of(group.group_id) for group in taken.groups),
        num_filtered=sum(taken.num_filtered.values()),
        num_stale=taken.num_stale,
    )
