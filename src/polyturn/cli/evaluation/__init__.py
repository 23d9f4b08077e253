"""`polyturn eval`: score policies on suites of environments, and say how two compare. A module for each command."""

from __future__ import annotations

import typer

from polyturn.cli.evaluation.compare import compare
from polyturn.cli.evaluation.ctl import ctl
from polyturn.cli.evaluation.curate import curate
from polyturn.cli.evaluation.export import export
from polyturn.cli.evaluation.report import report
from polyturn.cli.evaluation.resume import resume
from polyturn.cli.evaluation.run import evaluate
from polyturn.cli.evaluation.score import score
from polyturn.cli.evaluation.suites import list_suites
from polyturn.cli.evaluation.validate import validate

app = typer.Typer(
    help="Score policies on suites of environments.", no_args_is_help=True, rich_markup_mode=None
)
app.command("compare")(compare)
app.command("curate")(curate)
app.command("export")(export)
app.command("report")(report)
app.command("run")(evaluate)
app.command("resume")(resume)
app.command("score")(score)
app.command("ctl")(ctl)
app.command("list")(list_suites)
app.command("validate")(validate)
