"""What `--dry-run` prints: the resolved config, the batch arithmetic, the placement and a memory estimate."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from polyturn.cli.packages import PACKAGES
from polyturn.configs.arithmetic import check_batch, estimate_memory, human_bytes, placement
from polyturn.configs.loader import dump_config
from polyturn.configs.models import ModelShape, resolve_model_path
from polyturn.configs.schema import RunConfig


def print_plan(config: RunConfig) -> None:
    """Print everything; the config's lines stand first, so that they can be cut off and used as a recipe."""
    shape = ModelShape.read(resolve_model_path(config.model.path))
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
    parts = [
        (f"trainer rank (x {parallel.world_size})", estimate.rank),
        (f"engine rank (x {engines})", estimate.engine),
    ]
    rows = [
        (
            name,
            human_bytes(sum(sizes.values())),
            ", ".join(f"{part} {human_bytes(n)}" for part, n in sizes.items()),
        )
        for name, sizes in parts
    ]
    typer.echo(table(rows))
    missing = [p.distribution for p in PACKAGES if p.needed_to_train and p.installed_version() is None]
    if missing:
        typer.echo(f"\nnot installed here: {', '.join(missing)}; see `polyturn doctor`")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns as wide as they need."""
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
