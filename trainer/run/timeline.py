"""A run's timeline as a trace that ui.perfetto.dev and chrome://tracing open: who waits for whom.

    process     tracks
    trainer     its phases (episodes awaited, score, update, evaluate, checkpoint), one step behind the other
    weights     what sending them takes, and how long engines are paused for it
    episodes    lanes, each an episode behind the other, with what it waits for in it: generate, tools, queue
    engines     of each what it runs, what waits at it, and how full its KV is

An arrow goes from an episode to the update of the step that it was trained in. The format is the Chrome trace's
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU): complete events `X`, counters `C`,
flows `s` and `f`, names `M`; microseconds.
"""

from __future__ import annotations

import gzip
import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from polyturn.agents.episode import Episode
from polyturn.configs.schema.metrics import TimelineConfig
from polyturn.rollout.engines.load import EngineLoad, Loads
from polyturn.rollout.whole_file import whole_file

Event = dict[str, Any]
TRACKS: Mapping[str, tuple[int, int]] = {"trainer": (1, 1), "weights": (2, 1), "engines": (2, 2)}
"""Process and thread of each track of spans."""
WRITTEN_AT_MOST = 2
"""Files that an episode is in, while nothing is trained on it: what failed or was filtered never is."""
EPISODES, LOADS = 3, 4
"""Processes of the episodes' lanes and of the engines' counters."""
WEIGHT_PHASES = frozenset({"sync", "release", "reload", "offload", "resume"})
PROCESSES = {1: "trainer", 2: "weights", EPISODES: "episodes", LOADS: "engines"}


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time, in seconds of one clock."""

    track: str
    name: str
    started: float
    ended: float


@dataclass(slots=True)
class Played:
    """An attempt at an episode that has ended."""

    episode: Episode
    ended: float
    trained: tuple[int, float] | None = None
    """In which step, and when its update began."""
    written: int = 0
    """In so many files."""

    @property
    def started(self) -> float:
        return self.ended - self.episode.timings.total_s


@dataclass(frozen=True, slots=True)
class Load:
    """A sample of an engine's load."""

    at: float
    number: int
    load: EngineLoad


class Timeline:
    """Collects a run's trace, and writes a file of it after every so many steps. `note_episode` may be called by
    another thread than the rest.

    What is collected is bounded; the oldest goes first. Files are written by a thread of their own.
    """

    def __init__(
        self,
        config: TimelineConfig,
        directory: Path,
        tell: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`directory` is where the files go; it is made with the first."""
        self._config = config
        self._directory = directory
        self._tell = tell
        self._clock = clock
        self._started = clock()
        self._spans: deque[Span] = deque(maxlen=config.max_events)
        self._played: deque[Played] = deque(maxlen=config.max_events)
        self._loads: deque[Load] = deque(maxlen=config.max_events)
        self._first_step: int | None = None
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def is_on(self) -> bool:
        return self._config.every_steps > 0

    def span(self, track: str, name: str, started: float, ended: float) -> None:
        """Something on a track of `TRACKS`, by `time.perf_counter`."""
        if self.is_on:
            self._spans.append(Span(track, name, started, ended))

    def phase(self, name: str, started: float, ended: float) -> None:
        """A phase that a `Stopwatch` measured."""
        self.span("weights" if name in WEIGHT_PHASES else "trainer", name, started, ended)

    @contextmanager
    def measure(self, track: str, name: str) -> Iterator[None]:
        started = self._clock()
        try:
            yield
        finally:
            self.span(track, name, started, self._clock())

    def note_episode(self, episode: Episode) -> None:
        """An attempt has ended."""
        if self.is_on:
            with self._lock:
                self._played.append(Played(episode, self._clock()))

    def note_update(self, step: int, episodes: Sequence[Episode]) -> None:
        """The update of a step begins, with these episodes."""
        if not self.is_on:
            return
        now, names = self._clock(), {episode.episode_id for episode in episodes}
        with self._lock:
            known = list(self._played)
        for played in known:
            if played.episode.episode_id in names and played.trained is None:
                played.trained = (step, now)

    def note_pause(self, seconds: float) -> None:
        """Engines could not generate for so long, as they took weights, and can from now on."""
        now = self._clock()
        self.span("engines", "paused for weights", now - seconds, now)

    def note_loads(self, samples: Sequence[tuple[float, Loads]]) -> None:
        """Samples of the engines' loads."""
        for at, loads in samples:
            self._loads.extend(Load(at, engine, load) for engine, load in loads.items() if load is not None)

    def end_step(self, step: int, *, is_last: bool) -> None:
        """A step is finished: with every so many, and the last, a file is written."""
        if not self.is_on:
            return
        self._first_step = step if self._first_step is None else self._first_step
        if is_last or step % self._config.every_steps == 0:
            self._write(self._first_step, step)
            self._first_step = None

    def close(self) -> None:
        """Wait for what is being written."""
        if self._writer is not None:
            self._writer.join()

    def _write(self, first: int, last: int) -> None:
        self.close()
        spans, loads = list(self._spans), list(self._loads)
        self._spans.clear()
        self._loads.clear()
        with self._lock:
            # As they are: what is trained on meanwhile has its arrow in the next file, where it is, too.
            played = [replace(one) for one in self._played]
            for one in self._played:
                one.written += 1
            self._played = deque(
                (one for one in self._played if one.trained is None and one.written < WRITTEN_AT_MOST),
                maxlen=self._config.max_events,
            )
        path = self._directory / f"steps_{first:06d}_to_{last:06d}.json.gz"
        self._writer = threading.Thread(
            target=self._save, args=(path, spans, played, loads), name="timeline", daemon=True
        )
        self._writer.start()

    def _save(
        self, path: Path, spans: Sequence[Span], played: Sequence[Played], loads: Sequence[Load]
    ) -> None:
        events = trace_events(spans, played, loads, origin=self._started)
        trace = orjson.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
        try:
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as file:
                file.write(gzip.compress(trace, 5))
            for old in sorted(path.parent.glob("steps_*.json.gz"))[: -self._config.keep_files]:
                old.unlink()
        except OSError as fault:
            self._tell(f"warning: the timeline cannot be written: {fault}")


def trace_events(
    spans: Sequence[Span], played: Sequence[Played], loads: Sequence[Load], *, origin: float
) -> list[Event]:
    """The events of a Chrome trace, with names of processes and threads first. Times are from `origin` on: what began
    before it begins with it."""

    def micros(at: float) -> float:
        return max(0.0, round((at - origin) * 1e6, 1))

    events: list[Event] = []
    for span in sorted(spans, key=lambda one: (one.started, -one.ended)):
        process, thread = TRACKS[span.track]
        events.append(_complete(process, thread, span.name, micros(span.started), micros(span.ended)))
    for number, (lane, attempt) in enumerate(in_lanes(played), start=1):
        events += _episode_events(attempt, lane, number, micros)
    for one in loads:
        if one.at < origin:
            continue
        at, load = micros(one.at), one.load
        requests = {"running": load.num_running, "waiting": load.num_waiting}
        for name, figures in (("requests", requests), ("KV in use", {"share": load.kv_use})):
            name = f"engine {one.number}: {name}"
            events.append({"ph": "C", "pid": LOADS, "name": name, "ts": at, "args": figures})
    return [*_names(events), *sorted(events, key=lambda event: event["ts"])]


def in_lanes(played: Sequence[Played]) -> list[tuple[int, Played]]:
    """A lane for each, counted from 1: the first in which the one before has ended."""
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    found = []
    for one in sorted(played, key=lambda one: one.started):
        while busy and busy[0][0] <= one.started:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy) + 1
        heapq.heappush(busy, (one.ended, lane))
        found.append((lane, one))
    return found


