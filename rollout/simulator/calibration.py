"""Rates and episodes from a real run: what its metrics and trajectories show, instead of assumptions.

The episodes are replayed as they were. The engines' rates are those by which the simulated steps take as long as the
real ones did, and their episodes, too: found by least squares, over simulations of the run itself.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from polyturn.agents.episode import Episode
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.memory import CPU_KV_TOKENS
from polyturn.rollout.groups import position_of
from polyturn.rollout.simulator.engine import EngineRates
from polyturn.rollout.simulator.rates import Rates, TrainerRates
from polyturn.rollout.simulator.simulation import simulate
from polyturn.rollout.simulator.workload import EpisodeShape, ReplayedWorkload, TurnShape
from polyturn.rollout.store import TrajectoryStore

Column = npt.NDArray[np.float64]
MAX_STEPS = 4
"""So many steps are simulated to find the engines' rates."""
SLOPE_STEP, LARGEST_STEP, LAST_STEP = 0.1, 1.5, 0.02
"""Of the search, in logarithms of rates: to find slopes, at once, and before it ends."""
MAX_ROUNDS, MAX_DAMPINGS = 15, 5
QUANTILES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 1.0)
"""Of the episodes' seconds. The last ones of a step decode with few others, and tell what a step of the engine costs
whatever is in it from what each request costs; a mean over all does not tell them apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RealRun:
    """What a run directory shows."""

    config: RunConfig
    rows: Sequence[Mapping[str, float]]
    """Of the steps that are looked at."""
    workload: ReplayedWorkload
    """Its groups, in the order in which they were drawn."""
    episode_s: tuple[float, ...]
    """Of each episode: requests, tools, and waiting for them."""

    @property
    def num_steps(self) -> int:
        """That are looked at."""
        return len(self.rows)


def read_run(path: Path, *, skip: int = 1, num_steps: int | None = None) -> RealRun:
    """Read a run; its first steps warm up, and are left out.

    Raises:
        ValueError: the run has too few steps.
    """
    rows = [orjson.loads(line) for line in (path / "metrics.jsonl").read_bytes().splitlines()]
    rows = rows[skip : None if num_steps is None else skip + num_steps]
    if len(rows) < 2:
        raise ValueError(f"{path} has too few steps to calibrate on: two are needed behind the first {skip}")
    store = TrajectoryStore(path)
    groups: dict[int, list[Episode]] = {}
    for row in rows:
        for episode in store.read_step(int(row["step"])):
            groups.setdefault(position_of(episode.group_id), []).append(episode)
    return RealRun(
        config=load_config(path / "config.yaml"),
        rows=rows,
        workload=ReplayedWorkload(
            [[shape_of(episode) for episode in groups[position]] for position in sorted(groups)]
        ),
        episode_s=tuple(
            episode.timings.generate_s + episode.timings.tools_s + episode.timings.queue_s
            for position in sorted(groups)
            for episode in groups[position]
        ),
    )


def shape_of(episode: Episode) -> EpisodeShape:
    """An episode as it was played; its tools' seconds are shared out evenly over its turns."""
    sampled = np.concatenate([segment.sampled for segment in episode.segments])
    edges = np.flatnonzero(np.diff(sampled.astype(np.int8))) + 1
    runs = [(bool(sampled[start]), int(end - start)) for start, end in _spans(edges, len(sampled))]
    num_prompt = runs.pop(0)[1] if runs and not runs[0][0] else 1
    turns: list[TurnShape] = []
    num_turns = max(1, sum(is_sampled for is_sampled, _ in runs))
    for is_sampled, length in runs:
        if is_sampled:
            tool_s = episode.timings.tools_s / num_turns
            turns.append(TurnShape(num_sampled=length, num_observed=0, tool_s=tool_s))
        else:
            turns[-1] = replace(turns[-1], num_observed=length)
    return EpisodeShape(num_prompt=num_prompt, turns=tuple(turns), reward=episode.reward or 0.0)


def _spans(edges: Any, length: int) -> list[tuple[int, int]]:
    bounds = [0, *edges.tolist(), length]
    return list(itertools.pairwise(bounds))


