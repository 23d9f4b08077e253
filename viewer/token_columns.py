"""Tokens of a segment with what engine and trainer said of them, turns, segments, and the map of where both differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from polyturn.agents.episode import Episode
from polyturn.agents.ledger import Segment
from polyturn.rollout.token_credit import COLUMNS, TokenCredit
from polyturn.viewer.episode_table import version_range
from polyturn.viewer.plain_json import Json, finite, numbers
from polyturn.viewer.tokenizers import TokenTexts

MAX_LOG_RATIO = 20.0
MAX_TURNS = 2_000
MAX_EARLIER = 64
"""Segments before one that it may go on from."""
Column = npt.NDArray[Any]
Compared = tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32], TokenCredit]
"""Of a segment: which of its T tokens were sampled, their behavior logprobs [T], what the trainer said of them."""


def credit_columns(sampled: npt.NDArray[np.bool_], credit: TokenCredit | None) -> dict[str, Column | None]:
    """The columns of a segment's credit [T], NaN (False) where a token was not sampled; None where it has none."""
    found: dict[str, Column | None] = dict.fromkeys(COLUMNS)
    for name in COLUMNS:
        values = None if credit is None else getattr(credit, name)
        if values is not None and len(values) == sampled.sum():
            whole = (
                np.zeros(len(sampled), dtype=np.bool_) if name == "clipped" else np.full(len(sampled), np.nan)
            )
            whole[sampled] = values
            found[name] = whole
    return found


def token_page(
    segment: Segment, number: int, credit: TokenCredit | None, texts: TokenTexts, *, start: int, count: int
) -> Json:
    """The answer to `/api/tokens`."""
    here = slice(min(start, len(segment)), min(start + count, len(segment)))
    sampled = segment.sampled[here].tolist()
    credits = credit_columns(segment.sampled, credit)
    proximal = credits["proximal_logprobs"]
    difference = None if proximal is None else proximal - segment.logprobs.astype(np.float64)
    ratio = None if difference is None else np.exp(np.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO))

    def of_sampled(values: Column | None) -> list[Any] | None:
        """Null where a token was not sampled."""
        if values is None:
            return None
        shown = values[here].tolist() if values.dtype.kind in "bi" else numbers(values[here].tolist())
        return [value if is_sampled else None for value, is_sampled in zip(shown, sampled, strict=True)]

    return {
        "segment": number,
        "start": here.start,
        "total": len(segment),
        "ids": segment.token_ids[here].tolist(),
        "texts": texts.pieces(segment.token_ids[here]),
        "tokenizer": texts.sentence,
        "sampled": sampled,
        "turns": segment.turns[here].tolist(),
        "versions": of_sampled(segment.policy_versions),
        "logprobs": of_sampled(segment.logprobs),
        "trainer_logprobs": of_sampled(proximal),
        "differences": of_sampled(difference),
        "ratios": of_sampled(ratio),
        "weights": of_sampled(credits["correction_weights"]),
        "clipped": of_sampled(credits["clipped"]),
        "advantages": of_sampled(credits["advantages"]),
        "reference_logprobs": of_sampled(credits["reference_logprobs"]),
        "teacher_logprobs": of_sampled(segment.teacher_logprobs),
    }


def turns_of(episode: Episode, credit: Mapping[int, TokenCredit]) -> list[Json]:
    """`Turn` of each."""
    number = max(episode.num_turns, len(episode.turn_records))
    seconds = seconds_by_turn(episode)
    nothing = dict.fromkeys(("start_s", "generate_s", "tools_s", "queue_s"))
    return [
        {**_turn(episode, turn, credit), **(seconds[turn] if turn < len(seconds) else nothing)}
        for turn in range(min(number, MAX_TURNS))
    ]


def seconds_by_turn(episode: Episode) -> list[Json]:
    """When each turn began and what it waited for, of the turns of which that is known.

    A turn is what is generated until the environment steps, that step included; the reset's is before the first. Where
    an agent asks without stepping, each request is a turn.
    """
    spans = list(episode.timings.spans)
    steps = sum(kind == "tools" for kind, _, _ in spans)
    by_request = steps < episode.num_turns - 1 and sum(kind == "generate" for kind, _, _ in spans) > steps
    found: list[Json] = []
    turn: Json | None = None
    for kind, started, ended in spans:
        has_generated = turn is not None and turn["generate_s"] is not None
        if kind == "tools" and not has_generated:
            turn = None  # of the reset, as is what it waited for
            continue
        if turn is None or (by_request and has_generated and kind == "generate"):
            turn = {"start_s": finite(started), "generate_s": None, "tools_s": None, "queue_s": None}
            has_generated = False
        if kind == "generate" and not has_generated:
            found.append(turn)
        if (name := f"{kind}_s") in turn:
            turn[name] = (turn[name] or 0.0) + (finite(ended - started) or 0.0)
        if kind == "tools" and not by_request:
            turn = None
    return found


