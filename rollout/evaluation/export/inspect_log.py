"""Episodes as logs of inspect_ai, format 2: an archive (`.eval`), or one JSON file (`.json`), for each part.

The formats are those of inspect_ai 0.3.285, `inspect_ai.log.EvalLog` and its recorder of `.eval` files.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson

from polyturn.envs.messages import Message
from polyturn.rollout.evaluation.export.atif import file_name
from polyturn.rollout.evaluation.export.openai_rows import metadata_of
from polyturn.rollout.evaluation.export.stored import StoredEpisode, StoredPart, question_of
from polyturn.rollout.whole_file import whole_file

LOG_VERSION = 2
SCORER = "polyturn"
MAX_IN_MEMORY = 1 << 24
"""Bytes of what can be written only when all samples have gone by; more go to a temporary file."""
LIMITS = {"max_turns": "turn", "timeout_s": "time", "max_tokens": "token"}
"""What ended an episode, as inspect calls it; else `custom`."""


def write_inspect(part: StoredPart, output: Path) -> int:
    """Write a part as a log; how many episodes it has. The ending of `output` says which of the two formats."""
    return _write_json(part, output) if output.suffix == ".json" else _write_archive(part, output)


class _Samples:
    """A part's episodes as samples of inspect, and what the head of the log says of all of them."""

    def __init__(self, part: StoredPart) -> None:
        self._part = part
        self._epochs: Counter[str] = Counter()
        self._scores: list[float] = []
        self._number = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for stored in self._part.stream():
            name = file_name(stored.episode.task_id)
            self._epochs[name] += 1
            self._number += 1
            if stored.score is not None:
                self._scores.append(stored.score)
            yield sample_of(stored, sample_id=name, epoch=self._epochs[name], model=self._part.policy)

    @property
    def number(self) -> int:
        return self._number

    def start(self) -> dict[str, Any]:
        """What inspect writes before the first sample."""
        part = self._part
        identity = hashlib.sha256(f"{part.name}/{part.policy}/{part.created}".encode()).hexdigest()[:22]
        created = part.created or datetime.now(UTC).isoformat(timespec="seconds")
        return {
            "version": LOG_VERSION,
            "eval": {
                "eval_id": identity,
                "run_id": identity,
                "task_id": identity,
                "created": created,
                "task": part.name,
                "task_version": 0,
                "dataset": {"name": part.environment or part.name, "shuffled": False},
                "model": part.policy,
                "config": {},
                "packages": {"polyturn": version("polyturn")},
                "metadata": {"environment": part.environment, "split": part.split},
            },
            "plan": {"name": "plan", "steps": [], "config": {}},
        }

    def header(self) -> dict[str, Any]:
        """The log without its samples, once all have gone by."""
        start, scores = self.start(), self._scores
        created = start["eval"]["created"]
        start["eval"]["dataset"]["samples"] = len(self._epochs)
        start["eval"]["config"] = {"epochs": max(self._epochs.values(), default=1)}
        metrics = {"mean": {"name": "mean", "value": fmean(scores)}} if scores else {}
        results = {
            "total_samples": self._number,
            "completed_samples": len(scores),
            "scores": [
                {
                    "name": SCORER,
                    "scorer": SCORER,
                    "scored_samples": len(scores),
                    "unscored_samples": self._number - len(scores),
                    "metrics": metrics,
                }
            ],
        }
        stats = {"started_at": created, "completed_at": created, "model_usage": {}}
        return {**start, "status": "success", "results": results, "stats": stats}


def sample_of(stored: StoredEpisode, *, sample_id: str, epoch: int, model: str) -> dict[str, Any]:
    """An episode as an `EvalSample`. Without a score it has an error, and no score of 0."""
    episode = stored.episode
    messages = [_message(message, f"{episode.episode_id}/{i}") for i, message in enumerate(episode.messages)]
    sample: dict[str, Any] = {
        "id": sample_id,
        "epoch": epoch,
        "input": messages[: len(question_of(episode.messages))],
        "target": "",
        "messages": messages,
        "output": _output(messages, model),
        "metadata": metadata_of(stored),
        "total_time": episode.timings.total_s,
        "working_time": episode.timings.generate_s + episode.timings.tools_s,
        "uuid": f"{stored.entry}/{episode.episode_id}" if stored.entry else episode.episode_id,
        "turn_count": episode.num_turns,
    }
    if stored.score is not None:
        score: dict[str, Any] = {"value": stored.score, "metadata": dict(episode.reward_parts)}
        if stored.answer is not None:
            score["answer"] = stored.answer
        sample["scores"] = {SCORER: score}
    else:
        text = episode.error or str(stored.failure) or "it has no score"
        sentence = text.partition("\n")[0]
        sample["error"] = {"message": sentence, "traceback": text, "traceback_ansi": sentence}
    if stored.is_truncated:
        kind = LIMITS.get(episode.stop_reason, "token" if "token" in episode.stop_reason else "custom")
        sample["limit"] = {"type": kind, "limit": 0, "reason": episode.stop_reason}
    return sample


