"""The simulator: time that nobody waits for, engines by their formula, the real scheduler, and rates from a run."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from polyturn.agents.policy import SamplingParams
from polyturn.configs.loading.loader import load_config
from polyturn.rollout.simulator.calibration import RealRun, calibrate, shape_of
from polyturn.rollout.simulator.clock import run_virtually
from polyturn.rollout.simulator.engine import EngineRates, SimulatedEngine
from polyturn.rollout.simulator.rates import Rates, TrainerRates, rates_of
from polyturn.rollout.simulator.report import report_of
from polyturn.rollout.simulator.simulation import simulate
from polyturn.rollout.simulator.workload import (
    EpisodeShape,
    LogNormalWorkload,
    ReplayedWorkload,
    TurnShape,
)

ENGINE = EngineRates(
    overhead_s=0.01,
    weights_s=0.02,
    request_s=0.001,
    kv_token_s=0.0,
    prefill_s=0.1,
    prefill_token_s=0.001,
    kv_tokens=100_000,
    max_running=64,
)
TRAINER = TrainerRates(token_s=1e-3, overhead_s=1.0, sync_s=0.5)


def test_virtual_time_passes_without_waiting() -> None:
    async def main() -> list[tuple[float, str]]:
        loop, seen = asyncio.get_running_loop(), list[tuple[float, str]]()

        async def sleep(seconds: float, name: str) -> None:
            await asyncio.sleep(seconds)
            seen.append((loop.time(), name))

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await asyncio.Event().wait()
        await asyncio.gather(sleep(1e6, "late"), sleep(5, "early"), sleep(0, "at once"))
        return seen

    started = time.monotonic()
    assert run_virtually(main()) == [(10.0, "at once"), (15.0, "early"), (1000010.0, "late")]
    assert time.monotonic() - started < 60


def test_what_waits_for_ever_is_said_and_threads_are_refused() -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    async def think() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(RuntimeError, match="nothing is going to happen"):
        run_virtually(wait())
    with pytest.raises(RuntimeError, match="runs in a thread"):
        run_virtually(think())


def ask(engine: SimulatedEngine, identity: int, num_prompt: int, num_tokens: int):
    return engine.generate(
        prompt_ids=np.broadcast_to(np.int32(identity), num_prompt),
        sampling=SamplingParams(max_tokens=num_tokens),
    )


def engine_of(rates: EngineRates = ENGINE) -> SimulatedEngine:
    return SimulatedEngine(rates, prompts={0: 100, 1: 100}, samples_per_prompt=4)


@pytest.mark.parametrize(
    ("num_requests", "kv_token_s", "step_s"), [(1, 0.0, 0.03), (64, 0.0, 0.074), (1, 1e-4, None)]
)
def test_an_engine_takes_as_long_as_its_formula_says(
    num_requests: int, kv_token_s: float, step_s: float | None
) -> None:
    """Without a cache: prompts first, then all decode together."""
    rates = replace(ENGINE, kv_token_s=kv_token_s, has_prefix_cache=False)

    async def main() -> float:
        engine = engine_of(rates)
        await asyncio.gather(*(ask(engine, identity, 100, 50) for identity in range(num_requests)))
        return asyncio.get_running_loop().time()

    prefill_s = 0.1 + 0.001 * 100 * num_requests
    expected = prefill_s + 50 * (step_s or 0.03 + 1e-4 * 100)
    # The KV that grows within the fifty steps is looked at once: less than 25 tokens of 1e-4 s each are passed over.
    assert run_virtually(main()) == pytest.approx(expected, rel=1e-6 if step_s else 0.1)


def test_the_prefix_cache_saves_the_prompt_of_a_group_and_the_turns_before() -> None:
    async def main() -> list[int]:
        engine = engine_of()
        first = await ask(engine, 0, 100, 10)
        same_group = await ask(engine, 1, 100, 10)
        second_turn = await ask(engine, 0, 140, 10)
        other_group = await ask(engine, 4, 100, 10)
        return [answer.num_cached_tokens for answer in (first, same_group, second_turn, other_group)]

    assert run_virtually(main()) == [0, 100, 110, 0]


def test_requests_that_fill_the_pool_give_way_and_end_all_the_same() -> None:
    async def main() -> tuple[int, int, float]:
        engine = engine_of(replace(ENGINE, kv_tokens=1000))
        answers = await asyncio.gather(*(ask(engine, identity, 100, 300) for identity in range(8)))
        assert all(len(answer) == 300 for answer in answers)
        return engine.counts.num_preemptions, sum(a.num_retractions for a in answers), engine.counts.kv_peak

    num_preemptions, num_retractions, kv_peak = run_virtually(main())
    assert num_preemptions == num_retractions > 0
    assert kv_peak <= 1.02


@pytest.mark.parametrize("keeps_kv", [True, False])
def test_new_weights_come_while_requests_run(keeps_kv: bool) -> None:
    async def main() -> tuple[dict[int, int], float, int]:
        engine = engine_of()
        answer = asyncio.create_task(ask(engine, 0, 100, 100))
        await asyncio.sleep(0.2 + 40 * 0.03)
        engine.pause()
        await asyncio.sleep(1)
        engine.renew(version=1, keeps_kv=keeps_kv)
        engine.go_on()
        generation = await answer
        versions, counts = np.unique(generation.policy_versions, return_counts=True)
        by_version = dict(zip(versions.tolist(), counts.tolist(), strict=True))
        return by_version, asyncio.get_running_loop().time(), generation.num_retractions

    by_version, seconds, num_retractions = run_virtually(main())
    assert by_version == {0: 40, 1: 60}
    assert num_retractions == (0 if keeps_kv else 1)
    again_s = 0 if keeps_kv else 0.1 + 0.001 * 140
    assert seconds == pytest.approx(0.2 + 100 * 0.03 + 1 + again_s)


def test_a_request_that_nobody_waits_for_leaves_its_room() -> None:
    async def seconds_behind(*, dropped: bool) -> float:
        """Of a request behind one that nobody waits for any more, or that has ended."""
        engine, loop = engine_of(), asyncio.get_running_loop()
        before = asyncio.create_task(ask(engine, 0, 100, 10_000 if dropped else 10))
        await asyncio.sleep(1)
        before.cancel()
        await asyncio.gather(before, return_exceptions=True)
        started = loop.time()
        await ask(engine, 1, 100, 10)
        return loop.time() - started

    seconds = run_virtually(seconds_behind(dropped=True))
    assert seconds == pytest.approx(run_virtually(seconds_behind(dropped=False)))


def config_of(*overrides: str):
    return load_config(
        "quickstart",
        overrides=[
            "rollout.prompts_per_step=16",
            "rollout.samples_per_prompt=4",
            "trainer.global_batch_size=64",
            *overrides,
        ],
    )


KEEP_KV = ("rollout.kv_after_update=keep", "checks.max_logprob_difference=null")


def even(num_tokens: int = 200) -> ReplayedWorkload:
    """All episodes alike."""
    turn = TurnShape(num_sampled=num_tokens, num_observed=10, tool_s=0.0)
    return ReplayedWorkload([[EpisodeShape(num_prompt=100, turns=(turn,), reward=1.0)]])


RATES = Rates(engine=ENGINE, trainer=TRAINER, source="this test")


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_token_is_older_than_the_config_allows(staleness: int) -> None:
    config = config_of(f"rollout.max_staleness={staleness}")
    run = simulate(config, RATES, LogNormalWorkload(mean_tokens=100, mean_tool_s=2), num_steps=8)
    report = report_of(run, config)
    assert report.staleness_max == staleness
    assert sum(report.share_by_age.values()) == pytest.approx(1)
    positions = [position for step in run.steps for position in step.positions]
    assert len(positions) == len(set(positions)) == 8 * 16


def test_playing_while_training_hides_the_shorter_of_both() -> None:
    """Even episodes: a step is rollout and training one after the other, or the longer of the two, and the sync."""
    step_s = {}
    for staleness in (0, 1):
        config = config_of(f"rollout.max_staleness={staleness}", *(KEEP_KV if staleness else ()))
        run = simulate(config, RATES, even(), num_steps=9)
        step_s[staleness] = report_of(run, config).step_s
    rollout_s = simulate(config_of(), RATES, even(), num_steps=3).steps[1].wait_s
    train_s = TRAINER.step_s(64 * 310)
    assert step_s[0] == pytest.approx(rollout_s + train_s + TRAINER.sync_s)
    assert step_s[1] == pytest.approx(max(rollout_s, train_s) + TRAINER.sync_s, rel=0.03)


COMPLETION_ORDER = """
def quickest(groups, num_groups):
    complete = [group.position for group in groups if group.is_complete]
    return complete[:num_groups] if len(complete) >= num_groups else None
