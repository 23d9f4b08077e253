"""`polyturn eval run`, `resume` and `ctl` as a user has them: also where the process is killed, or a file changed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import orjson
import pytest

from polyturn.rollout.evaluation.directory import ENTRIES, EPISODES, read_evaluation, read_lines
from polyturn.rollout.evaluation.records import Failure
from polyturn.rollout.store import TrajectoryStore
from tests.support.chat_server import ChatServer, chat_server, message
from tests.support.command_line import Done, in_this_process

NUM_TASKS = 12
SCRIPT = """\
import asyncio
from pathlib import Path

from polyturn.agents.policy import PolicyFault


async def play(messages, tools):
    said = messages[-1]["content"].split()[-1]
    await asyncio.sleep(0.5 if Path("slow").exists() else 0.05)
    if said == "3" and not Path("mended").exists():
        raise PolicyFault("there is no 3")
    return said
"""
SUITE = """\
name: mine
recipe: quickstart
defaults:
  environment: {id: polyturn/SingleTurn-v0, tasks: tasks.jsonl, max_tokens_per_turn: 48, max_tokens_per_episode: 640}
  reward: {kind: rule, name: exact_match}
  evaluation: {samples_per_task: 2, num_tasks: 1000}
entries:
  - name: all
  - name: some
    evaluation: {num_tasks: 5, samples_per_task: 1}
