"""An agent of somebody else's plays an episode: an async function, or a program that it starts.

All that it asks of its session is sampled by the policy and recorded. What it returns is graded by the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeLimits, EpisodeTime, Slots
from polyturn.agents.dialects import Dialect
from polyturn.agents.environment_driver import Environment, EnvironmentDriver
from polyturn.agents.episode import Episode, Outcome, derive_seed
from polyturn.agents.episode_record import EpisodeRecord, Stop, to_the_end
from polyturn.agents.policy import (
    Generation,
    SamplingParams,
    TokenPolicy,
    live_episodes_of,
    policy_of_episode,
)
from polyturn.agents.sessions.matching import MessageKey, loose
from polyturn.agents.sessions.offers import Offer, Offers, Worth
from polyturn.agents.sessions.requests import Completer, CompletionRequest, SessionAddress
from polyturn.agents.sessions.session import Session
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, Message, Task, is_async
from polyturn.envs.plugins import Signature, load_plugin
from polyturn.tools.types import ToolSpec

AGENT_ENDED = "agent_ended"
"""Stop reason of an episode whose agent returned before the environment had come to an end."""
REWARDED = "rewarded"
"""Stop reason of an episode whose agent gave it a reward from elsewhere."""
CANCEL_GRACE_S = 10.0
"""So long an agent may take to end after it was cancelled; then it is left behind."""


class Endpoint(Protocol):
    """Serves sessions over HTTP."""

    offers: Offers

    async def open(self, session_id: str, completer: Completer) -> SessionAddress:
        """Serve a session, which nobody can address yet."""

    async def close(self, session_id: str) -> None:
        """Serve it no longer."""

    async def offers_address(self) -> tuple[str, str]:
        """Where programs outside take up episodes, and the key for it."""


class AgentEpisode:
    """What an agent is given: a task, and a session to play it with."""

    def __init__(
        self,
        *,
        episode_id: str,
        task: Task | None,
        messages: tuple[Message, ...],
        tools: tuple[ToolSpec, ...],
        env: Environment,
        seed: int,
        endpoint: Endpoint | None,
        address: SessionAddress | None,
        session: Session,
        tokenizer: Any,
        stage: _Stage,
    ) -> None:
        self.episode_id = episode_id
        self.task = task
        """What is played; None where the environment drew it."""
        self.messages = messages
        """How the task is posed."""
        self.tools = tools
        """The environment's own, which `step` answers."""
        self.env = env.unwrapped
        self.seed = seed
        self.tokenizer = tokenizer
        """The policy's, of `transformers`."""
        self.metrics: dict[str, float] = {}
        """What the agent counts: it goes into the episode's metrics."""
        self._endpoint = endpoint
        self._address = address
        self._session = session
        self._stage = stage

    @property
    def address(self) -> SessionAddress:
        """Where programs find the session. Raises `ValueError` where nothing serves it."""
        if self._address is None:
            raise ValueError("this episode's session is not served over HTTP; use reply() instead")
        return self._address

    @property
    def base_url(self) -> str:
        """Where clients of OpenAI's protocols find the session."""
        return self.address.base_url

    @property
    def anthropic_base_url(self) -> str:
        """Where clients of Anthropic's protocol find it."""
        return self.address.anthropic_base_url

    @property
    def api_key(self) -> str:
        """The key of the session."""
        return self.address.api_key

    @property
    def socket_path(self) -> Path | None:
        """A Unix socket where the session is served too."""
        return self.address.socket_path

    @property
    def has_asked(self) -> bool:
        """Whether the policy was asked anything yet."""
        return self._stage.has_been_asked

    async def reply(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] | None = None
    ) -> AssistantMessage:
        """The policy's answer to a conversation, without HTTP; `tools` are the environment's unless given.

        Raises:
            RequestRefused: the episode is over, or the conversation cannot be answered.
            PolicyFault: no engine answered.
        """
        offered = self.tools if tools is None else tuple(tools)
        request = CompletionRequest(messages=tuple(messages), tools=offered)
        return (await self._session.complete(request)).message

    async def generate(
        self, token_ids: npt.ArrayLike, *, max_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Generation:
        """What the policy samples behind tokens [T], for an agent that holds its tokens itself.

        Where they begin with what was sampled before, they are recorded behind it; any others begin a line.

        Args:
            max_tokens: At most so many; None: what the run allows.
            stop: Texts that end it, and belong to it.

        Raises:
            RequestRefused: the episode is over, or the context is full.
            PolicyFault: no engine answered.
        """
        given = np.asarray(token_ids, dtype=np.int32)
        return await self._session.generate(given, max_tokens=max_tokens, stop=stop)

    async def step(self, message: AssistantMessage | str) -> tuple[Message, ...] | None:
        """Do something in the environment: call its tools, or give the answer.

        Returns:
            What it answers: results of tools, a user's reply; None when the episode has ended with it.
        """
        return await self._stage.step(
            AssistantMessage(content=message) if isinstance(message, str) else message
        )

    def end(self, reward: float, *, is_truncated: bool = False) -> None:
        """End the episode with a reward that comes from elsewhere, in place of the environment's grade.

        `is_truncated`: what ended it was a limit of the agent's own, and not the task's end.
        """
        self._stage.end(reward, is_truncated=is_truncated)

    async def offers_address(self) -> tuple[str, str]:
        """Where programs outside take up the episodes that are offered, and the key for it."""
        return await self._served.offers_address()

    async def offer(self) -> Worth:
        """Offer the episode to programs outside, and wait until one has played it and says what it was worth.

        Until one has taken it up, nobody's time runs.
        """
        offer = Offer(
            session_id=self.episode_id,
            task_id=self.task.task_id if self.task is not None else "",
            messages=self.messages,
            tools=self.tools,
            address=self.address,
        )
        offers = self._served.offers
        offers.add(offer)
        try:
            await self._stage.wait(offer.taken.wait())
            return await offer.worth
        finally:
            offers.withdraw(self.episode_id)

    @property
    def _served(self) -> Endpoint:
        if self._endpoint is None:
            raise ValueError("this episode's session is not served over HTTP (agent.serve)")
        return self._endpoint


Agent = Callable[[AgentEpisode], Awaitable[AssistantMessage | str | None]]
"""Plays an episode. What it returns is the episode's last message, where no step has ended it; None: what the policy
said last. It is cancelled when the episode is over."""
AGENT = Signature(
    what="agent",
    arguments=("episode",),
    text="async def play(episode: AgentEpisode) -> str",
    wrong_results=(bytes, float, int, bool),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentSettings:
    """How an agent's episodes are played."""

    matching: MessageKey = loose
    """What two messages have in common that are one and the same."""
    policy_errors: tuple[type[BaseException], ...] = ()
    """What the agent raises for the policy's faults: the episode ends as if it had returned nothing."""
    grade_truncated: bool = False
    """Whether an episode that a limit ended is graded all the same."""


def load_agent(target: str, options: Mapping[str, Any] | None = None) -> Agent:
    """The agent that `module:name` or `path/to/file.py:name` names: an async function, or a class made with options.

    Raises:
        ValueError: it cannot be loaded, or cannot be called so.
    """
    agent: Agent = load_plugin(AGENT, target, options)
    if not is_async(agent):
        raise ValueError(f"{target} does not run on the event loop; {AGENT.right}")
    return agent


async def play_agent(
    *,
    env: Environment,
    policy: TokenPolicy,
    agent: Agent,
    endpoint: Endpoint | None,
    renderer: ChatRenderer,
    dialect: Dialect,
    task: Task | str | None,
    seed: int,
    limits: EpisodeLimits,
    episode_id: str,
    group_id: str,
    settings: AgentSettings | None = None,
    sampling: SamplingParams | None = None,
    slots: Slots | None = None,
) -> Episode:
    """Let an agent play one episode.

    What the agent takes between its requests is the policy's time, as are its answers; steps of the environment and
    whatever requests wait for are not.

    Args:
        endpoint: Serves the session to programs; None: the agent asks with `AgentEpisode.reply` alone.
        limits: `max_turns` answers in all, of whatever conversation.
        The others as for `play_tokens`.
    """
    settings = settings or AgentSettings()
    clock = EpisodeTime.of(limits, slots, live=live_episodes_of(policy))
    driver = EnvironmentDriver(env, task=task, seed=seed, limits=limits, clock=clock)
    record = EpisodeRecord()
    session: Session | None = None

    async def play(policy: TokenPolicy) -> Stop:
        nonlocal session
        observation, tools = record.begin(*await driver.reset())
        if record.role:
            raise EnvironmentFault(f"{driver.env_id}: an agent cannot play the roles of several agents")
        session = Session(
            session_id=episode_id,
            policy=policy,
            renderer=renderer,
            dialect=dialect,
            limits=limits,
            sampling=sampling or SamplingParams(),
            clock=clock,
            seed=seed,
            rule=settings.matching,
            on_answer=record.add_answer,
        )
        stage = _Stage(session, driver, record, clock)
        address = await endpoint.open(episode_id, session) if endpoint is not None else None
        given = AgentEpisode(
            episode_id=episode_id,
            task=task if isinstance(task, Task) else None,
            messages=observation,
            tools=tuple(tools),
            env=env,
            seed=derive_seed(seed, "agent"),
            endpoint=endpoint,
            address=address,
            session=session,
            tokenizer=renderer.tokenizer,
            stage=stage,
        )
        try:
            return await stage.play(agent, given, settings)
        finally:
            record.metrics.update(given.metrics)
            if endpoint is not None:
                await endpoint.close(episode_id)
            await session.close()

    try:
        with policy_of_episode(policy) as own_policy:
            stop = await to_the_end(functools.partial(play, own_policy))
    finally:
        clock.end()
    if session is not None:
        counts = asdict(session.counts())
        record.metrics.update({name: float(counts[name]) for name in counts if name != "num_answers"})
        record.messages = list(session.transcript()) or record.messages
    segments = session.segments() if session is not None else ()
    return record.episode(stop, driver, clock, segments, episode_id=episode_id, group_id=group_id, seed=seed)


class _Stage:
    """Where an agent plays: it ends the agent when the time is over, and steps the environment for it."""

    def __init__(
        self, session: Session, driver: EnvironmentDriver, record: EpisodeRecord, clock: EpisodeTime
    ) -> None:
        self._session, self._driver, self._record, self._clock = session, driver, record, clock
        self._stop: Stop | None = None
        self._num_waiting = 0
        self._alone_since: float | None = None
        self._stepping = asyncio.Lock()
        session.on_busy = self._count_own_time

    async def play(self, agent: Agent, given: AgentEpisode, settings: AgentSettings) -> Stop:
        """Let the agent play to its end."""
        last: AssistantMessage | str | None = None
        self._alone_since = time.perf_counter()
        running = asyncio.ensure_future(_run(agent, given))
        try:
            await self._until_done(running)
            if running.done() and not running.cancelled():
                last = running.result()
        except settings.policy_errors:
            last = ""
        except Exception:
            # An agent that is told that a limit is reached, or that no engine answers, often fails of that.
            if self._stop is None and self._session.limit is None and self._session.fault is None:
                raise
        finally:
            await _end(running)
            self._count_own_time()
            self._alone_since = None
        return await self._finish(last, settings)

    async def step(self, message: AssistantMessage) -> tuple[Message, ...] | None:
        """As `AgentEpisode.step`."""
        async with self._stepping:
            if self._stop is not None:
                return None
            with self._waiting():
                stepped = await self._driver.step(message)
            observation, self._stop = self._record.add_step(*stepped, clock=self._clock)
            self._session.is_closed = self._stop is not None
        return observation if self._stop is None else None

    def end(self, reward: float, *, is_truncated: bool = False) -> None:
        """As `AgentEpisode.end`."""
        if self._stop is None:
            self._record.reward += reward
            self._stop = Stop(Outcome.TRUNCATED if is_truncated else Outcome.COMPLETED, REWARDED)
            self._session.is_closed = True

    async def wait(self, event: Awaitable[object]) -> None:
        """Wait for something that is not the agent's time."""
        with self._waiting():
            await event

    @property
    def has_been_asked(self) -> bool:
        """Whether the policy was asked anything yet."""
        return self._session.has_been_asked()

    async def _until_done(self, running: asyncio.Future[Any]) -> None:
        """Wait until the agent has ended, or its time has."""
        while not running.done():
            left_s = self._left_s()
            if left_s <= 0:
                self._session.limit = self._session.limit or "timeout_s"
                return
            await asyncio.wait([running], timeout=max(left_s, 0.01))

    async def _finish(self, last: AssistantMessage | str | None, settings: AgentSettings) -> Stop:
        session, limit = self._session, self._session.limit
        session.is_closed = True
        if self._stop is not None:
            return self._stop
        if limit is None and session.fault is not None:
            raise session.fault
        if limit is not None and not settings.grade_truncated:
            return Stop(Outcome.TRUNCATED, limit)
        if last is None:
            last = session.last_message or AssistantMessage()
        await self.step(AssistantMessage(content=last) if isinstance(last, str) else last)
        if limit is not None:
            return Stop(Outcome.TRUNCATED, limit)
        return self._stop or Stop(Outcome.TRUNCATED, AGENT_ENDED)

    def _left_s(self) -> float:
        """Seconds until the policy's time is over if the agent goes on alone."""
        self._count_own_time()
        return self._clock.left_s

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """The agent waits for the environment."""
        self._count_own_time()
        self._num_waiting += 1
        self._alone_since = None
        try:
            yield
        finally:
            self._num_waiting -= 1
            self._count_own_time()

    def _count_own_time(self) -> None:
        """Count what the agent took while it waited for nothing."""
        now = time.perf_counter()
        if self._alone_since is not None:
            self._clock.spent_s += now - self._alone_since
        is_alone = not self._num_waiting and not self._session.num_busy
        self._alone_since = now if is_alone else None


async def _run(agent: Agent, given: AgentEpisode) -> AssistantMessage | str | None:
    try:
        return await agent(given)
    except SystemExit as error:  # which would end the event loop
        raise RuntimeError(f"the agent called exit({error.code})") from error


async def _end(running: asyncio.Future[Any]) -> None:
    """Cancel an agent, and wait until it has ended if it does so soon."""
    if running.done():
        return
    running.cancel()
    await asyncio.wait([running], timeout=CANCEL_GRACE_S)
