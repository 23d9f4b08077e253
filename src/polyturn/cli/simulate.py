"""`polyturn simulate`: what a recipe's scheduling does to a cluster, in virtual time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import typer

import polyturn
from polyturn.cli.outcome import reported, table
from polyturn.cli.train import Overrides, Recipe
from polyturn.configs.errors import ConfigError, did_you_mean
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.hardware import GpuName
from polyturn.rollout.simulator.calibration import calibrate as calibrated
from polyturn.rollout.simulator.calibration import read_run
from polyturn.rollout.simulator.rates import Rates, rates_of
from polyturn.rollout.simulator.report import report_of, rows_of
from polyturn.rollout.simulator.simulation import simulate as run_simulation
from polyturn.rollout.simulator.workload import LogNormalWorkload, Workload, workload_of

Option = typer.Option
Part = TypeVar("Part", bound=Any)


def simulate(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[
        int | None,
        Option("--nodes", min=1, help="Grow the recipe's engines and ranks to so many nodes."),
    ] = None,
    gpu: Annotated[str, Option("--gpu", help="Whose data sheet; `cluster.gpu` goes before.")] = "H100",
    steps: Annotated[int, Option("--steps", min=3, help="Steps to simulate.")] = 12,
    workload: Annotated[
        str, Option("--workload", metavar="NAME=VALUE,...", help="Episodes: mean_turns=6,tail=1.5")
    ] = "",
    rate: Annotated[
        str, Option("--rate", metavar="NAME=VALUE,...", help="Speeds of one's own: trainer.token_s=1e-6")
    ] = "",
    calibrate: Annotated[
        Path | None,
        Option("--calibrate", metavar="RUN_DIR", help="Speeds and episodes of a real run."),
    ] = None,
) -> None:
    """Simulate a recipe's scheduling before anyone rents GPUs.

    Without --calibrate, speeds are assumed from data sheets: good for comparing policies, not for promises. The last
    line is one JSON object.

    \b
    Example: polyturn simulate quickstart --nodes 8 rollout.max_staleness=2 --workload tail=1.5
    """
    with reported():
        config = polyturn.load_config(recipe, *overrides or ())
        if nodes is not None:
            config = grown(config, num_gpus=nodes * config.cluster.gpus_per_node)
        named = config.cluster.gpu or gpu
        if named not in get_args(GpuName):
            raise ConfigError(f"--gpu {named} is not known{did_you_mean(named, get_args(GpuName))}")
        chosen: Workload = workload_of(config)
        if calibrate is None:
            rates = rates_of(config, cast(GpuName, named))
        else:
            real = read_run(calibrate)
            rates, chosen = calibrated(real), real.workload
        rates = _with_rates(rates, _parts(rate))
        if isinstance(chosen, LogNormalWorkload):
            chosen = overridden(chosen, _parts(workload))
        elif workload:
            raise ConfigError("--workload does not go with --calibrate, which replays the run's episodes")
        run = run_simulation(config, rates, chosen, num_steps=steps)
        report = report_of(run, config)
    engines = config.engines
    typer.echo(
        f"{engines.num_engines} engine(s) of {engines.tensor_parallel}, {config.trainer.num_ranks} trainer rank(s); "
        f"{steps} steps of {config.rollout.prompts_per_step} x {config.rollout.samples_per_prompt} episodes, "
        f"max_staleness {config.rollout.max_staleness}"
    )
    typer.echo(f"speeds: {rates.source}")
    typer.echo(table(rows_of(report)))
    typer.echo(json.dumps(asdict(report)))


def grown(config: RunConfig, *, num_gpus: int) -> RunConfig:
    """The recipe on more GPUs: as many times its engines and its data-parallel ranks as fit.

    Raises:
        ConfigError: the recipe alone needs more.
    """
    engines, trainer = config.engines, config.trainer
    needed = engines.num_engines * engines.tensor_parallel + trainer.num_ranks
    factor = num_gpus // needed
    if not factor:
        raise ConfigError(
            f"--nodes: {num_gpus} GPUs are fewer than the {needed} that engines and ranks of the recipe take"
        )
    parallel = trainer.parallel.model_copy(update={"data": trainer.parallel.data * factor})
    return config.model_copy(
        update={
            "engines": engines.model_copy(update={"num_engines": engines.num_engines * factor}),
            "trainer": trainer.model_copy(update={"parallel": parallel}),
        }
    )


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def overridden(part: Part, given: Sequence[str], *, prefix: str = "") -> Part:
    """A dataclass of numbers with those replaced that stand in `given` under the prefix.

    Raises:
        ConfigError: a name that it does not have, or what is no number.
    """
    known = [field.name for field in fields(part)]
    for text in given:
        name, _, value = text.partition("=")
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        if name not in known:
            raise ConfigError(
                f"{text}: unknown name {prefix + name!r}{did_you_mean(name, known, prefix)}; there are "
                f"{', '.join(prefix + one for one in known)}"
            )
        kind = type(getattr(part, name))
        try:
            number = int(value) if kind is int else float(value)
        except ValueError as error:
            raise ConfigError(f"{text}: {value!r} is no number") from error
        part = replace(part, **{name: number})
    return part


def _with_rates(rates: Rates, given: Sequence[str]) -> Rates:
    for text in given:
        if not text.startswith(("engine.", "trainer.")):
            raise ConfigError(f"--rate {text}: say engine.NAME=VALUE or trainer.NAME=VALUE")
    return replace(
        rates,
        engine=overridden(rates.engine, given, prefix="engine."),
        trainer=overridden(rates.trainer, given, prefix="trainer."),
        source=rates.source + (f"; {', '.join(given)} as given" if given else ""),
    )
