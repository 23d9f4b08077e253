"""The package's shape: light imports, and imports that only run downwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "ray", "sglang", "sglang_router", "megatron", "transformers")


@pytest.mark.parametrize(
    "module",
    [
        "polyturn",
        "polyturn.cli.main",
        "polyturn.configs.loader",
        "polyturn.configs.upstream",
        "polyturn.tools.search.bm25",
        "polyturn.tools.toolset",
        "polyturn.envs",
        "polyturn.agents",
        "polyturn.trainer.preflight",
    ],
)
def test_light_import(module: str) -> None:
    program = f"import {module}, sys; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_names_are_light_and_there() -> None:
    program = (
        "import sys, polyturn;"
        "[getattr(polyturn, name) for name in polyturn.__all__];"
        "from polyturn.envs.registry import list_environments; assert list_environments();"
        f"print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package as it would be installed: static tools do not follow the editable mapping."""
    source = tmp_path_factory.mktemp("source")
    for name in ("polyturn", "configs", "tools", "envs", "agents", "rollout", "trainer"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("built")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run(install, check=True)
    yield target
    shutil.rmtree(target)


def lint_imports(built: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            str(Path(sys.executable).parent / "lint-imports"),
            "--config",
            str(ROOT / "pyproject.toml"),
            "--no-cache",
        ],
        cwd=built,
        env={**os.environ, "PYTHONPATH": str(built)},
        capture_output=True,
        text=True,
    )


def test_imports_run_downwards_only(built: Path) -> None:
    done = lint_imports(built)
    assert done.returncode == 0, done.stdout


def test_an_upward_import_would_be_found(built: Path) -> None:
    planted = built / "polyturn" / "configs" / "planted.py"
    planted.write_text("from polyturn.envs import messages\n")
    try:
        done = lint_imports(built)
    finally:
        planted.unlink()
    assert done.returncode != 0
    assert "polyturn.configs.planted -> polyturn.envs" in done.stdout


def test_every_folder_of_code_and_data_is_installed(built: Path) -> None:
    """A folder missing from the package list would work in an editable install only."""
    for name in ("polyturn", "configs", "tools", "envs", "agents", "rollout", "trainer"):
        inside = built / "polyturn" if name == "polyturn" else built / "polyturn" / name
        for path in (ROOT / name).rglob("*"):
            if (
                path.suffix in (".py", ".yaml", ".jinja", ".json", ".safetensors", ".tmpl")
                and "__pycache__" not in path.parts
            ):
                assert (inside / path.relative_to(ROOT / name)).is_file(), f"{path} is not installed"


def test_every_module_stays_short() -> None:
    """One idea a module: 400 lines at most."""
    folders = ("polyturn", "configs", "tools", "envs", "agents", "rollout", "trainer")
    long = {
        str(path.relative_to(ROOT)): count
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
