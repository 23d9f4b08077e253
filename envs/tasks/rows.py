"""From a row of a task file to a task: which key holds what, and what is said of a row that is wrong."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import orjson

from polyturn.envs.border import read_calls, read_content
from polyturn.envs.messages import EnvironmentChoice, Message, Role, Task
from polyturn.envs.registry import find as find_environment
from polyturn.envs.rewards.factory import read_reward
from polyturn.tools.plain import clean_text, shown

if TYPE_CHECKING:
    from polyturn.envs.registry import find as find_environment
from polyturn.envs.messages import Reward

DEFAULT_LABEL_KEYS = ("answer", "label")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowKeys:
    """Which key of a row holds what. Of these only the prompt and the label must be there.

    A key with dots that no row has itself leads inwards: `reward_model.ground_truth`, `messages.0.content`.
    """

    prompt: str = "prompt"
    """A text, or a list of messages."""
    label: str | None = None
    """None: `answer` or `label`, whichever a row has."""
    needs_label: bool = True
    """Whether a row without a label is an error."""
    id: str = "id"
    metadata: str = "metadata"
    """A mapping."""
    environment: str = "environment"
    """The name of one that the reader was given."""
    reward: str = "reward"
    """The name of one that the reader was given."""
    others: Literal["refuse", "keep", "drop"] = "refuse"
    """Further keys are errors, or become metadata, or are left out."""

    @property
    def label_keys(self) -> tuple[str, ...]:
        return DEFAULT_LABEL_KEYS if self.label is None else (self.label,)

    @property
    def all(self) -> tuple[str, ...]:
        return (self.id, self.prompt, *self.label_keys, self.metadata, self.environment, self.reward)

    @property
    def columns(self) -> frozenset[str]:
        """The keys themselves, and where they are dotted what they begin with."""
        return frozenset((*self.all, *(key.partition(".")[0] for key in self.all)))


class RowReader:
    """Makes tasks of rows, by one set of keys.

    Rows are data: they choose rewards and environments by name among those that the reader was given, and can bring
    none. Only rows that are trusted describe them, and with them code to load.
    """

    def __init__(
        self,
        keys: RowKeys | None = None,
        *,
        environment: EnvironmentChoice | None = None,
        reward: Reward | None = None,
        environments: Mapping[str, EnvironmentChoice] | None = None,
        rewards: Mapping[str, Reward] | None = None,
        trusted: bool = False,
    ) -> None:
        """
        Args:
            keys: Which key holds what.
            environment: Of rows that name none.
            reward: Of rows that name none.
            environments: What rows may choose, by name.
            rewards: What rows may choose, by name.
            trusted: Whether rows may also describe a reward or an environment, as a config does.
        """
        self.keys = keys or RowKeys()
        self._known = self.keys.columns
        self._environment = environment
        self._reward = reward
        self._named_environments = dict(environments or {})
        self._named_rewards = dict(rewards or {})
        self._trusted = trusted
        self._rewards: dict[str, Reward] = {}
        self._environments: dict[str, EnvironmentChoice] = {}

    def read(self, row: Any, where: str, *, default_id: str) -> Task:
        """The task of a row. Raises `ValueError`, beginning with `where`, for one that is wrong."""
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a task is a JSON object, not {type(row).__name__}")
        keys = self.keys
        extra = [key for key in row if key not in self._known]
        if keys.others == "refuse" or _root(keys.prompt, row) not in row:
            self.check_keys(row, where)
        metadata = look_up(row, keys.metadata)
        if not isinstance(metadata, dict | None):
            raise ValueError(f"{where}: {keys.metadata!r} must be an object, not {type(metadata).__name__}")
        metadata = metadata or {}
        if keys.others == "keep":
            # What a dotted key leads into holds more than that key.
            entered = [key for key in row if key in self._known and key not in keys.all]
            metadata = {**{key: row[key] for key in (*extra, *entered)}, **metadata}
        environment, reward = look_up(row, keys.environment), look_up(row, keys.reward)
        return Task(
            task_id=_read_id(look_up(row, keys.id), keys.id, where) or default_id,
            messages=_read_prompt(look_up(row, keys.prompt), keys.prompt, where),
            label=self._label(row, where),
            metadata=metadata,
            environment=self._environment if environment is None else self._choice(environment, where),
            reward=self._reward if reward is None else self._resolve(reward, where),
        )

    def check_keys(self, names: Iterable[str], where: str) -> None:
        """Raise `ValueError` for keys that are missing, or unknown where such are refused."""
        keys, names = self.keys, list(names)
        if keys.others == "refuse":
            for name in names:
                if name not in self._known:
                    near = difflib.get_close_matches(name, sorted(self._known), n=1)
                    hint = (
                        f"did you mean {near[0]!r}?"
                        if near
                        else f"further fields go under {keys.metadata!r}, or set other_keys to keep or drop"
                    )
                    raise ValueError(f"{where}: unknown key {name!r}, {hint}")
        if _root(keys.prompt, names) not in names:
            raise ValueError(f"{where}: missing key {keys.prompt!r}{_nearest_key(keys.prompt, names)}")

    def _label(self, row: Mapping[str, Any], where: str) -> Any:
        found = [key for key in self.keys.label_keys if look_up(row, key, _MISSING) is not _MISSING]
        label = look_up(row, found[0]) if len(found) == 1 else None
        if label is not None:
            return _read_label(label, found[0], where)
        if not self.keys.needs_label and len(found) < 2:
            return None
        if self.keys.label is None:
            if len(found) == 1:
                raise ValueError(
                    f"{where}: {found[0]!r} is null; a task needs an answer to be graded against"
                )
            raise ValueError(
                f"{where}: a task has one of 'answer' and 'label'; the keys are {', '.join(row)}"
            )
        if found:
            raise ValueError(
                f"{where}: {self.keys.label!r} is null; a task needs an answer to be graded against"
            )
        raise ValueError(f"{where}: missing key {self.keys.label!r}{_nearest_path(self.keys.label, row)}")

    def _resolve(self, given: Any, where: str) -> Reward:
        """The reward that a row chooses; rows that describe the same share it."""
        if isinstance(given, str) and given in self._named_rewards:
            return self._named_rewards[given]
        if not self._trusted:
            raise self._not_declared(given, self.keys.reward, "rewards", self._named_rewards, where)
        spec = json.dumps(given, sort_keys=True)
        if spec not in self._rewards:
            try:
                self._rewards[spec] = read_reward(given)
            except ValueError as error:
                raise ValueError(f"{where}: {self.keys.reward!r}: {error}") from error
        return self._rewards[spec]

    def _choice(self, given: Any, where: str) -> EnvironmentChoice:
        """The environment that a row chooses; rows that describe the same share the value."""
        if isinstance(given, str) and given in self._named_environments:
            return self._named_environments[given]
        if not self._trusted:
            raise self._not_declared(
                given, self.keys.environment, "environments", self._named_environments, where
            )
        spec = json.dumps(given, sort_keys=True)
        if spec not in self._environments:
            try:
                self._environments[spec] = read_environment(given)
            except ValueError as error:
                raise ValueError(f"{where}: {self.keys.environment!r}: {error}") from error
        return self._environments[spec]

    def _not_declared(
        self, given: Any, key: str, option: str, names: Iterable[str], where: str
    ) -> ValueError:
        """The error for a row that chooses what the recipe does not offer."""
        names = list(names)
        if not isinstance(given, str):
            return ValueError(
                f"{where}: {key!r}: a row may not describe {option}, only choose one by name among those that the "
                f"source declares under {option!r}{_offered(names)}; if you vouch for every row as for code of your "
                "own, set the source's trusted_rows: true"
            )
        near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"declare it there{_offered(names)}"
        return ValueError(
            f"{where}: {key!r}: {given[:80]!r} is not among those that the source declares under {option!r}; {hint}"
        )


def _offered(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else " (none so far)"


def read_environment(given: Any) -> EnvironmentChoice:
    """An environment from its id, or from `{id, options}`. Raises `ValueError`, also for an id that is not known."""
    if isinstance(given, str):
        given = {"id": given}
    if not isinstance(given, dict) or not isinstance(given.get("id"), str):
        raise ValueError("name an environment by its id, or as {'id': ..., 'options': {...}}")
    options = given.get("options") or {}
    unknown = sorted(set(given) - {"id", "options"})
    if unknown or not isinstance(options, dict):
        what = f"unknown key {unknown[0]!r}" if unknown else "'options' must be an object"
        raise ValueError(f"{what}; an environment is {{'id': ..., 'options': {{...}}}}")
    find_environment(given["id"])
    return EnvironmentChoice(env_id=given["id"], options=options)


_MISSING: Any = object()


def look_up(row: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """What stands in a row under a key, or where its dots lead; numbers count in lists, from the end where negative."""
    if key in row or "." not in key:
        return row.get(key, default)
    found: Any = row
    for part in key.split("."):
        if isinstance(found, Mapping):
            found = found.get(part, _MISSING)
        elif isinstance(found, list) and part.removeprefix("-").isdecimal() and len(part) < 10:
            index = int(part)
            found = found[index] if -len(found) <= index < len(found) else _MISSING
        else:
            return default
        if found is _MISSING:
            return default
    return found


def _root(key: str, names: Iterable[str]) -> str:
    """The key of the row itself that a key begins with."""
    return key if key in names else key.partition(".")[0]


def _read_id(given: Any, key: str, where: str) -> str | None:
    if given is None or (isinstance(given, float) and math.isnan(given)):
        return None
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ValueError(f"{where}: {key!r} must be a text or a number, not {shown(given)}")
    return clean_text(str(given))


def _read_label(label: Any, key: str, where: str) -> Any:
    """The label, unless it is none that anything could be graded against."""
    if isinstance(label, float) and not math.isfinite(label):
        hint = "; a value that was missing when the file was written" if math.isnan(label) else ""
        raise ValueError(f"{where}: {key!r} is {label}{hint}; a task needs an answer to be graded against")
    if isinstance(label, bytes | bytearray):
        raise ValueError(f"{where}: {key!r} is bytes, not a text or other JSON: {shown(label)}")
    return label


def _read_prompt(prompt: Any, key: str, where: str) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        prompt = _messages_in(prompt) or [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{where}: {key!r} must be a text or a list of messages, not {shown(prompt)}")
    messages: list[Message] = []
    for index, message in enumerate(prompt):
        at = f"{where}: {key}[{index}]"
        if not isinstance(message, dict) or message.get("role") not in get_args(Role):
            raise ValueError(f"{at} must have a 'role' of {', '.join(get_args(Role))}")
        # Columnar files have a value for every field of every message.
        present: Any = {name: value for name, value in message.items() if value is not None}
        calls = present.get("tool_calls")
        content = present.get("content", "" if calls else None)
        if not isinstance(content, str | list):
            raise ValueError(
                f"{at} must have a text as 'content', or a list of text parts, not {shown(content)}"
            )
        try:
            if calls:
                present["tool_calls"] = read_calls(calls)
            present["content"] = read_content(content)
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from error
        messages.append(present)
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: {key!r} ends with what the assistant said, which is the policy's to say: leave that message out"
        )
    return tuple(messages)


def _messages_in(text: str) -> list[Any] | None:
    """The messages of a text that is a list of them as JSON, as tables have it that know no lists; else None."""
    if not text.startswith("[") or '"role"' not in text[:1_000]:
        return None
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    is_chat = found and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in found)
    return found if is_chat else None


def _nearest_path(wanted: str, row: Mapping[str, Any]) -> str:
    """The nearest key of a row for one that is missing; for a dotted one, of where its first parts lead."""
    outer, _, inner = wanted.rpartition(".")
    within = look_up(row, outer) if outer else None
    if isinstance(within, Mapping):
        near = difflib.get_close_matches(inner, list(within), n=1, cutoff=0.5)
        return f", did you mean {f'{outer}.{near[0]}'!r}?" if near else f"; {outer!r} has {', '.join(within)}"
    return _nearest_key(wanted, row)


def _nearest_key(wanted: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    if near:
        return f", did you mean {near[0]!r}?"
    return f"; the keys are {', '.join(names) or 'none'}"
