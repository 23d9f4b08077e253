"""From a row of a task file to a task: which key holds what, and what is said of a row that is wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from polyturn.envs.messages import Message, Role
from polyturn.envs.tasks.types import EnvironmentChoice, Task

if TYPE_CHECKING:
    from polyturn.envs.rewards.types import Reward

DEFAULT_LABEL_KEYS = ("answer", "label")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowKeys:
    """Which key of a row holds what. Of these only the prompt and the label must be there."""

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
        self._known = frozenset(self.keys.all)
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
        if keys.others == "refuse" or keys.prompt not in row:
            self.check_keys(row, where)
        metadata = row.get(keys.metadata)
        if not isinstance(metadata, dict | None):
            raise ValueError(f"{where}: {keys.metadata!r} must be an object, not {type(metadata).__name__}")
        metadata = metadata or {}
        if extra and keys.others == "keep":
            metadata = {**{key: row[key] for key in extra}, **metadata}
        environment, reward = row.get(keys.environment), row.get(keys.reward)
        given_id = row.get(keys.id)
        return Task(
            task_id=default_id if given_id is None else str(given_id),
            messages=_read_prompt(row[keys.prompt], keys.prompt, where),
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
        if keys.prompt not in names:
            raise ValueError(f"{where}: missing key {keys.prompt!r}{_nearest_key(keys.prompt, names)}")

    def _label(self, row: Mapping[str, Any], where: str) -> Any:
        found = [key for key in self.keys.label_keys if key in row]
        if len(found) == 1 and row[found[0]] is not None:
            return row[found[0]]
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
        raise ValueError(f"{where}: missing key {self.keys.label!r}{_nearest_key(self.keys.label, row)}")

    def _resolve(self, given: Any, where: str) -> Reward:
        """The reward that a row chooses; rows that describe the same share it."""
        if isinstance(given, str) and given in self._named_rewards:
            return self._named_rewards[given]
        if not self._trusted:
            raise self._not_declared(given, self.keys.reward, "rewards", self._named_rewards, where)
        spec = json.dumps(given, sort_keys=True)
        if spec not in self._rewards:
            from polyturn.envs.rewards.factory import read_reward

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
    from polyturn.envs.registry import list_environments

    if isinstance(given, str):
        given = {"id": given}
    if not isinstance(given, dict) or not isinstance(given.get("id"), str):
        raise ValueError("name an environment by its id, or as {'id': ..., 'options': {...}}")
    options = given.get("options") or {}
    unknown = sorted(set(given) - {"id", "options"})
    if unknown or not isinstance(options, dict):
        what = f"unknown key {unknown[0]!r}" if unknown else "'options' must be an object"
        raise ValueError(f"{what}; an environment is {{'id': ..., 'options': {{...}}}}")
    known = [info.env_id for info in list_environments()]
    if given["id"] not in known:
        near = difflib.get_close_matches(given["id"], known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"there is no environment {given['id']!r}; {hint}")
    return EnvironmentChoice(env_id=given["id"], options=options)


def _read_prompt(prompt: Any, key: str, where: str) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    if not isinstance(prompt, list) or not prompt:
        shown = json.dumps(prompt, default=str)[:60]
        raise ValueError(f"{where}: {key!r} must be a text or a list of messages, not {shown}")
    messages: list[Message] = []
    for index, message in enumerate(prompt):
        if not isinstance(message, dict) or message.get("role") not in get_args(Role):
            raise ValueError(f"{where}: {key}[{index}] must have a 'role' of {', '.join(get_args(Role))}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: {key}[{index}] must have a text as 'content'")
        # Columnar files have a value for every field of every message.
        present: Any = {name: value for name, value in message.items() if value is not None}
        messages.append(present)
    return tuple(messages)


def _nearest_key(wanted: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    if near:
        return f", did you mean {near[0]!r}?"
    return f"; the keys are {', '.join(names) or 'none'}"
