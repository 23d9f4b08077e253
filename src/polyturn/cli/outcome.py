"""What commands print, and how they end: 0 it did it, 1 the run failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from polyturn.configs.errors import ConfigError, Interrupted, RunFailure, machine_fault
from polyturn.tools.plain import printable
from polyturn.tools.secrets import blank_credentials

RUN_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130


@contextmanager
def reported() -> Iterator[None]:
    """Print bad input, what the machine refuses and what ended a run as `error: ...` lines, and exit with its code.

    A pipe that nobody reads any more is left to the command line's own handling.
    """
    try:
        yield
    except ConfigError as error:
        print_error(error)
        raise typer.Exit(BAD_INPUT) from error
    except RunFailure as failure:
        print_error(failure)
        raise typer.Exit(RUN_FAILED) from failure
    except Interrupted as interrupted:
        typer.echo(f"{interrupted}\nrun: {interrupted.directory}")
        raise typer.Exit(INTERRUPTED) from interrupted
    except BrokenPipeError:
        raise
    except OSError as error:
        print_error(machine_fault(error))
        raise typer.Exit(RUN_FAILED) from error
    except KeyboardInterrupt as error:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from error


def print_error(error: Exception | str) -> None:
    """Each line of the message as an error of its own."""
    for line in blank_credentials(str(error)).splitlines() or [type(error).__name__]:
        typer.echo(f"error: {printable(line)}", err=True)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns as wide as they need."""
    if not rows:
        return ""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
