"""kill -9 at random moments of real runs: whether, resumed until its end, each trains what an uninterrupted one does.

    python benchmarks/kill_points.py --points 100 [--mode sync|k2] [--directory DIR] [--unfinished] [--jumping-clock]

A chain is one small run on the CPU, with real engine, router, Ray, rank and rollout worker, that is killed again and
again: each session of it goes on from the newest checkpoint until some of its processes have been killed. A point is
one kill. Nearly all of a session's time is its start, most of a minute of two cores, so that a session has several:

    rollout worker   in the steps of half of the sessions: the session goes on with another
    one that ends it the driver, the rank, the engine (its server or its scheduler), the router, in the steps or, of
                     two sessions in five, while the session starts
    the driver       once more while half of the others end

After `POINTS_PER_CHAIN` points a chain goes on to its last step without a kill, and the next one begins. Every session
is noted in `sessions.jsonl` as soon as it has ended, and every chain is compared as soon as it has; with `--directory`
what was done before stands, and the program goes on with it, so that it can be run in pieces (`--unfinished`: the last
chain is left as it is). With `--jumping-clock` the drivers' wall clock jumps by two hours, back and forth, every half
second. Compared with an uninterrupted run of as many steps are

lost     samples (prompt and number) that the uninterrupted run trained and a killed one did not
twice    samples that a killed one trained more than once, or that the uninterrupted one did not train
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from polyturn.agents.episode import Episode, Outcome
from polyturn.rollout.journal import read_journal
from polyturn.rollout.store import TrajectoryStore
from polyturn.trainer.sinks.json_lines import read_metrics

SMALL = (
    "trainer.global_batch_size=8",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=2",
    "rollout.num_workers=1",
    "environment.max_turns=2",
    "environment.max_tokens_per_turn=16",
    "evaluation.before=false",
    "evaluation.after=false",
    "trainer.parallel.data=1",
    # So that there is a router to kill.
    "engines.router.policy=cache_aware",
    "metrics.sinks=[]",
)
MODES: Mapping[str, tuple[str, ...]] = {"sync": (), "k2": ("rollout.max_staleness=2",)}
POINTS_PER_CHAIN = 20
NUM_STEPS = 80
"""Of a chain: hardly any is through before it has its points."""
STARTED_WITHIN_S = 300.0
ENDED_WITHIN_S = 180.0
GONE_WITHIN_S = 20.0
SPREAD_S = 4.0
"""Kills fall within so many seconds of a session's first step, or of the kill before; a step takes about 0.5 s."""
START_SPREAD_S = {"driver": 25.0, "rank": 15.0, "engine": 15.0, "router": 1.0}
"""Of kills in the start: since the process is there."""
ENDING_SPREAD_S = 2.0
SHARE_IN_START, SHARE_WITH_WORKER, SHARE_IN_ENDING = 0.4, 0.5, 0.5


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
class Kill:
    """One point."""

    victim: str
    moment: str
    """`start`, `steps`, or `ending`: the session was about to end, by another kill."""
    after_s: float
    """Since the process was there, or the first step was finished, or the kill before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRecord:
    """One session of a chain."""

    chain: int
    kills: tuple[Kill, ...]
    """In their order."""
    step: int
    """Finished steps at its end."""
    num_journaled: int
    """Episodes that stood in journals then."""
    exit_code: int
    sentence: str
    is_clear: bool
    """It ended with one sentence, or was killed itself, or had trained its last step."""
    orphans: tuple[str, ...]
    """The names of processes that outlived the session by `GONE_WITHIN_S`."""
    seconds: float

    @property
    def last(self) -> tuple[str, str] | None:
        """Victim and moment of the kill that ended it; None where it ended by itself."""
        return (self.kills[-1].victim, self.kills[-1].moment) if self.kills else None

    @classmethod
    def from_json(cls, line: str) -> SessionRecord:
        """Of a line of the notes."""
        plain = json.loads(line)
        kills = tuple(Kill(**kill) for kill in plain.pop("kills"))
        return cls(**{**plain, "kills": kills, "orphans": tuple(plain["orphans"])})


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

    def __init__(self, run: Path, *, resume: bool, how: How) -> None:
        command = [sys.executable, "-m", "polyturn.cli.main", "train", "quickstart", *SMALL, *MODES[how.mode]]
        command += [f"run_dir={run}", f"trainer.num_steps={NUM_STEPS}", f"resume={str(resume).lower()}"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **how.environment},
        )
        self.lines: list[str] = []
        self.num_steps = 0
        """Steps that it has finished."""
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()
        self.family: set[psutil.Process] = set()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append(line.rstrip())
            if "] step " in line:
                self.num_steps += 1

    @property
    def has_ended(self) -> bool:
        """Whether the driver has."""
        return self.process.poll() is not None

    def wait_until(self, is_so: Callable[[], bool]) -> bool:
        """Until it is so, or the session has ended: whether it is so. Raises where it comes to neither."""
        deadline = time.monotonic() + STARTED_WITHIN_S
        while not is_so():
            if self.has_ended:
                return False
            if time.monotonic() > deadline:
                raise RuntimeError("the session hangs:\n" + "\n".join(self.lines[-20:]))
            time.sleep(0.02)
        return True

    def kill(self, victim: str) -> bool:
        """Kill the driver, or a descendant of that kind; whether there was one."""
        self.remember()
        targets = [psutil.Process(self.process.pid)] if victim == "driver" else self.of_kind(victim)
        for process in random.sample(targets, len(targets)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                return True
        return False

    def remember(self) -> None:
        """Note all descendants that there are."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def of_kind(self, victim: str) -> list[psutil.Process]:
        """The descendants of a kind that are alive."""
        found = []
        for process in self.family:
            with contextlib.suppress(psutil.Error):
                if VICTIMS[victim](process) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

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
def session_of(run: Path, how: How) -> Iterator[Session]:
    """A session of the run, new or resumed; whatever happens, none is left behind."""
    session = Session(run, resume=(run / "config.yaml").exists(), how=how)
    try:
        yield session
    finally:
        session.remember()
        if not session.has_ended:
            session.process.kill()
            session.process.wait()


