"""kill -9 at random moments of a real run: whether, resumed until its end, it trains what an uninterrupted one does.

    python benchmarks/kill_points.py --points 100 [--mode sync|k2] [--directory DIR] [--jumping-clock]

One run directory of a small run on the CPU, with real engine, router, Ray and rank. A session of it begins, goes on
from the newest checkpoint, and at a random moment of its steps one of its processes is killed: the driver, a rank, the
engine (its server or its scheduler), the router, a rollout worker where that is a process. Some drivers are killed
anywhere in their start. A session costs its start, most of a minute of two cores; with `--directory` what was done
before stands, and the program goes on with it. With `--jumping-clock` the drivers' wall clock jumps by two hours, back
and forth, every half second.

In the end the run is resumed without a kill until its last step, and another one of as many steps is trained without
any. Compared are

lost     samples (prompt and number) that the uninterrupted run trained and the killed one did not
twice    samples that it trained more than once, or that the uninterrupted one did not train
changed  episodes that were whole in the journal at a kill, and were trained with other tokens: played twice
orphans  processes of a session that were there 20 s after its end
unclear  sessions that ended with more, or less, than one sentence

The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from polyturn.agents.episode import Episode, Outcome
from polyturn.rollout.journal import read_journal
from polyturn.rollout.store import TrajectoryStore
from polyturn.trainer.run.progress import read_metrics

SMALL = (
    "trainer.global_batch_size=8",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=2",
    "environment.max_turns=2",
    "environment.max_tokens_per_turn=16",
    "evaluation.before=false",
    "evaluation.after=false",
    "trainer.parallel.data=1",
    # So that there is a router to kill.
    "engines.router.policy=cache_aware",
    "logging.tensorboard=false",
    # So that there is a router to kill.
    "engines.router.policy=cache_aware",
)
MODES: Mapping[str, tuple[str, ...]] = {"sync": (), "k2": ("rollout.max_staleness=2",)}
MAX_AGE = 2
"""Of any mode: how many steps may be played ahead."""
ENDLESS = 100_000
"""Steps that no session reaches."""
STARTED_WITHIN_S = 300.0
ENDED_WITHIN_S = 180.0
GONE_WITHIN_S = 20.0
SPREAD_S = 4.0
"""Kills fall within so many seconds of a session's first step; a step takes about 0.3 s."""


def is_called(part: str) -> Callable[[psutil.Process], bool]:
    """Whether a process has the text in its command line."""
    return lambda process: part in " ".join(process.cmdline())


