"""The words in which environments, rewards and policies speak: messages, actions, tasks, scores and views of episodes.

A message has the shape of the OpenAI chat format; calls, results and specs of tools are in `polyturn.tools.types`.
Importing this module registers nothing and loads no environment.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Protocol, TypedDict, TypeVar

from polyturn.tools.plain import MAX_SIZE, as_number, clean_text, is_plain, printable, recordable, shown
from polyturn.tools.types import ToolCall, ToolSpec

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One message of a conversation, as chat templates take it."""

    role: Role
    content: str
    reasoning: NotRequired[str]
    """What an assistant thought before `content`; chat templates get it under the name that they know."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


Observation = tuple[Message, ...]
"""What is new since the last action."""


def one_line(message: Message) -> str:
    """A message for a person to read, with nothing in it that a terminal obeys."""
    calls = "".join(
        f" -> {c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls", ())
    )
    return printable(f"{message['role']}: {message['content']}{calls}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AssistantMessage:
    """An action: one assistant message with its text, its parsed tool calls and the raw text behind both."""

    content: str = ""
    reasoning: str | None = None
    """What it thought, without the marks around it; never graded as content. None: it did not think at all."""
    tool_calls: tuple[ToolCall, ...] = ()
    raw_text: str | None = None
    """The text as the policy wrote it; None when the policy speaks in messages."""

    @property
    def text(self) -> str:
        """Content and reasoning as one text, `<think>...</think>` before the content where it thought."""
        return self.content if self.reasoning is None else f"<think>{self.reasoning}</think>\n{self.content}"

    def to_message(self) -> Message:
        """The message as it stands in a transcript, which JSON can hold whatever the policy wrote."""
        message: Message = {"role": "assistant", "content": clean_text(self.content)}
        if self.reasoning is not None:
            message["reasoning"] = clean_text(self.reasoning)
        if self.tool_calls:
            message["tool_calls"] = [_to_record(call) for call in self.tool_calls]
        return message


Script = Callable[[Sequence[Message], Sequence[ToolSpec]], AssistantMessage]
"""The next assistant message, from the conversation so far and the tools."""


def script_of(say: Callable[[], AssistantMessage]) -> Script:
    """A script that looks at nothing: its messages are what `say` gives."""

    def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        del messages, tools
        return say()

    return script


def _to_record(call: ToolCall) -> dict[str, Any]:
    arguments = dict(call.arguments) if is_plain(call.arguments) else recordable(call.arguments)
    function = {"name": clean_text(call.name), "arguments": arguments}
    return {"id": clean_text(call.id), "type": "function", "function": function}


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentChoice:
    """The environment that a task wants to be played in, where it is not the run's own."""

    env_id: str
    """A registered id."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of its constructor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One problem: the messages that pose it, and what the grader needs."""

    task_id: str
    messages: tuple[Message, ...]
    label: Any = None
    """The right answer, or whatever the environment grades against. Never shown to the policy."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    environment: EnvironmentChoice | None = None
    """Where to play it; None: in the environment of the run."""
    reward: Reward | None = None
    """Grades this task; None: the run's reward, or the environment's own grade."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for an id or messages that are none: who makes a task hears of it, not who plays it."""
        if not isinstance(self.task_id, str) or not self.task_id:
            raise ValueError(f"a task's id must be a text that is not empty, not {shown(self.task_id)}")
        if isinstance(self.messages, str) or not isinstance(self.messages, Sequence):
            raise ValueError(
                f"task {shown(self.task_id)}: its messages must be a list of messages, not {shown(self.messages)}"
            )
        object.__setattr__(self, "task_id", clean_text(self.task_id))
        object.__setattr__(self, "messages", tuple(self.messages))

    @classmethod
    def from_prompt(
        cls, task_id: str, prompt: str, *, label: Any = None, metadata: Mapping[str, Any] | None = None
    ) -> Task:
        """A task that one user message poses."""
        message: Message = {"role": "user", "content": prompt}
        return cls(task_id=task_id, messages=(message,), label=label, metadata=metadata or {})


class TaskSource(Protocol):
    """Tasks by position. Position i is the same task in every process. Safe to read from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Task:
        """The task at `index`. Raises `IndexError` outside 0 <= index < len."""
        ...


class ListTasks:
    """Tasks held in memory.

    Raises:
        ValueError: there are none, or two share an id.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            raise ValueError("a task source needs at least one task")
        self._tasks = tuple(tasks)
        self._index = {task.task_id: index for index, task in enumerate(self._tasks)}
        if len(self._index) != len(self._tasks):
            twice = next(t.task_id for i, t in enumerate(self._tasks) if self._index[t.task_id] != i)
            raise ValueError(f"two tasks have the id {twice!r}")

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int, /) -> Task:
        return self._tasks[index]

    def find(self, task_id: str) -> Task:
        """The task with that id.

        Raises:
            ValueError: there is none.
        """
        if task_id not in self._index:
            raise no_such_task(task_id, self._index)
        return self._tasks[self._index[task_id]]


