"""What a simulated run says of its policy, as figures and as a table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.simulator.simulation import SimulatedRun


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Figures over all steps of a run; those of speed leave out the first ones, in which the engines fill."""

    step_s: float
    steps_per_hour: float
    tokens_per_s: float
    """Sampled and trained on."""
    trainer_use: float
    """Share of the time in which the trainer trains."""
    engine_use: float
    """Share of the time in which an engine computes, over all engines."""
    gpu_use: float
    """Both, by their GPUs."""
    batch_mean: float
    """Requests that decode at once on an engine that decodes."""
    kv_peak: float
    cache_hit_rate: float
    num_preemptions: int
    staleness_mean: float
    """Of sampled tokens, in steps."""
    staleness_max: int
    share_by_age: Mapping[int, float]
    episode_s_median: float
    episode_s_p99: float
    episode_s_max: float
    tail_wait_share: float
    """Of the time, in which the trainer waits."""
    length_bias: float
    """Mean length of what was trained on over that of what was drawn for as many steps, less 1."""
    reward_bias: float
    """Mean reward of what was trained on less that of what was drawn."""
    largest_step_length_bias: float
    """Of the step that is furthest off the mean of all that was drawn, in the deviations that chance gives a step."""
    num_filtered: int
    num_stale: int


def report_of(run: SimulatedRun, config: RunConfig) -> Report:
    """The figures of a run of this config."""
    steps, rollout = run.steps, config.rollout
    num_first = min(1 + rollout.max_staleness, len(steps) // 3)
    steady = steps[num_first:]
    step_s = statistics.fmean(step.seconds for step in steady)
    by_age: Counter[int] = Counter()
    for step in steps:
        by_age.update(step.tokens_by_age)
    num_sampled = max(1, by_age.total())
    trainer_use = sum(step.train_s for step in steady) / sum(step.seconds for step in steady)
    engine_use = statistics.fmean(engine.busy_s for engine in run.engines) / run.total_s
    engine_gpus = config.engines.num_engines * config.engines.tensor_parallel
    trainer_gpus = config.trainer.num_ranks
    episode_s = np.array(run.episode_s)
    decode_s = sum(engine.decode_s for engine in run.engines)
    length_bias, reward_bias = biases(run, num_positions=len(steps) * rollout.prompts_per_step)
    return Report(
        step_s=step_s,
        steps_per_hour=3600 / step_s,
        tokens_per_s=sum(step.num_sampled for step in steady) / sum(step.seconds for step in steady),
        trainer_use=trainer_use,
        engine_use=engine_use,
        gpu_use=(engine_use * engine_gpus + trainer_use * trainer_gpus) / (engine_gpus + trainer_gpus),
        batch_mean=sum(engine.request_seconds for engine in run.engines) / max(decode_s, 1e-9),
        kv_peak=max(engine.kv_peak for engine in run.engines),
        cache_hit_rate=sum(engine.num_cached_tokens for engine in run.engines)
        / max(1, sum(engine.num_prompt_tokens for engine in run.engines)),
        num_preemptions=sum(engine.num_preemptions for engine in run.engines),
        staleness_mean=sum(age * count for age, count in by_age.items()) / num_sampled,
        staleness_max=max(by_age, default=0),
        share_by_age={age: count / num_sampled for age, count in sorted(by_age.items())},
        episode_s_median=float(np.median(episode_s)),
        episode_s_p99=float(np.quantile(episode_s, 0.99)),
        episode_s_max=float(episode_s.max()),
        tail_wait_share=sum(step.wait_s for step in steady) / sum(step.seconds for step in steady),
        length_bias=length_bias,
        reward_bias=reward_bias,
        largest_step_length_bias=largest_step_bias(run),
        num_filtered=sum(step.num_filtered for step in steps),
        num_stale=sum(step.num_stale for step in steps),
    )


def biases(run: SimulatedRun, *, num_positions: int) -> tuple[float, float]:
    """Of length, relative, and of reward: what was trained on against the prompts that were drawn first."""
    drawn = [shape for position, shapes in run.drawn.items() if position < num_positions for shape in shapes]
    lengths = [length for step in run.steps for length in step.lengths]
    rewards = [reward for step in run.steps for reward in step.rewards]
    if not drawn or not lengths:
        return 0.0, 0.0
    return (
        statistics.fmean(lengths) / statistics.fmean(shape.num_sampled for shape in drawn) - 1,
        statistics.fmean(rewards) - statistics.fmean(shape.reward for shape in drawn),
    )


def largest_step_bias(run: SimulatedRun) -> float:
    """Of the steps' mean lengths the largest distance from the mean of all groups, in deviations of a step's mean."""
    groups = [statistics.fmean(s.num_sampled for s in shapes) for shapes in run.drawn.values()]
    if len(groups) < 2:
        return 0.0
    mean, deviation = statistics.fmean(groups), statistics.stdev(groups)
    found = [
        abs(statistics.fmean(step.lengths) - mean) / (deviation / max(1, len(step.positions)) ** 0.5)
        for step in run.steps
        if step.lengths and deviation
    ]
    return max(found, default=0.0)


def rows_of(report: Report) -> Sequence[tuple[str, str]]:
    """The table."""
    ages = ", ".join(f"{age}: {share:.1%}" for age, share in report.share_by_age.items())
    return (
        ("step", f"{report.step_s:,.1f} s, {report.steps_per_hour:,.1f} steps an hour"),
        ("sampled tokens trained on", f"{report.tokens_per_s:,.0f} a second"),
        (
            "GPUs in use",
            f"{report.gpu_use:.0%} (engines {report.engine_use:.0%}, trainer {report.trainer_use:.0%})",
        ),
        ("trainer waits for groups", f"{report.tail_wait_share:.0%} of the time"),
        (
            "episode",
            f"median {report.episode_s_median:,.1f} s, p99 {report.episode_s_p99:,.1f} s, longest "
            f"{report.episode_s_max:,.1f} s",
        ),
        (
            "engines",
            f"{report.batch_mean:,.1f} requests a batch, KV at most {report.kv_peak:.0%}, {report.num_preemptions:,} "
            f"preemptions, {report.cache_hit_rate:.0%} of prompt tokens cached",
        ),
        (
            "staleness",
            f"mean {report.staleness_mean:.2f} steps, largest {report.staleness_max}; by age {ages}",
        ),
        ("groups", f"{report.num_filtered:,} filtered, {report.num_stale:,} stale"),
        (
            "bias of what is trained on",
            f"length {report.length_bias:+.1%}, reward {report.reward_bias:+.3f}; the step furthest off in length: "
            f"{report.largest_step_length_bias:.1f} deviations",
        ),
    )