"""


def test_completion_order_is_seen_to_be_biased_and_the_order_of_drawing_is_not(tmp_path: Path) -> None:
    """Long episodes fail more often here: who trains on the quickest cuts length and adds reward."""
    (tmp_path / "order.py").write_text(COMPLETION_ORDER)
    workload = LogNormalWorkload(
        tail=1.2, mean_turns=1, mean_tokens=200, length_correlation=-0.9, mean_tool_s=0
    )
    found = {}
    for name, order in (
        ("quickest", f"{{kind: plugin, target: '{tmp_path / 'order.py'}:quickest'}}"),
        ("window", "{kind: windowed_fifo, window: 20}"),
        ("fifo", "{kind: fifo}"),
    ):
        config = config_of(
            "rollout.max_staleness=4",
            "rollout.on_stale=drop",
            f"rollout.order={order}",
            *KEEP_KV,
            "engines.num_engines=2",
        )
        run = simulate(config, replace(RATES, trainer=replace(TRAINER, token_s=0)), workload, num_steps=10)
        found[name] = report_of(run, config)
    assert found["quickest"].length_bias < found["window"].length_bias < found["fifo"].length_bias == 0
    assert found["quickest"].reward_bias > found["fifo"].reward_bias == 0
    assert found["quickest"].num_stale > 0 == found["fifo"].num_stale


def test_rates_of_a_run_predict_it_at_another_concurrency() -> None:
    """The run is simulated by rates that the calibration does not know, so the prediction can be checked."""
    secret = replace(
        ENGINE, overhead_s=0.004, weights_s=0, request_s=0.003, prefill_s=0.02, prefill_token_s=3e-4
    )
    workload = LogNormalWorkload(mean_turns=3, mean_tokens=60, max_tokens=200, mean_tool_s=0, tail=0.8)
    config, narrow = (
        config_of("rollout.max_concurrent_requests=64"),
        config_of("rollout.max_concurrent_requests=8"),
    )
    truth = Rates(engine=secret, trainer=TRAINER, source="")
    played = simulate(config, truth, workload, num_steps=3)
    shapes = [played.drawn[position] for position in sorted(played.drawn)]
    real = RealRun(
        config=config,
        rows=[
            {
                "seconds/generate": step.wait_s,
                "seconds/tools": 0.0,
                "seconds/train": step.train_s,
                "seconds/sync": step.sync_s,
                "seconds/step": step.seconds,
                "train/tokens": step.num_tokens,
            }
            for step in played.steps
        ],
        workload=ReplayedWorkload(shapes),
        episode_s=tuple(played.episode_s),
    )
    rates = calibrate(real)
    assert rates.trainer.step_s(20_000) == pytest.approx(TRAINER.step_s(20_000), rel=0.01)
    predicted = simulate(narrow, rates, real.workload, num_steps=3).steps
    actual = simulate(narrow, truth, workload, num_steps=3).steps
    ratio = statistics.fmean(step.wait_s for step in predicted) / statistics.fmean(s.wait_s for s in actual)
    assert ratio == pytest.approx(1, abs=0.1)


def test_an_episode_keeps_its_shape() -> None:
    from polyturn.agents.episode import Episode, EpisodeTimings, Outcome
    from polyturn.agents.ledger import Segment

    sampled = [0, 0, 0, 1, 1, 0, 1, 1, 1]
    episode = Episode(
        episode_id="g00000000.0.0",
        group_id="g00000000",
        env_id="e",
        task_id="t",
        seed=0,
        outcome=Outcome.COMPLETED,
        stop_reason="terminated",
        reward=0.5,
        segments=(
            Segment(
                token_ids=range(9),
                sampled=sampled,
                logprobs=[0.0] * 9,
                policy_versions=[0] * 9,
                turns=[0] * 9,
            ),
        ),
        timings=EpisodeTimings(tools_s=3.0),
    )
    assert shape_of(episode) == EpisodeShape(
        num_prompt=3,
        turns=(
            TurnShape(num_sampled=2, num_observed=1, tool_s=1.5),
            TurnShape(num_sampled=3, num_observed=0, tool_s=1.5),
        ),
        reward=0.5,
    )


def test_log_normal_episodes_have_the_means_that_were_asked_for() -> None:
    workload = LogNormalWorkload(mean_tokens=100, max_tokens=10**9, mean_turns=3, max_turns=99, success=0.3)
    shapes = [
        workload(position=position, sample=sample, attempt=0)
        for position, sample in itertools.product(range(1500), range(4))
    ]
    assert statistics.fmean(shape.turns[0].num_sampled for shape in shapes) == pytest.approx(100, rel=0.1)
    assert statistics.fmean(turn.tool_s for s in shapes for turn in s.turns) == pytest.approx(1, rel=0.1)
    assert statistics.fmean(shape.reward for shape in shapes) == pytest.approx(0.3, abs=0.03)
    assert 2.3 < statistics.fmean(len(shape.turns) for shape in shapes) < 3.1


def test_a_roofline_follows_the_gpu() -> None:
    """What reads memory goes by the bandwidth, what computes by the FLOPs; twice the ranks train twice as quickly."""
    config = config_of()
    slow, quick = rates_of(config, "A100-80GB"), rates_of(config, "H200")
    assert slow.engine.weights_s / quick.engine.weights_s == pytest.approx(4.8 / 2.04)
    assert slow.engine.request_s / quick.engine.request_s == pytest.approx(989 / 312)
    wide = rates_of(config_of("trainer.parallel.data=4"), "H200")
    assert quick.trainer.token_s / wide.trainer.token_s == pytest.approx(2)
    assert "not measured" in quick.source