def _message(message: Message, message_id: str) -> dict[str, Any]:
    taken: dict[str, Any] = {"id": message_id, "role": message["role"], "content": message["content"]}
    if message["role"] == "tool":
        taken["tool_call_id"] = message.get("tool_call_id")
        taken["function"] = message.get("name")
        return taken
    taken["source"] = "generate" if message["role"] == "assistant" else "input"
    if (reasoning := message.get("reasoning")) is not None:
        taken["content"] = [
            {"type": "reasoning", "reasoning": reasoning},
            {"type": "text", "text": message["content"]},
        ]
    if calls := message.get("tool_calls"):
        taken["tool_calls"] = [_call(call) for call in calls]
    return taken


def _call(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments")
    found = {"id": call.get("id", ""), "function": call["function"].get("name", ""), "type": "function"}
    if isinstance(arguments, dict):
        return {**found, "arguments": arguments}
    return {**found, "arguments": {}, "parse_error": f"the arguments are no object: {arguments}"}


def _output(messages: list[dict[str, Any]], model: str) -> dict[str, Any]:
    """The last message of the policy, as inspect has it beside the conversation."""
    last = next((message for message in reversed(messages) if message["role"] == "assistant"), None)
    choices = [] if last is None else [{"message": last, "stop_reason": "stop"}]
    return {"model": model, "choices": choices}


def _summary(sample: dict[str, Any]) -> dict[str, Any]:
    """What inspect's list of samples shows without opening them."""
    found = {key: sample[key] for key in ("id", "epoch", "target", "total_time", "working_time", "uuid")}
    found["input"] = [{**message, "content": _short(message["content"])} for message in sample["input"]]
    found["metadata"] = {
        key: value for key, value in sample["metadata"].items() if isinstance(value, int | float | bool)
    }
    if "scores" in sample:
        found["scores"] = sample["scores"]
    if "error" in sample:
        found["error"] = sample["error"]["message"]
    if "limit" in sample:
        found["limit"] = sample["limit"]["type"]
    return {**found, "completed": True, "message_count": len(sample["messages"])}


def _short(content: Any) -> Any:
    return content[:500] if isinstance(content, str) else content


def _write_archive(part: StoredPart, output: Path) -> int:
    """As inspect's own recorder writes it, so that its viewer opens single samples: a member for each."""
    samples = _Samples(part)
    with (
        whole_file(output) as file,
        tempfile.SpooledTemporaryFile(MAX_IN_MEMORY) as summaries,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=5) as archive,
    ):
        archive.writestr("_journal/start.json", orjson.dumps(samples.start()))
        for number, sample in enumerate(samples):
            archive.writestr(f"samples/{sample['id']}_epoch_{sample['epoch']}.json", orjson.dumps(sample))
            summaries.write((b"," if number else b"[") + orjson.dumps(_summary(sample)))
        summaries.write(b"]" if samples.number else b"[]")
        summaries.seek(0)
        with archive.open("summaries.json", "w") as member:
            shutil.copyfileobj(summaries, member)
        archive.writestr("header.json", orjson.dumps(samples.header()))
    return samples.number


def _write_json(part: StoredPart, output: Path) -> int:
    """One object. Its samples stand last, as inspect has them: who wants the head alone reads no further."""
    samples = _Samples(part)
    with whole_file(output) as file, tempfile.SpooledTemporaryFile(MAX_IN_MEMORY) as spooled:
        for number, sample in enumerate(samples):
            spooled.write((b",\n" if number else b"\n") + orjson.dumps(sample))
        file.write(orjson.dumps(samples.header())[:-1] + b',"samples":[')
        spooled.seek(0)
        shutil.copyfileobj(spooled, file)
        file.write(b"]}\n")
    return samples.number