"""
QUICK = ("rollout.max_retries=0", "rollout.max_concurrent_episodes=2")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("play.py").write_text(SCRIPT)
    Path("suite.yaml").write_text(SUITE)
    rows = [{"id": f"t{i}", "prompt": f"Say {i}", "answer": str(i)} for i in range(NUM_TASKS)]
    Path("tasks.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return tmp_path


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts an evaluation in a process of its own; none outlives the test."""
    with ExitStack() as running:

        def evaluate(*arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-m", "polyturn", "eval", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            running.callback(process.wait)
            running.callback(process.kill)
            return process

        yield evaluate


def run(*overrides: str, directory: str = "E") -> Done:
    return in_this_process(
        "eval",
        "run",
        "suite.yaml",
        "--policy",
        "scripted:play.py:play",
        "--directory",
        directory,
        *QUICK,
        *overrides,
    )


def wait_for_lines(count: int, directory: str = "E") -> None:
    deadline = time.monotonic() + 240
    while len(list(read_lines(Path(directory) / EPISODES))) < count:
        assert time.monotonic() < deadline, "no episodes came"
        time.sleep(0.02)


def kept(directory: str, name: str) -> Counter[tuple[str, str]]:
    """How often each attempt is stored, and how it ended."""
    store = TrajectoryStore(Path(directory) / ENTRIES / name)
    found = Counter(
        (episode.episode_id, str(episode.outcome))
        for step in store.steps()
        for episode in store.read_step(step)
    )
    store.close()
    return found


def test_what_was_killed_is_gone_on_with_and_no_episode_is_played_twice_or_lost(
    start: Callable[..., subprocess.Popen[str]], folder: Path
) -> None:
    process = start(
        "run",
        "suite.yaml",
        "--policy",
        "scripted:play.py:play",
        "--directory",
        "E",
        *QUICK,
        "rollout.max_retries=1",
    )
    wait_for_lines(6)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    half = read_evaluation(Path("E"))
    before = {line.episode_id for line in half.entries[0].episodes}
    assert 0 < len(before) < 2 * NUM_TASKS and not half.entries[1].episodes
    # The writer may have been killed between a trajectory and its line, and within a line.
    with (folder / "E" / EPISODES).open("r+b") as lines:
        last = list(read_lines(folder / "E" / EPISODES))[-1]
        lines.truncate((folder / "E" / EPISODES).stat().st_size - 7)

    Path("mended").touch()
    done = in_this_process("eval", "resume", "E")
    assert done.returncode == 0, done.stderr
    whole, some = read_evaluation(Path("E")).entries
    assert (
        len(whole.episodes) == whole.num_asked == 2 * NUM_TASKS and len(some.episodes) == some.num_asked == 5
    )
    assert {line.score for line in (*whole.episodes, *some.episodes)} == {1.0}
    stored = kept("E", "all")
    assert max(stored.values()) == 1
    survived = [identity for identity, outcome in stored if outcome != "failed"]
    assert sorted(survived) == sorted(line.episode_id for line in whole.episodes)
    assert last.episode_id in survived, "what had its trajectory was not played again"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["num_left"] == 0 and [one["num_tasks"] for one in result["results"]] == [NUM_TASKS, 5]
    assert {path.name for path in (folder / "E").iterdir()} >= {
        "report.json",
        "episodes.parquet",
        "evaluation.yaml",
    }

    # What a disk has spoilt is not played again where it has a line.
    shutil.copytree("E", "D")
    for spoilt in Path("D").rglob("*.parquet"):
        spoilt.write_bytes(spoilt.read_bytes()[:-100])
    played = (folder / "D" / EPISODES).read_bytes()
    (folder / "D" / EPISODES).write_bytes(played[: played.rindex(b"\n", 0, -1) + 1])
    spoilt_again = in_this_process("eval", "resume", "D")
    assert spoilt_again.returncode == 0, spoilt_again.stderr
    assert (folder / "D" / EPISODES).read_bytes().count(b"\n") == played.count(b"\n")

    again = in_this_process("eval", "resume", "E")
    assert (
        json.loads(again.stdout.splitlines()[-1])["results"] == result["results"]
        and kept("E", "all") == stored
    )


def test_what_failed_is_no_score_and_is_played_again_by_a_resume_alone(folder: Path) -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert "3 episodes have no score; `polyturn eval resume E` plays them again" in done.stdout
    first = read_evaluation(Path("E")).entries[0]
    failed = [line for line in first.episodes if line.failure is not Failure.NONE]
    assert [(line.task_id, line.score, line.error) for line in failed] == [("t3", None, "there is no 3")] * 2
    Path("mended").touch()
    done = in_this_process("eval", "resume", "E")
    assert done.returncode == 0 and "evaluating mine (3)" in done.stdout
    assert sum(1 for line in read_lines(folder / "E" / EPISODES)) == 2 * NUM_TASKS + 5 + 3
    assert {line.score for line in read_evaluation(Path("E")).entries[0].episodes} == {1.0}


CHANGES = (
    ("suite.yaml", "turn: 48", "turn: 49", "all.environment.max_tokens_per_turn was 48 and is 49"),
    (
        "suite.yaml",
        "name: exact_match",
        "name: contains",
        "all.reward.name was 'exact_match' and is 'contains'",
    ),
    ("suite.yaml", "name: some", "name: other", "its entries were all, some and are all, other"),
    ("tasks.jsonl", "Say 4", "Say 5", "all: the file tasks.jsonl was changed"),
    ("play.py", "0.05", "0.06", "scripted:play.py:play: play.py was changed"),
)


def test_a_resume_of_something_else_is_refused_and_says_what_is_not_what_it_was() -> None:
    assert run("evaluation.num_tasks=1", "evaluation.samples_per_task=1").returncode == 0
    for path, old, new, complaint in CHANGES:
        text = Path(path).read_text()
        Path(path).write_text(text.replace(old, new))
        done = in_this_process("eval", "resume", "E")
        assert done.returncode == 2 and f"E cannot go on: {complaint}" in done.stderr, done.stderr
        assert "Undo that, or begin another one with `polyturn eval run`" in done.stderr
        Path(path).write_text(text)
    assert in_this_process("eval", "resume", "E", "rollout.max_concurrent_episodes=1").returncode == 0


def test_a_running_evaluation_is_paused_retuned_and_stopped(
    start: Callable[..., subprocess.Popen[str]], folder: Path
) -> None:
    assert in_this_process("eval", "ctl", "E", "status").returncode == 2  # and what it imports is there
    Path("slow").touch()
    process = start("run", "suite.yaml", "--policy", "scripted:play.py:play", "--directory", "E", *QUICK)
    wait_for_lines(2)
    assert "no further episode starts" in ctl("pause")
    status = json.loads(ctl("status"))
    assert status["state"] == "paused" and status["settings"]["max_concurrent_episodes"] == 2
    while json.loads(ctl("status"))["num_playing"]:
        pass
    count = len(list(read_lines(folder / "E" / EPISODES)))
    assert ctl("set", "max_concurrent_episodes=1") == "max_concurrent_episodes was 2 and is 1\n"
    assert ctl("set", "some.max_tokens=1000") == "some.max_tokens is 1000\n"
    refused = in_this_process("eval", "ctl", "E", "set", "max_concurent_episodes=1")
    assert refused.returncode == 2 and "did you mean 'max_concurrent_episodes'" in refused.stderr
    other = in_this_process("eval", "resume", "E")
    assert other.returncode == 2 and "another process plays E" in other.stderr
    assert len(list(read_lines(folder / "E" / EPISODES))) == count
    Path("slow").unlink()
    assert "goes on with" in ctl("resume")
    wait_for_lines(2 * 4)  # t3 is played, and fails
    Path("mended").touch()
    assert ctl("requeue") == "2 errored episodes are played again\n"
    wait_for_lines(2 * 4 + 2)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "`polyturn eval resume E` goes on from there" in output
    assert not list((folder / "E" / ENTRIES).glob("*/journal/*")), "what has ended is in columnar files"
    assert [orjson.loads(line)["kind"] for line in (folder / "E" / "changes.jsonl").open("rb")] == [
        "pause",
        "set",
        "set",
        "resume",
        "requeue",
    ]
    late = in_this_process("eval", "ctl", "E", "status")
    assert late.returncode == 2 and "nobody plays E now; `polyturn eval resume E`" in late.stderr


def test_an_endpoint_is_sampled_as_the_entry_says_and_its_tokens_are_paid_for_up_to_the_budget(
    folder: Path,
) -> None:
    usage = {"prompt_tokens": 400, "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 100}}

    async def evaluate() -> tuple[Done, Done, ChatServer]:
        async with chat_server(message("4", usage=usage)) as server:
            done = await asyncio.to_thread(
                in_this_process,
                *(
                    "eval",
                    "run",
                    "suite.yaml",
                    "only=[some]",
                    "evaluation.temperature=0.25",
                    "--directory",
                    "E",
                ),
                *("--policy", f"openai:{server.url}", "--policy-option", "model=m"),
                *(
                    "--policy-option",
                    "max_concurrent_requests=1",
                    "budget.max_cost=0.9",
                    "evaluation.top_p=0.5",
                ),
                *("--price", "prompt=1000", "--price", "cached_prompt=500", "--price", "completion=1000"),
            )
            more = await asyncio.to_thread(in_this_process, "eval", "resume", "E", "budget.max_cost=10")
        return done, more, server

    done, more, server = asyncio.run(evaluate())
    assert done.returncode == more.returncode == 0, done.stderr + more.stderr
    assert "some: its budget max_cost=0.9 is spent; the rest of it is not played" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["num_left"] == 5 - 3
    assert {(request["temperature"], request["top_p"]) for request in server.requests} == {(0.25, 0.5)}
    [entry] = read_evaluation(Path("E")).entries
    assert [line.cost for line in entry.episodes] == [pytest.approx(0.3 + 0.05 + 0.05)] * 5
    assert (entry.episodes[0].num_prompt_tokens, entry.episodes[0].num_completion_tokens) == (400, 50)
    assert [line.score for line in entry.episodes] == [0.0] * 4 + [1.0]
    assert [line.answer for line in entry.episodes] == ["4"] * 5 and len(server.requests) == 5


GRADER = """\
from pathlib import Path


def grade(episode):
    if episode.answer == "3" and not Path("mended").exists():
        raise RuntimeError("the grader knows no 3")
    return float(episode.answer == episode.label)


def even(episode):
    return float(int(episode.answer) % 2 == 0)
"""


def test_what_could_not_be_graded_is_graded_later_and_by_another_reward_without_playing(folder: Path) -> None:
    Path("grade.py").write_text(GRADER)
    Path("play.py").write_text("def play(messages, tools):\n    return messages[-1]['content'].split()[-1]\n")
    reward = "reward={kind: function, target: 'grade.py:grade'}"
    done = run("only=[all]", reward)
    assert done.returncode == 0, done.stderr
    [entry] = read_evaluation(Path("E")).entries
    failed = [line for line in entry.episodes if line.failure is Failure.SCORER]
    assert [line.task_id for line in failed] == ["t3", "t3"] and "the grader knows no 3" in (
        failed[0].error or ""
    )
    stored = kept("E", "all")
    assert max(stored.values()) == 1 and len(stored) == 2 * NUM_TASKS, (
        "what could not be graded is not played again"
    )

    Path("mended").touch()
    shutil.copytree("E", "R")
    assert in_this_process("eval", "resume", "R").returncode == 0
    assert {line.score for line in read_evaluation(Path("R")).entries[0].episodes} == {1.0}
    assert kept("R", "all") == stored, "a resume grades first what was played to its end"

    Path("play.py").unlink()  # nobody plays
    done = in_this_process("eval", "score", "E")
    assert done.returncode == 0, done.stderr
    graded = json.loads(done.stdout.splitlines()[-1])["graded"]
    assert graded == {"all": {"num_scored": 2, "num_failed": 0, "num_kept": 0}}
    [entry] = read_evaluation(Path("E")).entries
    assert {(line.score, line.failure) for line in entry.episodes} == {(1.0, Failure.NONE)}
    assert kept("E", "all") == stored

    done = in_this_process("eval", "score", "E", "reward.target=grade.py:even", "--directory", "F")
    assert done.returncode == 0, done.stderr
    [entry] = read_evaluation(Path("F")).entries
    assert [line.score for line in entry.episodes[::2]] == [1.0, 0.0] * (NUM_TASKS // 2)
    assert {line.score for line in read_evaluation(Path("E")).entries[0].episodes} == {1.0}, "E is as it was"
    for change, complaint in (
        ("evaluation.temperature=0.5", "all.evaluation.temperature was 1.0 and is 0.5"),
        ("reward.target=grade.py:nothing", "grade.py has no 'nothing'"),
    ):
        refused = in_this_process("eval", "score", "E", change, "--directory", "G")
        assert refused.returncode == 2 and complaint in refused.stderr, refused.stderr
        assert not Path("G").exists()


def ctl(*arguments: str) -> str:
    done = in_this_process("eval", "ctl", "E", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("ctl", "E", "stop"), "there is no 'stop'"),
        (("ctl", "E", "status"), "E is no evaluation: it has no evaluation.yaml"),
        (("resume", "."), ". is no evaluation"),
        (
            ("run", "suite.yaml", "--policy", "oracle", "--price", "prompt"),
            "--price 'prompt' must be KIND=PRICE",
        ),
        (
            ("run", "suite.yaml", "--policy", "oracle", "--price", "prompt=1"),
            "needs a price of prompt and one of completion",
        ),
        (("run", "suite.yaml", "--policy", "sglang:"), "policy: 'sglang:' has no address"),
        (
            ("run", "suite.yaml", "--policy", "sglang:http://127.0.0.1:9"),
            "no SGLang server answers at http://127.0.0.1:9",
        ),
        (("run", "suite.yaml", "--model", "."), ". has no config.json"),
    ],
)
def test_bad_input_is_told_before_anything_is_made(
    arguments: tuple[str, ...], complaint: str, folder: Path
) -> None:
    before = sorted(folder.iterdir())
    done = in_this_process("eval", *arguments)
    assert done.returncode == 2 and complaint in done.stderr, done.stderr
    assert sorted(folder.iterdir()) == before
