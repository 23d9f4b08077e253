"""What the adapters of text-only gyms share: a peer's episode answers texts with messages and rewards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from polyturn.envs.adapters.randomness import OwnRandomness
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.envs.tasks import Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.threads import GivenUp, PinnedThread

Value = TypeVar("Value")
RewardKind = Literal["success", "return"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerStep:
    """What a peer answers to one text."""

    messages: Sequence[Message]
    reward: float
    done: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


class PeerEpisode(Protocol):
    """A running episode of another gym."""

    def step(self, text: str, /) -> PeerStep: ...

    def close(self) -> None: ...


class PeerTextEnv(ToolEnv):
    """Plays episodes of a text-only gym.

    The peer runs in this process, a call at a time in a thread with a deadline, with global random generators of its
    own. An exception in it, and a call that does not end, are an `EnvironmentFault`. A thread cannot be killed: what
    hangs keeps it, and where it holds the interpreter's lock, as a regular expression does, no deadline is seen.
    """

    def __init__(
        self, *, reward: RewardKind = "success", deadline_s: float = 30.0, split: str, render_mode: str | None
    ) -> None:
        """
        Args:
            reward: `success`: 1.0 where the last step was paid 1 or more, else 0.0; `return`: the sum of all steps.
            deadline_s: For one call of the peer.
            split: Where `reset` takes a task from.
            render_mode: None or "ansi".
        """
        if reward not in ("success", "return"):
            raise ValueError(f"reward must be 'success' or 'return', not {reward!r}")
        super().__init__(split=split, render_mode=render_mode)
        self._reward_kind: RewardKind = reward
        self._deadline_s = deadline_s
        self._episode: PeerEpisode | None = None
        self._randomness = OwnRandomness(0)
        self._paid: list[float] = []
        self._peer = PinnedThread("peer")

    @abstractmethod
    def open_episode(self, task: Task) -> tuple[PeerEpisode, Sequence[Message]]:
        """A new episode of the peer, and its first messages. Global random generators are seeded by now."""

    @abstractmethod
    def seed_of(self, task: Task) -> int:
        """What the peer's global random generators are seeded with."""

    def begin(self, task: Task) -> Sequence[Message]:
        self._close_episode()
        self._paid = []
        self._randomness = OwnRandomness(self.seed_of(task))
        self._episode, messages = self._in_peer(lambda: self.open_episode(task))
        return messages

    def follow_up(self, message: AssistantMessage) -> Sequence[Message]:
        episode = self._episode
        assert episode is not None
        answer = self._in_peer(lambda: episode.step(message.text))
        self._paid.append(float(answer.reward))
        self.metrics.update({"peer_return": sum(self._paid), **answer.metrics})
        if answer.done:
            return ()
        # Without a message from the peer it is the policy's turn again all the same.
        return answer.messages or ({"role": "user", "content": ""},)

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """The peer's reward."""
        del message
        if self._reward_kind == "return":
            return {"return": sum(self._paid)}
        return {"success": float(self._paid[-1] >= 1.0)}

    @property
    def is_reusable(self) -> bool:
        return super().is_reusable and self._peer.is_idle

    @property
    def still_running(self) -> tuple[str, ...]:
        return self._peer.still_running or super().still_running

    def close(self) -> None:
        self._close_episode()
        self._peer.shutdown()
        super().close()

    def _close_episode(self) -> None:
        episode, self._episode = self._episode, None
        if episode is not None:
            episode.close()

    def _in_peer(self, function: Callable[[], Value]) -> Value:
        """The function's value, drawn from the episode's own random generators. Raises `TimeoutError` when it hangs."""

        def run() -> Value:
            with self._randomness.active():
                return function()

        try:
            value: Value = self._peer.call(run, timeout_s=self._deadline_s, what="a call of its library")
        except GivenUp:
            raise TimeoutError(f"its library did not return within {self._deadline_s:g} s") from None
        return value
