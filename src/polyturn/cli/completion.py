"""What a shell completes: recipes and their options, suites, environments, policies, runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from polyturn.configs.loading.loader import shipped_names
from polyturn.configs.loading.validation import field_paths, shape_of
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.evaluation.directory import EVALUATIONS

RUNS = Path("runs")
"""Where recipes put their runs, unless they say otherwise."""


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes; files are the shell's own."""
    return _beginning(shipped_names("recipe"), incomplete) or _files(incomplete, ".yaml")


def complete_recipe_or_suite(incomplete: str) -> list[str]:
    """Shipped recipes and suites."""
    return _beginning([*shipped_names("recipe"), *shipped_names("suite")], incomplete) or _files(
        incomplete, ".yaml"
    )


def complete_override(incomplete: str) -> list[str]:
    """`a.b.c=` for every option of a recipe, and behind the `=` the values of a choice."""
    key, equals, begun = incomplete.partition("=")
    fields = dict(field_paths(RunConfig))
    if equals:
        field = fields.get(key)
        values = () if field is None else _choices(field.annotation)
        return [f"{key}={value}" for value in _beginning(values, begun)]
    plain = [f"{path}=" for path, field in fields.items() if shape_of(field) is None]
    return _beginning(plain, incomplete)


def complete_environment(incomplete: str) -> list[str]:
    """Registered environments."""
    from polyturn.envs.registry import list_environments

    return _beginning([found.env_id for found in list_environments()], incomplete)


def complete_policy(incomplete: str) -> list[str]:
    """Policies that are known by name."""
    from polyturn.agents.policies.named import NAMES

    # What follows the colon is the user's own.
    return _beginning([name.partition(":")[0] + ":" * (":" in name) for name in NAMES], incomplete)


def complete_run(incomplete: str) -> list[str]:
    """Directories of runs and evaluations below the one that is begun, or in `runs/`."""
    begun = Path(incomplete or ".")
    folder = begun if incomplete.endswith("/") or not incomplete else begun.parent
    places = [folder, RUNS, RUNS / EVALUATIONS] if folder == Path() else [folder]
    found = [path for place in places if place.is_dir() for path in sorted(place.iterdir()) if path.is_dir()]
    runs = [str(path) for path in found if _is_run(path)]
    # On the way to one, the directories themselves.
    return _beginning(runs, incomplete) or _beginning([f"{path}/" for path in found], incomplete)


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.yaml", "evaluation.yaml", "trajectories"))


def _files(incomplete: str, ending: str) -> list[str]:
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    if not folder.is_dir():
        return []
    found = [f"{path}/" if path.is_dir() else str(path) for path in sorted(folder.iterdir())]
    return _beginning([name for name in found if name.endswith(("/", ending))], incomplete)


def _choices(annotation: object) -> list[str]:
    """The values of a choice, of true or false, and null where that is one of them."""
    if annotation is bool:
        return ["true", "false"]
    found = []
    for member in get_args(annotation):
        if isinstance(member, str):
            found.append(member)
        elif member is type(None):
            found.append("null")
        else:
            found += _choices(member)
    return found


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
