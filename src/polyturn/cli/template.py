"""`polyturn template`: what a model's chat template does to conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.outcome import RUN_FAILED, print_error, reported, table
from polyturn.configs.errors import as_config_error
from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import resolve_model_path
from polyturn.packages import require
from polyturn.tools.plain import printable

app = typer.Typer(help="Look at the chat template of a model.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Keeps `check` a command of its own."""


@app.command()
def check(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A directory with a tokenizer, weights or not, or builtin:NAME."
        ),
    ],
    template: Annotated[
        Path | None, typer.Option("--template", help="As model.template: a Jinja file in place of its own.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="As model.template_options; may be repeated."),
    ] = None,
    tool_prompt: Annotated[
        str, typer.Option("--tool-prompt", metavar="WHO", help="As model.tool_prompt.")
    ] = "auto",
) -> None:
    """Say what holds for a chat template, where conversations branch, and show the first difference there.

    Exits with 2 where a run would refuse it, with 1 where turn by turn gives other tokens than the whole conversation.

    \b
    Example: polyturn template check Qwen3-4B --option enable_thinking=false
    """
    with reported():
        require(("transformers",))
        overrides = [f"model.path={model}", f"model.tool_prompt={tool_prompt}"]
        overrides += [f"model.template={template}"] if template is not None else []
        overrides += [f"model.template_options.{each}" for each in option or ()]
        config = load_config("quickstart", overrides).model
        directory = resolve_model_path(config.path, key="MODEL")
        from polyturn.agents.dialects import make_dialect
        from polyturn.agents.template_check import check_template
        from polyturn.rollout.factory import renderer_of

        with as_config_error(f"{model}: "):
            report = check_template(renderer_of(config, directory, make_dialect("hermes")))
    typer.echo(table(report.facts))
    typer.echo("\nWhat comes behind a turn, and what becomes of the conversation before it:\n")
    for case in report.cases:
        how = case.refusal or ("goes on" if case.difference is None else "a new segment")
        typer.echo(printable(f"{case.what}: {how}"))
        for line in case.difference.lines() if case.difference is not None else ():
            typer.echo(f"    {printable(line)}")
    if report.fault is not None:
        print_error(
            f"{model}: a conversation that goes on turn by turn is another than the template makes of the whole"
        )
        typer.echo("\n".join(f"    {printable(line)}" for line in report.fault.lines()))
        raise typer.Exit(RUN_FAILED)
    num_branching = sum(case.difference is not None for case in report.cases)
    typer.echo(
        f"\n{report.num_conversations} conversations were rendered turn by turn and whole: the tokens are the same "
        f"wherever the history goes on; it branches in {num_branching} of {len(report.cases)} cases"
    )
