"""Curves of several runs, thinned to as many points as a page can show."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from polyturn.configs.metrics.declared import find_metric
from polyturn.configs.metrics.overview import OVERVIEW
from polyturn.viewer.catalogue import ViewedRun
from polyturn.viewer.plain_json import Json, finite, numbers

MAX_NAMES = 5_000
MAX_CURVES = 400


def metrics_of(runs: Sequence[ViewedRun], names: Sequence[str], *, num_points: int) -> Json:
    """The answer to `/api/metrics`; without names, the curves of the overview."""
    rows = {run.id: run.metrics.rows() for run in runs}
    known = sorted({name for of_run in rows.values() for row in of_run for name in row} - {"step"})[
        :MAX_NAMES
    ]
    charts = [(curve, found) for curve in OVERVIEW if (found := curve.names_in(known))]
    headline = [name for _, found in charts for name in found]
    wanted = list(dict.fromkeys(names or headline))
    curves = [
        _curve(run.id, name, rows[run.id], num_points)
        for name in wanted
        for run in runs
        if any(name in row for row in rows[run.id])
    ]
    problems = [
        f"{run.metrics.path}: {run.metrics.num_damaged} lines are no rows of metrics"
        for run in runs
        if run.metrics.num_damaged
    ]
    return {
        "names": known,
        "headline": headline,
        "overview": [
            {"title": curve.title, "names": found, "better": curve.better or None} for curve, found in charts
        ],
        "about": {name: about for name in dict.fromkeys([*headline, *wanted]) if (about := _about(name))},
        "curves": curves[:MAX_CURVES],
        "problems": problems,
    }


def _about(name: str) -> Json | None:
    found = find_metric(name)
    if found is None:
        return None
    healthy = found.healthy
    return {
        "unit": found.metric.unit,
        "meaning": found.metric.meaning,
        "low": None if healthy is None else healthy.low,
        "high": None if healthy is None else healthy.high,
        "otherwise": None if healthy is None else healthy.otherwise,
    }


def _curve(run: str, name: str, rows: Sequence[Any], num_points: int) -> Json:
    steps = [row["step"] for row in rows if name in row]
    values = np.array(
        [np.nan if (value := finite(row[name])) is None else value for row in rows if name in row]
    )
    if len(steps) <= num_points:
        return {
            "run": run,
            "name": name,
            "steps": steps,
            "values": numbers(values),
            "low": None,
            "high": None,
        }
    starts = np.linspace(0, len(steps), num_points + 1).astype(int)
    stretches = [values[start:end] for start, end in pairwise(starts)]
    there = [stretch[np.isfinite(stretch)] for stretch in stretches]
    return {
        "run": run,
        "name": name,
        "steps": [steps[end - 1] for end in starts[1:].tolist()],
        "values": [finite(stretch.mean()) if len(stretch) else None for stretch in there],
        "low": [finite(stretch.min()) if len(stretch) else None for stretch in there],
        "high": [finite(stretch.max()) if len(stretch) else None for stretch in there],
    }
