"""Groups under way: many episodes at once, what failed is played again, and a failure is never scored."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyturn.agents.deadlines import Slots
from polyturn.agents.episode import (
    LASTING,
    NO_ENGINE,
    POLICY_FAULT,
    USER_FAULT,
    Episode,
    Outcome,
    sentence_of,
)
from polyturn.agents.forking import Fork
from polyturn.agents.policy import Policy
from polyturn.envs.faults import EnvironmentFault, message_of
from polyturn.envs.tasks.order import task_digest
from polyturn.rollout.branching import Branching, orphans
from polyturn.rollout.breaker import MIN_FAILURES, Breaker, Failures, part_of
from polyturn.rollout.groups import Group, Prompt, episode_id, parse_episode_id
from polyturn.rollout.player import Player, RolloutError, other_task

DRAIN_S = 60.0
CANCEL_S = 10.0
"""How long episodes that were cancelled may take to end."""
MAX_UNANSWERED = 3
"""So many attempts in a row that no engine answered, and twice as many as are played at once: none will answer. To drop
their samples, as those of other failures, would lose them for good."""

MAX_UNANSWERED_OF_A_SAMPLE = 16
"""So many attempts of one sample that no engine answered, while others were answered: it may be what ends the engines,
and is dropped as any other that fails. Fewer do not count as attempts."""
MAX_RETRY_DELAY_S = 30.0


async def play_groups(
    player: Player,
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int,
    policy: Policy,
    finished: Iterable[Episode] = (),
    keep: Callable[[Episode], Awaitable[None]] | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    stop: asyncio.Event | None = None,
    drain_s: float = DRAIN_S,
) -> list[Group]:
    """Play `samples_per_prompt` episodes of each prompt; groups come back in the order of the prompts.

    Args:
        prompts: What to play; their group ids must differ.
        samples_per_prompt: Episodes per group.
        policy: Who plays.
        finished: Attempts of these prompts that were made before, failed ones included: they are not made again.
        keep: Awaited with every attempt that ends, failed ones included, before it counts as ended.
        on_episode: Called with the same, behind `keep`.
        stop: Once set, no attempt starts, and those under way have `drain_s` seconds to end.
        drain_s: See `stop`; then they are cancelled, and missing from their groups.

    Raises:
        RolloutError: every episode failed, or none ended for `stall_timeout_s`.
    """
    player.prefetch(prompts)
    collection = Collection(
        player=player,
        policy=policy,
        samples_per_prompt=samples_per_prompt,
        keep=keep,
        on_episode=on_episode,
        stop=stop,
    )
    assert len({prompt.group_id for prompt in prompts}) == len(prompts), "two prompts share a group id"
    before: dict[str, list[Episode]] = {}
    for episode in finished:
        before.setdefault(episode.group_id, []).append(episode)
    under_way = [collection.begin(prompt, before.get(prompt.group_id, ())) for prompt in prompts]
    try:
        await collection.watch(asyncio.gather(*under_way), drain_s=drain_s)
    finally:
        await end_all(under_way)
    groups = [collection.group(prompt) for prompt in prompts]
    if not any(group.episodes for group in groups) and not collection.stop.is_set():
        raise RolloutError(f"every episode failed: {collection.why()}")
    return groups


class Collection:
    """Groups under way: their samples are played at once, each until it survives or has failed too often."""

    def __init__(
        self,
        *,
        player: Player,
        policy: Policy,
        samples_per_prompt: int,
        branching: Branching | None = None,
        keep: Callable[[Episode], Awaitable[None]] | None = None,
        on_episode: Callable[[Episode], None] | None = None,
        on_start: Callable[[Prompt], None] | None = None,
        stop: asyncio.Event | None = None,
    ) -> None:
        """
        Args:
            branching: Which samples branch from others of their group; None: none does.
            keep: Awaited with every attempt that ends, failed ones included, before it counts as ended.
            on_episode: Called with the same, behind `keep`.
            on_start: Called when an attempt of a prompt's group begins to be played.
            stop: Once set, no attempt starts.
        """
        limits = player.limits
        self.stop = stop or asyncio.Event()
        self._player = player
        self._policy = policy
        self._limits = limits
        self._samples_per_prompt = samples_per_prompt
        self._branching = branching
        self._write = keep
        self._on_episode = on_episode or (lambda _: None)
        self._on_start = on_start or (lambda _: None)
        self._episodes = asyncio.Semaphore(limits.max_concurrent_episodes)
        self.slots = Slots(
            requests=asyncio.Semaphore(limits.max_concurrent_requests),
            steps=asyncio.Semaphore(limits.max_concurrent_tools),
            timeout_s=limits.queue_timeout_s,
        )
        self._breaker = Breaker(
            max_failure_share=limits.max_failure_share, max_concurrent_episodes=limits.max_concurrent_episodes
        )
        self._num_failed_by_kind: Counter[str] = Counter()
        self._ended = asyncio.Event()
        self._attempts: dict[str, list[_Sample]] = {}
        self._scored: dict[str, tuple[Episode, ...]] = {}
        self._playing: dict[str, None] = {}
        """Episodes under way, those that began first in front."""
        self.count_anew()

    def count_anew(self) -> None:
        """Begin to count failures: what came before says nothing of what comes."""
        self._num_survived = self._num_failed = self._num_unanswered = 0
        self._faults: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._failures = Failures()

    @property
    def num_playing(self) -> int:
        """Episodes under way."""
        return len(self._playing)

    def begin(self, prompt: Prompt, finished: Iterable[Episode] = ()) -> asyncio.Task[Group]:
        """Begin to play a group; what is `finished` of it is not made again. Cancelled, it leaves nothing under way.

        The task raises `RolloutError` where nothing can be had any more.
        """
        samples = self._attempts.setdefault(
            prompt.group_id, [_Sample() for _ in range(self._samples_per_prompt)]
        )
        return asyncio.create_task(self._play_group(prompt, samples, tuple(finished)))

    def void(self, prompt: Prompt) -> None:
        """Let what was played of a group not count: it is played again under attempts of later numbers."""
        for sample in self._attempts.get(prompt.group_id, ()):
            sample.begin_anew()
        self._scored.pop(prompt.group_id, None)

    def forget(self, prompt: Prompt) -> None:
        """Drop what is known of a group that has ended."""
        self._attempts.pop(prompt.group_id, None)
        self._scored.pop(prompt.group_id, None)

    async def _play_group(
        self, prompt: Prompt, samples: Sequence[_Sample], finished: Sequence[Episode]
    ) -> Group:
        for episode in finished:
            _, number, _ = parse_episode_id(episode.episode_id)
            if number < len(samples):
                await self._check_task(prompt, episode)
                self._keep(samples[number], episode)
        for sample in samples:
            if self._is_settled(sample) and sample.was_never_answered:
                sample.begin_anew()
        left = orphans(sample.survivor for sample in samples)
        for sample in samples:
            if sample.survivor is not None and sample.survivor.episode_id in left:
                sample.begin_anew()
        jobs: list[asyncio.Task[None]] = []
        for number, sample in enumerate(samples):
            jobs.append(asyncio.create_task(self._play_sample(prompt, number, sample, jobs)))
        try:
            await asyncio.gather(*jobs)
        finally:
            await end_all(jobs)
        if self._player.group_rewards and all(self._is_settled(sample) for sample in samples):
            await self._score(prompt)
        return self.group(prompt)

    async def _check_task(self, prompt: Prompt, episode: Episode) -> None:
        """Raise where an episode that was played before is of another task than its group is of now."""
        task = await self._player.task(prompt)
        if episode.task_digest and episode.task_digest != task_digest(task):
            raise RolloutError(
                f"{other_task(episode, task)}. A group of both would compare answers to two questions: give the run "
                "the tasks, the seed and the options that it began with, or begin a new one"
            )

    async def watch(self, done: asyncio.Future[Any], *, drain_s: float) -> None:
        """Until it is done, or the stop's deadline has passed; raises what it raises, and where nothing ends."""
        stopping = asyncio.create_task(self.stop.wait())
        stalled = asyncio.create_task(self.stall())
        try:
            await asyncio.wait((done, stopping, stalled), return_when=asyncio.FIRST_COMPLETED)
            if stalled.done():
                stalled.result()
            if not done.done():
                await asyncio.wait((done,), timeout=drain_s)
            if done.done():
                done.result()
        finally:
            stopping.cancel()
            stalled.cancel()
            done.cancel()
            done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            await asyncio.gather(stopping, stalled, return_exceptions=True)

    async def stall(self) -> None:
        """Raise `RolloutError` when no attempt has ended for `stall_timeout_s`; else go on for ever."""
        limit = self._limits.stall_timeout_s
        while True:
            self._ended.clear()
            try:
                async with asyncio.timeout(limit):
                    await self._ended.wait()
            except TimeoutError:
                names = ", ".join(itertools.islice(self._playing, 3))
                oldest = f", the first of them {names}" if names else ""
                so_far = f"; so far {self.why()}" if self._faults else ""
                raise RolloutError(
                    f"no episode ended for {limit:g} s, {len(self._playing)} are under way{oldest}{so_far}"
                ) from None

    async def _play_sample(
        self, prompt: Prompt, number: int, sample: _Sample, jobs: Sequence[asyncio.Task[None]]
    ) -> None:
        """Play one sample until it survives or has failed too often; `jobs` do so with all of the group."""
        while not self._is_settled(sample):
            if sample.attempts and self._limits.retry_delay_s:
                doubled = self._limits.retry_delay_s * 2 ** (len(sample.attempts) - 1)
                await self._delay(min(doubled, MAX_RETRY_DELAY_S))
            attempt = sample.num_void + len(sample.attempts)
            fork = await self._fork(prompt, number, attempt, jobs)
            async with self._episodes:
                if self.stop.is_set():
                    return
                identity = episode_id(prompt.group_id, number, attempt)
                self._playing[identity] = None
                self._on_start(prompt)
                try:
                    episode = await self._player.play(
                        prompt, number, attempt, policy=self._policy, slots=self.slots, fork=fork
                    )
                finally:
                    del self._playing[identity]
            if self._write is not None:
                await self._write(episode)
            self._keep(sample, episode)
            self._count(episode)
            self._on_episode(episode)
            self._give_up_early(episode)
            self._player.check_threads()

    async def _fork(
        self, prompt: Prompt, number: int, attempt: int, jobs: Sequence[asyncio.Task[None]]
    ) -> Fork | None:
        """Where an attempt branches from the trunk of its sample, once that has ended; None: nowhere.

        Where the trunk failed for good, another one takes its place.
        """
        if self._branching is None:
            return None
        for place in self._branching.trunks_of(number):
            await asyncio.wait([jobs[place]])
            trunk = self._attempts[prompt.group_id][place].survivor
            if trunk is not None:
                return self._branching.fork(trunk, sample=number, attempt=attempt)
        return None

    async def _score(self, prompt: Prompt) -> None:
        """Add the group rewards. Where they fail for good the group loses its episodes."""
        survivors = self._survivors(prompt)
        self._scored[prompt.group_id] = ()
        for retry in range(self._limits.max_retries + 1):
            try:
                self._scored[prompt.group_id] = await self._player.add_group_rewards(prompt, survivors)
                return
            except EnvironmentFault as fault:
                self._faults[message_of(fault)] += 1
                self._kinds["group_reward_fault"] += 1
                self._num_failed_by_kind["group_reward_fault"] += 1
                self._failures.note(fault.part or "the group rewards", message_of(fault))
                await self._delay(self._limits.retry_delay_s * 2**retry)

    def _survivors(self, prompt: Prompt) -> tuple[Episode, ...]:
        """Of each sample the newest attempt that did not fail: it was made because those before did not count."""
        found = (sample.survivor for sample in self._attempts[prompt.group_id])
        return tuple(episode for episode in found if episode is not None)

    async def _delay(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stop.wait()

    def _keep(self, sample: _Sample, episode: Episode) -> None:
        sample.attempts.append(episode)
        if episode.outcome is Outcome.FAILED:
            sentence = sentence_of(episode.error or episode.stop_reason)
            self._faults[sentence] += 1
            self._kinds[episode.stop_reason] += 1
            self._failures.note(part_of(episode), sentence)

    def _count(self, episode: Episode) -> None:
        """What was played before, perhaps on machinery that has been mended since, is kept and not counted."""
        failed = episode.outcome is Outcome.FAILED
        self._num_failed += failed
        if failed:
            self._num_failed_by_kind[episode.stop_reason] += 1
        self._breaker.note(episode)
        self._num_survived += not failed
        self._num_unanswered = self._num_unanswered + 1 if episode.stop_reason == NO_ENGINE else 0
        self._ended.set()

    def take_failures(self) -> dict[str, int]:
        """Attempts that failed since the last call, by their stop reasons."""
        taken, self._num_failed_by_kind = dict(self._num_failed_by_kind), Counter()
        return taken

    def _give_up_early(self, ended: Episode) -> None:
        """Do not go on without an engine, or when too large a share of all attempts that were played here failed, or of
        those of the environment whose attempt has ended.
        """
        if self._num_unanswered >= max(MAX_UNANSWERED, 2 * len(self._playing)):
            raise RolloutError(
                f"{self._num_unanswered} attempts in a row had no answer of any engine: {self.why()}"
            )
        num_failed, num_survived = self._num_failed, self._num_survived
        num_samples = self._samples_per_prompt * len(self._attempts)
        num_live = min(self._limits.max_concurrent_episodes, num_samples)
        complaint = self._breaker.complaint(ended.env_id, num_live=num_live)
        if num_failed <= max(MIN_FAILURES, num_live):
            if complaint is not None:
                raise RolloutError(complaint)
            return
        if not num_survived and num_failed > 2 * self._limits.max_concurrent_episodes:
            raise RolloutError(f"no episode survived: {self.why()}")
        share, most = num_failed / (num_failed + num_survived), self._limits.max_failure_share
        if num_survived and share > most:
            raise RolloutError(
                f"{share:.0%} of the attempts failed, and rollout.max_failure_share allows {most:.0%}: {self.why()}"
            )
        if complaint is not None:
            raise RolloutError(complaint)

    def why(self) -> str:
        """How many attempts failed, the most frequent reason, how many of each kind, and what failed most of them."""
        if not self._faults:
            return "none was played"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())
        reason, count = self._faults.most_common(1)[0]
        worst = self._failures.worst
        return f"{self._faults.total()} attempts failed, {count} of them with: {reason} ({kinds}); {worst}"

    def group(self, prompt: Prompt) -> Group:
        """The group as far as it has got."""
        survivors = self._survivors(prompt)
        scored = self._scored.get(prompt.group_id, survivors)
        num_dropped = len(survivors) - len(scored)
        num_retries = 0
        for sample in self._attempts[prompt.group_id]:
            dropped = sample.survivor is None and self._is_settled(sample)
            num_dropped += dropped
            num_retries += sum(episode.outcome is Outcome.FAILED for episode in sample.attempts) - dropped
        return Group(
            group_id=prompt.group_id,
            prompt=prompt,
            episodes=scored,
            num_expected=self._samples_per_prompt,
            num_dropped=num_dropped,
            num_retries=num_retries,
            num_user_faults=sum(
                episode.stop_reason == USER_FAULT
                for sample in self._attempts[prompt.group_id]
                for episode in sample.attempts
            ),
        )

    def _is_settled(self, sample: _Sample) -> bool:
        num_unanswered = sum(episode.stop_reason == NO_ENGINE for episode in sample.attempts)
        return (
            len(sample.attempts) - num_unanswered > self._limits.max_retries
            or num_unanswered >= MAX_UNANSWERED_OF_A_SAMPLE
            or any(
                episode.outcome is not Outcome.FAILED or episode.stop_reason in LASTING
                for episode in sample.attempts
            )
        )


@dataclass(kw_only=True, slots=True)
class _Sample:
    """What was played of one sample."""

    attempts: list[Episode] = field(default_factory=list)
    num_void: int = 0
    """Attempts before these, which do not count any more."""

    def begin_anew(self) -> None:
        """Let what was played not count: attempts of later numbers follow."""
        self.num_void += len(self.attempts)
        self.attempts.clear()

    @property
    def was_never_answered(self) -> bool:
        """Whether only engines, or models of users, failed it: what was given up as they broke is tried again."""
        return all(made.stop_reason in (NO_ENGINE, POLICY_FAULT, USER_FAULT) for made in self.attempts)

    @property
    def survivor(self) -> Episode | None:
        """The newest attempt that did not fail."""
        return next((made for made in reversed(self.attempts) if made.outcome is not Outcome.FAILED), None)


async def end_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks. What holds on to its cancellation, as careless code does, is left behind after `CANCEL_S`."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=CANCEL_S)