def calibrate(run: RealRun) -> Rates:
    """The rates of a run. Raises as a simulation does."""
    trainer = trainer_rates(run.rows)
    first = _first_guess(run)
    num_steps = min(run.num_steps, MAX_STEPS)
    waits = [row["seconds/generate"] + row["seconds/tools"] for row in run.rows[:num_steps]]

    def residuals(logs: Column) -> Column:
        rates = Rates(engine=_engine_of(first, logs), trainer=trainer, source="")
        simulated = simulate(run.config, rates, run.workload, num_steps=num_steps)
        num_episodes = min(len(run.episode_s), len(simulated.episode_s))
        real_s = np.quantile(run.episode_s[:num_episodes], QUANTILES)
        simulated_s = np.quantile(simulated.episode_s[:num_episodes], QUANTILES)
        of_steps = [math.log(step.wait_s / wait) for step, wait in zip(simulated.steps, waits, strict=True)]
        return np.array([*of_steps, *np.log(simulated_s / real_s)])

    logs = least_squares(residuals, [0.0] * 4)
    return Rates(engine=_engine_of(first, logs), trainer=trainer, source=f"{num_steps} steps of a real run")


def trainer_rates(rows: Sequence[Mapping[str, float]]) -> TrainerRates:
    """A line through the seconds of training by tokens; all by the token where the line begins below 0."""
    tokens = np.array([row["train/tokens"] for row in rows])
    rest = [
        row["seconds/step"] - sum(row[f"seconds/{part}"] for part in ("generate", "tools", "train", "sync"))
        for row in rows
    ]
    seconds = np.array([row["seconds/train"] for row in rows])
    slope, start = np.polyfit(tokens, seconds, 1) if np.ptp(tokens) else (0.0, float(seconds.mean()))
    if start < 0 or slope < 0:
        slope, start = float(seconds.sum() / tokens.sum()), 0.0
    return TrainerRates(
        token_s=float(slope),
        overhead_s=float(start) + max(0.0, statistics.median(rest)),
        sync_s=statistics.median(row["seconds/sync"] for row in rows),
    )


def _first_guess(run: RealRun) -> EngineRates:
    """A batch's step costs as much for its requests as for itself."""
    sglang = run.config.sglang
    num_sampled = sum(shape.num_sampled for group in run.workload.groups for shape in group)
    waits = sum(row["seconds/generate"] + row["seconds/tools"] for row in run.rows)
    token_s = waits / num_sampled
    at_once = min(
        run.config.rollout.max_concurrent_requests,
        run.config.rollout.prompts_per_step * run.config.rollout.samples_per_prompt,
    )
    hits = [row.get("engine/cache_hit_rate", 0.0) for row in run.rows]
    return EngineRates(
        overhead_s=token_s * at_once / 4,
        weights_s=0.0,
        request_s=token_s / 2,
        kv_token_s=0.0,
        prefill_s=token_s * at_once / 4,
        prefill_token_s=token_s / 10,
        kv_tokens=int(sglang.get("max_total_tokens", CPU_KV_TOKENS)),
        max_running=int(sglang.get("max_running_requests", 128)),
        has_prefix_cache=max(hits) > 0,
    )


def _engine_of(first: EngineRates, logs: Iterable[float]) -> EngineRates:
    overhead, request, prefill, prefill_token = (math.exp(value) for value in logs)
    return replace(
        first,
        overhead_s=first.overhead_s * overhead,
        request_s=first.request_s * request,
        prefill_s=first.prefill_s * prefill,
        prefill_token_s=first.prefill_token_s * prefill_token,
    )


def least_squares(residuals: Callable[[Column], Column], start: Sequence[float]) -> list[float]:
    """Where the sum of the squares of a function of a few numbers is smallest (Levenberg and Marquardt).

    Rates that trade with one another make a valley that steps along the axes do not follow.
    """
    best = np.array(start)
    found = residuals(best)
    damping = 1.0
    for _ in range(MAX_ROUNDS):
        slopes = np.array(
            [(residuals(best + SLOPE_STEP * axis) - found) / SLOPE_STEP for axis in np.eye(len(best))]
        ).T
        moved = 0.0
        for _ in range(MAX_DAMPINGS):
            curve = slopes.T @ slopes
            step = -np.linalg.solve(
                curve + damping * (np.diag(np.diag(curve)) + 1e-6 * np.eye(len(best))), slopes.T @ found
            )
            step = np.clip(step, -LARGEST_STEP, LARGEST_STEP)
            tried = residuals(best + step)
            if tried @ tried < found @ found:
                moved = float(np.abs(step).max())
                best, found, damping = best + step, tried, damping / 3
                break
            damping *= 4
        if moved < LAST_STEP:
            break
    return [float(value) for value in best]
