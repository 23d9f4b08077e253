"""What passed as rows to fine-tune on: which episodes of an evaluation or a run are kept, and why others are not."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from polyturn.agents.episode import Outcome
from polyturn.rollout.evaluation.export.formats import check_new
from polyturn.rollout.evaluation.export.openai_rows import openai_row, write_lines
from polyturn.rollout.evaluation.export.stored import StoredEpisode, StoredPart, Tell, open_stored
from polyturn.rollout.fine_tuning.rows import tokenizer_digest, tokens_of

NO_SCORE = "has no score"
BELOW = "is below the minimum score"
TRUNCATED = "was ended by a limit"
SEVERAL = "is of several agents"
CREDENTIAL = "holds what looks like a credential"
UNREAD_CALL = "has a call that could not be read"
NO_ANSWER = "has no message of the policy"
SAME = "has the same conversation as another one"
NOT_BEST = "is beyond the best of its task"
UNBALANCED = "is beyond its environment's share"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which episodes are kept."""

    per_task: int | None = 1
    """The best so many of each task: by score, then by the fewest turns; None: all."""
    min_score: float | None = None
    """None: what is a success where they were played."""
    balance: bool = False
    """Keep as many of each environment as of the one that has the fewest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curated:
    """What was kept, and what was not."""

    num_rows: int
    num_with_tokens: int
    by_environment: Mapping[str, int]
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Episodes by the reason for which they are not there."""

    @property
    def num_dropped(self) -> int:
        return sum(self.dropped.values())


class _Candidate(NamedTuple):
    """An episode that may be kept, in the order of preference."""

    loss: float
    """Minus its score."""
    num_turns: int
    place: int
    """Among all episodes that are read."""
    environment: str
    task: str


def curate(source: Path, output: Path, choice: Choice, *, tell: Tell) -> Curated:
    """Write the rows that are chosen of what `source` holds, in its order, as `fine_tuning.rows` reads them.

    What is stored is read twice: once to choose, with a few numbers of each episode in memory, and once to write.

    Raises:
        ConfigError: as `export`, or nothing is left.
    """
    check_new(output)
    parts = open_stored(source, tell)
    dropped: Counter[str] = Counter()
    candidates = list(_candidates(parts, choice, dropped))
    kept = _best_of_tasks(candidates, choice.per_task, dropped)
    if choice.balance:
        kept = _balanced(kept, dropped)
    if not kept:
        return Curated(num_rows=0, num_with_tokens=0, by_environment={}, dropped=dict(dropped))
    places = {candidate.place for candidate in kept}
    num_with_tokens = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal num_with_tokens
        for place, (stored, tokenizer) in enumerate(_episodes(parts)):
            if place in places:
                row = row_of(stored, tokenizer)
                num_with_tokens += "tokens" in row
                yield row

    number = write_lines(output, rows())
    counts = Counter(candidate.environment for candidate in kept)
    return Curated(
        num_rows=number,
        num_with_tokens=num_with_tokens,
        by_environment=dict(sorted(counts.items())),
        dropped=dict(dropped),
    )


def row_of(stored: StoredEpisode, tokenizer: str) -> dict[str, Any]:
    """An episode as a row; with its tokens where it is known which `tokenizer` made them, and not empty."""
    row = openai_row(stored)
    if tokenizer and any(segment.num_sampled for segment in stored.episode.segments):
        row["tokens"] = tokens_of(stored.episode.segments, tokenizer)
    return row


def _episodes(parts: Sequence[StoredPart]) -> Iterator[tuple[StoredEpisode, str]]:
    """All episodes, each with the digest of the tokenizer that made its tokens; empty: nobody knows."""
    for part in parts:
        tokenizer = "" if part.model_path is None else tokenizer_digest(part.model_path, part.template)
        for stored in part.stream():
            yield stored, tokenizer


def _candidates(parts: Sequence[StoredPart], choice: Choice, dropped: Counter[str]) -> Iterator[_Candidate]:
    seen: set[bytes] = set()
    place = 0
    for part in parts:
        least = part.success_score if choice.min_score is None else choice.min_score
        for stored in part.stream():
            reason = _unfit(stored, least)
            if reason is None:
                digest = hashlib.blake2b(orjson.dumps(stored.episode.messages), digest_size=16).digest()
                reason = SAME if digest in seen else None
                seen.add(digest)
            if reason is None:
                yield _candidate(stored, place)
            else:
                dropped[reason] += 1
            place += 1


def _candidate(stored: StoredEpisode, place: int) -> _Candidate:
    episode = stored.episode
    return _Candidate(
        loss=-(stored.score or 0.0),
        num_turns=episode.num_turns,
        place=place,
        environment=episode.env_id,
        task=episode.task_digest or episode.task_id,
    )


def _unfit(stored: StoredEpisode, least: float) -> str | None:
    """Why an episode is nothing to learn from, whatever others there are."""
    episode = stored.episode
    if stored.score is None:
        return NO_SCORE
    if episode.outcome is Outcome.TRUNCATED:
        return TRUNCATED
    if stored.score < least:
        return BELOW
    if stored.is_of_several:
        return SEVERAL
    if stored.held_credential:
        return CREDENTIAL
    if all(message["role"] != "assistant" for message in episode.messages):
        return NO_ANSWER
    calls = (call for message in episode.messages for call in message.get("tool_calls", ()))
    return UNREAD_CALL if any(not call["function"].get("name") for call in calls) else None


def _best_of_tasks(
    candidates: Sequence[_Candidate], per_task: int | None, dropped: Counter[str]
) -> list[_Candidate]:
    if per_task is None:
        return list(candidates)
    taken: Counter[tuple[str, str]] = Counter()
    kept = []
    for candidate in sorted(candidates):
        task = (candidate.environment, candidate.task)
        if taken[task] < per_task:
            taken[task] += 1
            kept.append(candidate)
    dropped[NOT_BEST] += len(candidates) - len(kept)
    return kept


def _balanced(candidates: Sequence[_Candidate], dropped: Counter[str]) -> list[_Candidate]:
    """The best of each environment, as many as the one with the fewest has."""
    counts = Counter(candidate.environment for candidate in candidates)
    most = min(counts.values(), default=0)
    taken: Counter[str] = Counter()
    kept = []
    for candidate in sorted(candidates):
        if taken[candidate.environment] < most:
            taken[candidate.environment] += 1
            kept.append(candidate)
    dropped[UNBALANCED] += len(candidates) - len(kept)
    return kept
