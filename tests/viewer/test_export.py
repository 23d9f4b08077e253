"""The page as one file: what is in it, what cannot get out of it, and how large it gets."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson
import pytest

from polyturn.viewer.answers import Answers
from polyturn.viewer.catalogue import Catalogue
from polyturn.viewer.export import ExportChoice, export_page, request_key
from tests.support.command_line import in_this_process
from tests.viewer.api_types import read_api_types
from tests.viewer.fixture import FixtureRun

RUN = "search-20260101-120000"


class Scripts(HTMLParser):
    """What a browser takes for scripts, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=False)
        self.found: list[tuple[dict[str, str | None], str]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script"
        if self._inside:
            self.found.append((dict(attributes), ""))

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1] = (self.found[-1][0], self.found[-1][1] + data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


@pytest.fixture(scope="module")
def page(made: FixtureRun, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("exported") / "page.html"
    export_page(
        Answers(Catalogue([made.run, made.evaluation, made.other_evaluation])),
        path,
        ExportChoice(first_step=3, last_step=5, num_episodes=12),
    )
    return path.read_text(encoding="utf-8")


def test_the_scripts_are_the_pages_own_whatever_the_episodes_say(page: str) -> None:
    scripts = Scripts(page).found
    assert [attributes.get("type") for attributes, _ in scripts] == ["module", "application/json"]
    data, code = scripts[1][1], scripts[0][1]
    assert "onerror=alert(1)" in data and "<" not in data
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[0].replace(
        "&#x27;", "'"
    )
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy
    assert not re.search(r'(?:src|href)="(?!data:)', page.partition(code)[0])


def test_the_answers_are_those_that_the_page_asks_for(page: str) -> None:
    types = read_api_types()
    read: dict[str, Any] = orjson.loads(Scripts(page).found[1][1])
    assert types.problems(read, "Embedded") == []
    answers = read["answers"]
    for key, answer in answers.items():
        path = urlsplit(key).path
        assert types.problems(answer, types.answers[path]) == [], key
    rows = answers[request_key("/api/episodes", [("run", RUN), ("set", "train")])]["rows"]
    assert {row["step"] for row in rows} == {5} and len(rows) == 12
    for row in rows:
        where = [("run", RUN), ("set", "train"), ("step", str(row["step"]))]
        episode = answers[request_key("/api/episode", [("id", row["episode_id"]), *where])]
        assert request_key("/api/group", [("group", row["group_id"]), *where]) in answers
        for segment in episode["segments"]:
            number = ("segment", str(segment["segment"]))
            key = request_key("/api/tokens", sorted([("id", row["episode_id"]), number, *where]))
            assert len(answers[key]["ids"]) == segment["num_tokens"]
    steps = {parse_qs(urlsplit(key).query)["step"][0] for key in answers if key.startswith("/api/step?")}
    assert steps == {"0", "3", "4", "5"}
    assert any("bound of episodes" in sentence for sentence in read["left_out"])


def test_a_key_is_that_of_encodeuricomponent() -> None:
    assert (
        request_key("/api/x", [("a", "g 1/ü&'(~)*!"), ("b", "-_.")])
        == "/api/x?a=g%201%2F%C3%BC%26'(~)*!&b=-_."
    )


def test_the_command_bounds_the_file(made: FixtureRun, tmp_path: Path) -> None:
    target = tmp_path / "small.html"
    done = in_this_process(
        "view", str(made.run), "--export", str(target), "--megabytes", "1", "--episodes", "1000"
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"page: {target}"
    assert "bound of size" in done.stdout and target.stat().st_size < 2_500_000
    wrong = in_this_process("view", str(made.run), "--export", str(target), "--steps", "a")
    assert wrong.returncode == 2 and "FROM:TO" in wrong.stderr
    nothing = in_this_process("view", str(tmp_path / "none"))
    assert nothing.returncode == 2 and "there is no directory" in nothing.stderr
