"""What is recorded of an episode while it is played, and how it ends."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from polyturn.agents.deadlines import EpisodeLimits, EpisodeTime
from polyturn.agents.environment_driver import EnvironmentDriver
from polyturn.agents.episode import (
    PROMPT_TOO_LONG,
    Episode,
    EpisodeTimings,
    Outcome,
    TurnRecord,
    failed_part,
    failure_reason,
    failure_text,
)
from polyturn.agents.ledger import Segment
from polyturn.envs.hooks import current_task, is_interruption
from polyturn.envs.messages import AssistantMessage, Message, Observation
from polyturn.tools.plain import clean_text
from polyturn.tools.tool import OutOfTime
from polyturn.tools.types import UNKNOWN_TOOL, ToolResult, ToolSpec, ToolUsage


@dataclass(frozen=True, slots=True)
class Stop:
    """How an episode ended."""

    outcome: Outcome
    reason: str
    error: str | None = None
    failed_part: str = ""


def prompt_too_long(task_id: str, num_tokens: int, limits: EpisodeLimits) -> Stop:
    return Stop(
        Outcome.FAILED,
        PROMPT_TOO_LONG,
        f"the prompt of task {task_id!r} has {num_tokens:,} tokens, which leaves no room for an answer in "
        f"max_tokens_per_episode={limits.max_tokens_per_episode:,}",
    )


async def to_the_end(play: Callable[[], Awaitable[Stop]]) -> Stop:
    """Play to the end, to the time limit, or to whatever exception ends this episode and no other."""
    own_task = current_task()
    try:
        return await play()
    except OutOfTime:
        return Stop(Outcome.TRUNCATED, "timeout_s")
    except BaseException as error:
        # The border of one episode: whatever its code raises ends no other.
        if is_interruption(error, own_task):
            raise
        return Stop(Outcome.FAILED, failure_reason(error), failure_text(error), failed_part(error))


@dataclass(kw_only=True, slots=True)
class EpisodeRecord:
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
    answer: str | None = None
    num_turns: int = 0
    turn_records: list[TurnRecord] = field(default_factory=list)
    anchors: dict[str, str] = field(default_factory=dict)
    """The state that each role saw last."""
    num_tool_calls: int = 0
    num_tool_errors: int = 0
    num_recovered_calls: int = 0
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
    ) -> tuple[Observation, Stop | None]:
        """What a step gave: what the environment answers, and how the episode ended if it did."""
        self.reward += reward
        if self.turn_records:
            last = self.turn_records[-1]
            self.turn_records[-1] = replace(last, reward=last.reward + reward)
        self._hear(observation, info)
        for name, part in info.get("reward_parts", {}).items():
            self.reward_parts[name] = self.reward_parts.get(name, 0.0) + part
        self.metrics.update(info.get("metrics", {}))
        self.role_rewards.update(info.get("role_rewards", {}))
        self.answer = info.get("given_answer", self.answer)
        for tool_result in info.get("tool_results", ()):
            self._count(tool_result)
        if terminated:
            return observation, Stop(Outcome.COMPLETED, "terminated")
        if truncated:
            return observation, Stop(Outcome.TRUNCATED, info.get("stop_reason", "environment"))
        if clock.is_over:
            return observation, Stop(Outcome.TRUNCATED, "timeout_s")
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
        self.messages += (addressed(message, self.role) for message in observation)
        self.anchors[self.role] = info.get("anchor") or observation_digest(observation)

    def add_action(self, action: AssistantMessage) -> None:
        """What the policy did in the next turn."""
        message = action.to_message()
        self.conversations[self.role].append(message)
        self.messages.append(addressed(message, self.role))
        self.num_turns += 1
        self.turn_records.append(TurnRecord(role=self.role, anchor=self.anchors[self.role]))
        self._count_calls(action)

    def add_answer(self, message: AssistantMessage, conversation: Observation) -> None:
        """What the policy said to an agent's conversation, as the next turn."""
        self.num_turns += 1
        self._count_calls(message)
        self.turn_records.append(TurnRecord(anchor=observation_digest(conversation)))

    def _count_calls(self, message: AssistantMessage) -> None:
        self.num_tool_calls += len(message.tool_calls)
        self.num_recovered_calls += sum(call.is_recovered for call in message.tool_calls)

    def count(self, counts: Mapping[str, float]) -> None:
        """What the policy counted in one answer."""
        for name, value in counts.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value

    def episode(
        self,
        stop: Stop,
        driver: EnvironmentDriver,
        clock: EpisodeTime,
        segments: Iterable[Segment],
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
            answer=None if failed else self.answer,
            num_turns=self.num_turns,
            turn_records=() if failed else tuple(self.turn_records),
            num_tool_calls=self.num_tool_calls,
            num_tool_errors=self.num_tool_errors,
            num_recovered_calls=self.num_recovered_calls,
            tools=self.tools,
            messages=tuple(self.messages),
            segments=tuple(segments),
            num_drawn_tokens=clock.num_drawn_tokens,
            timings=EpisodeTimings(
                **clock.seconds,
                total_s=time.perf_counter() - self.started,
                spans=tuple(
                    (kind, began - self.started, ended - self.started) for kind, began, ended in clock.spans
                ),
            ),
            error=None if stop.error is None else clean_text(stop.error),
            failed_part=clean_text(stop.failed_part),
        )


def observation_digest(observation: Observation) -> str:
    """16 hex digits that are equal for observations of equal messages, whatever calls they answer."""
    digest = hashlib.blake2b(digest_size=8)
    for message in observation:
        for value in (message["role"], message.get("name", ""), message["content"]):
            digest.update(f"{len(value)}:{value}".encode(errors="surrogatepass"))
    return digest.hexdigest()


def addressed(message: Message, role: str) -> Message:
    """The message, with the name of the role that hears or says it where there are several."""
    return {**message, "name": role} if role and message["role"] != "tool" else message
