"""The episode loop: one policy plays one task of one environment, and all of it is recorded."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeLimits, EpisodeTime, Slots
from polyturn.agents.dialects import Dialect
from polyturn.agents.environment_driver import Environment, EnvironmentDriver
from polyturn.agents.episode import (
    PROMPT_TOO_LONG,
    Episode,
    EpisodeTimings,
    Outcome,
    TurnRecord,
    derive_seed,
    failure_reason,
    failure_text,
)
from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import (
    FinishReason,
    Generation,
    MessagePolicy,
    PolicyFault,
    SamplingParams,
    TokenPolicy,
    live_episodes_of,
    policy_of_episode,
)
from polyturn.agents.turns import History
from polyturn.envs.hooks import current_task, is_interruption
from polyturn.envs.messages import AssistantMessage, Message, Observation, Task
from polyturn.tools.plain import clean_text
from polyturn.tools.tool import OutOfTime
from polyturn.tools.types import UNKNOWN_TOOL, ToolResult, ToolSpec, ToolUsage

Value = TypeVar("Value")

LONG_TEXT_CHARS = 8_192
"""From here on an observation is rendered in a thread: tokenising it would hold up all other episodes."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 5.0
"""Before a generation is taken up again that an engine aborted without a token; doubles each time."""


async def play_tokens(
    *,
    env: Environment,
    policy: TokenPolicy,
    renderer: ChatRenderer,
    dialect: Dialect,
    task: Task | str | None,
    seed: int,
    limits: EpisodeLimits,
    episode_id: str,
    group_id: str,
    sampling: SamplingParams | None = None,
    slots: Slots | None = None,
) -> Episode:
    """Play one episode with a policy that samples tokens.

    Every prompt is the newest segment of the ledger, so the recorded tokens are those that the policy saw and sampled.
    Where the chat template rewrites earlier turns, a new segment begins with what it makes of them. Sampled tokens are
    never cut, and no segment grows beyond `limits.max_tokens_per_episode`. A turn that ran into a limit in the middle
    of an answer ends the episode as truncated, ungraded.

    Args:
        env: Not shared with an episode that still runs. A `ToolEnv` is awaited; any other steps in a thread.
        task: A task, the id of one, or None to let the environment draw one.
        seed: Of the environment, and of the requests: that of a turn is `derive_seed(seed, turn, 0)`.
        sampling: The temperature; its `max_tokens` and `seed` give way to `limits` and `seed`.
        slots: What other episodes share with this one; None: nothing.
    """
    clock = EpisodeTime.of(limits, slots, live=live_episodes_of(policy))
    driver = EnvironmentDriver(env, task=task, seed=seed, limits=limits, clock=clock)
    record = _Record()
    ledgers: dict[str, Ledger] = {}
    histories: dict[str, History] = {}
    sampling = sampling or SamplingParams()

    async def play(policy: TokenPolicy) -> _Stop:
        observation, tools = record.begin(*await driver.reset())
        for turn in range(limits.max_turns):
            if record.role not in ledgers:
                ledgers[record.role], histories[record.role] = Ledger(), renderer.history(tools)
            ledger, history = ledgers[record.role], histories[record.role]
            in_thought = renderer.opens_thought(observation, is_first=not len(ledger))
            branches = len(ledger) > 0 and not history.continues(record.conversations[record.role])
            if branches:
                new_ids = await _render(renderer, Ledger(), record.conversation, tools, slots)
            else:
                new_ids = await _render(renderer, ledger, observation, tools, slots)
            budget = limits.max_tokens_per_episode - len(new_ids) - (0 if branches else len(ledger))
            if budget <= 0 and not record.num_turns:
                return _prompt_too_long(driver.task_id, len(new_ids), limits)
            if budget <= 0:
                return _Stop(Outcome.TRUNCATED, "max_tokens_per_episode")
            if branches:
                ledger.branch(new_ids)
            else:
                ledger.append_observation(new_ids)
            request = replace(
                sampling,
                max_tokens=min(limits.max_tokens_per_turn, budget),
                routing_from=ledger.num_routed,
            )
            seeds = functools.partial(derive_seed, seed, turn)
            interruption = _Interruption(limits.interruption_timeout_s)
            generation = await _generate_turn(policy, ledger.token_ids, request, seeds, clock, interruption)
            ledger.append_generation(generation)
            parsed = dialect.parse(renderer.decode(generation.token_ids), in_thought=in_thought)
            action = renderer.with_call_ids(parsed, record.num_tool_calls)
            record.add_action(action)
            if clock.is_over:
                return _Stop(Outcome.TRUNCATED, "timeout_s")
            if generation.finish_reason == "length":
                if len(generation) < request.max_tokens:
                    return _Stop(Outcome.TRUNCATED, "engine_context")
                if budget <= limits.max_tokens_per_turn:
                    return _Stop(Outcome.TRUNCATED, "max_tokens_per_episode")
                if not action.tool_calls:
                    return _Stop(Outcome.TRUNCATED, "max_tokens_per_turn")
            if action.tool_calls and driver.refuses_calls:
                return _Stop(Outcome.TRUNCATED, "max_tool_calls_per_episode")
            observation, stop = record.add_step(*await driver.step(action), clock=clock)
            if stop is not None:
                return stop
        return _Stop(Outcome.TRUNCATED, "max_turns")

    try:
        with policy_of_episode(policy) as own_policy:
            stop = await _to_the_end(functools.partial(play, own_policy))
    finally:
        clock.end()
    return record.episode(stop, driver, clock, ledgers, episode_id=episode_id, group_id=group_id, seed=seed)


