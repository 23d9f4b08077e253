"""`polyturn env`: see the environments, play, check and write one."""

from __future__ import annotations

import asyncio
import inspect
import json
import random
import signal
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from polyturn.agents.episode import Outcome
from polyturn.agents.episode_loop import EpisodeLimits, play_messages
from polyturn.agents.message_policies import HumanPolicy, ScriptedPolicy
from polyturn.agents.policy import MessagePolicy
from polyturn.cli.env_check import check
from polyturn.cli.env_new import new
from polyturn.cli.env_options import EnvId, Options, read_options
from polyturn.cli.outcome import INTERRUPTED, RUN_FAILED, reported
from polyturn.cli.plan import table
from polyturn.configs.errors import ConfigError
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.envs.registry import list_environments, make
from polyturn.envs.tasks import Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.plain import printable
from polyturn.tools.types import ToolSpec

app = typer.Typer(
    help="List, show, play, check and write environments.", no_args_is_help=True, rich_markup_mode=None
)
app.command("check")(check)
app.command("new")(new)


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
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Watch the environment's scripted oracle.")
    ] = False,
) -> None:
    """Play an episode in the terminal.

    Answer in one line, or call a tool by its name and a JSON object.

    \b
    Example: polyturn env play polyturn/TwoHopSearch-v0 --seed 3
    """
    with reported():
        env = make_environment(env_id, options)
        lines = _Lines()
        policy: MessagePolicy = (
            _narrated_oracle(env) if oracle else HumanPolicy(read=lines.read, write=typer.echo)
        )
        chosen = _choose_task(env, split=split, task=task, seed=seed)
    # A pending read of the terminal would hold up any tidier end on Ctrl-C, and there is nothing to save.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    limits = EpisodeLimits(max_turns=max_turns, timeout_s=24 * 3600.0)
    episode_of = play_messages(
        env=env,
        policy=policy,
        task=chosen,
        seed=seed,
        limits=limits,
        episode_id="play-0",
        group_id="play-0",
    )
    try:
        episode = asyncio.run(episode_of)
    finally:
        signal.signal(signal.SIGINT, previous)
        env.close()
    if lines.have_ended:
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


class _Lines:
    """What is typed at the terminal."""

    def __init__(self) -> None:
        self.have_ended = False

    def read(self, prompt: str) -> str:
        """The next line. Raises `EOFError` when there are no more, which fails the episode."""
        try:
            return input(prompt)
        except EOFError:
            self.have_ended = True
            raise


def _choose_task(env: ToolEnv, *, split: str, task: str | None, seed: int) -> Task:
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


def _narrated_oracle(env: ToolEnv) -> ScriptedPolicy:
    """The environment's `oracle(messages, tools)`, with all that it sees and says printed."""
    script = getattr(env, "oracle", None)
    if script is None:
        raise ConfigError(f"{env.env_id} has no scripted oracle; play it yourself, without --oracle")
    shown = 0

    def narrated(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        nonlocal shown
        for message in messages[shown:]:
            if message["role"] != "assistant":
                typer.echo(printable(f"[{message['role']}] {message['content']}"))
        shown = len(messages)
        reply: AssistantMessage = script(messages, tools)
        for call in reply.tool_calls:
            arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
            typer.echo(printable(f"[assistant] {call.name} {arguments}"))
        if reply.content:
            typer.echo(printable(f"[assistant] {reply.content}"))
        return reply

    return ScriptedPolicy(narrated)


def make_environment(env_id: str, options: list[str] | None) -> ToolEnv:
    """The environment with `key=value` arguments. Raises ConfigError."""
    try:
        return make(env_id, **read_options(options))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _constructor(env: ToolEnv) -> list[tuple[str, str]]:
    parameters = inspect.signature(type(env)).parameters.values()
    return [
        (p.name, "required" if p.default is p.empty else f"default {p.default!r}")
        for p in parameters
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def _splits(env: ToolEnv) -> list[tuple[str, str]]:
    """The usual splits that the environment has, with their sizes."""
    rows = []
    for split in ("train", "validation", "heldout", "test"):
        try:
            rows.append((split, f"{len(env.tasks(split)):,}"))
        except ValueError:
            continue
    return rows
