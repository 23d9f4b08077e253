"""`polyturn train` and `config`: the commands that take a recipe, and what `--dry-run` prints of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import polyturn
from polyturn.cli.completion import complete_override, complete_recipe
from polyturn.cli.outcome import reported, table
from polyturn.configs.loading.loader import dump_config, json_schema, show_origins
from polyturn.configs.metrics.markdown import metrics_markdown
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.reference import options_markdown
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.tasks import (
    EnvironmentReward,
    FunctionReward,
    JudgeReward,
    RemoteReward,
    RubricReward,
    RuleReward,
)
from polyturn.configs.sizing.arithmetic import check_batch
from polyturn.configs.sizing.fit import judge
from polyturn.configs.sizing.memory import estimate_memory, human_bytes
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.configs.sizing.placement import plan_placement, planned_nodes
from polyturn.configs.sizing.placement_table import meeting_lines, placement_lines
from polyturn.configs.sizing.served import served_memory
from polyturn.configs.sizing.turns import turn_memory
from polyturn.envs.messages import TaskSource
from polyturn.envs.tasks import MixtureTasks
from polyturn.envs.tasks.sources import source_name
from polyturn.packages import PACKAGES
from polyturn.rollout.factory import task_configs, tasks_of
from polyturn.rollout.suites import suites_of
from polyturn.tools.secrets import public_url
from polyturn.trainer.run.model_checks import capacity_of, check_memory, critic_shape
from polyturn.trainer.run.preflight import preflight

Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of a shipped recipe.",
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Options that replace the recipe's.",
        autocompletion=complete_override,
    ),
]


UNEVALUATED: Mapping[str, Any] = {"before": False, "after": False, "every_steps": 0, "suites": []}
"""The section `evaluation` of a run without engines."""


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would run, and start nothing.")
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            metavar="RUN",
            help="Train on the steps that a run directory holds; without engines and evaluations.",
        ),
    ] = None,
) -> None:
    """Train a policy.

    The last line printed is `run: PATH`. Ctrl-C saves; resume=true goes on.

    \b
    Example: polyturn train quickstart seed=1 trainer.optimizer.learning_rate=1e-6
    """
    with reported():
        options = {} if replay is None else {"rollout": {"replay": replay}, "evaluation": UNEVALUATED}
        config = polyturn.load_config(recipe, *overrides or (), **options)
        if dry_run:
            for warning in preflight(config, dry_run=True):
                print_warning(warning)
            print_plan(config)
            return
        path = polyturn.train(config)
    typer.echo(f"run: {path}")


def print_warning(warning: str) -> None:
    typer.echo(f"warning: {warning}", err=True)


config_app = typer.Typer(
    help="Show options: a recipe's, or all.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@config_app.command()
def show(
    recipe: Recipe,
    overrides: Overrides = None,
    origin: Annotated[
        bool,
        typer.Option("--origin", help="Say behind each value where it was written, or that it is a default."),
    ] = False,
) -> None:
    """Print the resolved config as YAML.

    \b
    Example: polyturn config show quickstart trainer.num_steps=5 --origin
    """
    with reported():
        if origin:
            text = show_origins(recipe, overrides or ())
        else:
            text = dump_config(polyturn.load_config(recipe, *overrides or ()))
        typer.echo(text, nl=False)


@config_app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors.

    \b
    Example: polyturn config schema > recipe.schema.json
    """
    typer.echo(json.dumps(json_schema(), indent=2))


@config_app.command()
def options() -> None:
    """Print every option with its type, default and meaning, as Markdown tables.

    \b
    Example: polyturn config options
    """
    typer.echo(options_markdown(), nl=False)


@config_app.command()
def metrics() -> None:
    """Print every metric of a run with its unit, meaning and healthy range, as Markdown tables.

    \b
    Example: polyturn config metrics
    """
    typer.echo(metrics_markdown(), nl=False)


def print_plan(config: RunConfig) -> None:
    """Print everything; the config's lines stand first, so that they can be cut off and used as a recipe.

    Raises:
        ConfigError: the memory that this takes is not there.
    """
    shape = ModelShape.read(resolve_model_path(config.model.path, needs_weights=False))
    typer.echo("# config")
    typer.echo(dump_config(config))
    typer.echo(f"# batch\n{check_batch(config)}\n")
    typer.echo("# placement")
    placement = plan_placement(config, planned_nodes(config))
    typer.echo(
        table([(line.node, line.device, line.name, line.note) for line in placement_lines(config, placement)])
    )
    for sentence in meeting_lines(placement):
        typer.echo(sentence)
    _print_memory(config, shape)
    if config.supervised is None:
        typer.echo(f"\n# tasks\n{table(_task_rows(config))}\n\n# reward\n{table(_reward_rows(config))}")
    missing = [p.distribution for p in PACKAGES if p.needed_to_train and p.installed_version() is None]
    if missing:
        typer.echo(f"\nnot installed here: {', '.join(missing)}; see `polyturn doctor`")
    check_memory(config, shape)


