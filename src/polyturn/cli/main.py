"""`polyturn`: the command line. Each command imports what it needs only when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from polyturn import __version__
from polyturn.cli import (
    convert,
    engines,
    env,
    evaluation,
    import_slime,
    models,
    probe,
    rollout,
    serve,
    sft,
    simulate,
    template,
    traces,
    train,
    view,
)
from polyturn.cli.doctor.command import doctor

app = typer.Typer(
    name="polyturn",
    help="Train, evaluate and play multi-turn tool use.\n\nExample: polyturn train quickstart trainer.num_steps=5",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("rollout")(rollout.rollout)
app.command("sft")(sft.sft)
app.command("simulate")(simulate.simulate)
app.command("probe")(probe.probe)
app.command("convert")(convert.convert)
app.command("import-slime")(import_slime.import_slime)
app.add_typer(env.app, name="env")
app.add_typer(evaluation.app, name="eval")
app.add_typer(traces.app, name="traces")
app.add_typer(engines.app, name="engines")
app.add_typer(models.app, name="models")
app.add_typer(train.config_app, name="config")
app.add_typer(serve.app, name="serve")
app.add_typer(template.app, name="template")
app.command("view")(view.view)
app.command("doctor")(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"polyturn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
