"""What `--dry-run` prints: the resolved config, the batch arithmetic, the placement and a memory estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import typer

from polyturn.cli.packages import PACKAGES
from polyturn.configs.loading.loader import dump_config
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.tasks import (
    EnvironmentReward,
    FunctionReward,
    RemoteReward,
    RubricReward,
    RuleReward,
)
from polyturn.configs.sizing.arithmetic import check_batch, placement
from polyturn.configs.sizing.fit import judge
from polyturn.configs.sizing.memory import estimate_memory, human_bytes
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.envs.tasks import MixtureTasks, TaskSource
from polyturn.envs.tasks.open import source_name
from polyturn.rollout.task_sources import task_configs, tasks_of
from polyturn.tools.plain import printable
from polyturn.trainer.run.model_checks import capacity_of, check_memory, critic_shape


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
    typer.echo(table([(row.name, row.device, row.note) for row in placement(config)]))
    _print_memory(config, shape)
    typer.echo(f"\n# tasks\n{table(_task_rows(config))}\n\n# reward\n{table(_reward_rows(config))}")
    missing = [p.distribution for p in PACKAGES if p.needed_to_train and p.installed_version() is None]
    if missing:
        typer.echo(f"\nnot installed here: {', '.join(missing)}; see `polyturn doctor`")
    check_memory(config, shape)


def _print_memory(config: RunConfig, shape: ModelShape) -> None:
    estimate = estimate_memory(config, shape, critic_shape(config))
    typer.echo(
        f"\n# memory, estimated from {shape.num_parameters:,} parameters; activations and libraries come on top"
    )
    rows = []
    for name, ranks, parallel in (
        ("trainer rank", estimate.stages, config.trainer.parallel),
        ("critic rank", estimate.critic, config.trainer.critic.parallel),
    ):
        of_a_stage = parallel.world_size // parallel.pipeline
        for stage, rank in enumerate(ranks):
            which = f" of stage {stage}" if parallel.pipeline > 1 else ""
            rows.append(_memory_row(f"{name}{which} (x {of_a_stage})", rank.parts))
    engines = config.engines.num_engines * config.engines.tensor_parallel
    rows.append(_memory_row(f"engine rank (x {engines})", estimate.engine))
    typer.echo(table(rows))
    host = max(rank.host for rank in (*estimate.stages, *estimate.critic))
    if host:
        typer.echo(f"and for each of these ranks up to {human_bytes(host)} of its host's memory")
    capacity = capacity_of(config)
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
    """Split, source, size and share of the prompts."""
    rows = []
    for split in dict.fromkeys((config.environment.train_split, config.evaluation.split)):
        tasks = tasks_of(config, split)
        if isinstance(tasks, MixtureTasks):
            total = sum(tasks.weights)
            rows += [
                (split, name, _size(source), f"{weight / total:.1%} of the prompts")
                for name, source, weight in zip(tasks.names, tasks.sources, tasks.weights, strict=True)
            ]
        else:
            given = task_configs(config, split)
            name = source_name(given[0]) if given else f"{config.environment.id}'s own"
            rows.append((split, name, _size(tasks), ""))
    return rows


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


def _shown(reward: EnvironmentReward | RuleReward | FunctionReward | RemoteReward) -> str:
    if isinstance(reward, EnvironmentReward):
        return "the environment's own grade"
    named = (
        reward.url
        if isinstance(reward, RemoteReward)
        else (reward.name if isinstance(reward, RuleReward) else reward.target)
    )
    options = {} if isinstance(reward, RemoteReward) else reward.options
    return f"{reward.kind} {named}" + (f" {options}" if options else "")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns as wide as they need."""
    if not rows:
        return ""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
