"""What a step's trajectories cost: memory while they are held, bytes on disk, and the time in which they are written.

    python benchmarks/trajectories.py [--short]

The step is 2,048 episodes of 16k tokens (33.5M), in 16 turns each, half of the tokens sampled. Only `--held` different
episodes are made, by the ledger from generations, and written again and again under other ids: memory is measured of
these. Token ids are drawn log-uniformly from a vocabulary of 151k, which is harder to compress than text.

The journal is written as in a run, from an event loop with many episodes at once, the columnar file in a thread of the
same loop; meanwhile a task of the loop sleeps 1 ms at a time, and the longest that it overslept is told, also of two
seconds in which nothing is written, for what else the machine does. The last line is JSON; `write_ns_per_token` is of
both files together, wall time, `write_cpu_ns_per_token` the process's CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import resource
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import Generation
from polyturn.rollout.store import TrajectoryStore

VOCABULARY = 151_000
NUM_TURNS = 16
AT_ONCE = 64
"""Episodes that end at once."""


def make_episode(number: int, num_tokens: int) -> Episode:
    """An episode as the loop leaves it."""
    draws = np.random.default_rng(number)
    ledger = Ledger()
    length = num_tokens // NUM_TURNS // 2
    for turn in range(NUM_TURNS):
        ids = np.exp(draws.uniform(0, np.log(VOCABULARY), 2 * length)).astype(np.int32)
        ledger.append_observation(ids[:length].tolist())
        ledger.append_generation(
            Generation(
                token_ids=ids[length:].tolist(),
                logprobs=(-draws.exponential(0.4, length)).astype(np.float32).tolist(),
                policy_versions=[turn // 8] * length,
                finish_reason="stop",
            )
        )
    return Episode(
        episode_id=f"g{number:08d}.0.0",
        group_id=f"g{number:08d}",
        env_id="benchmark",
        task_id=str(number),
        seed=number,
        outcome=Outcome.COMPLETED,
        stop_reason="terminated",
        reward=1.0,
        num_turns=NUM_TURNS,
        segments=(ledger.to_segment(),),
    )


def held_bytes() -> int:
    """The memory that this process has in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@asynccontextmanager
async def ticking() -> AsyncIterator[list[float]]:
    """While it lasts a list grows of the seconds by which a sleep of 1 ms was longer than that."""
    late: list[float] = [0.0]

    async def tick() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - started - 0.001)

    task = asyncio.create_task(tick())
    try:
        yield late
    finally:
        task.cancel()


async def write(store: TrajectoryStore, episodes: list[Episode]) -> dict[str, float]:
    """Write the journal and the columnar file; seconds of each, and how long the loop was held at most."""
    waiting = iter(episodes)

    async def end_episodes() -> None:
        for episode in waiting:
            await store.keep(1, episode)

    async with ticking() as late_by_others:
        await asyncio.sleep(2)
    started, cpu = time.perf_counter(), time.process_time()
    async with ticking() as late_by_journal:
        await asyncio.gather(*(end_episodes() for _ in range(AT_ONCE)))
    journal_s = time.perf_counter() - started
    async with ticking() as late_by_file:
        await asyncio.to_thread(store.write_step, 1, episodes)
    return {
        "journal_s": journal_s,
        "columnar_s": time.perf_counter() - started - journal_s,
        "cpu_s": time.process_time() - cpu,
        "loop_held_by_others_ms": 1e3 * max(late_by_others),
        "loop_held_by_journal_ms": 1e3 * max(late_by_journal),
        "loop_held_by_columnar_ms": 1e3 * max(late_by_file),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16_384, help="of each episode")
    parser.add_argument("--held", type=int, default=256, help="episodes that differ")
    parser.add_argument("--short", action="store_true", help="64 episodes of 4k tokens")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.episodes, arguments.tokens, arguments.held = 64, 4096, 32
    make_episode(0, arguments.tokens)
    gc.collect()
    before = held_bytes()
    held = [make_episode(number, arguments.tokens) for number in range(arguments.held)]
    gc.collect()
    num_held = sum(len(segment) for episode in held for segment in episode.segments)
    bytes_held = held_bytes() - before
    episodes = [
        replace(held[number % len(held)], episode_id=f"g{number:08d}.0.0", group_id=f"g{number:08d}")
        for number in range(arguments.episodes)
    ]
    num_tokens = sum(len(segment) for episode in episodes for segment in episode.segments)
    with tempfile.TemporaryDirectory(prefix="polyturn-trajectories-") as directory:
        store = TrajectoryStore(Path(directory))
        seconds = asyncio.run(write(store, episodes))
        journal, columnar = store.journal_path(1).stat().st_size, store.path(1).stat().st_size
        started = time.perf_counter()
        assert store.journaled(1)[0] == episodes[0]
        read_s = time.perf_counter() - started
        store.close()
    figures = {
        "num_tokens": num_tokens,
        "bytes_per_token_held": bytes_held / num_held,
        "bytes_per_token_disk": (journal + columnar) / num_tokens,
        "bytes_per_token_journal": journal / num_tokens,
        "bytes_per_token_columnar": columnar / num_tokens,
        "write_ns_per_token": 1e9 * (seconds["journal_s"] + seconds["columnar_s"]) / num_tokens,
        "write_cpu_ns_per_token": 1e9 * seconds["cpu_s"] / num_tokens,
        **seconds,
        "journal_read_s": read_s,
    }
    for name, value in figures.items():
        print(f"{name:28} {value:12,.2f}")
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