def _episode_events(one: Played, lane: int, number: int, micros: Callable[[float], float]) -> Iterator[Event]:
    """The episode's slice, what it waited for inside it, and the arrow to its update."""
    episode, started, ended = one.episode, micros(one.started), micros(one.ended)
    versions = [int(segment.policy_versions.max()) for segment in episode.segments if len(segment)]
    yield _complete(
        EPISODES,
        lane,
        episode.task_id or episode.episode_id,
        started,
        ended,
        episode=episode.episode_id,
        outcome=str(episode.outcome),
        stop_reason=episode.stop_reason,
        reward=episode.reward,
        turns=episode.num_turns,
        sampled_tokens=episode.num_sampled_tokens,
        version=max(versions, default=None),
        step=None if one.trained is None else one.trained[0],
    )
    free = started
    for kind, begin_s, end_s in sorted(episode.timings.spans, key=lambda span: span[1]):
        # Requests of one episode may overlap; slices of one track may not.
        begin, end = max(free, started + begin_s * 1e6), min(ended, started + end_s * 1e6)
        if end > begin:
            yield _complete(EPISODES, lane, kind, round(begin, 1), round(end, 1))
            free = end
    if one.trained is not None:
        step, at = one.trained
        arrow = {"cat": "trained", "name": f"trained in step {step}", "id": number}
        process, thread = TRACKS["trainer"]
        # Inside the slice: at its very end it would be the next one's.
        begins = max(started, round(ended - 1.0, 1))
        yield {**arrow, "ph": "s", "pid": EPISODES, "tid": lane, "ts": begins}
        yield {**arrow, "ph": "f", "bp": "e", "pid": process, "tid": thread, "ts": micros(at)}


def _complete(process: int, thread: int, name: str, started: float, ended: float, **arguments: Any) -> Event:
    event = {
        "ph": "X",
        "pid": process,
        "tid": thread,
        "name": name,
        "ts": started,
        "dur": max(0.0, ended - started),
    }
    return event | ({"args": arguments} if arguments else {})


def _names(events: Sequence[Event]) -> Iterator[Event]:
    """Of the processes and threads that events are of."""
    named = {place: track for track, place in TRACKS.items()}
    for process in sorted({event["pid"] for event in events}):
        name = {"name": PROCESSES[process]}
        yield {"ph": "M", "pid": process, "name": "process_name", "args": name, "ts": 0}
    for process, thread in sorted({(event["pid"], event["tid"]) for event in events if "tid" in event}):
        name = {"name": named.get((process, thread), f"lane {thread}")}
        yield {"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": name, "ts": 0}