def _print_memory(config: RunConfig, shape: ModelShape) -> None:
    estimate = estimate_memory(config, shape, critic_shape(config))
    typer.echo(
        f"\n# memory, estimated from {shape.num_parameters:,} parameters, of each device while it computes"
    )
    rows = []
    for name, ranks, parallel in (
        ("trainer rank", estimate.stages, config.trainer.parallel),
        ("critic rank", estimate.critic, config.trainer.critic.parallel),
    ):
        of_a_stage = parallel.world_size // parallel.pipeline
        for stage, rank in enumerate(ranks):
            which = f" of stage {stage}" if parallel.pipeline > 1 else ""
            sizes = {**rank.parts, **rank.working}
            rows.append(_memory_row(f"{name}{which} (x {of_a_stage})", sizes))
    if config.plays:
        engines = config.engines.num_engines * config.engines.tensor_parallel
        rows.append(_memory_row(f"engine rank (x {engines})", estimate.engine))
    for served in served_memory(config):
        rows.append(_memory_row(f"{served.model.name} engine rank (x {served.num_ranks})", served.parts))
    typer.echo(table(rows))
    host = max(rank.host for rank in (*estimate.stages, *estimate.critic))
    if host:
        typer.echo(f"and for each of these ranks up to {human_bytes(host)} of its host's memory")
    capacity = capacity_of(config)
    if config.shares_gpus and config.trainer.device == "cuda" and capacity.gpu is not None:
        typer.echo("a GPU that trainer and engine share, by turns")
        turns = turn_memory(config, shape, estimate, gpu=capacity.gpu)
        typer.echo(table([_memory_row(turn.name, turn.parts) for turn in turns]))
    _, tight = judge(config, shape, capacity, critic_shape(config))
    if capacity.gpu is not None:
        typer.echo(
            f"judged by {capacity.gpu_name}: {human_bytes(capacity.gpu)} a GPU; cluster.gpu names another"
        )
    for sentence in tight:
        typer.echo(f"warning: {sentence}")


def _memory_row(name: str, sizes: Mapping[str, int]) -> tuple[str, str, str]:
    parts = ", ".join(f"{part} {human_bytes(size)}" for part, size in sizes.items())
    return name, human_bytes(sum(sizes.values())), parts


def _task_rows(config: RunConfig) -> list[tuple[str, str, str, str]]:
    """Split, source, size and share of the prompts; suites of the evaluation by their names."""
    splits = dict.fromkeys((config.environment.train_split, config.evaluation.split))
    rows = [row for split in splits for row in _rows_of(config, split, split)]
    for suite in suites_of(config)[1:]:
        split = suite.config.evaluation.split
        rows += _rows_of(suite.config, split, f"{suite.name}: {split}")
    return rows


def _rows_of(config: RunConfig, split: str, shown: str) -> list[tuple[str, str, str, str]]:
    tasks = tasks_of(config, split)
    if isinstance(tasks, MixtureTasks):
        total = sum(tasks.weights)
        return [
            (shown, name, _size(source), f"{weight / total:.1%} of the prompts")
            for name, source, weight in zip(tasks.names, tasks.sources, tasks.weights, strict=True)
        ]
    given = task_configs(config, split)
    name = source_name(given[0]) if given else f"{config.environment.id}'s own"
    return [(shown, name, _size(tasks), "")]


def _size(source: TaskSource) -> str:
    return "endless" if getattr(source, "is_endless", False) else f"{len(source):,} tasks"


def _reward_rows(config: RunConfig) -> list[tuple[str, str, str]]:
    """Name, what it is, and weight."""
    reward = config.reward
    if isinstance(reward, RubricReward):
        rows = [(part.name, _shown(part.reward), f"weight {part.weight:g}") for part in reward.parts]
    else:
        rows = [("reward", _shown(reward), "")]
    groups = [
        (part.name, f"group reward {part.target}", f"weight {part.weight:g}") for part in config.group_rewards
    ]
    return rows + groups


def _shown(
    reward: EnvironmentReward | RuleReward | FunctionReward | RemoteReward | JudgeReward,
) -> str:
    if isinstance(reward, EnvironmentReward):
        return "the environment's own grade"
    if isinstance(reward, JudgeReward):
        return f"judge {reward.judge or ', '.join(public_url(url) for url in reward.urls)}"
    named = (
        reward.url
        if isinstance(reward, RemoteReward)
        else (reward.name if isinstance(reward, RuleReward) else reward.target)
    )
    options = {} if isinstance(reward, RemoteReward) else reward.options
    return f"{reward.kind} {named}" + (f" {options}" if options else "")
