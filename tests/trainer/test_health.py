"""The table of what is unhealthy: what stands in it, from when on, and that it is said on a terminal and elsewhere."""

from __future__ import annotations

import io
import math
from pathlib import Path

from rich.console import Console

from polyturn.configs.schema.alarms import AlarmsConfig
from polyturn.trainer.run.alarms import AlarmMonitor
from polyturn.trainer.run.health import HealthMonitor, findings
from polyturn.trainer.run.progress import PlainProgress, health_table

ROOT = Path(__file__).resolve().parents[2]
WELL = {"offpolicy/kl": 0.05, "train/entropy": 0.5, "reward/mean": 0.0, "train/skipped_updates": 0.0}
ILL = {
    **WELL,
    "offpolicy/kl": 0.06,
    "offpolicy/turn_1/kl": 0.2,
    "train/loss": math.nan,
    "outcome/truncated": 0.9,
    "alarm/truncated_episodes": 1.0,
}


def test_alarms_come_first_and_one_metric_stands_once() -> None:
    assert findings(WELL, AlarmsConfig()) == []
    found = findings(ILL, AlarmsConfig())
    assert [one.name for one in found] == ["outcome/truncated", "offpolicy/kl", "train/loss"]
    assert [one.is_alarm for one in found] == [True, False, False]
    alarm, mismatch, _ = found
    assert alarm.healthy == "at most 0.5" and "90% of the episodes were ended by a limit" in alarm.sentence
    assert mismatch.line.startswith(
        "offpolicy/kl is 0.06, healthy is at most 0.05: trainer and engines differ"
    )
    for one in found:
        assert (ROOT / one.page.partition("#")[0]).is_file()


def test_what_an_alarm_watches_is_judged_by_its_option_alone() -> None:
    """A share that the config calls fine is nowhere else called unhealthy."""
    config = AlarmsConfig(truncated_episodes=None)
    row = {"outcome/truncated": 1.0, "group/uniform": 1.0}
    row |= AlarmMonitor(config.model_copy(update={"after_steps": 1}), print).watch(1, row)
    assert [one.name for one in findings(row, config)] == ["group/uniform"]


def test_figures_are_told_when_they_lasted_and_when_they_are_over() -> None:
    stream = io.StringIO()
    progress, monitor = PlainProgress(num_steps=9, stream=stream), HealthMonitor(AlarmsConfig(after_steps=2))
    for step, row in enumerate([ILL, ILL, ILL, WELL, ILL], start=1):
        progress.health(step, monitor.watch(row))
    told = [line.partition("] ")[2] for line in stream.getvalue().splitlines()]
    assert [line.partition(" is ")[0] for line in told] == [
        "unhealthy at step 2: offpolicy/kl",
        "unhealthy at step 2: train/loss",
        "healthy again at step 4: offpolicy/kl",
        "healthy again at step 4: train/loss",
    ]


def test_the_table_shows_what_to_do_and_where_to_read() -> None:
    assert health_table([]) == []
    hostile = {f"tool/{chr(27)}[2J/calls": math.inf, "env/[bold]": math.nan}
    many = {f"heldout/[red]{i}/num_failed": 1.0 for i in range(2)}
    found = findings({**ILL, **hostile, **many}, AlarmsConfig())
    console = Console(file=io.StringIO(), width=240, force_terminal=False)
    console.print(*health_table(found))
    text = console.file.getvalue()
    assert "offpolicy/kl" in text and "at most 0.05" in text and "docs/objective.md#figures" in text
    assert chr(27) not in text and "env/[bold]" in text and "heldout/[red]0/num_failed" in text
    console.print(*health_table(found * 3))
    assert "and 12 more" in console.file.getvalue()
