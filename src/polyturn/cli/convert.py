"""`polyturn convert`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.outcome import RUN_FAILED, print_error, reported
from polyturn.configs.errors import ConfigError
from polyturn.configs.models import BUILTIN, PRESET, resolve_model_path
from polyturn.packages import require
from polyturn.rollout.engines.placement import gpu_environment

KINDS = ("hf", "torch_dist", "fp8")


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Hugging Face or torch_dist directory, a checkpoint, a run directory, or builtin:NAME.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A directory that is not there yet.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="KIND",
            help="hf, torch_dist or fp8 (Hugging Face, 128 x 128 blocks). "
            "Default: torch_dist from hf, hf from all else.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="The Hugging Face directory of the model, where the source names none; or builtin:NAME.",
            metavar="DIR",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="float32 or bfloat16. Default: what config.json names.", metavar="DTYPE"
        ),
    ] = None,
    tensor: Annotated[int, typer.Option("--tensor", min=1, help="Tensor-parallel ranks.")] = 1,
    pipeline: Annotated[int, typer.Option("--pipeline", min=1, help="Pipeline stages.")] = 1,
    expert: Annotated[int, typer.Option("--expert", min=1, help="Expert-parallel ranks.")] = 1,
) -> None:
    """Convert weights between Hugging Face, Megatron's torch_dist and FP8, bit for bit where no dtype changes.

    On several processes or nodes start it with torchrun: torchrun --nproc-per-node 8 -m polyturn convert ...

    \b
    Example: polyturn convert Qwen3-4B qwen3-4b-torch-dist
    """
    with reported():
        require()
        # It runs on the CPU, also where there are GPUs.
        os.environ.update(gpu_environment(()))
        from polyturn.trainer.megatron.convert import TorchrunPlace, make_plan
        from polyturn.trainer.megatron.convert import convert as run

        if to is not None and to not in KINDS:
            raise ConfigError(f"--to {to}: there are {', '.join(KINDS)}")
        place = TorchrunPlace.from_environment()

        def tell(text: str) -> None:
            if place.rank == 0:
                typer.echo(text, err=True)

        try:
            plan = make_plan(
                _directory(source, "SOURCE"),
                target,
                to=to,  # type: ignore[arg-type]
                model=None if model is None else _directory(model, "--model"),
                dtype=dtype,
                tensor=tensor,
                pipeline=pipeline,
                expert=expert,
                place=place,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        try:
            run(plan, tell)
        except ValueError as failure:
            print_error(failure)
            raise typer.Exit(RUN_FAILED) from failure
    if place.rank == 0:
        typer.echo(f"{plan.kind}: {target}")


def _directory(written: str, key: str) -> Path:
    """A path, or the directory of `builtin:NAME`."""
    return resolve_model_path(written, key=key) if written.startswith((BUILTIN, PRESET)) else Path(written)
