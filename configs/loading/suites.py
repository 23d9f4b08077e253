"""From a suite and the command line to the validated config of each of its entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from polyturn.configs.errors import ConfigError, did_you_mean
from polyturn.configs.loading import yaml_tree
from polyturn.configs.loading.loader import (
    COMMAND_LINE,
    find_shipped,
    load_config,
    merge,
    name_default_kinds,
    nearest_or_all,
    read_layers,
    read_override,
    read_section,
    shipped_names,
    unknown_keys,
)
from polyturn.configs.loading.yaml_tree import Tree
from polyturn.configs.schema.run import EnvironmentConfig, EvaluationConfig, RunConfig
from polyturn.configs.schema.suite import Budget, Need, SuiteConfig, SuiteEntry, name_of_environment


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedEntry:
    """One entry of a suite, with the config that it is played by."""

    name: str
    config: RunConfig
    success_score: float = 1.0
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedSuite:
    """What an evaluation plays."""

    name: str
    entries: tuple[LoadedEntry, ...]
    is_on_cpu: bool = False
    """Whether its engines are to run on the CPU because nobody says where, and this machine has no GPU."""


NEUTRAL_RECIPE = "evaluation"
ON_CPU = ("engines.device=cpu", "trainer.device=cpu", "model.dtype=float32")
GPU_FILES = ("nvidia[0-9]*", "dxg")
"""What the driver makes in `/dev`, the last where Linux is a guest of Windows."""


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether this machine has a GPU that engines run on."""
    return any(True for pattern in GPU_FILES for _ in devices.glob(pattern))


def load_evaluation(recipe_or_suite: str | Path, overrides: Sequence[str] = ()) -> LoadedSuite:
    """A suite, or the held-out tasks of a recipe as a suite of one entry.

    Overrides of a suite are as of `read_suite`; all others are the recipe's. Raises ConfigError, also where a file is
    missing that an entry needs.
    """
    if not is_suite(recipe_or_suite):
        return suite_of(load_config(recipe_or_suite, overrides))
    loaded, left = read_suite(recipe_or_suite, overrides)
    if missing := missing_files(loaded):
        raise ConfigError("\n".join(missing))
    is_on_cpu = loaded.recipe is None and not has_gpu()
    recipe = loaded.recipe or NEUTRAL_RECIPE
    beside = find_shipped("suite", recipe_or_suite).parent / recipe
    base = load_config(beside if beside.is_file() else recipe, [*(ON_CPU if is_on_cpu else ()), *left])
    return LoadedSuite(
        name=loaded.name,
        is_on_cpu=is_on_cpu and base.engines.device == "cpu",
        entries=tuple(
            LoadedEntry(
                name=entry.called,
                config=_config_of(base, entry, loaded.data),
                success_score=entry.success_score,
                budget=entry.budget,
            )
            for entry in loaded.played
        ),
    )


def suite_of(config: RunConfig) -> LoadedSuite:
    """The held-out tasks of a recipe as a suite of one entry."""
    entry = LoadedEntry(name=name_of_environment(config.environment.id), config=config)
    return LoadedSuite(name=config.name, entries=(entry,))


def _config_of(base: RunConfig, entry: SuiteEntry, data: Path) -> RunConfig:
    return base.model_copy(
        update={
            "environment": with_files(entry, data),
            "reward": entry.reward,
            "evaluation": EvaluationConfig(**dict(entry.evaluation)),
            "agent": entry.agent or base.agent,
        }
    )


def read_suite(suite: str | Path, overrides: Sequence[str] = ()) -> tuple[SuiteConfig, list[str]]:
    """A suite as it is written, and the overrides that are its recipe's.

    Its own are `data`, `only` and what an entry has: `evaluation.num_tasks=16` holds for every entry, and
    `entries.NAME.evaluation.num_tasks=16` for one. No file that an entry needs is looked for. Raises ConfigError.
    """
    tree = read_layers(find_shipped("suite", suite), SuiteConfig, ())
    tree = _with_defaults(tree)
    left = []
    for override in overrides:
        key = override.partition("=")[0].strip()
        first, _, rest = key.partition(".")
        if first in SUITE_KEYS:
            tree = merge(tree, read_override(override, SuiteConfig), SuiteConfig)
        elif first in ENTRY_KEYS:
            tree = _over_entries(tree, read_override(override, SuiteEntry), None)
        elif first == "entries" and rest:
            name = _entry_named(tree, rest)
            given = read_override(override.strip().removeprefix(f"entries.{name}."), SuiteEntry)
            tree = _over_entries(tree, given, name)
        else:
            left.append(override)
    return read_section(SuiteConfig, name_default_kinds(tree, SuiteConfig)), left


