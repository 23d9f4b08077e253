"""What users and machines can do to the files of a command: one sentence that says where, and never a traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from polyturn.cli.main import app

pytestmark = pytest.mark.usefixtures("workspace")

JUNK = b"\x93\xff\x00\x01 not what was written \xfe" * 40


def said(*arguments: str) -> str:
    """What a command that cannot be done says: sentences that begin with `error: `, and nothing else."""
    result = CliRunner().invoke(app, arguments)
    if not isinstance(result.exception, SystemExit):
        raise AssertionError("a traceback would reach the user") from result.exception
    assert result.exit_code in (1, 2) and result.stdout == "", result.output
    lines = result.stderr.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), result.stderr
    return "\n".join(line.removeprefix("error: ") for line in lines)


def junk(path: Path) -> None:
    path.write_bytes(JUNK)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def circular(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def json_list(path: Path) -> None:
    path.write_text("[1, 2]")


DAMAGES = (junk, empty, cut, directory, dangling, circular, json_list)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_damaged_model_directory(workspace: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(workspace / "model" / name)
    assert name in said("train", "recipe.yaml")


@pytest.mark.parametrize("damage", [junk, directory, circular])
def test_a_damaged_recipe(workspace: Path, damage: Callable[[Path], None]) -> None:
    damage(workspace / "recipe.yaml")
    assert "recipe.yaml" in said("train", "recipe.yaml")


@pytest.mark.parametrize("damage", [junk, empty, cut, directory, dangling, circular])
def test_a_damaged_task_file(workspace: Path, damage: Callable[[Path], None]) -> None:
    tasks = workspace / "tasks.jsonl"
    tasks.write_text(
        '{"prompt": "q", "answer": "a"}\n' * 2 + '{"prompt": "a longer question", "answer": "a"}\n'
    )
    damage(tasks)
    single = ("environment.id=polyturn/SingleTurn-v0", "environment.tasks=tasks.jsonl")
    assert "tasks.jsonl" in said("train", "recipe.yaml", *single)


@pytest.mark.parametrize("key", ["output_dir", "run_dir"])
@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("recipe.yaml/runs", "is no directory"),
        ("/proc/1/runs", ""),
        ("/sys/kernel/runs", ""),
        ("/dev/full/runs", "is no directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_to(workspace: Path, key: str, place: str, why: str) -> None:
    sentence = said("train", "recipe.yaml", f"{key}={place}")
    assert place in sentence and why in sentence
    assert "name another place" in sentence or "choose a shorter name" in sentence
    assert not (workspace / "runs").exists()


def test_a_read_only_disk(workspace: Path) -> None:
    disk = workspace / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no disk can be mounted here")
    try:
        for arguments in (("train", "recipe.yaml", "run_dir=disk/run"), ("convert", "model", "disk/target")):
            assert "Read-only file system" in said(*arguments)
        assert "Read-only file system; choose a place" in said(
            "env", "new", "mine", "--directory", "disk/mine"
        )
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


RUN = {
    "config.yaml": "extends: quickstart\n",
    "identity.json": "{}",
}


def begin_run(workspace: Path) -> Path:
    """A run directory that looks as if a run had begun in it."""
    run = workspace / "run"
    run.mkdir()
    for name, text in RUN.items():
        (run / name).write_text(text)
    return run


@pytest.mark.parametrize("damage", [junk, empty, cut, directory])
@pytest.mark.parametrize("name", ["identity.json", "config.yaml"])
def test_a_resume_of_a_run_whose_record_is_damaged(
    workspace: Path, name: str, damage: Callable[[Path], None]
) -> None:
    run = begin_run(workspace)
    if name == "config.yaml":
        (run / "identity.json").unlink()
    damage(run / name)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    sentence = said("train", "recipe.yaml", "resume=true", "run_dir=run")
    assert name in sentence
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "nothing was changed"


def test_a_resume_with_other_data_changes_nothing(workspace: Path) -> None:
    run = begin_run(workspace)
    (run / "identity.json").write_text(json.dumps({"config": {"seed": 7, "trainer": {"num_steps": 5}}}))
    before = {path: path.read_bytes() for path in run.rglob("*")}
    sentence = said("train", "recipe.yaml", "resume=true", "run_dir=run")
    assert "seed is 0, the run began with 7" in sentence and "checkpoint.load=" in sentence
    assert {path: path.read_bytes() for path in run.rglob("*")} == before
    dry = said("train", "recipe.yaml", "resume=true", "run_dir=run", "--dry-run")
    assert dry == sentence


@pytest.mark.parametrize("name", ["state.json", "trainer.json"])
def test_a_resume_without_a_sound_checkpoint(workspace: Path, name: str) -> None:
    step = begin_run(workspace) / "checkpoints" / "step_000001"
    step.mkdir(parents=True)
    for part in ("state.json", "trainer.json"):
        (step / part).write_text("{}")
    junk(step / name)
    sentence = said("train", "recipe.yaml", "resume=true", "run_dir=run")
    assert "none of the checkpoints in" in sentence and "Delete them to begin anew" in sentence


def test_a_dry_run_of_a_resume_tells_what_it_changes(workspace: Path) -> None:
    run = begin_run(workspace)
    (run / "identity.json").write_text(json.dumps({"config": {"trainer": {"num_steps": 5}}}))
    done = CliRunner().invoke(app, ["train", "recipe.yaml", "resume=true", "run_dir=run", "--dry-run"])
    assert done.exit_code == 0, done.stderr
    assert done.stderr == "warning: resume: trainer.num_steps is 40, the run began with 5\n"


def test_a_new_run_beside_what_another_left(workspace: Path) -> None:
    (workspace / "run" / "trajectories").mkdir(parents=True)
    sentence = said("train", "recipe.yaml", "run_dir=run")
    assert sentence.startswith("run_dir: run holds trajectories of a run whose config.yaml is gone")


@pytest.mark.parametrize(
    "command", [("eval", "run", "recipe.yaml", "--model", "model"), ("convert", "model", "target")]
)
@pytest.mark.parametrize("damage", [junk, empty, directory, circular, json_list])
def test_other_commands_on_a_damaged_model(
    workspace: Path, command: tuple[str, ...], damage: Callable[[Path], None]
) -> None:
    damage(workspace / "model" / "config.json")
    assert "config.json" in said(*command)
    assert not (workspace / "target").exists()


def test_a_conversion_to_where_nothing_can_be_written() -> None:
    assert "recipe.yaml" in said("convert", "model", "recipe.yaml/target")


def test_a_new_environment_where_nothing_can_be_written() -> None:
    assert "recipe.yaml" in said("env", "new", "mine", "--directory", "recipe.yaml/there")


def test_a_package_that_could_not_be_written_can_be_tried_again(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name.endswith(".py"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert "No space left on device; make room there" in said("env", "new", "mine")
    assert not (workspace / "mine").exists() and not list(workspace.glob("*.part"))
    assert CliRunner().invoke(app, ["env", "new", "mine"]).exit_code == 0
