"""One sitting of an evaluation: the episodes that are not scored yet are played, each until it ends or has failed too
often, and what may be changed meanwhile.

    waiting ---a place is free---> under way ---ended, or failed for good---> a line is written
       ^                              |
       +----failed, and may be tried again: after a delay

What grades an episode and fails leaves it without a score, but with its trajectory: it is not played again, since that
would ask the policy until an answer can be graded; `polyturn eval score` grades it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyturn.agents.deadlines import Slots
from polyturn.agents.episode import LASTING, NO_ENGINE, USER_FAULT, Episode, Outcome, sentence_of
from polyturn.agents.ledger import UNSAMPLED_VERSION
from polyturn.configs.schema.suite import Budget
from polyturn.rollout.breaker import MIN_FAILURES, Breaker, Failures, part_of
from polyturn.rollout.collection import (
    DRAIN_S,
    MAX_RETRY_DELAY_S,
    MAX_UNANSWERED,
    MAX_UNANSWERED_OF_A_SAMPLE,
    end_all,
)
from polyturn.rollout.evaluation.directory import Place
from polyturn.rollout.evaluation.plan import PlannedEntry
from polyturn.rollout.evaluation.recorder import Recorder
from polyturn.rollout.evaluation.records import Failure, ScoredEpisode
from polyturn.rollout.evaluation.scoring import evaluation_prompt, failure_of
from polyturn.rollout.player import EpisodePlayer, RolloutError

POLL_S = 0.25
"""How often it is looked whether anything is asked of the sitting."""


@dataclass(kw_only=True, slots=True)
class PlayedEntry:
    """An entry, with what plays it, and what was spent on it."""

    planned: PlannedEntry
    player: EpisodePlayer
    policy: Any
    """What the player's episodes are played with."""
    budget: Budget
    num_tokens: int = 0
    cost: float = 0.0
    began: float | None = None
    """When its first episode of this sitting began, by `time.monotonic`."""
    parked: list[Job] = field(default_factory=list)
    """What is not played because the budget is spent."""
    num_user_faults: int = 0
    versions: tuple[int, int] = (UNSAMPLED_VERSION, UNSAMPLED_VERSION)
    """The oldest and the newest policy version behind a sampled token."""

    @property
    def spent(self) -> str | None:
        """Which budget is spent; None: there is some left."""
        budget = self.budget
        seconds = 0.0 if self.began is None else time.monotonic() - self.began
        for name, used, most in (
            ("max_tokens", self.num_tokens, budget.max_tokens),
            ("max_cost", self.cost, budget.max_cost),
            ("max_seconds", seconds, budget.max_seconds),
        ):
            if most is not None and used >= most:
                return f"{name}={most:g}"
        return None


@dataclass(kw_only=True, slots=True)
class Job:
    """One place of an evaluation that is to be played."""

    entry: PlayedEntry
    task_index: int
    sample: int
    num_failed: int = 0
    num_unanswered: int = 0

    @property
    def place(self) -> Place:
        return self.entry.planned.name, self.task_index, self.sample


@dataclass(kw_only=True, slots=True)
class Settings:
    """What may be changed while an evaluation is played: nothing of it changes what an episode comes to."""

    max_concurrent_episodes: int
    max_retries: int
    max_failure_share: float
    retry_delay_s: float
    stall_timeout_s: float | None


