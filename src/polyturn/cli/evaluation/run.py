"""`polyturn eval run`: a policy plays a suite, or the held-out tasks of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.completion import complete_recipe_or_suite
from polyturn.cli.evaluation.played import print_played
from polyturn.cli.options import PolicyName, PolicyOptions, read_options
from polyturn.cli.outcome import reported
from polyturn.cli.train import Overrides, print_warning
from polyturn.configs.errors import ConfigError, as_config_error
from polyturn.configs.loading.yaml_tree import read_value
from polyturn.configs.models import resolve_model_path
from polyturn.evaluations import asked, begin, play, shown
from polyturn.rollout.evaluation.scoring import Prices

PRICES = ("prompt", "cached_prompt", "completion")


def evaluate(
    recipe_or_suite: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_SUITE",
            help="A YAML file, or the name of a shipped recipe or suite.",
            autocompletion=complete_recipe_or_suite,
        ),
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH",
            help="A Hugging Face directory, a run, a checkpoint or builtin:NAME. Default: the newest run's policy.",
        ),
    ] = None,
    policy: PolicyName = "model",
    policy_options: PolicyOptions = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory",
            metavar="DIR",
            help="A new directory. Default: evaluations/SUITE-DATE in output_dir.",
        ),
    ] = None,
    prices: Annotated[
        list[str] | None,
        typer.Option(
            "--price",
            metavar="KIND=PRICE",
            help="Of a million tokens: prompt, completion, cached_prompt (default: as prompt).",
        ),
    ] = None,
) -> None:
    """Score a policy on a suite, or on the held-out tasks of a recipe.

    All is kept in a directory: `polyturn eval resume` goes on. The last line is one JSON object (docs/evaluation.md).

    \b
    Example: polyturn eval run quickstart --model runs/quickstart-20260101-120000 evaluation.num_tasks=64
    """
    with reported():
        with asked(
            recipe_or_suite,
            overrides or (),
            model_path=None if model is None else resolve_model_path(model, key="--model"),
            policy=policy,
            policy_options=read_options(policy_options),
            prices=_read_prices(prices or ()),
            on_warning=print_warning,
        ) as evaluation:
            with as_config_error():
                path = begin(evaluation, directory)
            typer.echo(f"evaluation: {path}")
            with shown(evaluation.suite) as watching:
                conducted = play(path, evaluation, watching)
        print_played(path, evaluation, conducted)


def _read_prices(written: list[str] | tuple[str, ...]) -> Prices | None:
    """The prices of `kind=price` arguments; None: none are given. Raises ConfigError."""
    given: dict[str, float] = {}
    for option in written:
        kind, equals, text = option.partition("=")
        value = read_value(text, "command line", kind).plain() if equals else None
        if kind not in PRICES or isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ConfigError(
                f"command line: --price '{option}' must be KIND=PRICE, a KIND of {', '.join(PRICES)} and a PRICE of "
                "at least 0"
            )
        given[kind] = float(value)
    if not given:
        return None
    if "prompt" not in given or "completion" not in given:
        raise ConfigError("command line: --price needs a price of prompt and one of completion")
    return Prices(**{"cached_prompt": given["prompt"], **given})
