"""Reports and comparisons for people: tables on a terminal, as wide as it is, and plain where they go elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from polyturn.cli.outcome import table
from polyturn.rollout.evaluation.compare import Comparison, EntryComparison, PairedResult, TaskPair, Verdict
from polyturn.rollout.evaluation.report import AtK, Coverage, Estimate, Figures, Report, Spending
from polyturn.tools.plain import printable

OVERALL = "all"
"""The row of what is over all entries."""
MAX_NAMED = 10
"""Tasks that flipped and are named; the JSON has all."""
NOTHING = "-"
LONGEST_NAME = 40

Rows = Sequence[Sequence[str]]
Named = Sequence[tuple[str, Figures]]


def print_report(report: Report) -> None:
    """Scores with intervals and coverage, what k samples are worth, what was spent, and what failed or was cut off."""
    named = [(entry.name, entry.figures) for entry in report.entries]
    if len(named) > 1:
        named.append((OVERALL, report.overall))
    _print_line(f"{report.suite}, played by {report.policy}")
    _print_table(
        ("entry", "score", "95 % interval", "coverage", "tasks", "no answer"),
        [_score_row(name, figures) for name, figures in named],
    )
    of_k: dict[str, Callable[[Figures], Sequence[AtK]]] = {
        "pass@k": lambda figures: figures.pass_at,
        "pass^k": lambda figures: figures.pass_all,
        "majority@k": lambda figures: figures.majority,
    }
    for title, choose in of_k.items():
        _print_at_each_k(title, [(name, choose(figures)) for name, figures in named])
    spent = [(name, figures.spending, figures) for name, figures in named if figures.spending is not None]
    if spent:
        _print_table(
            ("an episode", "turns", "tokens in", "out", "calls", "failed calls", "cost"),
            [_spent_row(name, spending, figures) for name, spending, figures in spent],
        )
        _print_table(
            ("seconds, p50/p90/p99", "policy", "tools", "queue", "all"),
            [_seconds_row(name, spending) for name, spending, _ in spent],
        )
    for name, figures in named[: len(report.entries)]:
        _print_asides(name, figures, report)


def print_comparison(comparison: Comparison) -> None:
    """Effects with intervals and p-values, the tasks that flipped, and what was left out."""
    _print_line(f"A: {comparison.a}\nB: {comparison.b}")
    for warning in comparison.warnings:
        _print_line(f"warning: {warning}")
    rows = [_paired_row(entry.name, entry.result, [entry]) for entry in comparison.entries]
    if len(rows) > 1:
        rows.append(_paired_row(OVERALL, comparison.overall, comparison.entries))
    _print_table(
        ("entry", "tasks", "A", "B", "B - A", "95 % interval", "p", "detectable", "flipped", "B is"), rows
    )
    for entry in comparison.entries:
        _print_tasks(f"{entry.name}: gained by B", entry.gained)
        _print_tasks(f"{entry.name}: lost by B", entry.lost)
        left_out = [
            f"{count} {name.removeprefix('num_').replace('_', ' ')}"
            for name, count in asdict(entry.left_out).items()
            if count
        ]
        if left_out:
            _print_line(f"{entry.name}: tasks left out: {', '.join(left_out)}")
    for name, where in comparison.entries_left_out.items():
        _print_line(f"{name}: left out, as it is {where}")
    if len(comparison.entries) > 1:
        _print_line("p of entries is adjusted for their number (Holm).")


def _score_row(name: str, figures: Figures) -> list[str]:
    score, share = figures.score, figures.no_answer_share
    return [
        name,
        _number(figures.verdict) if figures.verdict is not None else "no verdict",
        _interval(score) if figures.verdict is not None else NOTHING,
        _coverage(figures.coverage),
        f"{figures.coverage.num_scored_tasks}/{figures.coverage.num_tasks}",
        NOTHING if share is None else f"{share:.1%}",
    ]


def _coverage(coverage: Coverage) -> str:
    return f"{coverage.num_scored}/{coverage.num_asked} ({coverage.share:.1%})"


def _print_at_each_k(title: str, named: Sequence[tuple[str, Sequence[AtK]]]) -> None:
    """For k above 1; those of 1 are scores, or the share of successes, and stand in the first table."""
    by_name = {name: {at_k.k: at_k.estimate for at_k in found} for name, found in named}
    every_k = sorted({k for found in by_name.values() for k in found})
    if every_k and every_k[-1] > 1:
        header = (title, *(f"k={k}" for k in every_k))
        _print_table(
            header, [[name, *(_at_k(found.get(k)) for k in every_k)] for name, found in by_name.items()]
        )


def _at_k(estimate: Estimate | None) -> str:
    """What fewer tasks stand behind than were asked for says so."""
    if estimate is None:
        return NOTHING
    behind = "" if estimate.coverage == 1 else f" on {estimate.coverage:.0%}"
    return f"{_number(estimate.mean)} {_interval(estimate)}{behind}"


def _spent_row(name: str, spending: Spending, figures: Figures) -> list[str]:
    cost = figures.cost
    return [
        name,
        f"{spending.turns.mean:.1f}",
        f"{spending.prompt_tokens.mean:.0f}",
        f"{spending.completion_tokens.mean:.0f}",
        f"{spending.tool_calls.mean:.1f}",
        f"{spending.tool_error_share:.1%}",
        NOTHING if cost is None else f"{cost.per_episode:.4g} (all {cost.total:.4g})",
    ]


def _seconds_row(name: str, spending: Spending) -> list[str]:
    of_part = (spending.policy_s, spending.tools_s, spending.queue_s, spending.total_s)
    return [name, *(f"{part.p50:.2f}/{part.p90:.2f}/{part.p99:.2f}" for part in of_part)]


def _print_asides(name: str, figures: Figures, report: Report) -> None:
    """What stands beside a score: why it is no verdict, what failed, what was cut off."""
    coverage = figures.coverage
    if figures.verdict is None:
        seen = "" if figures.score is None else f"; of what was scored {_number(figures.score.mean)}"
        within = (
            "" if figures.bounds is None else f", of all between {' and '.join(map(_number, figures.bounds))}"
        )
        _print_line(
            f"{name}: no verdict, as {coverage.share:.1%} of the episodes have a score and "
            f"{report.coverage_floor:.0%} are needed{seen}{within}"
        )
    failed = {"infrastructure": coverage.num_infrastructure, "the scorer": coverage.num_scorer}
    said = [f"{count} failed by {who}" for who, count in failed.items() if count]
    said += [f"{coverage.num_missing} not played"] if coverage.num_missing else []
    said += [f"{count} cut off by {cause}" for cause, count in figures.truncated.items()]
    if said:
        _print_line(f"{name}: {', '.join(said)}")
    for sentence, count in figures.errors.items():
        _print_line(f"{name}: {count}x {sentence}")


def _paired_row(name: str, result: PairedResult | None, entries: Sequence[EntryComparison]) -> list[str]:
    if result is None:
        return [name, "0", *[NOTHING] * 7, "not compared"]
    num_gained, num_lost = (
        sum(len(flipped) for flipped in way)
        for way in zip(*((e.gained, e.lost) for e in entries), strict=True)
    )
    detectable = result.minimal_detectable_effect
    words = {Verdict.UNDECIDED: "not told apart", Verdict.NONE: "no verdict"}
    return [
        name,
        str(result.num_tasks),
        _number(result.a),
        _number(result.b),
        f"{result.effect:+.3f}",
        NOTHING if result.low is None or result.high is None else f"{result.low:+.3f} to {result.high:+.3f}",
        "<0.001" if result.p_adjusted < 0.001 else f"{result.p_adjusted:.3f}",
        NOTHING if detectable is None else f"{detectable:.3f}",
        f"+{num_gained} -{num_lost}",
        words.get(result.verdict, str(result.verdict)),
    ]


def _print_tasks(title: str, tasks: Sequence[TaskPair]) -> None:
    if tasks:
        named = ", ".join(_shortened(task.task_id) for task in tasks[:MAX_NAMED])
        more = f" and {len(tasks) - MAX_NAMED} more" if len(tasks) > MAX_NAMED else ""
        _print_line(f"{title}: {named}{more}")


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _number(value: float) -> str:
    return f"{value:.3f}"


def _interval(estimate: Estimate | None) -> str:
    if estimate is None or estimate.low is None or estimate.high is None:
        return NOTHING
    return f"[{_number(estimate.low)}, {_number(estimate.high)}]"


def _print_line(text: str) -> None:
    """Wrapped on a terminal, whole elsewhere."""
    console = Console()
    plain = "\n".join(printable(line) for line in text.splitlines())
    if console.is_terminal:
        console.print(Text(plain))
    else:
        print(plain)


def _print_table(header: Sequence[str], rows: Rows) -> None:
    """As a table; where that is wider than the terminal, as a paragraph for each row."""
    console = Console()
    if not console.is_terminal:
        print(f"\n{table([header, *rows])}")
        return
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        shown.add_column(Text(name))
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    if Measurement.get(console, console.options.update(max_width=10_000), shown).maximum <= console.width:
        console.print(shown)
        return
    label_width = max(len(name) for name in header[1:])
    for row in rows:
        console.print(Text(printable(f"{header[0]}: {row[0]}"), style="bold"))
        for name, cell in zip(header[1:], row[1:], strict=True):
            console.print(Text(printable(f"  {name.ljust(label_width)}  {cell}")))
    console.print()
