"""Stored episodes on a terminal: what is printed of them, and that nothing a model wrote is obeyed."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyturn.cli.main import app
from polyturn.cli.traces.paper import Paper, bar, fold, one_line
from polyturn.cli.traces.tokens import pieces, token_lines
from tests.support.stored_run import HOSTILE, episode, make_evaluation, make_run, segment

OBEYED = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("stored") / "run")


def traces(command: str, directory: Path, *arguments: str, code: int = 0) -> str:
    runner = CliRunner(env={"COLUMNS": "100"})
    result = runner.invoke(app, ["traces", command, str(directory), *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_an_episode_is_shown_as_a_conversation(run: Path) -> None:
    text = traces("show", run, "g00000003.1")
    for line in (
        "task task-3, polyturn/TwoHop-v0, seed 7",
        "reward 1; advantage 0.5; completed (terminated); 2 turns; 1 tool calls, 1 with errors; 4 tokens;",
        "[2] assistant, turn 1",
        "(thought 20 characters; --thinking shows them) I should look it up.",
        '→ search({"query":"capital of France"})',
        "[3] tool search\n    Paris is the capital.",
        "[4] assistant, turn 2\n    Answer 3.1",
    ):
        assert line in text, text
    assert "step 2  kept" in text.splitlines()[0]
    assert "    I should look it up." in traces("show", run, "g00000003.1", "--thinking")
    several = traces("show", run, "--step", "1", "--limit", "2")
    assert several.count("━━ g0000000") == 2 and "2 of 4 that fit; --limit shows more" in several


def test_a_failed_attempt_is_shown_with_why(run: Path) -> None:
    text = traces("show", run, "--outcome", "dropped")
    assert "no reward; failed (no_engine)" in text and "no engine answered\n  a trace" in text


def test_hostile_text_stays_text(run: Path) -> None:
    for arguments in (
        ("show", "g00000004.0.1", "--color", "always", "--tokens", "mask"),
        ("search", "owned", "--color", "always", "--context", "200"),
        ("show", "g00000004.0.1", "--json"),
        ("search", "owned", "--json", "--context", "200"),
    ):
        text = traces(arguments[0], run, *arguments[1:])
        # Colours are the only sequences, and only ours.
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert "owned" in plain and not OBEYED.search(plain.replace("\n", "")), arguments
    shown = json.loads(traces("show", run, "g00000004.0.1", "--json"))
    assert shown["messages"][-1]["content"] == HOSTILE
    [found] = [json.loads(line) for line in traces("search", run, "owned", "--json").splitlines()]
    assert found["matches"][0]["message"] == 4 and found["episode_id"] == "g00000004.0.1"


def test_a_search_shows_where_the_text_stands(run: Path) -> None:
    text = traces("search", run, "capital", "--step", "1:2", "--reward", "1", "--context", "5")
    assert text.count('    [2] assistant call: …ry":"«capital» of F…') == 4
    assert text.count("    [3] tool content: … the «capital».") == 4
    assert text.startswith(
        "g00000000.1.0  train  step 1  reward 1  completed (terminated)  2 turns  1 calls (1 errors)"
    )
    rows = [json.loads(line) for line in traces("search", run, "--sort", "-reward", "--json").splitlines()]
    rewards = [row["reward"] for row in rows]
    # What has no reward comes last.
    assert rewards[:-1] == sorted(rewards[:-1], reverse=True) and rewards[-1] is None and len(rows) == 10
    limited = traces("search", run, "--limit", "3")
    assert limited.count("\ng0") == 2 and "the first 3; --limit 0 shows all" in limited


def test_statistics_are_a_table_and_bars(run: Path) -> None:
    text = traces("stats", run, "--by", "step")
    for line in (
        "10 episodes of train; also stored: evaluation/after",
        r"reward +0\.472 +0\.25 +1 +1",
        r"0 +4 +44\.4%  █+",
        r"no_engine +1 +10\.0%  █+",
        r"search +9 +4 +0 +0 +0\.250 +0\.250",
        r"3 +2 +0\.25 +50% +0% +50%",
    ):
        assert re.search(rf"^{line}", text, flags=re.MULTILINE), text
    value = json.loads(traces("stats", run, "--json", "--outcome", "tool_error"))
    assert value["num_episodes"] == 4 and value["tools"]["search"]["num_failures"] == 4


def test_statistics_of_a_run_end_with_the_overview_of_its_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "over the steps" not in traces("stats", run)
    rows = [
        {"step": step, "reward/mean": reward, "seconds/\x1b[2J": 1.0}
        for step, reward in ((1, 0.0), (2, 1.0), (4, 0.5))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = traces("stats", run)
    assert re.search(r"^reward/mean +0 +0\.5 +0 +1  ▁█[▄▅]$", text, flags=re.MULTILINE), text
    assert not OBEYED.search(text.replace("\n", ""))
    value = json.loads(traces("stats", run, "--json"))
    assert value["overview"]["reward/mean"] == [[1, 0.0], [2, 1.0], [4, 0.5]]


def test_an_evaluation_under_way_is_read(tmp_path: Path) -> None:
    directory = make_evaluation(tmp_path / "evaluation")
    assert "3 episodes of qa, sums" in traces("stats", directory, "--by", "part")
    assert "sums" in traces("search", directory, "--in", "sums")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("search", "--in", "eval"), "no part 'eval' is stored in"),
        (("search", "(", "--regex"), "'(' is no regular expression"),
        (("search", "--step", "x"), "--step: 'x' is no range: write 2, 2:5, 2: or :5"),
        (("search", "--sort", "size"), "--sort: 'size' is none of reward"),
        (("stats", "--by", "size"), "--by: 'size' is none of part, step"),
        (("show", "g9"), "(searched: train); `polyturn traces stats` says what there is"),
        (("show", "--in", "eval"), "there are train, evaluation/after"),
        (("show", "--tokens", "logprobs"), "did you mean 'logprob'?"),
        (("show", "--tokens", "mask", "--tokenizer", "builtin:none"), "no shipped model 'none'"),
        (("stats", "--color", "red"), "--color: 'red' is none of auto, always, never"),
    ],
)
def test_what_cannot_be_meant_is_refused(run: Path, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in traces(arguments[0], run, *arguments[1:], code=2)


def test_a_directory_without_episodes_is_refused_with_what_is_near(run: Path) -> None:
    assert f"name one of them: {run}" in traces("stats", run.parent, code=2)


def test_damage_is_a_warning_beside_what_is_sound(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    (directory / "trajectories" / "step_000001.parquet").write_bytes(b"PAR1 no more")
    result = CliRunner().invoke(app, ["traces", "stats", str(directory)])
    assert result.exit_code == 0 and "6 episodes of train" in result.stdout
    assert "warning: " in result.stderr and "step_000001.parquet is damaged" in result.stderr


def test_tokens_are_text_where_there_is_a_tokenizer(run: Path) -> None:
    text = traces(
        "show",
        run,
        "g00000003.1",
        "--tokens",
        "mask",
        "--tokenizer",
        "builtin:tiny-searcher",
        "--color",
        "always",
    )
    assert "tokens of segment 0: 7, 4 sampled" in text and "\x1b[32m" in text
    assert "10 11 12 13 14 15 16" in traces("show", run, "g00000003.1", "--tokens", "turn")
    paper = Paper(width=20, is_coloured=False)
    found = list(
        token_lines(
            episode(0, 0, segments=(segment(3, 20),)), lambda ids: "ab\n" * len(ids), "version", paper
        )
    )
    assert found[2:] == ["ab⏎"] * 23


def test_tokens_that_make_one_character_come_as_one() -> None:
    raw = [b"a", *(bytes([byte]) for byte in "é漢".encode()), b"\xff", b"b"]
    decode = lambda ids: b"".join(raw[identity] for identity in ids).decode(errors="replace")  # noqa: E731
    found = list(pieces(range(len(raw)), decode))
    assert [text for text, _ in found][:3] == ["a", "é", "漢"] and "".join(
        text for text, _ in found
    ).endswith("b")


def test_lines_are_folded_by_what_they_take_up() -> None:
    assert list(fold("one two three", 7)) == ["one two", "three"]
    assert list(fold("漢字漢字 x", 4)) == ["漢字", "漢字", "x"]
    assert list(fold("abcdefghij", 4)) == ["abcd", "efgh", "ij"]
    assert list(fold("", 4)) == [""]
    paper = Paper(width=40, is_coloured=False)
    lines = list(paper.lines("x" * 10_000_000, limit=3))
    assert len(lines) == 4 and lines[-1] == "… 10,000,000 characters in all; --full shows them"
    assert list(paper.lines("short", limit=3, indent=2)) == ["  short"]
    assert one_line("a\nb" + "c" * 50, 8) == "a⏎ bccc…"
    assert bar(0, 8) == "" and bar(1, 8) == "█" * 8 and bar(0.001, 8) == "▏"


def test_a_terminal_gets_colours_and_a_pager(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real terminal: the pager is started where the lines are more than it has, and gets what is printed."""
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ncat > {tmp_path}/paged\n")
    pager.chmod(0o755)
    monkeypatch.setenv("PAGER", str(pager))
    monkeypatch.setenv("LINES", "12")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for arguments, is_paged in (([], False), (["the"], True), (["the", "--no-pager"], False)):
        (tmp_path / "paged").unlink(missing_ok=True)
        text = _on_terminal(["traces", "search", str(run), *arguments])
        assert (tmp_path / "paged").exists() is is_paged, text
        printed = (tmp_path / "paged").read_text() if is_paged else text
        assert "g00000000.0.0" in printed and "\x1b[" in printed


def _on_terminal(arguments: list[str]) -> str:
    """What the command prints whose standard output is a terminal; a fork of this process, which has read it all."""
    process, terminal = pty.fork()
    if process == 0:
        code = 1
        with contextlib.suppress(BaseException):
            # Those of this process are pytest's.
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w"))
            app(arguments, standalone_mode=False)
            sys.stdout.flush()
            code = 0
        os._exit(code)
    found = b""
    # The end of a terminal is an error.
    with contextlib.suppress(OSError), open(terminal, "rb", buffering=0) as opened:
        while piece := opened.read(65536):
            found += piece
    assert os.waitpid(process, 0)[1] == 0, found
    return found.decode()
