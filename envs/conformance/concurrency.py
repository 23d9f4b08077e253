"""The check that episodes played at the same time do not disturb one another."""

from __future__ import annotations

import asyncio
import contextlib
import time

from polyturn.envs.conformance.episodes import Trace, difference, play, play_async, policy_of
from polyturn.envs.conformance.findings import Nonconforming, Subject
from polyturn.envs.tool_env import ToolEnv

NUM_AT_ONCE = 8


def check_concurrency(subject: Subject) -> str:
    """Episodes in turn and in threads, each on an instance of its own, give what each gives alone."""
    count = _how_many(subject)
    alone: list[Trace] = []
    with subject.open() as env:
        nondeterministic = env.spec is not None and env.spec.nondeterministic
        for seed in range(min(count, 64)):
            alone.append(play(env, policy_of(env, _policy(seed), seed), seed=seed))
    together = asyncio.run(_together(subject, count))
    if nondeterministic:
        return f"{count} episodes at once; registered as nondeterministic, so not compared"
    for seed, trace in enumerate(together):
        if where := difference(alone[seed % len(alone)], trace):
            raise Nonconforming(
                f"an episode goes another way when {count} are played at the same time: {where}; keep what belongs "
                "to an episode on the instance, share read-only things only, and guard what threads share"
            )
    return f"{count} episodes at once, each as if alone"


def _policy(seed: int):  # type: ignore[no-untyped-def]
    return "random" if seed % 2 else "oracle"


def _how_many(subject: Subject) -> int:
    """As many episodes as asked for, or as the budget allows, but never fewer than 16."""
    started = time.perf_counter()
    for seed in range(3):
        with subject.open() as env:
            play(env, policy_of(env, _policy(seed), seed), seed=seed)
    seconds = (time.perf_counter() - started) / 3
    return max(min(16, subject.num_episodes), min(subject.num_episodes, int(4 * subject.budget_s / seconds)))


async def _together(subject: Subject, count: int) -> list[Trace]:
    """`count` episodes of 64 seeds at most, all begun before any ends."""
    with contextlib.ExitStack() as stack:
        envs: list[ToolEnv] = [stack.enter_context(subject.open()) for _ in range(count)]
        slots = asyncio.Semaphore(NUM_AT_ONCE)
        return await asyncio.gather(
            *(
                play_async(env, policy_of(env, _policy(seed), seed), seed=seed, slots=slots)
                for seed, env in ((index % 64, env) for index, env in enumerate(envs))
            )
        )
