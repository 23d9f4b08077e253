"""What a person sees of a run: a live display on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from polyturn.tools.plain import printable
from polyturn.trainer.run.health import Finding

HELDOUT_LOSS = "heldout/loss"
"""Of a run that is fine-tuned on rows."""
NUM_ROWS_SHOWN = 12
NUM_FINDINGS_SHOWN = 6


class ProgressDisplay(Protocol):
    """Shows the phases and the finished steps of a run."""

    def phase(self, name: str, *, total: int | None = None) -> None:
        """A phase begins; `total` counts the units of it, where they are known."""
        ...

    def advance(self) -> None:
        """One unit of the phase is done."""
        ...

    def step(self, step: int, row: Mapping[str, float]) -> None:
        """A step is finished."""
        ...

    def health(self, step: int, findings: Sequence[Finding]) -> None:
        """What is unhealthy after a step."""
        ...

    def message(self, text: str) -> None:
        """A line that stays."""
        ...

    def close(self) -> None: ...


def make_progress(kind: Literal["auto", "bar", "plain"], *, num_steps: int) -> ProgressDisplay:
    """The display that suits the terminal, or the one that was asked for."""
    live = kind == "bar" or (kind == "auto" and sys.stdout.isatty())
    return LiveProgress(num_steps=num_steps) if live else PlainProgress(num_steps=num_steps)


def format_step(step: int, num_steps: int, row: Mapping[str, float]) -> str:
    """One line about a step: reward, success, turns, speed, and where the seconds went."""
    seconds = {part: row.get(f"seconds/{part}", 0.0) for part in ("generate", "tools", "train", "sync")}
    split = " ".join(f"{part} {value:.1f}" for part, value in seconds.items())
    if seconds["sync"]:
        split += f", engines paused {row.get('sync/pause_seconds', 0.0):.2f}"
    end = f"{row['seconds/step']:.1f} s ({split})"
    if not row["episode/num"]:
        return f"step {step:>3}/{num_steps}  nothing to train on  {end}"
    figures = "  ".join(
        f"{value} {name}" if name == "tok/s" else f"{name} {value}" for name, value in headline(row).items()
    )
    return f"step {step:>3}/{num_steps}  {figures}  {end}"


def headline(row: Mapping[str, float]) -> dict[str, str]:
    """What a step is judged by at a glance: rewards of what was played, or losses of what was taught."""
    if HELDOUT_LOSS in row or "reward/mean" not in row:
        found = row.get(HELDOUT_LOSS)
        return {
            "loss": f"{row.get('train/loss', 0.0):.4f}",
            "held-out": "-" if found is None else f"{found:.4f}",
            "tok/s": f"{row['train/tokens_per_second']:.0f}",
        }
    return {
        "reward": f"{row['reward/mean']:.3f}",
        "success": f"{row['success/mean']:.3f}",
        "turns": f"{row['episode/turns']:.2f}",
        "tok/s": f"{row['rollout/tokens_per_second']:.0f}",
    }


class PlainProgress:
    """One line per phase and per step."""

    def __init__(self, *, num_steps: int, stream: TextIO | None = None) -> None:
        self._num_steps = num_steps
        self._stream = stream or sys.stdout
        self._started = time.monotonic()
        self._unhealthy: set[str] = set()

    def phase(self, name: str, *, total: int | None = None) -> None:
        if not name.startswith("step"):
            self.message(f"{name} …" if total is None else f"{name} ({total}) …")

    def advance(self) -> None:
        """Units within a phase are not shown line by line."""

    def step(self, step: int, row: Mapping[str, float]) -> None:
        self.message(format_step(step, self._num_steps, row))

    def health(self, step: int, findings: Sequence[Finding]) -> None:
        """A line when something begins to be unhealthy, and when it is healthy again; alarms have said theirs."""
        seen = {finding.name: finding for finding in findings if not finding.is_alarm}
        for name in [name for name in seen if name not in self._unhealthy]:
            self.message(f"unhealthy at step {step}: {seen[name].line}")
        alarms = {finding.name for finding in findings if finding.is_alarm}
        for name in sorted(self._unhealthy - set(seen) - alarms):
            self.message(f"healthy again at step {step}: {name}")
        self._unhealthy = set(seen)

    def message(self, text: str) -> None:
        shown = f"[{time.monotonic() - self._started:6.1f} s] {printable(text)}"
        print(shown, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is held."""


class LiveProgress:
    """A table of the last steps above two bars: the run's steps and the phase under way."""

    def __init__(self, *, num_steps: int) -> None:
        self._rows: list[tuple[int, Mapping[str, float]]] = []
        self._findings: Sequence[Finding] = ()
        self._bars = Progress(
            TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._steps: TaskID = self._bars.add_task("steps", total=num_steps)
        self._phase: TaskID = self._bars.add_task("starting", total=None)
        self._live = Live(self._render(), console=Console(), refresh_per_second=4, transient=False)
        self._live.start()

    def phase(self, name: str, *, total: int | None = None) -> None:
        self._bars.reset(self._phase, description=name, total=total, completed=0)

    def advance(self) -> None:
        self._bars.advance(self._phase)

    def step(self, step: int, row: Mapping[str, float]) -> None:
        self._rows = [*self._rows, (step, row)][-NUM_ROWS_SHOWN:]
        self._bars.update(self._steps, completed=step)
        self._live.update(self._render())

    def health(self, step: int, findings: Sequence[Finding]) -> None:
        """The table under the bars."""
        del step
        self._findings = findings
        self._live.update(self._render())

    def message(self, text: str) -> None:
        # Not as Rich's markup: what failed may have brackets in its words.
        self._live.console.print(printable(text), markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Group:
        parts = ("generate", "tools", "train", "sync")
        names = headline(self._rows[-1][1]) if self._rows else ()
        table = Table("step", *names, *parts, box=None)
        for step, row in self._rows:
            table.add_row(
                str(step),
                *headline(row).values(),
                *(f"{row.get(f'seconds/{part}', 0.0):.1f} s" for part in parts),
            )
        return Group(table, self._bars, *health_table(self._findings))


def health_table(findings: Sequence[Finding]) -> list[Table]:
    """What is unhealthy, as a table; none where all is well."""
    if not findings:
        return []
    table = Table("unhealthy", "is", "healthy is", "what to do", "read", title_justify="left", box=None)
    for finding in findings[:NUM_FINDINGS_SHOWN]:
        cells = (finding.name, f"{finding.value:.4g}", finding.healthy, finding.sentence, finding.page)
        # Names of environments and tools are not ours: no control sequence, no markup.
        table.add_row(
            *(Text(printable(cell)) for cell in cells), style="red" if finding.is_alarm else "yellow"
        )
    if len(findings) > NUM_FINDINGS_SHOWN:
        table.add_row(Text(f"and {len(findings) - NUM_FINDINGS_SHOWN} more"))
    return [table]