def _turn(episode: Episode, turn: int, credit: Mapping[int, TokenCredit]) -> Json:
    sampled: dict[str, list[Column]] = {"logprobs": [], "versions": [], "differences": [], "advantages": []}
    context: int | None = None
    role = ""
    for place, segment in enumerate(episode.segments):
        mask = segment.sampled & (segment.turns == turn)
        if not mask.any():
            continue
        columns = credit_columns(segment.sampled, credit.get(place))
        context = int(np.argmax(mask))
        role = segment.role
        sampled["logprobs"].append(segment.logprobs[mask])
        sampled["versions"].append(segment.policy_versions[mask])
        if (proximal := columns["proximal_logprobs"]) is not None:
            sampled["differences"].append(np.abs(proximal - segment.logprobs)[mask])
        if (advantages := columns["advantages"]) is not None:
            sampled["advantages"].append(advantages[mask])
    record = episode.turn_records[turn] if turn < len(episode.turn_records) else None
    return {
        "turn": turn,
        "role": (record.role if record is not None else role)[:200],
        "reward": None if record is None else finite(record.reward),
        "num_sampled": sum(len(column) for column in sampled["logprobs"]),
        "num_context": context,
        **version_range(sampled["versions"]),
        "mean_logprob": _mean(sampled["logprobs"]),
        "mean_difference": _mean(sampled["differences"]),
        "mean_advantage": _mean(sampled["advantages"]),
    }


def _mean(columns: Sequence[Column]) -> float | None:
    flat = np.concatenate([np.zeros(0), *columns]).astype(np.float64)
    return finite(flat.mean()) if len(flat) else None


def segment_tree(episode: Episode, advantages: Mapping[str, float]) -> list[Json]:
    """`SegmentNode` of each segment: its parent is the earlier one with the longest common prefix."""
    nodes: list[Json] = []
    for number, segment in enumerate(episode.segments):
        first = max(0, number - MAX_EARLIER)
        shared = [num_shared(segment.token_ids, one.token_ids) for one in episode.segments[first:number]]
        longest = max(shared, default=0)
        parent = first + shared.index(longest) if longest else None
        turns = segment.turns[segment.sampled]
        nodes.append(
            {
                "segment": number,
                "role": segment.role[:200],
                "parent": parent,
                "num_shared": longest,
                "num_tokens": len(segment),
                "num_sampled": segment.num_sampled,
                "first_turn": int(turns.min()) if len(turns) else None,
                "last_turn": int(turns.max()) if len(turns) else None,
                "advantage": finite(advantages.get(segment.role)),
            }
        )
    return nodes


def num_shared(one: Column, other: Column) -> int:
    """With how many equal tokens both begin."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def mismatch_map(steps: Iterable[tuple[int, Iterable[Compared]]], *, reason: str) -> Json:
    """The answer to `/api/mismatch`: |trainer - engine| by step and by position, in at most 49 rows of equal length.

    `reason` is given where there is nothing.
    """
    found: list[tuple[int, Column, Column]] = []
    for step, segments in steps:
        positions, gaps = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
        for sampled, logprobs, credit in segments:
            proximal = credit_columns(sampled, credit)["proximal_logprobs"]
            if proximal is not None:
                where = np.flatnonzero(sampled & np.isfinite(proximal))
                positions.append(where)
                gaps.append(np.abs(proximal - logprobs)[where])
        if sum(map(len, gaps)):
            found.append((step, np.concatenate(positions), np.concatenate(gaps)))
    longest = max((int(where.max()) for _, where, _ in found), default=0)
    edges = [0]
    width = max(32, -(-longest // 48))
    while found and edges[-1] + width <= longest:
        edges.append(edges[-1] + width)
    rows = [_by_position(edges, where, gaps) for _, where, gaps in found]
    return {
        "steps": [step for step, _, _ in found],
        "positions": edges if found else [],
        "mean": [row["mean"] for row in rows],
        "max": [row["max"] for row in rows],
        "num_tokens": [row["num"] for row in rows],
        "reason": None if found else reason,
    }


def _by_position(edges: Sequence[int], where: Column, gaps: Column) -> Mapping[str, list[Any]]:
    bins = np.searchsorted(np.asarray(edges), where, side="right") - 1
    counts = np.bincount(bins, minlength=len(edges))
    sums = np.bincount(bins, weights=gaps, minlength=len(edges))
    largest = np.full(len(edges), -np.inf)
    np.maximum.at(largest, bins, gaps)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
    return {"mean": numbers(means), "max": numbers(largest), "num": counts.tolist()}
