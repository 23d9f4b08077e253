"""What an evaluation was asked for: `evaluation.yaml`, all that decides its result. It is written once, before the
first episode, and never changed."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 1


class _Recorded(BaseModel):
    """What a file of ours holds; a key that it should not have is damage, or of a later release."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PlannedEntry(_Recorded):
    """One entry of the suite, as it is played."""

    name: str
    environment: str
    """Its id."""
    split: str
    num_tasks: Annotated[int, Field(ge=1)]
    """That are played: no more than there are."""
    samples_per_task: Annotated[int, Field(ge=1)]
    success_score: float
    tasks_digest: str = ""
    """Of the digests of the tasks that are played, in order."""
    budget: dict[str, float | None] = {}
    """As `configs.schema.suite.Budget`."""
    config: dict[str, Any] = {}
    """The run config that the entry is played by."""
    files: dict[str, str] = {}
    """SHA-256 of each file that the tasks or the reward are read from, by its path."""


class Player(_Recorded):
    """Who plays."""

    name: str
    """As `agents.policies.named` has it."""
    label: str
    """For people."""
    options: dict[str, Any] = {}
    """Without what is secret."""
    model: str | None = None
    """The directory that is served, or the URL that is asked for tokens; None: neither."""
    prices: dict[str, float] | None = None
    """As `scoring.Prices`; None: none were given."""
    files: dict[str, str] = {}
    """What tells the model or the script apart from another of the same path: a digest of each file."""


class EvaluationPlan(_Recorded):
    """`evaluation.yaml`."""

    format: int = FORMAT
    suite: str
    player: Player
    package: str
    """The version of Polyturn that played it."""
    created: str
    """When, in UTC, as ISO 8601 has it."""
    source: str | None = None
    """The suite or recipe that was named: a file, or the name of a shipped one."""
    scored_from: str | None = None
    """The evaluation whose stored episodes were graded in place of playing; None: it was played."""
    overrides: list[str] = []
    """Those of the command line."""
    entries: Annotated[list[PlannedEntry], Field(min_length=1)]