def kill_in(session: Session, victim: str, moments: random.Random) -> list[Kill]:
    """Kill in a session until it is about to end; fewer kills, or none, where it ends by itself before."""
    kills: list[Kill] = []

    def strike(victim: str, moment: str, spread_s: float) -> bool:
        after_s = moments.uniform(0, spread_s)
        time.sleep(after_s)
        struck = not session.has_ended and session.kill(victim)
        if struck:
            kills.append(Kill(victim=victim, moment=moment, after_s=round(after_s, 3)))
        return struck

    def is_there() -> bool:
        session.remember()
        return victim == "driver" or bool(session.of_kind(victim))

    if moments.random() < SHARE_IN_START:
        session.wait_until(is_there)
        strike(victim, "start", START_SPREAD_S[victim])
    else:
        session.wait_until(lambda: session.num_steps > 0)
        if moments.random() < SHARE_WITH_WORKER and strike("rollout worker", "steps", SPREAD_S):
            # It goes on: with the step that was under way, and another one.
            before = session.num_steps
            session.wait_until(lambda: session.num_steps > before + 1)
        strike(victim, "steps", SPREAD_S)
    if victim != "driver" and moments.random() < SHARE_IN_ENDING:
        strike("driver", "ending", ENDING_SPREAD_S)
    return kills