VICTIMS: Mapping[str, Callable[[psutil.Process], bool]] = {
    "rank": is_called("ray::PolicyRank"),
    "engine": lambda process: (
        is_called("sglang::scheduler")(process)
        or (is_called("rollout.engines.sglang_main")(process) and not is_called("supervisor")(process))
    ),
    "router": is_called("sglang::router"),
    "rollout worker": is_called("ray::PlayerActor"),
}
"""Beside the driver: which of its descendants."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One kill."""

    victim: str
    moment: str
    """`start`, or `steps`."""
    after_s: float
    """Since the session, or its first step, began."""
    step: int
    """Finished steps then."""
    num_journaled: int
    """Episodes that stood in journals."""
    exit_code: int
    sentence: str
    is_clear: bool
    """The session ended with one sentence, or was killed itself."""
    orphans: tuple[str, ...]
    """The names of processes that outlived the session by `GONE_WITHIN_S`."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class How:
    """What all sessions have in common."""

    mode: str
    environment: Mapping[str, str]


def jumping_clock(directory: Path) -> dict[str, str]:
    """The environment in which a program's wall clock jumps."""
    library = directory / "jumping_clock.so"
    source = Path(__file__).with_name("jumping_clock.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return {"LD_PRELOAD": str(library)}


class Session:
    """One `polyturn train` of the run, in processes of its own; its output is read as it comes."""

    def __init__(self, run: Path, *, num_steps: int, resume: bool, how: How) -> None:
        command = [sys.executable, "-m", "polyturn.cli.main", "train", "quickstart", *SMALL, *MODES[how.mode]]
        command += [f"run_dir={run}", f"trainer.num_steps={num_steps}", f"resume={str(resume).lower()}"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **how.environment},
        )
        self.lines: list[str] = []
        self.began = threading.Event()
        """Its first step has been finished."""
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()
        self.family: set[psutil.Process] = set()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append(line.rstrip())
            if "] step " in line:
                self.began.set()

    def wait_for_steps(self) -> None:
        """Until its first step has been finished. Raises where it does not come to that."""
        deadline = time.monotonic() + STARTED_WITHIN_S
        while not self.began.wait(0.02):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the session came to no step:\n" + "\n".join(self.lines[-20:]))

    def remember(self) -> None:
        """Note all descendants that there are."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def descendants(self, fits: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
        """Those of which it holds, the oldest first."""
        found = []
        for process in self.family:
            with contextlib.suppress(psutil.Error):
                if fits(process):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def end(self) -> int:
        """Wait for its end; the exit code. Raises `TimeoutExpired` where it hangs."""
        code = self.process.wait(timeout=ENDED_WITHIN_S)
        self._reader.join(timeout=5)
        return code

    def orphans(self) -> tuple[str, ...]:
        """The names of its processes that outlive it; they are killed."""
        _, alive = psutil.wait_procs(list(self.family), timeout=GONE_WITHIN_S)
        found = []
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline())[-120:])
                    process.kill()
        return tuple(found)


@contextlib.contextmanager
def session_of(run: Path, *, num_steps: int, how: How) -> Iterator[Session]:
    """A session of the run, new or resumed; whatever happens, none is left behind."""
    session = Session(run, num_steps=num_steps, resume=(run / "config.yaml").exists(), how=how)
    try:
        yield session
    finally:
        session.remember()
        if session.process.poll() is None:
            session.process.kill()
            session.process.wait()


def kill_once(run: Path, victim: str, *, how: How, random_: random.Random) -> Point:
    """One session, with one kill in it."""
    begun = time.monotonic()
    in_start = victim == "driver" and random_.random() < 0.4
    with session_of(run, num_steps=ENDLESS, how=how) as session:
        after_s = random_.uniform(0, 25 if in_start else SPREAD_S)
        if not in_start:
            session.wait_for_steps()
        session.remember()
        targets = [psutil.Process(session.process.pid)]
        if victim != "driver":
            targets = session.descendants(VICTIMS[victim])
            if not targets:
                raise RuntimeError(f"the session has no {victim}")
        time.sleep(after_s)
        session.remember()
        random_.choice(targets).kill()
        code = session.end()
        orphans = session.orphans()
    errors = [line for line in session.lines if line.startswith("error: ")]
    is_clear = code == -9 if victim == "driver" else code == 1 and len(errors) == 1
    return Point(
        victim=victim,
        moment="start" if in_start else "steps",
        after_s=round(after_s, 3),
        step=len(finished_steps(run)),
        num_journaled=len(journaled(run)),
        exit_code=code,
        sentence=" | ".join(errors),
        is_clear=is_clear and not any("Traceback" in line for line in session.lines),
        orphans=orphans,
        seconds=round(time.monotonic() - begun, 1),
    )


def finished_steps(run: Path) -> list[int]:
    """The steps that have a row of metrics, in their order."""
    path = run / "metrics.jsonl"
    return [row["step"] for row in read_metrics(path)] if path.exists() else []


def digest_of(episode: Episode) -> int:
    """Of an episode's tokens and their logprobs."""
    found = 0
    for segment in episode.segments:
        found = zlib.crc32(segment.logprobs.tobytes(), zlib.crc32(segment.token_ids.tobytes(), found))
    return found


def journaled(run: Path) -> dict[str, int]:
    """The digests of the episodes that are whole in the run's journals, and did not fail, by their ids."""
    return {
        episode.episode_id: digest_of(episode)
        for path in sorted((run / "journal").glob("*.journal"))
        for episode in read_journal(path).episodes
        if episode.outcome is not Outcome.FAILED
    }


def trained(run: Path) -> dict[str, list[tuple[str, int]]]:
    """Of each sample the attempts that were trained on, as episode ids with digests."""
    store = TrajectoryStore(run)
    found: dict[str, list[tuple[str, int]]] = {}
    for step in store.steps():
        for episode in store.read_step(step):
            sample = f"{episode.task_id} {episode.episode_id.rsplit('.', 1)[0]}"
            found.setdefault(sample, []).append((episode.episode_id, digest_of(episode)))
    return found


def finish(run: Path, *, num_steps: int, how: How) -> None:
    """Go on to the last step without a kill."""
    with session_of(run, num_steps=num_steps, how=how) as session:
        code = session.process.wait(timeout=3600)
    if code:
        raise RuntimeError("the run could not be finished:\n" + "\n".join(session.lines[-20:]))


