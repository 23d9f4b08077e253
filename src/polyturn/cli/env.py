"""`polyturn env`: see the environments, play, check and write one."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import importlib.util
import inspect
import json
import keyword
import random
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Any

import typer

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.policies.episodes import MessageEpisodes, NamedPolicy
from polyturn.agents.policies.named import make_policy
from polyturn.agents.policy import MessagePolicy, Reply, as_reply
from polyturn.cli.completion import complete_environment
from polyturn.cli.options import PolicyName, PolicyOptions, read_options
from polyturn.cli.outcome import INTERRUPTED, RUN_FAILED, print_error, reported, table
from polyturn.configs.errors import ConfigError, as_config_error
from polyturn.envs.conformance.runner import CHECKS, check_isolated
from polyturn.envs.conformance.subject import Unavailable
from polyturn.envs.messages import Message, Task
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.registry import find, list_environments, make
from polyturn.rollout.whole_file import removed_on_failure
from polyturn.tools.plain import printable
from polyturn.tools.types import ToolSpec

app = typer.Typer(
    help="List, show, play, check and write environments.", no_args_is_help=True, rich_markup_mode=None
)

EnvId = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="As `polyturn env list` shows it.", autocompletion=complete_environment
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Arguments of the environment's constructor."),
]


@app.command("list")
def list_() -> None:
    """List the registered environments, those of installed packages included.

    \b
    Example: polyturn env list
    """
    typer.echo(table([(info.env_id, info.description) for info in list_environments()]))


@app.command()
def show(env_id: EnvId, options: Options = None) -> None:
    """Show an environment's tools, options, splits and a first observation.

    \b
    Example: polyturn env show polyturn/TwoHopSearch-v0
    """
    with reported():
        env = make_environment(env_id, options)
        info = next(found for found in list_environments() if found.env_id == env.env_id)
        typer.echo(f"{info.env_id}\n{info.description}\n{info.entry_point}\n")
        typer.echo("options:")
        typer.echo(table([(f"  {name}", default) for name, default in _constructor(env)]))
        typer.echo("\ntasks:")
        typer.echo(table([(f"  {split}", size) for split, size in _splits(env)]))
        typer.echo("\ntools:")
        for tool in env.tools:
            typer.echo(json.dumps(tool.to_openai()["function"], indent=2))
        observation, _ = env.reset(seed=0)
        typer.echo("\na first observation:")
        for message in observation:
            typer.echo(printable(f"[{message['role']}] {message['content']}"))
        env.close()


@app.command()
def play(
    env_id: EnvId,
    options: Options = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Draws the task, and seeds the environment.")
    ] = 0,
    split: Annotated[str, typer.Option(help="Where the task is drawn from.")] = "train",
    task: Annotated[str | None, typer.Option(metavar="ID", help="Play this task.")] = None,
    max_turns: Annotated[int, typer.Option(min=1, help="The episode is truncated after so many.")] = 32,
    policy: PolicyName = "human",
    policy_options: PolicyOptions = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="As --policy oracle: watch the environment's scripted oracle.")
    ] = False,
) -> None:
    """Play an episode in the terminal, or watch a policy play it.

    Answer in one line, or call a tool by its name and a JSON object.

    \b
    Example: polyturn env play polyturn/TwoHopSearch-v0 --seed 3
    """
    with reported(), as_config_error():
        env = make_environment(env_id, options)
        player = watched(make_policy("oracle" if oracle else policy, read_options(policy_options)))
        player.check(env)
        chosen = _choose_task(env, split=split, task=task, seed=seed)
    # A pending read of the terminal would hold up any tidier end on Ctrl-C, and there is nothing to save.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    limits = EpisodeLimits(max_turns=max_turns, timeout_s=24 * 3600.0)
    try:
        episode = asyncio.run(_play_one(player, env, chosen, seed=seed, limits=limits))
    finally:
        signal.signal(signal.SIGINT, previous)
        env.close()
    if (episode.error or "").startswith("EOFError"):
        typer.echo("\nthe input ended before the episode did", err=True)
        raise typer.Exit(INTERRUPTED)
    if episode.outcome is Outcome.FAILED:
        typer.echo(printable(f"error: {episode.error}"), err=True)
        raise typer.Exit(RUN_FAILED)
    parts = ", ".join(f"{printable(name)} {value:g}" for name, value in episode.reward_parts.items())
    typer.echo(
        f"\n{episode.outcome.value} ({episode.stop_reason}) after {episode.num_turns} turns: "
        f"reward {episode.reward:g}" + (f" ({parts})" if parts else "")
    )


async def _play_one(
    player: NamedPolicy, env: PlayedEnv, task: Task, *, seed: int, limits: EpisodeLimits
) -> Episode:
    async with contextlib.aclosing(player):
        return await player.play(
            env=env, task=task, seed=seed, limits=limits, episode_id="play-0", group_id="play-0"
        )


def _choose_task(env: PlayedEnv, *, split: str, task: str | None, seed: int) -> Task:
    """The task of that id, or one that the seed draws from the split. Raises ConfigError."""
    try:
        source = env.tasks(split)
        if task is not None:
            find: Callable[[str], Task] | None = getattr(source, "find", None)
            if find is None:
                raise ValueError(f"{type(source).__name__} cannot find tasks by id; leave --task out")
            return find(task)
        if len(source) == 0:
            raise ValueError(f"there are no tasks in the split '{split}'")
        return source[random.Random(seed).randrange(len(source))]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def watched(player: NamedPolicy) -> NamedPolicy:
    """The policy, with all that it sees and says printed; a person sees that anyway, and types the rest."""
    if not isinstance(player, MessageEpisodes) or player.label == "human":
        return player
    make = player.make
    return MessageEpisodes(player.label, lambda env, seed: _Watched(make(env, seed)), client=player.client)


class _Watched:
    """A policy whose conversation is printed."""

    def __init__(self, policy: MessagePolicy) -> None:
        self._policy = policy
        self._num_shown = 0

    async def reply(self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Reply:
        for message in messages[self._num_shown :]:
            if message["role"] != "assistant":
                typer.echo(printable(f"[{message['role']}] {message['content']}"))
        self._num_shown = len(messages)
        reply = as_reply(await self._policy.reply(messages=messages, tools=tools))
        for call in reply.message.tool_calls:
            arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
            typer.echo(printable(f"[assistant] {call.name} {arguments}"))
        if reply.message.content:
            typer.echo(printable(f"[assistant] {reply.message.content}"))
        return reply


def make_environment(env_id: str, options: list[str] | None) -> PlayedEnv:
    """The environment with `key=value` arguments. Raises ConfigError."""
    try:
        return make(env_id, **read_options(options))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _constructor(env: PlayedEnv) -> list[tuple[str, str]]:
    parameters = inspect.signature(type(env.unwrapped)).parameters.values()
    return [
        (p.name, "required" if p.default is p.empty else f"default {p.default!r}")
        for p in parameters
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def _splits(env: PlayedEnv) -> list[tuple[str, str]]:
    """The common splits that the environment has, with their sizes."""
    rows = []
    for split in ("train", "validation", "heldout", "test"):
        try:
            rows.append((split, f"{len(env.tasks(split)):,}"))
        except ValueError:
            continue
    return rows


_WIDTH = max(len(name) for name in CHECKS)


@app.command()
def check(
    env_id: Annotated[
        str | None,
        typer.Argument(metavar="[ID]", help="The environment to check.", autocompletion=complete_environment),
    ] = None,
    options: Options = None,
    every: Annotated[bool, typer.Option("--all", help="Check all that are registered.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--check", metavar="NAME", help="This check alone.")
    ] = None,
    deadline_s: Annotated[float, typer.Option(min=1, help="Seconds a check may take.")] = 120.0,
    num_tasks: Annotated[int, typer.Option(min=1, help="Tasks of each split to play.")] = 8,
    num_episodes: Annotated[int, typer.Option(min=2, help="Episodes to play at once.")] = 1000,
    budget_s: Annotated[float, typer.Option(min=0.1, help="How long to go on repeating episodes.")] = 5.0,
) -> None:
    """Check that an environment keeps its promises; exit with 1 if it does not.

    \b
    Example: polyturn env check polyturn/TwoHopSearch-v0
    """
    with reported():
        if every == (env_id is not None):
            raise ConfigError("command line: name one environment, or write --all")
        for name in only or ():
            if name not in CHECKS:
                raise ConfigError(f"command line: there is no check '{name}'{_nearest(name)}")
        arguments = read_options(options)
        limits: dict[str, Any] = {
            "checks": only,
            "deadline_s": deadline_s,
            "num_tasks": num_tasks,
            "num_episodes": num_episodes,
            "budget_s": budget_s,
        }
        if env_id is not None:
            failed = not _check_one(_known(env_id), arguments, limits, alone=True)
        else:
            results = [_check_one(i.env_id, {}, limits, alone=False) for i in list_environments()]
            failed = False in results
            unchecked = results.count(None)
            typer.echo(
                f"{results.count(True)} of {len(results)} environments pass"
                + (f", {unchecked} could not be checked here" if unchecked else "")
            )
    if failed:
        raise typer.Exit(RUN_FAILED)


def _known(env_id: str) -> str:
    try:
        return find(env_id).env_id
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_one(env_id: str, options: dict[str, Any], limits: dict[str, Any], *, alone: bool) -> bool | None:
    """Print the findings as they come; whether all are well, or None where nothing can be said.

    Raises ConfigError for options that the environment does not take, where it is checked alone.
    """
    typer.echo(env_id)
    failed = count = 0
    try:
        for finding in check_isolated(env_id, options, **limits):
            count += 1
            failed += not finding.ok
            result = "ok" if finding.ok else "FAIL"
            typer.echo(
                f"  {finding.check:<{_WIDTH}}  {result:<4}  {finding.seconds:6.2f} s  {finding.message}"
            )
    except Unavailable as reason:
        typer.echo(f"  not checked here: {reason}\n")
        return None
    except ValueError as error:
        if alone:
            raise ConfigError(str(error)) from error
        print_error(error)
        return False
    typer.echo(f"  {failed} of {count} checks failed\n" if failed else f"  all {count} checks passed\n")
    return not failed


def _nearest(name: str) -> str:
    matches: Sequence[str] = difflib.get_close_matches(name, CHECKS, n=1, cutoff=0.4)
    return f"; did you mean '{matches[0]}'?" if matches else f"; the checks are {', '.join(CHECKS)}"


FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "{package}/__init__.py": "init.py",
    "{package}/environment.py": "environment.py",
    "tests/test_environment.py": "test_environment.py",
}
"""What is written, and the template that it is written from."""


@app.command()
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
