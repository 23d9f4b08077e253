"""Where tasks come from, and what grades an episode of one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from polyturn.configs.schema.section import Section

PartName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class EnvironmentReward(Section):
    """The environment's own grade."""

    kind: Literal["environment"] = "environment"


class RuleReward(Section):
    """A rule that compares the answer with the task's label."""

    kind: Literal["rule"]
    name: str
    """exact_match, f1, contains, multiple_choice, numeric, regex, format, math or unit_tests (docs/rewards.md)."""
    options: dict[str, Any] = {}
    """The rule's own options."""


class FunctionReward(Section):
    """A function or class of one's own."""

    kind: Literal["function"]
    target: str
    """`module:name` or `path/to/file.py:name`, a function of an EpisodeView or a class of such."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function, or of the class's constructor."""


class RemoteReward(Section):
    """A service that grades over HTTP. What it cannot grade is a fault, never a reward of 0."""

    kind: Literal["remote"]
    url: str
    """Where batches of episodes are posted."""
    batch_size: PositiveInt = 32
    """Most episodes in a request."""
    linger_s: NonNegativeFloat = 0.01
    """How long an episode waits for others to share its request."""
    deadline_s: PositiveFloat = 60.0
    """From the end of an episode to its reward, retries included; then it is a fault."""
    max_retries: NonNegativeInt = 3
    """After a connection that failed, a 5xx, 408, 425 or 429, not before the time that Retry-After asks for; other
    failures are not tried again."""
    max_concurrent_requests: PositiveInt = 8
    """Requests under way at once."""
    breaker_failures: PositiveInt = 5
    """So many failed requests in a row, and none is sent for breaker_reset_s."""
    breaker_reset_s: PositiveFloat = 10.0
    """Then one request tries whether the service is back."""


JUDGE_PROMPT = """Grade the answer to the question below, from {low} (worthless) to {high} (perfect).

Question:
{question}

Answer:
{answer}

Say in a sentence or two what is right and wrong about the answer. End with a line `Score: N`."""


class JudgeReward(Section):
    """A model that grades by a prompt (docs/judges.md). What it does not grade is a fault, never a reward of 0."""

    kind: Literal["judge"]
    judge: str | None = None
    """A name of `judges`: a model that the run serves, or knows where it is served."""
    urls: list[Annotated[str, Field(pattern=r"^https?://[^/\s]+")]] = []
    """In place of a name: OpenAI-compatible addresses, up to and with `/v1`, asked in turn."""
    model: str = "default"
    """The model's name there; SGLang takes any."""
    api_key_file: Path | None = None
    """A file that holds the key and nothing else, or `env:NAME` for a variable, sent as `Authorization: Bearer KEY`;
    null sends none."""
    prompt: str = JUDGE_PROMPT
    """What is asked, with {question} (the task's messages), {conversation} (all messages), {answer}, {label}, {low} and
    {high} in it; other braces are left as they are."""
    pattern: str = r"(?i)score[^\w-]*(-?\d+(?:\.\d+)?)"
    """A regular expression; its first group in the last place of the reply where it matches, thoughts left out, is the
    grade."""
    values: dict[str, FiniteFloat] = {}
    """What the group is worth, such as `{yes: 1, no: 0}`, whatever its case; empty: it is a number from `low` to
    `high`, and the reward (number - low) / (high - low)."""
    low: FiniteFloat = 0.0
    """The worst grade."""
    high: FiniteFloat = 10.0
    """The best grade."""
    temperature: NonNegativeFloat = 0.0
    """Of the judge's reply."""
    max_tokens: PositiveInt = 512
    """Of the judge's reply, thoughts included."""
    request: dict[str, Any] = {}
    """Further fields of each request, such as `chat_template_kwargs`."""
    max_concurrent_requests: PositiveInt = 16
    """Replies that are waited for at once, in each process that plays episodes."""
    deadline_s: PositiveFloat = 120.0
    """From the end of an episode to its reward, queue and retries included; then it is a fault."""
    max_retries: NonNegativeInt = 3
    """After a connection that failed, a 5xx, 408, 425 or 429, or a reply without a grade; then it is a fault."""
    breaker_failures: PositiveInt = 8
    """So many failed requests in a row, and none is sent for breaker_reset_s."""
    breaker_reset_s: PositiveFloat = 10.0
    """Then one request tries whether the judge is back."""

    @model_validator(mode="after")
    def _can_be_asked_and_read(self) -> Self:
        if (self.judge is None) == (not self.urls):
            raise ValueError(
                "a judge is asked at `judge`, a name of `judges`, or at `urls`: give one of them"
            )
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern: {error}") from error
        if groups < 1:
            raise ValueError("pattern: it has no group, which would be the grade")
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self


PartReward = Annotated[
    EnvironmentReward | RuleReward | FunctionReward | RemoteReward | JudgeReward, Field(discriminator="kind")
]


