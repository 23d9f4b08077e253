"""The episode loop: one policy plays one task of one environment, and all of it is recorded."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import gymnasium

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.dialects import Dialect
from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.failures import failure_reason, failure_text
from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import (
    FinishReason,
    Generation,
    MessagePolicy,
    PolicyFault,
    SamplingParams,
    TokenPolicy,
)
from polyturn.agents.seeds import derive_seed
from polyturn.envs.border import read_reset, read_step
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.hooks import current_task, is_interruption
from polyturn.envs.messages import AssistantMessage, Message, Observation
from polyturn.envs.tasks import Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.metrics import UNKNOWN_TOOL, ToolUsage
from polyturn.tools.plain import clean_text, shown
from polyturn.tools.types import ToolResult, ToolSpec

Value = TypeVar("Value")

MAX_INTERRUPTIONS = 8
"""How often the generation of one turn may be aborted by the engine and taken up again."""

Environment = gymnasium.Env[Observation, AssistantMessage]


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeLimits:
    """Where an episode is truncated. Token limits do not apply to policies that speak in messages."""

    max_turns: int = 8
    max_tokens_per_turn: int = 256
    max_tokens_per_episode: int = 4096
    """Prompt, observations and answers together."""
    timeout_s: float = 600.0


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
    executor: Executor | None = None,
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
        executor: Runs what is not `async` in the environment; None: the event loop's own threads.
    """
    record = _Record(
        env=env, episode_id=episode_id, group_id=group_id, seed=seed, executor=executor, limits=limits
    )
    ledgers: dict[str, Ledger] = {}
    sampling = sampling or SamplingParams()

    async def play() -> _Stop:
        observation, tools = await record.reset(task)
        for turn in range(limits.max_turns):
            ledger = ledgers.setdefault(record.role, Ledger())
            in_thought = renderer.opens_thought(observation, is_first=not len(ledger))
            branches = len(ledger) > 0 and not renderer.continues(record.conversation, tools)
            if branches:
                new_ids = renderer.start(record.conversation, tools)
            else:
                new_ids = _render(renderer, ledger, observation, tools)
            budget = limits.max_tokens_per_episode - len(new_ids) - (0 if branches else len(ledger))
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
            with record.clock("generate_s"):
                generation = await _generate_turn(policy, ledger.token_ids, request, seeds)
            ledger.append_generation(generation)
            parsed = dialect.parse(renderer.decode(generation.token_ids), in_thought=in_thought)
            action = renderer.with_call_ids(parsed, record.num_tool_calls)
            record.add_action(action)
            if generation.finish_reason == "length":
                if budget <= limits.max_tokens_per_turn:
                    return _Stop(Outcome.TRUNCATED, "max_tokens_per_episode")
                if not action.tool_calls:
                    return _Stop(Outcome.TRUNCATED, "max_tokens_per_turn")
            observation, stop = await record.step(action)
            if stop is not None:
                return stop
        return _Stop(Outcome.TRUNCATED, "max_turns")

    stop = await record.run(play, task)
    return record.episode(stop, ledgers)


async def play_messages(
    *,
    env: Environment,
    policy: MessagePolicy,
    task: Task | str | None,
    seed: int,
    limits: EpisodeLimits,
    episode_id: str,
    group_id: str,
    executor: Executor | None = None,
) -> Episode:
    """Play one episode with a policy that speaks in messages: a script, a person, a remote endpoint. No tokens."""
    record = _Record(
        env=env, episode_id=episode_id, group_id=group_id, seed=seed, executor=executor, limits=limits
    )

    async def play() -> _Stop:
        _, tools = await record.reset(task)
        for _ in range(limits.max_turns):
            with record.clock("generate_s"):
                action = await policy.reply(messages=record.conversation, tools=tools)
            record.add_action(action)
            _, stop = await record.step(action)
            if stop is not None:
                return stop
        return _Stop(Outcome.TRUNCATED, "max_turns")

    stop = await record.run(play, task)
    return record.episode(stop, {})


def _render(
    renderer: ChatRenderer, ledger: Ledger, observation: Observation, tools: Sequence[ToolSpec]
) -> list[int]:
    """The tokens of an observation: of a whole conversation so far where the ledger is empty, else what it adds."""
    if not len(ledger):
        return renderer.start(observation, tools)
    return renderer.extend(observation, last_token_id=ledger.last_token_id, tools=tools)


