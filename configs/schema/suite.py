"""A suite: a named list of environments to score one policy on, what each needs, and what is known to be odd in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from polyturn.configs.errors import did_you_mean
from polyturn.configs.schema.agent import AgentConfig
from polyturn.configs.schema.run import EnvironmentConfig, EvaluatedTasks
from polyturn.configs.schema.section import Section
from polyturn.configs.schema.tasks import EnvironmentReward, RewardChoice

EntryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
CheckName = Literal[
    "oracle",
    "do_nothing",
    "random",
    "duplicates",
    "leaks",
    "other_answers",
    "near_duplicates",
    "near_leaks",
    "gold_answer",
    "answer_in_prompt",
]
"""What `polyturn eval validate` looks at, task by task."""


class Need(Section):
    """Something that the package does not ship: a file, a directory or a service."""

    option: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
    """The option of the environment that names it."""
    file: str | None = None
    """Where it is looked for, below the suite's `data`; null: it is no file, and the option has a value of its own."""
    required: bool = True
    """Whether the entry cannot be played without it; false of training tasks, in which the others are looked for."""
    get: str
    """One sentence: what to get, and from where."""


class Accepted(Section):
    """So many tasks of one finding are known and accepted; one more, and the suite is refused."""

    check: CheckName
    num_tasks: NonNegativeInt
    why: str
    """One sentence for whoever reads the result."""


class Budget(Section):
    """What may be spent on the episodes of an entry together; then no further one starts. What one episode may take
    stands in `environment`."""

    max_tokens: PositiveInt | None = None
    """Tokens of prompts and completions; null: no limit."""
    max_cost: PositiveFloat | None = None
    """In the currency of the prices that are given; null: no limit."""
    max_seconds: PositiveFloat | None = None
    """From the entry's first episode on, in one sitting; null: no limit."""


class SuiteEntry(Section):
    """One environment of a suite."""

    name: EntryName | None = None
    """What reports call it; null: the environment's id, without its namespace and version."""
    environment: EnvironmentConfig
    reward: RewardChoice = EnvironmentReward()
    evaluation: EvaluatedTasks = EvaluatedTasks()
    success_score: float = 1.0
    """A score of so much and more is a success, which pass@k counts."""
    budget: Budget = Budget()
    agent: AgentConfig | None = None
    """Who plays in place of the built-in loop, where a model is served; null: whom the recipe names, if anybody."""
    needs: list[Need] = []
    """What has to be got before the entry can be played."""
    has_oracle: bool = True
    """Whether the environment's oracle solves every task; false where it does not know the answers."""
    accepts: list[Accepted] = []
    """What `polyturn eval validate` would refuse, and is known."""

    @property
    def called(self) -> str:
        """What reports call it."""
        return self.name or name_of_environment(self.environment.id)


def name_of_environment(env_id: str) -> str:
    """What an environment is called in reports: its id without namespace and version, in characters of a file's name.

    A project's own `my_module:polyturn/Mine-v0` is `Mine`.
    """
    bare = re.sub(r"-v\d+$", "", env_id.rpartition("/")[2].rpartition(":")[2])
    return re.sub(r"[^A-Za-z0-9._-]", "-", bare).lstrip("._-") or "entry"


class SuiteConfig(Section):
    """A named list of environments to score one policy on."""

    name: EntryName
    about: str = ""
    """One line for `polyturn eval list`."""
    recipe: str | None = None
    """The recipe whose engines, model settings and limits serve the suite; null: `evaluation`, for any chat model on a
    GPU, or where this machine has none, on its CPU."""
    data: Path = Path("data")
    """The directory of the files that entries need, relative to the working directory."""
    defaults: dict[str, Any] = {}
    """What every entry has that does not say otherwise: keys of an entry."""
    only: list[str] = []
    """The entries that are played, by name; empty: all."""
    entries: Annotated[list[SuiteEntry], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_tell_entries_apart(self) -> Self:
        names = [entry.called for entry in self.entries]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two entries are called {name!r}; give each a `name` of its own")
        for name in self.only:
            if name not in names:
                known = ", ".join(names)
                raise ValueError(
                    f"only: there is no entry {name!r}{did_you_mean(name, names)}; there are {known}"
                )
        return self

    @property
    def played(self) -> list[SuiteEntry]:
        """The entries that `only` leaves."""
        return [entry for entry in self.entries if not self.only or entry.called in self.only]
