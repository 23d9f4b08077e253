"""The steps of a run that is fine-tuned on rows: which rows, in which order, as episodes that a policy has played."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Segment
from polyturn.configs.errors import ConfigError, as_config_error
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.supervised import SupervisedConfig
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.envs.messages import Message
from polyturn.rollout.factory import dialect_of, renderer_of
from polyturn.rollout.fine_tuning.rendering import RowRenderer
from polyturn.rollout.fine_tuning.rows import Row, read_rows, tokenizer_digest
from polyturn.rollout.groups import Group, PromptCursor
from polyturn.rollout.unplayed import UnplayedSteps

TAUGHT = "taught"
"""Stop reason of an episode that nobody played."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaughtRow:
    """A row with its tokens."""

    messages: tuple[Message, ...]
    segments: tuple[Segment, ...]
    environment: str
    task_id: str
    score: float

    @property
    def num_tokens(self) -> int:
        return sum(len(segment) for segment in self.segments)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaughtRows:
    """The rows of a run, in the order in which they are written."""

    train: tuple[TaughtRow, ...]
    heldout: tuple[TaughtRow, ...]
    num_stored: int
    """Of all rows, those whose own tokens are taken."""
    num_too_long: int
    """Left out."""

    def summary(self) -> str:
        """What they are, in a sentence."""
        num_tokens = sum(row.num_tokens for row in self.train)
        num_taught = sum(segment.num_sampled for row in self.train for segment in row.segments)
        rendered = len(self.train) + len(self.heldout) - self.num_stored
        return (
            f"{len(self.train):,} rows to train on with {num_tokens:,} tokens, of which {num_taught:,} are taught; "
            f"{len(self.heldout):,} held out; {self.num_stored:,} with tokens of their own, {rendered:,} rendered; "
            f"{self.num_too_long:,} too long and left out"
        )


def load_rows(config: RunConfig, on_row: Callable[[], object] = lambda: None) -> TaughtRows:
    """Read, check and tokenise all rows that the section `supervised` names. They are held in memory: 15 bytes a token,
    and the messages.

    Args:
        on_row: Called after each.

    Raises:
        ConfigError: a file or a row is not as it should be, or there is none to train on.
    """
    section = config.supervised
    assert section is not None, "nothing is fine-tuned"
    renderer = _renderer(config, section)
    most = section.max_tokens or config.environment.max_tokens_per_episode
    num_stored = num_too_long = 0

    def load(paths: Iterable[Path]) -> list[TaughtRow]:
        nonlocal num_stored, num_too_long
        rows = []
        for path in paths:
            for row in read_rows(path):
                segments = renderer(row)
                on_row()
                if max(len(segment) for segment in segments) > most:
                    num_too_long += 1
                    continue
                num_stored += renderer.takes_tokens_of(row)
                rows.append(_taught(row, segments))
        return rows

    train, heldout = load(section.data), load(section.heldout)
    if not section.heldout:
        train, heldout = _split(train, section.heldout_share, seed=config.seed)
    if not train:
        files = ", ".join(map(str, section.data))
        why = f"all {num_too_long:,} are longer than {most:,} tokens" if num_too_long else "there are none"
        raise ConfigError(f"supervised.data: no row of {files} can be trained on: {why}")
    return TaughtRows(
        train=tuple(train), heldout=tuple(heldout), num_stored=num_stored, num_too_long=num_too_long
    )


def _renderer(config: RunConfig, section: SupervisedConfig) -> RowRenderer:
    path = resolve_model_path(config.model.path)
    with as_config_error("model: "):
        dialect = dialect_of(config.model, path)
        renderer = renderer_of(config.model, path, dialect)
    return RowRenderer(
        renderer,
        dialect,
        tokenizer=tokenizer_digest(path, config.model.template),
        vocab_size=ModelShape.read(path).vocab_size,
        stored=section.tokens == "stored",
    )


def _taught(row: Row, segments: Sequence[Segment]) -> TaughtRow:
    return TaughtRow(
        messages=row.messages,
        segments=tuple(segments),
        environment=row.environment,
        task_id=row.task_id or row.where,
        score=row.score,
    )


def _split(rows: Sequence[TaughtRow], share: float, *, seed: int) -> tuple[list[TaughtRow], list[TaughtRow]]:
    """Rows to train on, and those to measure. All rows of one task are on one side: else an answer would be known."""
    tasks = list(dict.fromkeys((row.environment, row.task_id) for row in rows))
    if not share or len(tasks) < 2:
        return list(rows), []
    number = min(max(1, round(share * len(tasks))), len(tasks) - 1)
    drawn = np.random.default_rng([seed, len(tasks)]).permutation(len(tasks))[:number]
    held = {tasks[index] for index in drawn.tolist()}
    is_held = [(row.environment, row.task_id) in held for row in rows]
    return (
        [row for row, out in zip(rows, is_held, strict=True) if not out],
        [row for row, out in zip(rows, is_held, strict=True) if out],
    )


class TaughtSteps(UnplayedSteps):
    """The `StepSource` that gives each step the next rows; every epoch has all of them once, in an order of its own."""

    def __init__(self, config: RunConfig, rows: TaughtRows) -> None:
        super().__init__()
        assert config.supervised is not None, "nothing is fine-tuned"
        self.rows = rows
        self._environment = config.environment.id
        self._per_step = config.rollout.prompts_per_step
        self._end = len(rows.train) * config.supervised.epochs
        self._cursor = PromptCursor(len(rows.train), seed=config.seed)

    def groups_of(self, step: int) -> tuple[Group, ...]:
        """A group for each row; the last step may have fewer."""
        first = (step - 1) * self._per_step
        return tuple(
            self._group(position) for position in range(first, min(first + self._per_step, self._end))
        )

    def _group(self, position: int) -> Group:
        prompt = self._cursor.at(position)
        row = self.rows.train[prompt.task_index]
        episode = episode_of(row, prompt.group_id, environment=self._environment)
        return Group(
            group_id=prompt.group_id,
            prompt=prompt,
            episodes=(episode,),
            num_expected=1,
            num_dropped=0,
            num_retries=0,
        )


def episode_of(row: TaughtRow, group_id: str, *, environment: str) -> Episode:
    """A row as the trainer takes it: an episode whose taught tokens count as sampled."""
    return Episode(
        episode_id=f"{group_id}.0.0",
        group_id=group_id,
        env_id=row.environment or environment,
        task_id=row.task_id,
        seed=0,
        outcome=Outcome.COMPLETED,
        stop_reason=TAUGHT,
        reward=row.score,
        num_turns=sum(message["role"] == "assistant" for message in row.messages),
        messages=row.messages,
        segments=row.segments,
    )