async def play_messages(
    *,
    env: Environment,
    policy: MessagePolicy,
    task: Task | str | None,
    seed: int,
    limits: EpisodeLimits,
    episode_id: str,
    group_id: str,
    slots: Slots | None = None,
) -> Episode:
    """Play one episode with a policy that speaks in messages: a script, a person, a remote endpoint. No tokens."""
    clock = EpisodeTime.of(limits, slots)
    driver = EnvironmentDriver(env, task=task, seed=seed, limits=limits, clock=clock)
    record = _Record()

    async def play() -> _Stop:
        _, tools = record.begin(*await driver.reset())
        for _ in range(limits.max_turns):
            ask = functools.partial(policy.reply, messages=record.conversation, tools=tools)
            action = await clock.request(ask)
            record.add_action(action)
            if clock.is_over:
                return _Stop(Outcome.TRUNCATED, "timeout_s")
            if action.tool_calls and driver.refuses_calls:
                return _Stop(Outcome.TRUNCATED, "max_tool_calls_per_episode")
            _, stop = record.add_step(*await driver.step(action), clock=clock)
            if stop is not None:
                return stop
        return _Stop(Outcome.TRUNCATED, "max_turns")

    stop = await _to_the_end(play)
    return record.episode(stop, driver, clock, {}, episode_id=episode_id, group_id=group_id, seed=seed)


async def _render(
    renderer: ChatRenderer,
    ledger: Ledger,
    observation: Observation,
    tools: Sequence[ToolSpec],
    slots: Slots | None,
) -> npt.NDArray[np.int32]:
    """The tokens of an observation: of a whole conversation so far where the ledger is empty, else what it adds."""
    if len(ledger):
        last = ledger.last_token_id
        render = functools.partial(renderer.extend, observation, last_token_id=last, tools=tools)
    else:
        render = functools.partial(renderer.start, observation, tools)
    # Lists of numbers are made into arrays there, too: a million of them are a pause of many milliseconds.
    if sum(len(message["content"]) for message in observation) < LONG_TEXT_CHARS:
        return np.array(render(), dtype=np.int32)
    async with slots.long_renders if slots is not None else contextlib.nullcontext():
        return await asyncio.to_thread(lambda: np.array(render(), dtype=np.int32))


def _prompt_too_long(task_id: str, num_tokens: int, limits: EpisodeLimits) -> _Stop:
    return _Stop(
        Outcome.FAILED,
        PROMPT_TOO_LONG,
        f"the prompt of task {task_id!r} has {num_tokens:,} tokens, which leaves no room for an answer in "
        f"max_tokens_per_episode={limits.max_tokens_per_episode:,}",
    )