def compare(killed: Path, whole: Path, kept: Mapping[str, int]) -> dict[str, int]:
    """What the killed run trained beside the uninterrupted one; `kept` are digests of what stood in journals."""
    ours, theirs = trained(killed), trained(whole)
    steps = finished_steps(killed)
    by_id = {identity: digest for attempts in ours.values() for identity, digest in attempts}
    return {
        "steps": len(steps),
        "samples": len(theirs),
        "lost": len(theirs.keys() - ours.keys()),
        "twice": sum(len(attempts) - 1 for attempts in ours.values()) + len(ours.keys() - theirs.keys()),
        "steps_lost_or_twice": len(set(range(1, len(steps) + 1)) ^ set(steps)),
        "kept": len(kept),
        "changed": sum(by_id.get(identity, digest) != digest for identity, digest in kept.items()),
    }


def table_of(points: list[Point]) -> str:
    """A row for each victim and moment."""
    rows = [
        f"{'victim':16} {'moment':8} {'points':>6} {'unclear':>8} {'orphans':>8} {'seconds':>8}  most frequent end"
    ]
    for victim, moment in sorted({(point.victim, point.moment) for point in points}):
        chosen = [point for point in points if (point.victim, point.moment) == (victim, moment)]
        ends = Counter(point.sentence.split(";")[0][:90] or f"exit {point.exit_code}" for point in chosen)
        rows.append(
            f"{victim:16} {moment:8} {len(chosen):>6} {sum(not p.is_clear for p in chosen):>8} "
            f"{sum(len(p.orphans) for p in chosen):>8} {sum(p.seconds for p in chosen) / len(chosen):>8.1f}  "
            f"{ends.most_common(1)[0][0]}"
        )
    return "\n".join(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=100, help="kills, those of earlier calls included")
    parser.add_argument("--mode", choices=sorted(MODES), default="sync")
    parser.add_argument("--victims", nargs="+", default=["driver", "rank", "engine", "router"])
    parser.add_argument("--directory", type=Path, help="where the runs are, and stay")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jumping-clock", action="store_true", help="needs a C compiler")
    parser.add_argument("--unfinished", action="store_true", help="no comparison yet")
    parser.add_argument("--short", action="store_true", help="4 points")
    return parser.parse_args()


def run_points(directory: Path, how: How, arguments: argparse.Namespace) -> list[Point]:
    """Kill until there are as many points as asked for; each is noted with what stood in journals."""
    notes, run = directory / "points.jsonl", directory / "killed"
    points = [Point(**json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []
    num_points = 4 if arguments.short else arguments.points
    for number in range(len(points), num_points):
        victim = arguments.victims[number % len(arguments.victims)]
        random_ = random.Random(f"{arguments.seed}/{number}")
        point = kill_once(run, victim, how=how, random_=random_)
        with notes.open("a") as file:
            file.write(json.dumps(asdict(point)) + "\n")
        (directory / f"journaled_{number:04d}.json").write_text(json.dumps(journaled(run)))
        points.append(point)
        print(
            f"{number + 1:>4}/{num_points} {victim:14} {point.after_s:6.2f} s into {point.moment}, step {point.step}, "
            f"{point.num_journaled} episodes kept, {point.seconds:.0f} s: {point.sentence or point.exit_code}",
            flush=True,
        )
    return points


def main() -> None:
    arguments = parse_arguments()
    with contextlib.ExitStack() as stack:
        directory = arguments.directory
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="polyturn-kill-points-")))
        directory.mkdir(parents=True, exist_ok=True)
        clock = jumping_clock(directory) if arguments.jumping_clock else {}
        how = How(mode=arguments.mode, environment=clock)
        points = run_points(directory, how, arguments)
        print(table_of(points))
        if arguments.unfinished:
            return
        killed, whole = directory / "killed", directory / "whole"
        # What is played ahead finds room before the last step.
        num_steps = points[-1].step + 2 + 2 * MAX_AGE
        finish(killed, num_steps=num_steps, how=how)
        finish(whole, num_steps=num_steps, how=how)
        kept: dict[str, int] = {}
        for path in sorted(directory.glob("journaled_*.json")):
            kept |= json.loads(path.read_text())
        found = compare(killed, whole, kept)
    figures = {
        "benchmark": "kill_points",
        "mode": arguments.mode,
        "jumping_clock": arguments.jumping_clock,
        "points": len(points),
        **found,
        "orphans": sum(len(point.orphans) for point in points),
        "unclear": sum(not point.is_clear for point in points),
        "seconds_per_point": round(sum(point.seconds for point in points) / len(points), 1),
        "victims": dict(Counter(point.victim for point in points)),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
