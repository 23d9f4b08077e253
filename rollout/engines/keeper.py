"""Keeps the engines of a run going: what fails is taken out at once and replaced, and serves once it has the weights.

    starting -> behind -> serving -> leaving -> (removed)
       ^  |                  |
       |  | failed start     | ended, hung, failing, garbled
       |  v                  |
       waiting  <------------+
          |
          v
       (given up, after `attempts` failed starts in a row)

`behind`: it answers, and does not have the weights that the others serve. Requests go to those that are `serving`.

A thread of its own looks after the engines; the run's own thread takes weights to them. What the two share is changed
under a lock that is held for moments only. All states and the ways between them are here, so the module is long.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from ray.exceptions import RayError

from polyturn.configs.schema.engines import ReplaceConfig
from polyturn.rollout.engines.engine_log import EngineLog
from polyturn.rollout.engines.fleet import Ailment
from polyturn.rollout.engines.launch import Engines
from polyturn.rollout.engines.members import Loss, Losses, Member, Players, State, Weights
from polyturn.rollout.engines.membership import Membership
from polyturn.rollout.engines.process import EngineError
from polyturn.rollout.engines.requests import answer_requests
from polyturn.rollout.engines.router_keeper import RouterKeeper

LOOK_S = 0.25
"""Between two looks at all engines."""
ENDED_S = 0.5
"""Between two looks at whether an engine's process has ended."""
PROBE_S = 2.0
"""Between two questions to an engine, which its scheduler has to answer."""
PROBE_TIMEOUT_S = 5.0
NOTICE_S = 3.0


def answers(url: str) -> bool:
    """Whether the engine's scheduler answers, as it also does while it rests: `/health` is of its server alone."""
    try:
        reply = httpx.get(f"{url}/server_info", timeout=PROBE_TIMEOUT_S, trust_env=False, verify=False)
    except httpx.HTTPError:
        return False
    return reply.status_code == 200