async def _generate_turn(
    policy: TokenPolicy,
    prompt_ids: npt.NDArray[np.int32],
    sampling: SamplingParams,
    seeds: Callable[[int], int],
    clock: EpisodeTime,
    interruption: _Interruption,
) -> Generation:
    """One turn. A generation that the engine aborted goes on from its tokens, which stay as they are."""
    parts: list[Generation] = []
    num_sampled = num_routed = 0
    for attempt in itertools.count():
        request = replace(
            sampling,
            max_tokens=sampling.max_tokens - num_sampled,
            seed=seeds(attempt),
            routing_from=sampling.routing_from + num_routed,
        )
        so_far = np.concatenate([prompt_ids, *(part.token_ids for part in parts)]) if parts else prompt_ids
        ask = functools.partial(policy.generate, prompt_ids=so_far, sampling=request)
        spent_s = clock.spent_s
        part = await clock.request(ask)
        parts.append(part)
        num_sampled += len(part)
        num_routed += 0 if part.routed_experts is None else len(part.routed_experts)
        finish_reason: FinishReason = part.finish_reason
        if finish_reason == "abort" and num_sampled >= sampling.max_tokens:
            finish_reason = "length"
        if finish_reason != "abort":
            break
        if len(part):
            interruption.end()
        else:
            clock.spent_s = spent_s
            await interruption.wait()
    if not num_sampled:
        raise PolicyFault("the engine sampled no token")
    if len(parts) == 1 and finish_reason == parts[0].finish_reason:
        return parts[0]
    return Generation.joined(parts, finish_reason)


class _Interruption:
    """An engine that aborts what it has not begun, as it does while it takes new weights."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.end()

    def end(self) -> None:
        """The engine sampled something."""
        self._deadline: float | None = None
        self._wait_s = FIRST_WAIT_S

    async def wait(self) -> None:
        """Give it a little time. Raises `PolicyFault` when it had enough of that."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._timeout_s
        if now >= self._deadline:
            raise PolicyFault(
                f"the engine aborted the generation of one turn again and again for {self._timeout_s:g} s"
            )
        await asyncio.sleep(min(self._wait_s, self._deadline - now))
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)


@dataclass(frozen=True, slots=True)
class _Stop:
    """How an episode ended."""

    outcome: Outcome
    reason: str
    error: str | None = None


async def _to_the_end(play: Callable[[], Awaitable[_Stop]]) -> _Stop:
    """Play to the end, to the time limit, or to whatever exception ends this episode and no other."""
    own_task = current_task()
    try:
        return await play()
    except OutOfTime:
        return _Stop(Outcome.TRUNCATED, "timeout_s")
    except BaseException as error:
        # The border of one episode: whatever its code raises ends no other.
        if is_interruption(error, own_task):
            raise
        return _Stop(Outcome.FAILED, failure_reason(error), failure_text(error))


