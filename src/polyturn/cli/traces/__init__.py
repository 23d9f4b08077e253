"""`polyturn traces`: stored episodes on a terminal."""

from __future__ import annotations

import typer

from polyturn.cli.traces.search import search
from polyturn.cli.traces.show import show
from polyturn.cli.traces.stats import stats

app = typer.Typer(help="Stored episodes of a run or an evaluation, on a terminal.", no_args_is_help=True)
app.command("show")(show)
app.command("search")(search)
app.command("stats")(stats)
