"""`polyturn env new`: a package with an environment to begin from."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from polyturn.cli.outcome import reported
from polyturn.configs.errors import ConfigError
from polyturn.rollout.whole_file import removed_on_failure

FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "{package}/__init__.py": "init.py",
    "{package}/environment.py": "environment.py",
    "tests/test_environment.py": "test_environment.py",
}
"""What is written, and the template that it is written from."""


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The package's name, such as my-gym.")],
    directory: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where to; by default a new folder of that name.")
    ] = None,
) -> None:
    """Write a pip package with an environment, its tests and its registration.

    \b
    Example: polyturn env new my-gym
    """
    with reported():
        target = write_package(name, Path(name) if directory is None else directory)
    typer.echo(f"wrote {target}; now:")
    typer.echo(f"  pip install -e '{target}[test]' && pytest {target}")
    typer.echo(f"  polyturn env play {environment_id(name)} --seed 3")


def write_package(name: str, target: Path) -> Path:
    """Write the package into `target`. Raises ConfigError for a name no package can have, or a folder in use."""
    package = package_name(name)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already and not empty; name another --directory")
    values = {
        "distribution": name,
        "package": package,
        "class_name": "Multiply",
        "env_id": environment_id(name),
    }
    if target.exists():
        _write_files(target, values)
        return target
    with removed_on_failure(target.with_name(f"{target.name}.part")) as part:
        _write_files(part, values)
        part.rename(target)
    return target


def _write_files(target: Path, values: Mapping[str, str]) -> None:
    templates = files("polyturn.cli") / "package_template"
    for path, template in FILES.items():
        text = (templates / f"{template}.tmpl").read_text(encoding="utf-8")
        file = target / path.format(package=values["package"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(values), encoding="utf-8")


def package_name(name: str) -> str:
    """The import package of a distribution. Raises ConfigError."""
    package = name.lower().replace("-", "_").replace(".", "_")
    if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?", name) or keyword.iskeyword(package):
        raise ConfigError(
            f"'{name}' cannot be the name of a package: use letters, digits, '-' and '_', as in my-gym"
        )
    if package in ("polyturn", "tests") or package in sys.stdlib_module_names:
        raise ConfigError(
            f"'{name}' is taken: Python would import another '{package}'; choose another, as in my-gym"
        )
    found = importlib.util.find_spec(package)
    if found is not None:
        # An installed package of that name would stand before this one, or this one before it.
        where = found.origin or ", ".join(found.submodule_search_locations or ())
        raise ConfigError(
            f"'{name}' is taken: '{package}' is installed in {where}; choose another, as in my-gym"
        )
    return package


def environment_id(name: str) -> str:
    """The id of the environment in the package."""
    return f"{package_name(name)}/Multiply-v0"