SUITE_KEYS = ("data", "only")
ENTRY_KEYS = ("environment", "evaluation", "reward", "success_score", "budget", "agent")


def _with_defaults(tree: Tree) -> Tree:
    """The suite with its defaults below every entry. Raises ConfigError where they have what no entry has."""
    defaults, entries = tree.value.get("defaults"), tree.value.get("entries")
    if defaults is None or not isinstance(defaults.value, dict) or not _is_list(entries):
        return tree
    if problems := list(unknown_keys(defaults, SuiteEntry, SuiteConfig, "defaults.")):
        raise ConfigError("\n".join(problems))
    merged = [merge(defaults, entry, SuiteEntry) for entry in entries.value]
    return Tree({**tree.value, "entries": Tree(merged, entries.origin)}, tree.origin)


def _over_entries(tree: Tree, given: Tree, name: str | None) -> Tree:
    """The suite with what is given over the entry of that name; None: over every entry."""
    entries = tree.value.get("entries")
    if not _is_list(entries):
        return tree
    merged = [
        merge(entry, given, SuiteEntry) if name is None or _name_in(entry) == name else entry
        for entry in entries.value
    ]
    return Tree({**tree.value, "entries": Tree(merged, entries.origin)}, tree.origin)


def _entry_named(tree: Tree, rest: str) -> str:
    """The name of an entry that an override begins with; a name may have dots. Raises ConfigError."""
    entries = tree.value.get("entries")
    names = [_name_in(entry) for entry in entries.value] if _is_list(entries) else []
    for name in sorted(names, key=len, reverse=True):
        if name and rest.startswith(f"{name}."):
            return name
    wanted = rest.partition(".")[0]
    raise ConfigError(
        f"{COMMAND_LINE}: there is no entry '{wanted}'{did_you_mean(wanted, names)}; there are {', '.join(names)}"
    )


def _name_in(entry: Tree) -> str:
    """What an entry is called, as far as it can be told before it is read."""
    written = entry.plain()
    if not isinstance(written, dict):
        return ""
    environment = written.get("environment")
    env_id = environment.get("id") if isinstance(environment, dict) else None
    name = written.get("name")
    return name if isinstance(name, str) else name_of_environment(env_id) if isinstance(env_id, str) else ""


def _is_list(tree: Tree | None) -> TypeGuard[Tree]:
    return tree is not None and isinstance(tree.value, list)


def with_files(entry: SuiteEntry, data: Path) -> EnvironmentConfig:
    """The entry's environment with the files that it needs among its options, unless they name others."""
    missing = missing_needs(entry, data)
    found = {
        need.option: str((data / need.file).expanduser())
        for need in entry.needs
        if need.file is not None and (need.required or need not in missing)
    }
    return entry.environment.model_copy(update={"options": {**found, **entry.environment.options}})


def missing_needs(entry: SuiteEntry, data: Path) -> list[Need]:
    """The files that an entry needs, required or not, and that are not there."""
    missing = []
    for need in entry.needs:
        if need.file is not None:
            named = entry.environment.options.get(need.option, data / need.file)
            if not Path(str(named)).expanduser().exists():
                missing.append(need)
    return missing


def missing_files(suite: SuiteConfig) -> list[str]:
    """A sentence for each file that an entry cannot be played without and that is not there, and what to do."""
    problems = []
    for entry in suite.played:
        for need in missing_needs(entry, suite.data):
            if need.required:
                named = entry.environment.options.get(need.option, suite.data / (need.file or ""))
                problems.append(f"{suite.name}: {entry.called}: there is no '{named}': {need.get}")
    if problems:
        problems.append(
            f"{suite.name}: name another directory than '{suite.data}' with data=DIR, one file with "
            "entries.NAME.environment.options.OPTION=FILE, or play other entries with only=[NAME]"
        )
    return problems


def is_suite(name: str | Path) -> bool:
    """Whether `name` is a suite, shipped or a file that lists entries, and no recipe.

    Raises ConfigError where it is neither.
    """
    path = Path(name)
    if path.is_file():
        return "entries" in yaml_tree.read_file(path).value
    recipes, suites = shipped_names("recipe"), shipped_names("suite")
    stem = str(name).removesuffix(".yaml")
    if stem not in recipes + suites:
        hint = nearest_or_all(stem, recipes + suites)
        raise ConfigError(f"there is no recipe or suite '{name}', neither a file nor a shipped one; {hint}")
    return stem not in recipes
