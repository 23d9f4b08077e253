"""Checks of what an environment holds: it gives it back, does not need ever more, and how long it takes."""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from polyturn.envs.conformance.subject import MAX_TURNS, Nonconforming, Subject, play, policy_of
from polyturn.envs.messages import Message
from polyturn.envs.played_env import PlayedEnv

MEMORY_PER_EPISODE = 32 * 1024
"""Bytes by which a process may grow with each episode, in every one of three windows, before it is called a leak."""

_NUM_INSTANCES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """What this process holds."""

    files: int
    threads: int
    processes: int
    memory: int

    @classmethod
    def now(cls) -> _Held:
        process = psutil.Process()
        return cls(
            files=len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else process.num_fds(),
            threads=threading.active_count(),
            processes=len(process.children(recursive=True)),
            memory=process.memory_info().rss,
        )

    def growth(self, before: _Held) -> Mapping[str, int]:
        """What is held in more than `before`, memory aside."""
        grown = {
            "open files": self.files - before.files,
            "threads": self.threads - before.threads,
            "child processes": self.processes - before.processes,
        }
        return {name: count for name, count in grown.items() if count > 0}


def check_close(subject: Subject) -> str:
    """Closing gives back processes, threads and files, and closing again does no harm."""
    _use_one(subject)  # what instances share, such as an index, is opened with the first and stays
    _use_one(subject)
    gc.collect()
    before = _Held.now()
    for _ in range(_NUM_INSTANCES):
        _use_one(subject)
    grown = {name: count for name, count in _settled(before).items() if count >= _NUM_INSTANCES}
    if grown:
        raise Nonconforming(
            f"{_NUM_INSTANCES} instances were closed and left {_listed(grown)} behind: give back in close() what "
            "__init__, begin and tools open"
        )
    return f"{_NUM_INSTANCES} instances left nothing"


def _use_one(subject: Subject) -> None:
    with subject.open() as env:
        play(env, policy_of(env, "oracle"), seed=0)
        env.close()


def check_leaks(subject: Subject) -> str:
    """Episode after episode needs no more files, threads, processes or memory than the first."""
    with subject.open() as env:
        seconds = _episodes(env, 3)
        size = max(8, min(100, int(subject.budget_s / 4 / max(seconds / 3, 1e-5))))
        _episodes(env, size)
        gc.collect()
        before = _Held.now()
        windows = []
        start = before
        for _ in range(3):
            _episodes(env, size)
            gc.collect()
            end = _Held.now()
            windows.append(end.memory - start.memory)
            start = end
        grown = {name: count for name, count in _settled(before).items() if count >= size}
    if grown:
        raise Nonconforming(
            f"{3 * size} episodes left {_listed(grown)} open: give back at the end of an episode, or in the next "
            "reset, what begin, tools and grade open"
        )
    if min(windows) > MEMORY_PER_EPISODE * size:
        raise Nonconforming(
            f"each episode leaves {min(windows) / size / 1024:.0f} KiB or more in memory: keep nothing of an episode "
            "after its end, and bound every cache"
        )
    return f"{3 * size} episodes, {max(0, sum(windows)) / 3 / size / 1024:.1f} KiB each"


def _episodes(env: PlayedEnv, count: int) -> float:
    """The seconds that so many oracle episodes take."""
    started = time.perf_counter()
    for seed in range(count):
        play(env, policy_of(env, "oracle"), seed=seed)
    return time.perf_counter() - started


def _settled(before: _Held) -> Mapping[str, int]:
    """The growth, once threads and processes that are just ending have ended."""
    gc.collect()
    for _ in range(20):
        if not (grown := _Held.now().growth(before)):
            break
        time.sleep(0.05)
    return grown


def _listed(grown: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in grown.items())


def check_speed(subject: Subject) -> str:
    """A report: microseconds for each reset and step of the oracle's episodes, the median of them."""
    resets: list[float] = []
    steps: list[float] = []
    with subject.open() as env:
        script = policy_of(env, "oracle")
        deadline = time.perf_counter() + min(subject.budget_s, 1.0)
        seed = 0
        while seed < 5 or (time.perf_counter() < deadline and seed < 200):
            started = time.perf_counter()
            observation, info = env.reset(seed=seed)
            resets.append(time.perf_counter() - started)
            messages: list[Message] = list(observation)
            for _ in range(MAX_TURNS):
                action = script(tuple(messages), info["tools"])
                started = time.perf_counter()
                observation, _, terminated, truncated, _ = env.step(action)
                steps.append(time.perf_counter() - started)
                messages += [action.to_message(), *observation]
                if terminated or truncated:
                    break
            seed += 1
    return (
        f"{statistics.median(resets) * 1e6:,.0f} us a reset, {statistics.median(steps) * 1e6:,.0f} us a step"
    )
