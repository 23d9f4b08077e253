"""The small files that a run leaves beside its episodes, read whatever is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import yaml

from polyturn.configs.schema.alarms import AlarmsConfig
from polyturn.viewer.episode_sets import Fingerprint, fingerprint
from polyturn.viewer.plain_json import Json, finite, text_of

ALARM = "alarm/"
MAX_CONFIG_BYTES = 2_000_000

MetricRow = Mapping[str, Any]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is not there or holds no such thing."""
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, and how many whole lines are none. A last line without end is left out."""
    try:
        content = path.read_bytes()
    except OSError:
        return [], 0
    found, num_damaged = [], 0
    for line in content.split(b"\n")[:-1]:
        try:
            row = orjson.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            found.append(row)
        else:
            num_damaged += 1
    return found, num_damaged


def read_config(path: Path) -> tuple[str | None, dict[str, Any]]:
    """A YAML file as text and, where it is one, as a mapping."""
    try:
        text = path.read_bytes()[:MAX_CONFIG_BYTES].decode(errors="replace")
    except OSError:
        return None, {}
    try:
        found = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return text, {}
    return text, found if isinstance(found, dict) else {}


def at(config: Mapping[str, Any], *keys: str) -> Any:
    """A value inside of mappings; None where there is none."""
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


@dataclass
class MetricRows:
    """`metrics.jsonl`, read again where it has changed."""

    path: Path
    _mark: Fingerprint = None
    _rows: list[MetricRow] = field(default_factory=list)
    num_damaged: int = 0

    def rows(self) -> list[MetricRow]:
        """The rows in the order of their steps; of a step that was trained again the last one."""
        mark = fingerprint(self.path)
        if mark is None or mark != self._mark:
            found, self.num_damaged = read_lines(self.path)
            by_step = {row["step"]: row for row in found if _is_step(row.get("step"))}
            self._rows = [by_step[step] for step in sorted(by_step)]
            self._mark = mark
        return self._rows

    def row(self, step: int) -> MetricRow:
        """The row of a step; empty where there is none."""
        return next((row for row in reversed(self.rows()) if row["step"] == step), {})


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def alarms_of(rows: Sequence[MetricRow]) -> list[Json]:
    """`Alarm` of each stretch of steps in which one went off, the newest first."""
    begun: dict[str, Json] = {}
    found: list[Json] = []
    for row in rows:
        for key, value in row.items():
            if not key.startswith(ALARM):
                continue
            name = key.removeprefix(ALARM)
            if value:
                if name not in begun:
                    begun[name] = {
                        "name": name,
                        "sentence": _sentence(name),
                        "since": row["step"],
                        "until": None,
                    }
                    found.append(begun[name])
            elif name in begun:
                begun.pop(name)["until"] = _step_before(rows, row["step"])
    return sorted(found, key=lambda alarm: alarm["since"], reverse=True)


def _step_before(rows: Sequence[MetricRow], step: int) -> int:
    return max((row["step"] for row in rows if row["step"] < step), default=step)


def _sentence(name: str) -> str:
    """What the option that sets its threshold says."""
    option = AlarmsConfig.model_fields.get(name)
    said = option.description if option is not None else None
    return said or name


def seconds_of(summary: Mapping[str, Any], rows: Sequence[MetricRow]) -> dict[str, float | None]:
    """Seconds by phase: of the summary, or summed over the rows of a run that has none yet."""
    given = at(summary, "seconds")
    if isinstance(given, Mapping):
        return {str(name): finite(value) for name, value in given.items()}
    sums: dict[str, float | None] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("seconds/") and (number := finite(value)) is not None:
                name = key.removeprefix("seconds/")
                sums[name] = (sums.get(name) or 0.0) + number
    return sums


def held_out_results(directory: Path, summary: Mapping[str, Any], sets: Sequence[str]) -> list[Json]:
    """`HeldOutResult` of each evaluation of a run of training."""
    found = []
    before_after: dict[str, Any] = {"": at(summary, "heldout")}
    suites = at(summary, "suites")
    before_after |= dict(suites) if isinstance(suites, Mapping) else {}
    for suite, results in before_after.items():
        for when in ("before", "after"):
            result = at(results, when) if isinstance(results, Mapping) else None
            if isinstance(result, Mapping):
                name = f"{suite}_{when}" if suite else when
                found.append(_result(str(suite) or "heldout", when, None, result, name, sets))
    for line in read_lines(directory / "evaluation" / "results.jsonl")[0]:
        step = line.get("step")
        if not _is_step(step):
            continue
        suite, when = text_of(line.get("suite")), f"step_{step:06d}"
        name = when if suite in ("", "heldout") else f"{suite}_{when}"
        found.append(_result(suite, str(step), step, line, name, sets))
    return found


def _result(
    suite: str, when: str, step: int | None, result: Mapping[str, Any], name: str, sets: Sequence[str]
) -> Json:
    num_tasks = result.get("num_tasks")
    return {
        "suite": suite[:200],
        "when": when,
        "step": step,
        **{key: finite(result.get(key)) for key in ("mean", "low", "high")},
        "num_tasks": num_tasks if _is_step(num_tasks) else None,
        "set": f"heldout:{name}" if f"heldout:{name}" in sets else None,
    }