class RubricPart(Section):
    """One criterion."""

    name: PartName
    """What its raw value is recorded as."""
    weight: FiniteFloat = 1.0
    """Its share in the reward; 0 records it only."""
    reward: PartReward


class RubricReward(Section):
    """Weighted criteria. Every raw value is recorded; the reward is their weighted sum."""

    kind: Literal["rubric"]
    parts: Annotated[list[RubricPart], Field(min_length=1)]
    """The criteria; their names must differ."""


RewardChoice = Annotated[
    EnvironmentReward | RuleReward | FunctionReward | RemoteReward | JudgeReward | RubricReward,
    Field(discriminator="kind"),
]


def _by_rule_name(given: Any) -> Any:
    """A list of rules' names as a mapping of each name to its rule."""
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        return given
    return {name: {"kind": "rule", "name": name} for name in given}


NamedRewards = Annotated[
    dict[str, RewardChoice],
    BeforeValidator(_by_rule_name, json_schema_input_type=list[str] | dict[str, RewardChoice]),
]
"""Rewards by name, or a list of rules' names."""

OptionalReward = Annotated[
    EnvironmentReward | RuleReward | FunctionReward | RemoteReward | JudgeReward | RubricReward | None,
    Field(discriminator="kind"),
]


class GroupRewardConfig(Section):
    """A reward that sees all episodes of a task; added to theirs, in training only."""

    name: PartName
    """What its raw value is recorded as."""
    weight: FiniteFloat = 1.0
    """Its share in the reward; 0 records it only."""
    target: str
    """rank, diversity, or `module:name` or `path/to/file.py:name` of one's own."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function, or of the class's constructor."""


class TaskEnvironment(Section):
    """The environment of a source's tasks."""

    id: str
    """A registered id."""
    options: dict[str, Any] = {}
    """Keyword arguments of the environment's constructor."""


def _by_id(given: Any) -> Any:
    """A list of ids as a mapping of each id to its environment."""
    if not isinstance(given, list | tuple) or not all(isinstance(env_id, str) for env_id in given):
        return given
    return {env_id: {"id": env_id} for env_id in given}


NamedEnvironments = Annotated[
    dict[str, TaskEnvironment],
    BeforeValidator(_by_id, json_schema_input_type=list[str] | dict[str, TaskEnvironment]),
]
"""Environments by name, or a list of ids."""


class TaskSourceConfig(Section):
    """A source of tasks: a file, or a function that makes them. Several sources are a mixture."""

    path: str | None = None
    """A JSONL or Parquet (.parquet) file, relative to the working directory; `path@[a:b]` is a part of it."""
    generator: str | None = None
    """In place of a path: `module:name` or `path/to/file.py:name`, called with an index and a seed."""
    size: PositiveInt | None = None
    """Of a generator: how many tasks it makes; null for no end."""
    seed: NonNegativeInt = 0
    """Of a generator."""
    weight: PositiveFloat | None = None
    """Share of the prompts drawn from this source, against the other weights; null in all: in proportion to sizes."""
    prompt_key: str = "prompt"
    """The key of a text or a list of messages. Dots lead inwards, here and in the other keys."""
    label_key: str | None = None
    """The key of what is graded against, such as `reward_model.ground_truth`; null: `answer` or `label`."""
    needs_label: bool = True
    """Whether a row without a label is an error."""
    id_key: str = "id"
    """The key of the task's id; a row without one is named after file and line."""
    metadata_key: str = "metadata"
    """The key of a mapping that rewards and environments may read."""
    environment_key: str = "environment"
    """The key of the row's own environment: a name of `environments`."""
    reward_key: str = "reward"
    """The key of the row's own reward: a name of `rewards`."""
    other_keys: Literal["refuse", "keep", "drop"] = "refuse"
    """Further keys of a row are errors, or go into the metadata, or are left out."""
    check_rows: NonNegativeInt | None = None
    """Rows that are checked before anything starts; null: all."""
    environment: TaskEnvironment | None = None
    """For rows that name none; null: the run's."""
    reward: OptionalReward = None
    """For rows that name none; null: the run's."""
    environments: NamedEnvironments = {}
    """What rows may choose by name: a list of ids, or `{name: {id, options}}`."""
    rewards: NamedRewards = {}
    """What rows may choose by name: a list of rules, or `{name: ...}` with mappings as the section `reward`."""
    trusted_rows: bool = False
    """Whether rows may describe environments and rewards themselves, with options, code and URLs. Whoever writes such
    a file runs code here."""


def _as_sources(given: Any) -> Any:
    """A path, a source, or a list of either, as a list of sources."""
    if not isinstance(given, str | dict | list | tuple | TaskSourceConfig):
        return given
    items = given if isinstance(given, list | tuple) else [given]
    return [{"path": item} if isinstance(item, str) else item for item in items]


TaskSources = Annotated[
    list[TaskSourceConfig],
    BeforeValidator(
        _as_sources, json_schema_input_type=str | TaskSourceConfig | list[str | TaskSourceConfig]
    ),
]
"""Written as a path, a source, or a list of paths and sources."""
