"""What adapters to other gyms ("peers") share.

Optional packages are asked for by the command that installs them. Tasks may be seeds. A peer's code draws from global
random generators of its own, and its episodes answer texts with messages and rewards.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import random
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal, Protocol, TypeVar

import numpy as np

from polyturn.envs.messages import AssistantMessage, Message, Task, known_split
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.threads import GivenUp, PinnedThread


class MissingPackage(ImportError, ValueError):
    """An adapter's package cannot be imported. The text says how to install it."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, which `pip install polyturn[extra]` brings.

    Raises:
        MissingPackage: it, or something that it imports, is not there.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        why = "is not installed" if error.name == package else f"cannot be imported ({error})"
        raise _missing(package, why, extra) from error


def require_installed(package: str, *, extra: str) -> None:
    """As `require`, of a package that another process will import."""
    if importlib.util.find_spec(package) is None:
        raise _missing(package, "is not installed", extra)


def _missing(package: str, why: str, extra: str) -> MissingPackage:
    return MissingPackage(
        f"the package {package!r} {why}; install it with: pip install 'polyturn[{extra}]'", name=package
    )


_lock = threading.RLock()
"""The global generators are one per process, so code that draws from them takes turns."""

PATIENCE_S = 120.0


class OwnRandomness:
    """A private state of the global generators, for one episode of an environment that uses them.

    Inside `active()` the global generators continue this state; afterwards they are as they were. So an episode draws
    the same numbers whatever runs beside it, and nothing else notices that it drew any. Threads take turns.
    """

    def __init__(self, seed: int) -> None:
        """
        Args:
            seed: Non-negative; only its lowest 32 bits reach NumPy's generator.
        """
        self._python = random.Random(seed).getstate()
        self._numpy = np.random.RandomState(seed % 2**32).get_state()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let the global generators continue this state until the end of the block.

        Raises:
            RuntimeError: another thread has been drawing for more than `PATIENCE_S`: it hangs.
        """
        if not _lock.acquire(timeout=PATIENCE_S):
            raise RuntimeError(
                "another episode hangs and holds the global random generators; restart this process"
            )
        try:
            python, numpy = random.getstate(), np.random.get_state()
            random.setstate(self._python)
            np.random.set_state(self._numpy)
            try:
                yield
            finally:
                self._python, self._numpy = random.getstate(), np.random.get_state()
                random.setstate(python)
                np.random.set_state(numpy)
        finally:
            _lock.release()


FIRST_SEED: Mapping[str, int] = {"train": 0, "validation": 1 << 29, "heldout": 1 << 30}
"""Where the seeds of a split begin."""

MAX_SIZE = 1 << 29


def check_split(split: str) -> None:
    """Raises ValueError for a split that does not exist."""
    known_split(split, FIRST_SEED)


def check_size(size: int) -> None:
    """Raises ValueError for a size that splits have no room for."""
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size must be from 1 to {MAX_SIZE}, not {size}")


class SeededTasks:
    """Task i of a split is made of the split's seed i. Ids are `name/split/i`."""

    def __init__(self, name: str, split: str, size: int, make: Callable[[str, int], Task]) -> None:
        """
        Args:
            name: What the ids begin with.
            split: `train`, `validation` or `heldout`.
            size: How many.
            make: The task of an id and a seed.
        """
        check_split(split)
        check_size(size)
        self._name, self._split, self._size, self._make = name, split, size, make

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int, /) -> Task:
        if not 0 <= index < self._size:
            raise IndexError(f"task {index} of {self._size}")
        return self._make(f"{self._name}/{self._split}/{index}", FIRST_SEED[self._split] + index)

    def find(self, task_id: str) -> Task:
        """The task of that id. Raises ValueError where there is none."""
        prefix, _, index = task_id.rpartition("/")
        known = prefix == f"{self._name}/{self._split}" and index.isdecimal() and len(index) < 12
        if not known or int(index) >= self._size:
            raise ValueError(f"no task {task_id!r}; ids look like {self._name}/{self._split}/0")
        return self[int(index)]


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