class Sitting:
    """Plays what an evaluation lacks. Used on one event loop."""

    def __init__(
        self,
        entries: Sequence[PlayedEntry],
        recorder: Recorder,
        *,
        on_line: Callable[[ScoredEpisode], object] = lambda _: None,
        tell: Callable[[str], object] = lambda _: None,
        poll: Callable[[Sitting], object] = lambda _: None,
    ) -> None:
        """
        Args:
            entries: All of the suite, in their order.
            recorder: Knows what is played already.
            on_line: Called with each line as it is written.
            tell: Called with sentences for people.
            poll: Called again and again; may call `pause` and so on.
        """
        self.entries = {entry.planned.name: entry for entry in entries}
        limits = [entry.player.limits for entry in entries]
        self.settings = Settings(
            max_concurrent_episodes=min(each.max_concurrent_episodes for each in limits),
            max_retries=limits[0].max_retries,
            max_failure_share=limits[0].max_failure_share,
            retry_delay_s=limits[0].retry_delay_s,
            stall_timeout_s=_longest(each.stall_timeout_s for each in limits),
        )
        self._recorder, self._on_line, self._tell, self._poll = recorder, on_line, tell, poll
        self._slots = Slots(
            requests=asyncio.Semaphore(min(each.max_concurrent_requests for each in limits)),
            steps=asyncio.Semaphore(limits[0].max_concurrent_tools),
            timeout_s=limits[0].queue_timeout_s,
        )
        self.is_paused = False
        self._stopping = False
        self._changed = asyncio.Event()
        self._waiting: deque[Job] = deque(self._missing(entries))
        self._delayed = 0
        self._playing: dict[asyncio.Task[None], Job] = {}
        self._fault: BaseException | None = None
        self._last_end = time.monotonic()
        self._num_unanswered = 0
        self._failures = Failures()
        self._begin_to_count()
        for line in recorder.lines.values():
            if line.entry in self.entries:
                self._spend(self.entries[line.entry], line)

    @property
    def num_left(self) -> int:
        """Places that are to be played, those under way included."""
        return len(self._waiting) + self._delayed + len(self._playing)

    @property
    def num_playing(self) -> int:
        """Episodes under way."""
        return len(self._playing)

    @property
    def was_stopped(self) -> bool:
        """Whether it was asked to end before all was played."""
        return self._stopping

    def stop(self) -> None:
        """Let no further episode start; those under way have a minute to end. Called on the event loop."""
        self._stopping = True
        self._changed.set()

    def pause(self) -> None:
        """Let no further episode start for now; those under way go on."""
        self.is_paused = True

    def resume(self) -> None:
        """Go on after a pause."""
        self.is_paused = False
        self._changed.set()

    def requeue(self) -> int:
        """Play again what failed for good in this sitting; how many places that are."""
        queued = {job.place for job in (*self._waiting, *self._playing.values())}
        failed = [
            place
            for place, line in self._recorder.lines.items()
            if line.failure is not Failure.NONE and place not in queued and place[0] in self.entries
        ]
        self._waiting.extend(self._job(*place) for place in failed)
        self._begin_to_count()
        self._changed.set()
        return len(failed)

    def retuned(self) -> None:
        """Look again at what is parked and at what may start: settings or budgets were changed."""
        for entry in self.entries.values():
            if entry.spent is None and entry.parked:
                self._waiting.extend(entry.parked)
                entry.parked.clear()
        self._begin_to_count()
        self._changed.set()

    async def play(self) -> None:
        """Play until nothing is left, or until `stop`.

        Raises:
            RolloutError: no engine answers, too large a share of the attempts fails, or nothing ends any more.
        """
        watch = asyncio.create_task(self._watch())
        watch.add_done_callback(self._note_fault)
        try:
            while self.num_left and not self._stopping:
                self._start_what_may()
                await self._wait()
            if self._playing:
                await asyncio.wait(self._playing, timeout=DRAIN_S)
            self._raise_fault()
        finally:
            watch.cancel()
            await end_all([*self._playing])

    def _missing(self, entries: Iterable[PlayedEntry]) -> Iterable[Job]:
        for entry in entries:
            planned = entry.planned
            for task_index in range(planned.num_tasks):
                for sample in range(planned.samples_per_task):
                    line = self._recorder.lines.get((planned.name, task_index, sample))
                    if line is None or line.failure is not Failure.NONE:
                        yield Job(entry=entry, task_index=task_index, sample=sample)

    def _job(self, name: str, task_index: int, sample: int) -> Job:
        return Job(entry=self.entries[name], task_index=task_index, sample=sample)

    def _start_what_may(self) -> None:
        while (
            self._waiting
            and not self.is_paused
            and self._fault is None
            and len(self._playing) < self.settings.max_concurrent_episodes
        ):
            job = self._waiting.popleft()
            if (spent := job.entry.spent) is not None:
                self._park(job, spent)
                continue
            if job.entry.began is None:
                job.entry.began = time.monotonic()
            task = asyncio.create_task(self._attempt(job))
            self._playing[task] = job
            task.add_done_callback(self._ended)

    def _park(self, job: Job, spent: str) -> None:
        if not job.entry.parked:
            self._tell(f"{job.entry.planned.name}: its budget {spent} is spent; the rest of it is not played")
        job.entry.parked.append(job)

    async def _wait(self) -> None:
        """Until something has changed; raises where nothing ends any more."""
        self._raise_fault()
        if not self.num_left:
            return
        self._changed.clear()
        limit = self.settings.stall_timeout_s
        try:
            async with asyncio.timeout(limit if self._playing else None):
                await self._changed.wait()
        except TimeoutError:
            if self._playing and time.monotonic() - self._last_end >= (limit or 0.0):
                raise RolloutError(
                    f"no episode ended for {limit:g} s, {len(self._playing)} are under way; {self._why()}"
                ) from None
        self._raise_fault()

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            self._poll(self)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._playing[task]
        self._last_end = time.monotonic()
        self._note_fault(task)

    def _note_fault(self, task: asyncio.Task[None]) -> None:
        """What a task of the sitting fails of ends it."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fault = self._fault or error
        self._changed.set()

    async def _attempt(self, job: Job) -> None:
        name, entry = job.entry.planned.name, job.entry
        episode = await entry.player.play(
            evaluation_prompt(job.task_index),
            job.sample,
            self._recorder.next_attempt(job.place),
            policy=entry.policy,
            slots=self._slots,
        )
        is_final = self._is_final(job, episode)
        line = await self._recorder.keep(name, episode, is_final=is_final)
        self._note(entry, episode)
        if line is not None:
            self._spend(entry, line)
            self._on_line(line)
        else:
            self._try_again(job)
        self._give_up_early(episode)
        entry.player.check_threads()

    def _is_final(self, job: Job, episode: Episode) -> bool:
        """Whether an attempt is what its place has come to."""
        if failure_of(episode) is not Failure.INFRASTRUCTURE or episode.stop_reason in LASTING:
            return True
        if episode.stop_reason == NO_ENGINE:
            job.num_unanswered += 1
        else:
            job.num_failed += 1
        return job.num_failed > self.settings.max_retries or job.num_unanswered >= MAX_UNANSWERED_OF_A_SAMPLE

    def _try_again(self, job: Job) -> None:
        def put_back() -> None:
            self._delayed -= 1
            self._waiting.appendleft(job)
            self._changed.set()

        num_before = job.num_failed + job.num_unanswered - 1
        self._delayed += 1
        delay_s = min(self.settings.retry_delay_s * 2**num_before, MAX_RETRY_DELAY_S)
        asyncio.get_running_loop().call_later(delay_s, put_back)

    def _spend(self, entry: PlayedEntry, line: ScoredEpisode) -> None:
        entry.num_tokens += line.num_prompt_tokens + line.num_completion_tokens
        entry.cost += line.cost or 0.0

    def _note(self, entry: PlayedEntry, episode: Episode) -> None:
        failed = episode.outcome is Outcome.FAILED
        entry.num_user_faults += episode.stop_reason == USER_FAULT
        for segment in episode.segments:
            if segment.num_sampled and not failed:
                drawn = segment.policy_versions[segment.sampled]
                oldest, newest = entry.versions
                low = int(drawn.min())
                entry.versions = (
                    low if oldest == UNSAMPLED_VERSION else min(oldest, low),
                    max(newest, int(drawn.max())),
                )
        self._breaker.note(episode)
        self._num_ended[failed] += 1
        self._num_unanswered = self._num_unanswered + 1 if episode.stop_reason == NO_ENGINE else 0
        if failed:
            sentence = sentence_of(episode.error or episode.stop_reason)
            self._reasons[sentence] += 1
            self._failures.note(part_of(episode), sentence)

    def _begin_to_count(self) -> None:
        """Count failures from here on: what came before says nothing of what comes."""
        settings = self.settings
        self._breaker = Breaker(
            max_failure_share=settings.max_failure_share,
            max_concurrent_episodes=settings.max_concurrent_episodes,
        )
        self._num_ended: Counter[bool] = Counter()
        self._num_unanswered = 0
        self._reasons: Counter[str] = Counter()
        self._failures = Failures()

    def _give_up_early(self, ended: Episode) -> None:
        """Do not go on without an engine, or where too large a share of the attempts fails."""
        if self._num_unanswered >= max(MAX_UNANSWERED, 2 * len(self._playing)):
            raise RolloutError(
                f"{self._num_unanswered} attempts in a row had no answer of any engine: {self._why()}"
            )
        num_live = min(self.settings.max_concurrent_episodes, len(self._playing) + len(self._waiting))
        complaint = self._breaker.complaint(ended.env_id, num_live=max(num_live, 1))
        num_failed, num_survived = self._num_ended[True], self._num_ended[False]
        if complaint is None and num_failed > max(MIN_FAILURES, num_live):
            share, most = num_failed / (num_failed + num_survived), self.settings.max_failure_share
            if share > most and (num_survived or num_failed > 2 * self.settings.max_concurrent_episodes):
                complaint = (
                    f"{share:.0%} of the attempts failed, and rollout.max_failure_share allows {most:.0%}: "
                    f"{self._why()}"
                )
        if complaint is not None:
            raise RolloutError(complaint)

    def _why(self) -> str:
        """How many attempts failed, and by what."""
        if not self._reasons:
            return "no attempt failed"
        reason, count = self._reasons.most_common(1)[0]
        return (
            f"{self._reasons.total()} attempts failed, {count} of them with: {reason}; {self._failures.worst}"
        )


def _longest(timeouts_s: Iterable[float | None]) -> float | None:
    """The longest of several limits; None, no limit, is longer than any."""
    given = [each for each in timeouts_s if each is not None]
    return max(given, default=None)
