"""Conversations as OpenAI has them, a line of JSON each: `messages`, `tools`, and what is known as `metadata`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from polyturn.envs.messages import Message
from polyturn.rollout.evaluation.export.stored import StoredEpisode, StoredPart
from polyturn.rollout.whole_file import whole_file

LINE_ENDS = {"\u2028": b"\\u2028", "\u2029": b"\\u2029", "\u0085": b"\\u0085"}
"""What some readers take for the end of a line, as JSON escapes."""


def openai_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form: arguments are JSON text, thoughts are `reasoning_content`, as servers call them."""
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    taken: dict[str, Any] = {"role": message["role"], "content": message["content"]}
    if message["role"] == "tool":
        taken["tool_call_id"] = message.get("tool_call_id", "")
        return taken
    if name := message.get("name"):
        taken["name"] = name
    if (reasoning := message.get("reasoning")) is not None:
        taken["reasoning_content"] = reasoning
    if calls := message.get("tool_calls"):
        taken["tool_calls"] = [_call(call) for call in calls]
    return taken


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function") or {}
    arguments = function.get("arguments", {})
    # Spaces as `json.dumps` and chat templates write them: a reader that puts the text in a prompt as it is gets what
    # the model has seen.
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": call.get("id", ""),
        "type": "function",
        "function": {"name": function.get("name", ""), "arguments": text},
    }


def metadata_of(stored: StoredEpisode) -> dict[str, Any]:
    """What is known of an episode beside its messages, by names that all formats share; None stands for what is not."""
    episode = stored.episode
    return {
        "episode_id": episode.episode_id,
        "entry": stored.entry or None,
        "step": stored.step,
        "environment": episode.env_id,
        "task_id": episode.task_id,
        "task_digest": episode.task_digest,
        "task_index": stored.task_index,
        "sample": stored.sample,
        "seed": episode.seed,
        "score": stored.score,
        "failure": str(stored.failure) or None,
        "answer": stored.answer,
        "outcome": str(episode.outcome),
        "stop_reason": episode.stop_reason,
        "error": episode.error,
        "num_turns": episode.num_turns,
        "num_tool_calls": episode.num_tool_calls,
        "num_tool_errors": episode.num_tool_errors,
        "generate_s": episode.timings.generate_s,
        "tools_s": episode.timings.tools_s,
        "queue_s": episode.timings.queue_s,
        "total_s": episode.timings.total_s,
        "reward_parts": dict(episode.reward_parts),
        "metrics": dict(episode.metrics),
    }


def openai_row(stored: StoredEpisode) -> dict[str, Any]:
    """An episode as a line of OpenAI's data for fine-tuning. The score is `metadata.score`."""
    row: dict[str, Any] = {"messages": openai_messages(stored.episode.messages)}
    if stored.tools:
        row["tools"] = list(stored.tools)
    return {**row, "metadata": metadata_of(stored)}


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as one line, whatever the reader takes for an end of line."""
    line = orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)
    for character, escape in LINE_ENDS.items():
        line = line.replace(character.encode(), escape)
    return line + b"\n"


def write_openai(part: StoredPart, output: Path) -> int:
    """Write a part's episodes as JSONL; how many."""
    return write_lines(output, (openai_row(stored) for stored in part.stream()))


def write_lines(output: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    """Write rows as JSONL, all of them or nothing; how many."""
    number = 0
    with whole_file(output) as file:
        for row in rows:
            file.write(json_line(row))
            number += 1
    return number
