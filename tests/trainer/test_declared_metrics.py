"""One table of metrics: what code makes is in it, what is in it is made, and the documentation shows it."""

from __future__ import annotations

import ast
import fnmatch
import functools
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from polyturn.configs.metrics.declared import find_metric, undeclared
from polyturn.configs.metrics.markdown import metrics_markdown
from polyturn.configs.metrics.overview import OVERVIEW
from polyturn.configs.metrics.table import HEALTHY, METRICS, WATCHED
from polyturn.configs.schema.alarms import AlarmsConfig
from polyturn.rollout.engines.fleet import Traffic
from polyturn.rollout.evaluation.held_out import EvaluationResult
from polyturn.trainer.run.alarms import KINDS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("agents", "envs", "rollout", "trainer")
LOOKS_LIKE_A_METRIC = re.compile(r"[a-z_*]+(/[a-z0-9_*]+)+")
MARK = "x_9"
"""Stands for what only a run knows, in a name."""


@functools.cache
def read(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The strings that a module writes, and the names of its fields."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree)
    fields_of = (
        node.target.id
        for node in nodes
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
    return tuple(written(tree)), tuple(fields_of)


def texts(path: Path) -> tuple[str, ...]:
    return read(path)[0]


def words(path: Path) -> tuple[str, ...]:
    """What a name may be put together from."""
    return (*read(path)[0], *read(path)[1])


def written(tree: ast.AST) -> Iterator[str]:
    """The strings; what is put into one stands as `*`."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def modules() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


FIRST = {metric.name.partition("/")[0] for metric in METRICS}


def spelled(name: str) -> list[str]:
    """A declared name as code may make it: with and without what may be missing."""
    return [
        name.replace("[*/]", part).replace("*", MARK) for part in ({"", "*/"} if "[*/]" in name else {""})
    ]


SPELLED = [one for metric in METRICS for one in spelled(metric.name)]
SPELLED += [f"environment/{MARK}/{one}" for one in SPELLED]


def is_declared(text: str) -> bool:
    """Whether a name, or one of those that a pattern stands for, is in the table."""
    return any(fnmatch.fnmatchcase(one, text) for one in SPELLED) or not undeclared([text.replace("*", MARK)])


def test_what_code_makes_is_in_the_table() -> None:
    owners = {metric.owner for metric in METRICS}
    found = {
        (str(path.relative_to(ROOT)), text)
        for path in modules()
        if str(path.relative_to(ROOT)) in owners
        for text in texts(path)
        if LOOKS_LIKE_A_METRIC.fullmatch(text) and text.partition("/")[0] in FIRST
    }
    assert len(found) > 100
    assert sorted(one for one in found if not is_declared(one[1])) == []


def is_made(name: str, owner: Path, known: set[str]) -> bool:
    """Whether the owner writes the name, or a pattern of it whose open parts are words that code knows."""
    for text in texts(owner):
        if not LOOKS_LIKE_A_METRIC.fullmatch(text):
            continue
        pattern = re.compile(re.escape(text).replace(r"\*", "(.+)"))
        for one in spelled(name):
            found = pattern.fullmatch(one)
            if found is not None and all(MARK in part or part in known for part in found.groups()):
                return True
    return False


def test_what_is_in_the_table_is_made() -> None:
    known = {word for path in modules() for word in words(path)}
    assert [m.name for m in METRICS if not is_made(m.name, ROOT / m.owner, known)] == []
    metrics_module = ROOT / "trainer/run/metrics.py"
    assert not is_made("train/no_such_figure", metrics_module, known)
    assert not is_made("nothing/mean", metrics_module, known)


def test_each_name_stands_once_with_a_unit_and_a_page() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.unit and metric.meaning and (ROOT / metric.owner).is_file()
        page, _, anchor = metric.page.partition("#")
        text = (ROOT / "docs" / page).read_text()
        headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        anchors = {re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in headings}
        assert not anchor or anchor in anchors, metric.page
        row = metric.name.replace("[*/]", "").replace("*", MARK)
        found = find_metric(row if not row.startswith("environment/") else "environment/a/b/reward/mean")
        assert found is not None


def test_figures_that_are_fields_are_all_declared() -> None:
    numbers = {field.name for field in fields(EvaluationResult)} - {"method", "policy", "metrics"}
    assert undeclared(f"heldout/greedy/{name}" for name in numbers) == []
    assert undeclared(f"engine/{name}" for name in Traffic().figures()) == []
    assert set(AlarmsConfig.model_fields) - {"after_steps"} == set(KINDS) == set(WATCHED.values())
    for name, alarm in WATCHED.items():
        assert KINDS[alarm].figure.replace("*", "0") in [one.replace(MARK, "0") for one in spelled(name)]
    assert {*HEALTHY, *WATCHED} <= {metric.name for metric in METRICS} and not HEALTHY.keys() & WATCHED.keys()


@pytest.mark.parametrize(
    ("name", "pattern", "parts"),
    [
        ("reward/mean", "reward/mean", ()),
        ("reward/exact_match", "reward/*", ("exact_match",)),
        ("engine/3/kv_use", "engine/*/kv_use", ("3",)),
        ("engine/requests", "engine/[*/]requests", ()),
        ("engine/lost_hung", "engine/lost_*", ("hung",)),
        ("heldout/greedy/env/num_searches", "heldout/[*/]env/*", ("greedy", "num_searches")),
        ("offpolicy/age_4_to_7/kl", "offpolicy/[*/]kl", ("age_4_to_7",)),
        ("environment/mine/Game-v0/train/loss", "train/loss", ("mine/Game-v0",)),
    ],
)
def test_a_name_in_a_row_finds_its_metric(name: str, pattern: str, parts: tuple[str, ...]) -> None:
    found = find_metric(name)
    assert found is not None and (found.metric.name, found.parts) == (pattern, parts)


def test_what_nobody_declared_is_found_out() -> None:
    row = ["step", "reward/mean", "rewards/mean", "environment/a/loss", "train/los"]
    assert undeclared(row) == ["environment/a/loss", "rewards/mean", "train/los"]


def test_the_overview_is_of_declared_metrics() -> None:
    assert len({curve.title for curve in OVERVIEW}) == len(OVERVIEW) == 12
    for curve in OVERVIEW:
        for name in curve.names:
            assert any(fnmatch.fnmatchcase(one, name) for one in SPELLED), name
    seconds = next(curve for curve in OVERVIEW if curve.names == ("seconds/*",))
    assert seconds.names_in(["seconds/step", "train/loss", "seconds/tools"]) == [
        "seconds/step",
        "seconds/tools",
    ]


def test_the_page_shows_the_table() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page.endswith(metrics_markdown()), (
        "write what `polyturn config metrics` prints at the end of docs/metrics.md"
    )