async def _generate_turn(
    policy: TokenPolicy, prompt_ids: Sequence[int], sampling: SamplingParams, seeds: Callable[[int], int]
) -> Generation:
    """One turn. A generation that the engine aborted goes on from its tokens, which stay as they are."""
    token_ids: list[int] = []
    logprobs: list[float] = []
    versions: list[int] = []
    routed: list[str] = []
    finish_reason: FinishReason = "abort"
    for attempt in range(MAX_INTERRUPTIONS + 1):
        request = replace(
            sampling,
            max_tokens=sampling.max_tokens - len(token_ids),
            seed=seeds(attempt),
            routing_from=sampling.routing_from + len(routed),
        )
        part = await policy.generate(prompt_ids=[*prompt_ids, *token_ids], sampling=request)
        token_ids += part.token_ids
        logprobs += part.logprobs
        versions += part.policy_versions
        routed += part.routed_experts
        finish_reason = part.finish_reason
        if finish_reason == "abort" and len(token_ids) >= sampling.max_tokens:
            finish_reason = "length"
        if finish_reason != "abort":
            break
    if finish_reason == "abort":
        raise PolicyFault(f"the engine aborted the generation of one turn {MAX_INTERRUPTIONS + 1} times")
    if not token_ids:
        raise PolicyFault("the engine sampled no token")
    return Generation(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        policy_versions=tuple(versions),
        finish_reason=finish_reason,
        routed_experts=tuple(routed),
    )


@dataclass(frozen=True, slots=True)
class _Stop:
    """How an episode ended."""

    outcome: Outcome
    reason: str
    error: str | None = None


@dataclass(kw_only=True, slots=True)
class _Record:
    """Plays the environment's side of one episode and keeps what happened."""

    env: Environment
    episode_id: str
    group_id: str
    seed: int
    executor: Executor | None
    limits: EpisodeLimits
    task_id: str = ""
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
    seconds: dict[str, float] = field(default_factory=lambda: {"generate_s": 0.0, "tools_s": 0.0})
    started: float = field(default_factory=time.perf_counter)

    async def run(self, play: Callable[[], Awaitable[_Stop]], task: Task | str | None) -> _Stop:
        """Play to the end, to the time limit, or to whatever exception ends this episode and no other."""
        self.task_id = task.task_id if isinstance(task, Task) else task or ""
        limit, own_task = asyncio.timeout(self.limits.timeout_s), current_task()
        try:
            async with limit:
                return await play()
        except TimeoutError as error:
            if limit.expired():
                return _Stop(Outcome.TRUNCATED, "timeout_s")
            return _Stop(Outcome.FAILED, failure_reason(error), failure_text(error))
        except BaseException as error:
            # The border of one episode: whatever its code raises ends no other.
            if is_interruption(error, own_task):
                raise
            return _Stop(Outcome.FAILED, failure_reason(error), failure_text(error))

    async def reset(self, task: Task | str | None) -> tuple[Observation, Any]:
        """The first messages, and the specs of the tools."""
        options = {} if task is None else {"task": task}
        with self.clock("tools_s"):
            if isinstance(self.env, ToolEnv):
                observation, info = await self.env.reset_async(
                    seed=self.seed, options=options, executor=self.executor
                )
            else:
                observation, info = await self._in_thread(self.env.reset, seed=self.seed, options=options)
        observation, info = self._enter(read_reset, (observation, info))
        self.task_id = info.get("task_id", self.task_id)
        self._hear(observation, info)
        self.tool_names = frozenset(spec.name for spec in info.get("tools", ()))
        return observation, info.get("tools", ())

    async def step(self, action: AssistantMessage) -> tuple[Observation, _Stop | None]:
        """What the environment answers, and how the episode ended if it did."""
        with self.clock("tools_s"):
            if isinstance(self.env, ToolEnv):
                result = await self.env.step_async(action, executor=self.executor)
            else:
                result = await self._in_thread(self.env.step, action)
        observation, reward, terminated, truncated, info = self._enter(read_step, result)
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
        return observation, None

    def _enter(self, read: Callable[[Any], Value], given: Any) -> Value:
        """What the environment gave, checked. Raises `EnvironmentFault` for what cannot be played or kept."""
        try:
            return read(given)
        except ValueError as error:
            raise EnvironmentFault(f"{self.env_id}: task {shown(self.task_id)}: {error}") from error

    @property
    def env_id(self) -> str:
        inner = self.env.unwrapped
        if isinstance(inner, ToolEnv):
            return inner.env_id
        return getattr(self.env.spec, "id", type(inner).__name__)

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
        message = action.to_message()
        self.conversations[self.role].append(message)
        self.messages.append(_addressed(message, self.role))
        self.num_turns += 1
        self.turn_records.append(TurnRecord(role=self.role, anchor=self.anchors[self.role]))
        self.num_tool_calls += len(action.tool_calls)

    def clock(self, name: str) -> _Clock:
        return _Clock(self.seconds, name)

    def episode(self, stop: _Stop, ledgers: dict[str, Ledger]) -> Episode:
        failed = stop.outcome is Outcome.FAILED
        return Episode(
            episode_id=self.episode_id,
            group_id=self.group_id,
            env_id=clean_text(self.env_id),
            task_id=clean_text(self.task_id),
            seed=self.seed,
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
            timings=EpisodeTimings(**self.seconds, total_s=time.perf_counter() - self.started),
            error=None if stop.error is None else clean_text(stop.error),
        )

    async def _in_thread(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self.executor, call)


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


@dataclass(slots=True)
class _Clock:
    """Adds the seconds of a `with` block to a sum, also when the block is left by an exception."""

    sums: dict[str, float]
    name: str
    started: float = 0.0

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.sums[self.name] += time.perf_counter() - self.started