class EngineKeeper:
    """The engines of one run, from the time that all of them are ready."""

    def __init__(
        self,
        engines: Engines,
        config: ReplaceConfig,
        *,
        players: Players,
        directory: Path,
        log: EngineLog,
        start_timeout_s: float,
        drain_s: float,
        are_fixed: bool = False,
        are_updated_elsewhere: bool = False,
        probe: Callable[[str], bool] = answers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            engines: All ready. Who has made them stops them.
            players: Who asks them.
            directory: Of the run, where requests are looked for.
            start_timeout_s: How long a new one may take, its place included.
            drain_s: How long one that leaves has to end what is under way.
            are_fixed: What has gone is not replaced, and none is added: their places are somebody else's by turns.
            are_updated_elsewhere: Others give them their weights: who serves another version than is asked for gets
                nothing new to do until it serves that one.
            probe: Whether the engine at an address answers.
        """
        self._engines = engines
        self._config = config.model_copy(update={"attempts": 0}) if are_fixed else config
        self._are_fixed = are_fixed
        self._are_updated_elsewhere = are_updated_elsewhere
        self._directory = directory
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._drain_s = drain_s
        self._probe = probe
        self._clock = clock
        self._lock = threading.RLock()
        now = clock()
        self._members = {
            number: Member(
                number=number, state="serving", engine=engine, url=engine.url, answered=now, since=now
            )
            for number, engine in engines.by_number.items()
        }
        self._next_number = max(self._members, default=-1) + 1
        self._num_wanted = len(self._members)
        self._losses = Losses(limit=config.deaths_per_hour)
        self._fault: EngineError | None = None
        self._num_quiet = 0
        self._weights: Weights | None = None
        self._players = players
        self._helpers = ThreadPoolExecutor(max_workers=16, thread_name_prefix="engine")
        self._router = RouterKeeper(
            engines, hung_after_s=config.hung_after_s, log=log, helpers=self._helpers, clock=clock
        )
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engines")
        self._keeping: Future[None] | None = None
        self._next_ailments = 0.0
        self._ailments: Mapping[int, Ailment] = {}
        self._stand()

    def begin(self, weights: Weights) -> None:
        """Look after the engines from now on; those that come have their weights from `weights`, or from those of a
        later call."""
        self._weights = weights
        if self._keeping is not None:
            return
        self._keeping = self._thread.submit(self._keep)

    def close(self) -> None:
        """Look after them no longer; an engine that is starting is ended with the others."""
        self._closing.set()
        self._thread.shutdown()
        self._helpers.shutdown(wait=True, cancel_futures=True)

    def check(self) -> None:
        """Raise `EngineError` where the engines cannot be kept going: too many were lost, or none is left."""
        if self._keeping is not None and self._keeping.done():
            self._keeping.result()
        if self._fault is not None:
            raise self._fault

    @property
    def members(self) -> Membership:
        """The engines that hold the weights."""
        with self._lock:
            return Membership(serving=self._urls("serving"), leaving=self._urls("leaving"))

    @property
    def behind(self) -> dict[int, str]:
        """The engines that wait for weights, by their numbers."""
        with self._lock:
            return self._urls("behind")

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Engines take weights meanwhile, and need not answer anything else."""
        with self._lock:
            self._num_quiet += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_quiet -= 1
                for member in self._members.values():
                    member.answered = self._clock()

    def fall_behind(self) -> None:
        """Another version is asked for from now on, which others bring the engines."""
        with self._lock:
            for member in self._members.values():
                if member.state == "serving":
                    self._change(member, "behind")
            self._announce()

    def examine(self) -> list[int]:
        """Look at once which engines that hold weights, or wait for them, do not answer: they are lost.

        Who is asked has more time than in an ordinary look, since this is asked after a failure.
        """
        with self._lock:
            found = [
                member
                for member in self._members.values()
                if member.state in ("serving", "behind", "leaving")
            ]
        checks = {member.number: self._helpers.submit(self._ends_or_hangs, member) for member in found}
        lost = []
        for member in found:
            what = checks[member.number].result()
            if what is not None and self._lose(member, *what):
                lost.append(member.number)
        return lost

    def reject(self, number: int, why: str) -> None:
        """An engine does not take the weights that others take."""
        with self._lock:
            member = self._members.get(number)
            state = None if member is None else member.state
        if member is None:
            return
        if state == "behind":
            self._note_failed_start(member, EngineError(why))
        else:
            self._lose(member, "failing", f"engine {number} does not take new weights: {why}")

    def admit(self, number: int, version: int) -> None:
        """An engine has the weights that the others serve: it is asked from now on."""
        with self._lock:
            member = self._members.get(number)
            if member is None or member.state not in ("behind", "serving"):
                return
            is_new, member.version = member.state == "behind", version
            if not is_new:
                self._stand()
                return
            self._change(member, "serving")
            member.num_failed, member.is_outdated = 0, False
            seconds = self._clock() - member.lost_at if member.lost is not None else None
            self._announce()
        came = f"engine {number} serves version {version} at {member.url}"
        if seconds is None:
            self._log.count("engine/added")
            self._log.note("serving", came, engine=number, version=version)
            return
        self._log.count("engine/replaced")
        self._log.took("engine/seconds_to_serving", seconds)
        self._log.note(
            "serving",
            f"{came}, {seconds:.1f} s after the one before it was last seen",
            engine=number,
            version=version,
            seconds_to_serving=seconds,
            after=member.lost,
        )

    def add(self) -> int:
        """One more engine is to be started; its number. Raises `ValueError` where that cannot be."""
        if self._are_fixed:
            raise ValueError("the engines are on the trainer's GPUs, where there is no room for more")
        with self._lock:
            number = self._next_number
            self._next_number += 1
            self._num_wanted += 1
            member = Member(number=number, state="waiting", since=self._clock())
            self._members[number] = member
            self._start(member)
        self._log.note("added", f"engine {number} is being started", engine=number)
        return number

    def remove(self, number: int) -> None:
        """End an engine when its requests have ended; its episodes go on elsewhere.

        Raises:
            ValueError: there is no such engine, or no other one serves.
        """
        with self._lock:
            member = self._members.get(number)
            if member is None or member.state == "leaving":
                known = ", ".join(str(each) for each in self._members)
                raise ValueError(f"there is no engine {number} to remove; there are {known}")
            others = [one for one in self._urls("serving") if one != number]
            if not others:
                raise ValueError(f"engine {number} is the only one that serves; add another one first")
            self._num_wanted -= 1
            was_asked = member.state == "serving"
            self._change(member, "leaving")
            self._announce()
        way = "ends what is under way, and leaves" if was_asked else "leaves"
        self._log.note("leaving", f"engine {number} {way}", engine=number)

    def take_figures(self) -> dict[str, float]:
        """Metrics since the last call."""
        with self._lock:
            num_serving = len(self._urls("serving"))
            standing = {
                "engine/serving": float(num_serving),
                "engine/missing": float(max(0, self._num_wanted - num_serving)),
            }
        return self._log.take_figures() | standing

    def _keep(self) -> None:
        while not self._closing.wait(LOOK_S):
            self.look()

    def look(self) -> None:
        """One look at all engines, and one step further with each."""
        with self._lock:
            members = list(self._members.values())
        ailments = self._find_ailments()
        answer_requests(self._directory, add=self.add, remove=self.remove)
        for member in members:
            match member.state:
                case "serving":
                    self._look_at_serving(member, ailments.get(member.number))
                case "behind":
                    self._bring_weights(member)
                case "starting":
                    self._look_at_start(member)
                case "waiting" if self._clock() >= member.since:
                    self._start(member)
                case "leaving":
                    self._look_at_leaving(member)
                case _:
                    pass
        self._router.look(list(self.members.serving.values()))

    def _find_ailments(self) -> Mapping[int, Ailment]:
        if self._clock() >= self._next_ailments:
            self._ailments = self._players.ailments()
            self._next_ailments = self._clock() + PROBE_S
        return self._ailments

    def _look_at_serving(self, member: Member, ailment: Ailment | None) -> None:
        now = self._clock()
        how = self._how_it_ended(member, now)
        if how is not None:
            self._lose(member, "ended", how)
            return
        if member.is_ailing(ailment, now, faults_in_a_row=self._config.faults_in_a_row):
            assert ailment is not None
            kind: Loss = "garbled" if 2 * ailment.num_garbled > ailment.num_faults else "failing"
            self._lose(
                member,
                kind,
                f"engine {member.number} failed the last {ailment.num_faults} requests: {ailment.last}",
            )
            return
        self._ask(member, now)
        if member.state == "serving" and member.is_outdated:
            self._note_outdated(member)
            return
        if self._num_quiet == 0 and now - member.answered > self._config.hung_after_s:
            self._lose(
                member,
                "hung",
                f"engine {member.number} answers nothing for {now - member.answered:.0f} s",
            )

    def _how_it_ended(self, member: Member, now: float) -> str | None:
        """What the look before found; begins another one."""
        if member.engine is None or (member.ended is not None and not member.ended.done()):
            return None
        if member.ended is not None:
            found, member.ended = member.ended.result(), None
            return found
        if now - member.looked >= ENDED_S:
            member.looked, member.ended = now, self._helpers.submit(member.engine.ended)
        return None

    def _ask(self, member: Member, now: float) -> None:
        """Take the answer to the question before, and ask the next one; nobody waits for an engine that hangs."""
        if member.probe is not None:
            if not member.probe.done():
                return
            if member.probe.result():
                member.answered = member.asked
            member.probe = None
        if now - member.asked >= PROBE_S:
            member.asked = now
            member.probe = self._helpers.submit(self._answers, member)

    def _answers(self, member: Member) -> bool:
        if not self._probe(member.url):
            return False
        if self._are_updated_elsewhere and self._weights is not None and not self._num_quiet:
            with contextlib.suppress(EngineError):
                member.is_outdated = not self._weights.serves(member.url)
        return True

    def _note_outdated(self, member: Member) -> None:
        with self._lock:
            if member.state != "serving":
                return
            self._change(member, "behind")
            self._announce()
        self._log.count("engine/outdated")
        self._log.note(
            "outdated",
            f"engine {member.number} at {member.url} serves another version than is asked for: it gets nothing new",
            engine=member.number,
        )

    def _ends_or_hangs(self, member: Member) -> tuple[Loss, str] | None:
        how = member.engine.ended() if member.engine is not None else None
        if how is not None:
            return "ended", how
        if self._probe(member.url):
            return None
        # One that has just been killed may not be seen to have ended yet.
        deadline = time.monotonic() + NOTICE_S
        while how is None and member.engine is not None and time.monotonic() < deadline:
            time.sleep(0.1)
            how = member.engine.ended()
        return ("ended", how) if how is not None else ("hung", f"engine {member.number} does not answer")

    def _lose(self, member: Member, kind: Loss, how: str) -> bool:
        """Take an engine out: nobody asks it any more, and another one is started. False: it was lost before."""
        with self._lock:
            if member.state not in ("serving", "behind", "leaving") or self._closing.is_set():
                return False
            now = self._clock()
            if member.state == "leaving":
                self._drop(member)
                return True
            member.lost, member.lost_at, member.version = kind, member.answered, None
            member.probe, member.ended, member.ailing_since, member.url = None, None, None, ""
            self._change(member, "waiting")
            self._announce()
            if self._losses.note(now):
                self._fault = EngineError(
                    f"{len(self._losses.times)} engines were lost within an hour, more than "
                    f"engines.replace.deaths_per_hour={self._config.deaths_per_hour}; the last one: {how}"
                )
        self._log.count("engine/lost")
        self._log.count(f"engine/lost_{kind}")
        self._log.note("lost", f"{how}; its episodes go on elsewhere", engine=member.number, kind=kind)
        if not self._config.attempts:
            self._give_up(member)
        return True

    def _start(self, member: Member) -> None:
        """Begin to start an engine in place of the one before, which is ended first."""
        with self._lock:
            if member.state != "waiting" or self._fault is not None:
                return
            self._change(member, "starting")
            member.starting = self._helpers.submit(self._engines.replace, member.number)

    def _look_at_start(self, member: Member) -> None:
        try:
            if member.starting is not None:
                if not member.starting.done():
                    return
                member.engine, member.starting = member.starting.result(), None
            assert member.engine is not None
            if not member.engine.ready():
                if self._clock() - member.since > self._start_timeout_s:
                    raise EngineError(f"it was not ready after {self._start_timeout_s:g} s")
                return
        except (EngineError, LookupError, RayError, RuntimeError, ValueError) as fault:
            # It has no place, or its node went while it started.
            self._note_failed_start(member, fault)
            return
        with self._lock:
            member.url, member.answered = member.engine.url, self._clock()
            self._change(member, "behind")
        self._bring_weights(member)

    def _bring_weights(self, member: Member) -> None:
        assert self._weights is not None
        with self._lock:
            engine, url = member.engine, member.url
            if member.state != "behind" or engine is None:
                return
        try:
            how = engine.ended()
            if how is not None:
                raise EngineError(how)
            self._weights.bring(url, lambda version: self.admit(member.number, version))
        except EngineError as fault:
            self._note_failed_start(member, fault)

    def _note_failed_start(self, member: Member, fault: BaseException) -> None:
        told = str(fault).strip() or type(fault).__name__
        reason = fault.sentence if isinstance(fault, EngineError) else told.splitlines()[0]
        with self._lock:
            if member.state not in ("starting", "behind"):
                return
            member.starting, member.url = None, ""
            member.num_failed += 1
            wait_s = self._config.first_wait_s * 2 ** (member.num_failed - 1)
            self._change(member, "waiting", at=self._clock() + wait_s)
        self._log.count("engine/failed_starts")
        self._log.note(
            "failed_start",
            f"start {member.num_failed} of engine {member.number} failed: {reason}",
            engine=member.number,
        )
        if member.num_failed >= self._config.attempts:
            self._give_up(member)

    def _give_up(self, member: Member) -> None:
        with self._lock:
            self._drop(member)
            left = [one for one in self._members.values() if one.state != "leaving"]
            if not left and self._fault is None:
                self._fault = EngineError(
                    f"no engine is left: engine {member.number} was given up after {member.num_failed} failed starts "
                    f"(engines.replace.attempts={self._config.attempts})"
                )
        self._log.count("engine/given_up")
        self._log.note(
            "given_up",
            f"engine {member.number} is given up, and the run goes on without it (engines.replace.attempts="
            f"{self._config.attempts})",
            engine=member.number,
        )

    def _look_at_leaving(self, member: Member) -> None:
        if member.starting is not None and not member.starting.done():
            return
        is_idle = not self._players.num_requests().get(member.number, 0)
        if is_idle or self._clock() - member.since > self._drain_s:
            with self._lock:
                self._drop(member)
            self._log.count("engine/removed")
            self._log.note("removed", f"engine {member.number} has left", engine=member.number)

    def _drop(self, member: Member) -> None:
        del self._members[member.number]
        self._helpers.submit(self._engines.remove, member.number)
        self._announce()

    def _change(self, member: Member, state: State, *, at: float | None = None) -> None:
        member.state, member.since = state, self._clock() if at is None else at

    def _urls(self, state: State) -> dict[int, str]:
        return {
            number: member.url
            for number, member in sorted(self._members.items())
            if member.state == state and member.url
        }

    def _announce(self) -> None:
        """Tell those who ask, and who looks into the run directory, what engines there are."""
        leaving = self._urls("leaving") | (self._urls("behind") if self._are_updated_elsewhere else {})
        self._players.set_engines(Membership(serving=self._urls("serving"), leaving=leaving))
        self._stand()

    def _stand(self) -> None:
        self._log.stand(
            [
                {"engine": member.number, "state": member.state, "url": member.url, "version": member.version}
                for _, member in sorted(self._members.items())
            ]
        )
