"""Episodes in ATIF, Harbor's Agent Trajectory Interchange Format (its RFC 0001), version 1.7."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from polyturn.agents.ledger import Segment
from polyturn.envs.messages import Message
from polyturn.rollout.evaluation.export.openai_rows import metadata_of, write_lines
from polyturn.rollout.evaluation.export.stored import StoredEpisode, StoredPart
from polyturn.rollout.whole_file import removed_on_failure

SCHEMA_VERSION = "ATIF-v1.7"
AGENT = "polyturn"
SOURCES = {"system": "system", "user": "user", "assistant": "agent"}


def trajectory_of(stored: StoredEpisode, *, model: str) -> dict[str, Any]:
    """An episode as an ATIF trajectory.

    A tool's result is an observation of the step that called it. Sampled tokens and logprobs stand in the metrics of
    their turn's step where a turn was sampled in one piece. An episode without messages has one empty step, because
    ATIF wants one.
    """
    episode = stored.episode
    drawn = _turns(episode.segments)
    steps: list[dict[str, Any]] = []
    turn = 0
    for message in episode.messages:
        if message["role"] == "tool":
            _observe(steps, message)
            continue
        step: dict[str, Any] = {"step_id": len(steps) + 1, "source": SOURCES[message["role"]]}
        step["message"] = message["content"]
        if message["role"] == "assistant":
            step |= _action(message)
            if turn in drawn:
                step["metrics"] = drawn[turn]
            turn += 1
        if name := message.get("name"):
            step["extra"] = {"name": name}
        steps.append(step)
    if not steps:
        steps = [{"step_id": 1, "source": "system", "message": ""}]
    agent: dict[str, Any] = {"name": AGENT, "version": version("polyturn"), "model_name": model}
    if stored.tools:
        agent["tool_definitions"] = list(stored.tools)
    known = {name: value for name, value in metadata_of(stored).items() if value is not None}
    return {
        "schema_version": SCHEMA_VERSION,
        "session_id": episode.episode_id,
        "trajectory_id": episode.episode_id,
        "agent": agent,
        "steps": steps,
        "final_metrics": {
            "total_prompt_tokens": sum(found["prompt_tokens"] for found in drawn.values()),
            "total_completion_tokens": sum(found["completion_tokens"] for found in drawn.values()),
            "total_steps": len(steps),
        },
        "extra": known,
    }


def _action(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (reasoning := message.get("reasoning")) is not None:
        found["reasoning_content"] = reasoning
    if calls := message.get("tool_calls"):
        found["tool_calls"] = [
            {
                "tool_call_id": call.get("id", ""),
                "function_name": call["function"].get("name", ""),
                "arguments": _object(call["function"].get("arguments")),
            }
            for call in calls
        ]
    return found


def _object(arguments: Any) -> Mapping[str, Any]:
    """What ATIF takes for arguments: an object; text that is none stands under `raw`."""
    return arguments if isinstance(arguments, Mapping) else {"raw": arguments}


def _observe(steps: list[dict[str, Any]], message: Message) -> None:
    """Put a tool's result where ATIF has it: at the step before, with the id of the call if that step made it."""
    if not steps:
        steps.append({"step_id": 1, "source": "system", "message": ""})
    last = steps[-1]
    calls = {call["tool_call_id"] for call in last.get("tool_calls", ())}
    result: dict[str, Any] = {"content": message["content"]}
    if message.get("tool_call_id") in calls:
        result["source_call_id"] = message["tool_call_id"]
    last.setdefault("observation", {"results": []})["results"].append(result)


def _turns(segments: Sequence[Segment]) -> dict[int, dict[str, Any]]:
    """By turn what was sampled in it, and how many tokens stood before."""
    found: dict[int, dict[str, Any]] = {}
    for segment in segments:
        places = np.flatnonzero(segment.sampled)
        for turn in np.unique(segment.turns[places]).tolist():
            own = places[segment.turns[places] == turn]
            found[turn] = {
                "prompt_tokens": int(own[0]),
                "completion_tokens": len(own),
                "completion_token_ids": segment.token_ids[own],
                "logprobs": segment.logprobs[own],
            }
    return found


def write_atif(part: StoredPart, output: Path) -> int:
    """Write a part's episodes; how many.

    Into a directory, a file for each episode, which is there whole or not at all; or, where `output` ends with
    `.jsonl`, a line for each.
    """
    trajectories = (trajectory_of(stored, model=part.policy) for stored in part.stream())
    if output.suffix == ".jsonl":
        return write_lines(output, trajectories)
    return _write_files(output, trajectories)


def _write_files(output: Path, trajectories: Iterator[Mapping[str, Any]]) -> int:
    names: set[str] = set()
    with removed_on_failure(output.with_name(f"{output.name}.part")) as folder:
        for trajectory in trajectories:
            name = file_name(str(trajectory["trajectory_id"]))
            if name in names:
                name = f"{name}-{len(names)}"
            names.add(name)
            content = orjson.dumps(trajectory, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_INDENT_2)
            (folder / f"{name}.json").write_bytes(content)
        folder.rename(output)
    return len(names)


def file_name(text: str) -> str:
    """A text as a name that is one on every file system, and in an archive: no separators, nothing hidden."""
    return re.sub(r"[^A-Za-z0-9._=+-]", "_", text).lstrip(".")[:120] or "episode"
