"""Packages of environments, as `polyturn env new` writes them and as in examples/: installed, tested, found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyturn.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
InSite = Callable[..., "subprocess.CompletedProcess[str]"]


def new(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["env", "new", *arguments])
    return result.exit_code, result.stdout, result.stderr


def install(package: Path, site: Path) -> InSite:
    """Install the package alone into `site`; what is returned runs a Python module that finds it there."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(site), str(package)]
    subprocess.run(command, check=True, capture_output=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=package,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, InSite]:
    """A written and installed package."""
    package = tmp_path_factory.mktemp("new") / "my-gym"
    code, out, err = new("my-gym", "--directory", str(package))
    assert (code, err) == (0, ""), err
    assert "polyturn env play my_gym/Multiply-v0" in out
    return package, install(package, tmp_path_factory.mktemp("site"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("json", "Python would import another 'json'"),
        ("Test", "'test' is installed in"),
        ("pytest", "'pytest' is installed in"),
        ("PyYAML.yaml", None),
        ("yaml", "'yaml' is installed in"),
        ("gymnasium", "'gymnasium' is installed in"),
        ("polyturn", "Python would import another 'polyturn'"),
        ("class", "cannot be the name of a package"),
    ],
)
def test_a_name_that_another_package_has_is_refused(tmp_path: Path, name: str, why: str | None) -> None:
    code, out, err = new(name, "--directory", str(tmp_path / "here"))
    if why is None:
        assert code == 0
        return
    assert (code, out) == (2, "")
    assert why in err
    assert not (tmp_path / "here").exists()


def test_a_new_package_passes_its_own_tests(written: tuple[Path, InSite]) -> None:
    package, run = written
    done = run("pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
    assert len((package / "my_gym" / "environment.py").read_text().splitlines()) < 60


def test_its_tests_fail_when_its_environment_is_broken(written: tuple[Path, InSite], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(written[0], broken)
    source = broken / "my_gym" / "environment.py"
    source.write_text(
        source.read_text().replace("polyturn.exact_match(message.content, self.task.label)", "1.0")
    )
    done = install(broken, tmp_path / "site")("pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 1
    assert "reward_hacks: empty is paid 1" in done.stdout


def test_polyturn_finds_a_new_package(written: tuple[Path, InSite]) -> None:
    _, run = written
    listed = run("polyturn", "env", "list").stdout
    assert "my_gym/Multiply-v0 " in listed and "polyturn/TwoHopSearch-v0" in listed
    played = run("polyturn", "env", "play", "my_gym/Multiply-v0", "--oracle", "--split", "heldout")
    assert played.stdout.splitlines()[-1].endswith("reward 1 (correct 1)")
    planned = run("polyturn", "train", "quickstart", "environment.id=my_gym/Multiply-v0", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "id: my_gym/Multiply-v0" in planned.stdout


def test_an_environment_is_checked_from_the_command_line(written: tuple[Path, InSite]) -> None:
    _, run = written
    done = run("polyturn", "env", "check", "my_gym/Multiply-v0", "max_turns=5", "--num-episodes", "64")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[0] == "my_gym/Multiply-v0"
    assert "checks passed" in done.stdout and "us a step" in done.stdout


def test_the_example_passes_its_own_tests(tmp_path: Path) -> None:
    package = tmp_path / "ferry_desk"
    shutil.copytree(ROOT / "examples" / "ferry_desk", package)
    run = install(package, tmp_path / "site")
    done = run("pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    assert "ferry_desk/FerryDesk-v0" in run("polyturn", "env", "list").stdout


@pytest.mark.parametrize("name", ["-gym", "my gym", "1gym", "class", "polyturn", "my/gym"])
def test_a_name_that_no_package_can_have(name: str, tmp_path: Path) -> None:
    code, _, err = new("--directory", str(tmp_path / "x"), "--", name)
    assert code == 2
    assert err.startswith(f"error: '{name}'") and "my-gym" in err
    assert not (tmp_path / "x").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = new("my-gym", "--directory", str(tmp_path))
    assert code == 2 and "not empty" in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
