"""Lines for a terminal: nothing in them that it obeys, folded to its width, coloured, and paged.

What comes from models goes through `polyturn.tools.plain.printable` before it is measured, cut or coloured, so that the
only control sequences are those made here.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import click
import typer
from rich.cells import cell_len, chop_cells

from polyturn.configs.errors import ConfigError
from polyturn.tools.plain import printable

TAB = "    "
NARROWEST = 20
COLOURS = ("auto", "always", "never")


@dataclass(frozen=True, slots=True)
class Paper:
    """What lines are written on."""

    width: int
    is_coloured: bool

    @classmethod
    def of_terminal(cls, colour: str) -> Paper:
        """As wide as the terminal, 100 columns where there is none. Raises ConfigError for an unknown `colour`."""
        if colour not in COLOURS:
            raise ConfigError(f"--color: '{colour}' is none of {', '.join(COLOURS)}")
        is_coloured = colour == "always" or (colour == "auto" and sys.stdout.isatty())
        return cls(width=max(NARROWEST, shutil.get_terminal_size((100, 24)).columns), is_coloured=is_coloured)

    def ink(self, text: str, colour: str | None = None, *, bold: bool = False, dim: bool = False) -> str:
        """A printable text in a colour."""
        if not self.is_coloured:
            return text
        return click.style(text, fg=colour, bold=bold or None, dim=dim or None)

    def lines(
        self,
        text: str,
        *,
        indent: int = 0,
        limit: int | None = None,
        colour: str | None = None,
        dim: bool = False,
    ) -> Iterator[str]:
        """A text folded to the width; beyond `limit` lines it says how much is left out."""
        room = max(NARROWEST, self.width - indent)
        # A limit of lines bounds what has to be looked at of a text that is one huge line.
        shown = text if limit is None else text[: limit * room * 2]
        folded = fold(printable(shown).replace("\t", TAB), room)
        taken = list(folded) if limit is None else list(itertools.islice(folded, limit))
        for line in taken:
            yield " " * indent + self.ink(line, colour, dim=dim)
        is_more = len(shown) < len(text) or next(folded, None) is not None
        if is_more:
            left = f"… {len(text):,} characters in all; --full shows them"
            yield " " * indent + self.ink(left, dim=True)


def fold(text: str, width: int) -> Iterator[str]:
    """Printable text in lines of at most so many columns: between words, or within one that is longer."""
    for line in text.split("\n"):
        if cell_len(line) <= width:
            yield line.rstrip()
            continue
        yield from _fold_line(line, width)


def _fold_line(line: str, width: int) -> Iterator[str]:
    current, room = "", width
    for word in line.split(" "):
        size = cell_len(word)
        if current and size + 1 <= room:
            current, room = f"{current} {word}", room - size - 1
            continue
        if current:
            yield current
        *whole, word = chop_cells(word, width) if size > width else [word]
        yield from whole
        current, room = word, width - cell_len(word)
    yield current


def one_line(text: str, limit: int) -> str:
    """A text as one printable line of at most so many columns."""
    cut = printable(text[: 4 * limit].replace("\n", "⏎ ").replace("\t", " "))
    if cell_len(cut) <= limit and len(text) <= 4 * limit:
        return cut
    return chop_cells(cut, max(1, limit - 1))[0] + "…"


def columns(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> Iterator[str]:
    """Rows of printable text in columns as wide as they need; those of `right` stand at the right."""
    if not rows:
        return
    widths = [max(cell_len(row[number]) for row in rows) for number in range(len(rows[0]))]
    at_right = set(right)
    for row in rows:
        cells = []
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            filler = " " * (width - cell_len(cell))
            cells.append(filler + cell if number in at_right else cell + filler)
        yield "  ".join(cells).rstrip()


def bar(share: float, width: int) -> str:
    """A bar for a share from 0 to 1; what is not nothing is seen."""
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def put(lines: Iterable[str], *, paged: bool, is_coloured: bool) -> None:
    """Print lines; on a terminal, where they are more than it has, in the pager."""
    if not paged or not sys.stdout.isatty():
        for line in lines:
            typer.echo(line, color=is_coloured)
        return
    remaining = iter(lines)
    height = shutil.get_terminal_size().lines - 1
    first = list(itertools.islice(remaining, height + 1))
    if len(first) <= height:
        for line in first:
            typer.echo(line, color=is_coloured)
        return
    click.echo_via_pager((f"{line}\n" for line in itertools.chain(first, remaining)), color=is_coloured)
