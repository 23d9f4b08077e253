"""What `--dry-run` prints: the resolved config, the batch arithmetic, the placement and a memory estimate."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from polyturn.cli.packages import PACKAGES
from polyturn.configs.arithmetic import check_batch, placement
from polyturn.configs.loader import dump_config
from polyturn.configs.memory import estimate_memory, human_bytes
from polyturn.configs.model_shape import ModelShape
from polyturn.configs.models import resolve_model_path
from polyturn.configs.rewards import (
    EnvironmentReward,
    FunctionReward,
    RemoteReward,
    RubricReward,
    RuleReward,
)
from polyturn.configs.schema import RunConfig
from polyturn.envs.tasks import MixtureTasks, TaskSource
from polyturn.envs.tasks.open import source_name
from polyturn.rollout.task_sources import task_configs, tasks_of
from polyturn.tools.plain import printable


def print_plan(config: RunConfig) -> None:
    """Print everything; the config's lines stand first, so that they can be cut off and used as a recipe."""
    shape = ModelShape.read(resolve_model_path(config.model.path, needs_weights=False))
    typer.echo("# config")
    typer.echo(dump_config(config))
    typer.echo(f"# batch\n{check_batch(config)}\n")
    typer.echo("# placement")
    typer.echo(table([(row.name, row.device, row.note) for row in placement(config)]))
    estimate = estimate_memory(config, shape)
    parallel = config.trainer.parallel
    engines = config.engines.num_engines * config.engines.tensor_parallel
    typer.echo(
        f"\n# memory, estimated from {shape.num_parameters:,} parameters; activations and libraries come on top"
    )
    ranks_of_a_stage = parallel.world_size // parallel.pipeline
    parts = [
        (f"trainer rank{f' of stage {stage}' if parallel.pipeline > 1 else ''} (x {ranks_of_a_stage})", sizes)
        for stage, sizes in enumerate(estimate.stages)
    ]
    parts.append((f"engine rank (x {engines})", estimate.engine))
    rows = [
        (
            name,
            human_bytes(sum(sizes.values())),
            ", ".join(f"{part} {human_bytes(n)}" for part, n in sizes.items()),
        )
        for name, sizes in parts
    ]
    typer.echo(table(rows))
    if any(estimate.host):
        typer.echo(f"and for each trainer rank up to {human_bytes(max(estimate.host))} of its host's memory")
    typer.echo(f"\n# tasks\n{table(_task_rows(config))}\n\n# reward\n{table(_reward_rows(config))}")
    missing = [p.distribution for p in PACKAGES if p.needed_to_train and p.installed_version() is None]
    if missing:
        typer.echo(f"\nnot installed here: {', '.join(missing)}; see `polyturn doctor`")


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