def where_of(source: TaskSource, index: int) -> str:
    """Where a task of a source stands, for messages: file and line, or its id."""
    where = getattr(source, "where", None)
    return where(index) if where is not None else f"task {source[index].task_id!r}"


def no_such_task(task_id: str, known: Iterable[str] = ()) -> ValueError:
    """The error for an id that no task has, with the nearest of those that are known."""
    near = difflib.get_close_matches(task_id, list(known), n=1, cutoff=0.5)
    return ValueError(f"no task {task_id!r}" + (f", did you mean {near[0]!r}?" if near else ""))


Name = TypeVar("Name", bound=str)


def known_split(split: str, splits: Iterable[Name]) -> Name:
    """The split, if it is one of `splits`.

    Raises:
        ValueError: it is none of them; the message lists them.
    """
    names = tuple(splits)
    for name in names:
        if name == split:
            return name
    raise ValueError(f"unknown split {split!r}; the splits are {', '.join(names)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeView:
    """What a reward sees of an episode that has come to its end."""

    task: Task
    message: AssistantMessage
    """The last assistant message: the answer."""
    messages: tuple[Message, ...]
    """The whole conversation, the answer included."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the environment counted."""
    reward: float | None = None
    """The reward so far: None for the reward of an episode, its value for a group reward."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """The parts of the environment's own grade where the reward asks for it, or all parts for a group reward."""

    @property
    def answer(self) -> str:
        """The text of the last assistant message."""
        return self.message.content

    @property
    def label(self) -> Any:
        """What the task is graded against."""
        return self.task.label


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A reward with the raw values that it was made of."""

    value: float
    parts: Mapping[str, float]
    """Recorded as they are: a weight changes `value` and not the part."""


Grade = Mapping[str, float] | Score
"""What an environment's own grade is: numbers by name, whose sum is the reward; or both apart."""

RewardValue = float | Mapping[str, float] | Score
"""A number; numbers by name, whose sum is the reward; or both apart."""


class Reward(Protocol):
    """Scores one episode. May be `async`. An exception is an `EnvironmentFault`, never a reward of 0.

    With an attribute `uses_environment_grade` that is true, `episode.reward_parts` holds the environment's own grade.
    """

    def __call__(self, episode: EpisodeView, /) -> RewardValue | Awaitable[RewardValue]: ...


class GroupReward(Protocol):
    """Scores all episodes of one task together, one value for each, in their order. May be `async`."""

    def __call__(
        self, episodes: Sequence[EpisodeView], /
    ) -> Sequence[RewardValue] | Awaitable[Sequence[RewardValue]]: ...


def as_score(value: Any, *, name: str | None = "reward") -> Score:
    """A reward's value with its parts; a bare number is a part called `name`, and refused where that is None.

    Raises:
        ValueError: it is no finite number, or mapping of such.
    """
    # What nearly every grade returns, at a third of the price of looking at it in full.
    if type(value) is dict:
        quick = 0.0
        for key, part in value.items():
            if (
                type(key) is not str
                or not key.isascii()
                or type(part) is not float
                or not -MAX_SIZE <= part <= MAX_SIZE
            ):
                break
            quick += part
        else:
            return Score(value=quick, parts=value.copy())
    given = value.parts if isinstance(value, Score) else value
    if not isinstance(given, Mapping):
        if name is None:
            raise ValueError(f"it must return finite numbers by name, not {shown(value, limit=200)}")
        given = {name: given}
    try:
        parts = {_name(key): as_number(part) for key, part in given.items()}
        total = as_number(value.value) if isinstance(value, Score) else sum(parts.values())
    except ValueError as error:
        raise ValueError(
            f"it must return a finite number, or finite numbers by name, not {shown(value, limit=200)}: {error}"
        ) from error
    return Score(value=total, parts=parts)


def is_async(function: Any) -> bool:
    """Whether calling it gives something to await: an `async` function, an object with an `async __call__`, or one that
    says so by an attribute `is_async`.
    """
    if getattr(function, "is_async", False):
        return True
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  the method itself is wanted
    )


def _name(key: Any) -> str:
    return clean_text(key) if isinstance(key, str) else shown(key)