@dataclass(kw_only=True, slots=True)
class _Record:
    """What happened in one episode so far."""

    messages: list[Message] = field(default_factory=list)
    conversations: dict[str, list[Message]] = field(default_factory=dict)
    """What each role has seen and said."""
    role: str = ""
    """Whose turn it is."""
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    role_rewards: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    num_turns: int = 0
    turn_records: list[TurnRecord] = field(default_factory=list)
    anchors: dict[str, str] = field(default_factory=dict)
    """The state that each role saw last."""
    num_tool_calls: int = 0
    num_tool_errors: int = 0
    tool_names: frozenset[str] = frozenset()
    tools: dict[str, ToolUsage] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def begin(self, observation: Observation, info: dict[str, Any]) -> tuple[Observation, Sequence[ToolSpec]]:
        """What a reset gave: the first messages, and the specs of the tools."""
        self._hear(observation, info)
        self.tool_names = frozenset(spec.name for spec in info.get("tools", ()))
        return observation, info.get("tools", ())

    def add_step(
        self,
        observation: Observation,
        reward: float,
        terminated: bool,
        truncated: bool,
        info: dict[str, Any],
        *,
        clock: EpisodeTime,
    ) -> tuple[Observation, _Stop | None]:
        """What a step gave: what the environment answers, and how the episode ended if it did."""
        self.reward += reward
        self.turn_records[-1] = replace(self.turn_records[-1], reward=reward)
        self._hear(observation, info)
        for name, part in info.get("reward_parts", {}).items():
            self.reward_parts[name] = self.reward_parts.get(name, 0.0) + part
        self.metrics.update(info.get("metrics", {}))
        self.role_rewards.update(info.get("role_rewards", {}))
        for tool_result in info.get("tool_results", ()):
            self._count(tool_result)
        if terminated:
            return observation, _Stop(Outcome.COMPLETED, "terminated")
        if truncated:
            return observation, _Stop(Outcome.TRUNCATED, info.get("stop_reason", "environment"))
        if clock.is_over:
            return observation, _Stop(Outcome.TRUNCATED, "timeout_s")
        return observation, None

    def _count(self, result: ToolResult) -> None:
        self.num_tool_errors += not result.ok
        name = result.name if result.name in self.tool_names else UNKNOWN_TOOL
        usage = ToolUsage.of(result)
        self.tools[name] = self.tools[name] + usage if name in self.tools else usage

    @property
    def conversation(self) -> tuple[Message, ...]:
        """What the role whose turn it is has seen and said."""
        return tuple(self.conversations[self.role])

    def _hear(self, observation: Observation, info: dict[str, Any]) -> None:
        """Whoever is next hears the observation."""
        self.role = info.get("role", self.role)
        self.conversations.setdefault(self.role, []).extend(observation)
        self.messages += (_addressed(message, self.role) for message in observation)
        self.anchors[self.role] = info.get("anchor") or observation_digest(observation)

    def add_action(self, action: AssistantMessage) -> None:
        """What the policy did in the next turn."""
        message = action.to_message()
        self.conversations[self.role].append(message)
        self.messages.append(_addressed(message, self.role))
        self.num_turns += 1
        self.turn_records.append(TurnRecord(role=self.role, anchor=self.anchors[self.role]))
        self.num_tool_calls += len(action.tool_calls)

    def episode(
        self,
        stop: _Stop,
        driver: EnvironmentDriver,
        clock: EpisodeTime,
        ledgers: dict[str, Ledger],
        *,
        episode_id: str,
        group_id: str,
        seed: int,
    ) -> Episode:
        """The episode that ended so."""
        failed = stop.outcome is Outcome.FAILED
        return Episode(
            episode_id=episode_id,
            group_id=group_id,
            env_id=clean_text(driver.env_id),
            task_id=clean_text(driver.task_id),
            seed=seed,
            outcome=stop.outcome,
            stop_reason=stop.reason,
            reward=None if failed else self.reward,
            reward_parts={} if failed else self.reward_parts,
            role_rewards={} if failed else self.role_rewards,
            metrics=self.metrics,
            num_turns=self.num_turns,
            turn_records=() if failed else tuple(self.turn_records),
            num_tool_calls=self.num_tool_calls,
            num_tool_errors=self.num_tool_errors,
            tools=self.tools,
            messages=tuple(self.messages),
            segments=tuple(
                segment for role, ledger in ledgers.items() for segment in ledger.to_segments(role=role)
            ),
            timings=EpisodeTimings(**clock.seconds, total_s=time.perf_counter() - self.started),
            error=None if stop.error is None else clean_text(stop.error),
        )


def observation_digest(observation: Observation) -> str:
    """16 hex digits that are equal for observations of equal messages, whatever calls they answer."""
    digest = hashlib.blake2b(digest_size=8)
    for message in observation:
        for value in (message["role"], message.get("name", ""), message["content"]):
            digest.update(f"{len(value)}:{value}".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _addressed(message: Message, role: str) -> Message:
    """The message, with the name of the role that hears or says it where there are several."""
    return {**message, "name": role} if role and message["role"] != "tool" else message