def play_session(run: Path, chain: int, victim: str, *, how: How, moments: random.Random) -> SessionRecord:
    """One session, with the kills in it."""
    begun = time.monotonic()
    with session_of(run, how) as session:
        kills = kill_in(session, victim, moments)
        code = session.end()
        orphans = session.orphans()
    if code and not kills:
        raise RuntimeError(
            "the session failed before anything was killed:\n" + "\n".join(session.lines[-20:])
        )
    errors = [line for line in session.lines if line.startswith("error: ")]
    if any(kill.victim == "driver" for kill in kills):
        is_clear = code == -9
    else:
        is_clear = (code, len(errors)) in ((0, 0), (1, 1))
    return SessionRecord(
        chain=chain,
        kills=tuple(kills),
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


def is_finished(run: Path) -> bool:
    """Whether its last step is trained, and its policy written."""
    path = run / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def finish(run: Path, how: How) -> None:
    """Go on to the last step without a kill."""
    with session_of(run, how) as session:
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


def table_of(sessions: Sequence[SessionRecord]) -> str:
    """A row for each victim and moment, and how the sessions ended whose last kill it was."""
    rows = [
        f"{'victim':16} {'moment':8} {'points':>6} {'sessions':>9} {'unclear':>8} {'orphans':>8}  most frequent end"
    ]
    counts = Counter((kill.victim, kill.moment) for session in sessions for kill in session.kills)
    for (victim, moment), count in sorted(counts.items()):
        ended = [one for one in sessions if one.last == (victim, moment)]
        ends = Counter(one.sentence.split(";")[0][:90] or f"exit {one.exit_code}" for one in ended)
        end = ends.most_common(1)[0][0] if ends else "others were killed after it in all sessions"
        rows.append(
            f"{victim:16} {moment:8} {count:>6} {len(ended):>9} {sum(not one.is_clear for one in ended):>8} "
            f"{sum(len(one.orphans) for one in ended):>8}  {end}"
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
    parser.add_argument("--unfinished", action="store_true", help="leave the last chain as it is")
    parser.add_argument("--short", action="store_true", help="4 points")
    return parser.parse_args()


class Chains:
    """The chains of a directory, and its notes of their sessions."""

    def __init__(self, directory: Path, how: How, *, seed: int, victims: Sequence[str]) -> None:
        self._directory = directory
        self._how = how
        self._seed = seed
        self._victims = victims
        self._notes = directory / "sessions.jsonl"
        lines = self._notes.read_text().splitlines() if self._notes.exists() else []
        self.sessions = [SessionRecord.from_json(line) for line in lines]

    @property
    def num_points(self) -> int:
        """Kills so far."""
        return sum(len(session.kills) for session in self.sessions)

    def kill(self, num_points: int) -> None:
        """Kill until there are so many points."""
        while self.num_points < num_points:
            chain = self._chain_to_go_on()
            run, number = self._run(chain), len(self.sessions)
            victim = self._victims[number % len(self._victims)]
            moments = random.Random(f"{self._seed}/{number}")
            session = play_session(run, chain, victim, how=self._how, moments=moments)
            self._journaled(chain, number).write_text(json.dumps(journaled(run)))
            with self._notes.open("a") as file:
                file.write(json.dumps(asdict(session)) + "\n")
            self.sessions.append(session)
            struck = ", ".join(f"{kill.victim} ({kill.moment})" for kill in session.kills) or "none"
            print(
                f"{self.num_points:>4}/{num_points} chain {chain}: {struck}; step {session.step}, "
                f"{session.num_journaled} episodes kept, {session.seconds:.0f} s: "
                f"{session.sentence or session.exit_code}",
                flush=True,
            )

    def results(self) -> list[dict[str, int]]:
        """Finish every chain, and compare it; what was compared before is read."""
        return [self._result(chain) for chain in sorted({session.chain for session in self.sessions})]

    def _chain_to_go_on(self) -> int:
        chain = self.sessions[-1].chain if self.sessions else 0
        of_it = [session for session in self.sessions if session.chain == chain]
        is_through = bool(of_it) and of_it[-1].exit_code == 0
        if is_through or sum(len(session.kills) for session in of_it) >= POINTS_PER_CHAIN:
            self._result(chain)
            return chain + 1
        return chain

    def _run(self, chain: int) -> Path:
        return self._directory / f"chain_{chain:03d}"

    def _journaled(self, chain: int, session: int | str) -> Path:
        """What stood in journals at the end of a session."""
        return self._directory / f"journaled_{chain:03d}_{session}.json"

    def _result(self, chain: int) -> dict[str, int]:
        """What comes of a chain."""
        run, whole = self._run(chain), self._directory / "whole"
        path = run / "result.json"
        if not path.exists():
            for each in (whole, run):
                if not is_finished(each):
                    finish(each, self._how)
            kept: dict[str, int] = {}
            for noted in sorted(self._directory.glob(self._journaled(chain, "*").name)):
                kept |= json.loads(noted.read_text())
            path.write_text(json.dumps(compare(run, whole, kept)))
            print(f"chain {chain}: {path.read_text()}", flush=True)
        found: dict[str, int] = json.loads(path.read_text())
        return found


def main() -> None:
    arguments = parse_arguments()
    with contextlib.ExitStack() as stack:
        directory = arguments.directory
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="polyturn-kill-points-")))
        directory.mkdir(parents=True, exist_ok=True)
        clock = jumping_clock(directory) if arguments.jumping_clock else {}
        how = How(mode=arguments.mode, environment=clock)
        chains = Chains(directory, how, seed=arguments.seed, victims=arguments.victims)
        chains.kill(4 if arguments.short else arguments.points)
        print(table_of(chains.sessions))
        if arguments.unfinished:
            return
        results = chains.results()
    sessions = chains.sessions
    figures = {
        "benchmark": "kill_points",
        "mode": arguments.mode,
        "jumping_clock": arguments.jumping_clock,
        "points": chains.num_points,
        "sessions": len(sessions),
        "chains": len(results),
        **{name: sum(found[name] for found in results) for name in results[0]},
        "orphans": sum(len(session.orphans) for session in sessions),
        "unclear": sum(not session.is_clear for session in sessions),
        "seconds_per_point": round(sum(session.seconds for session in sessions) / chains.num_points, 1),
        "victims": dict(Counter(kill.victim for session in sessions for kill in session.kills)),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
