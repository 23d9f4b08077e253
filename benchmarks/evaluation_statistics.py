"""What the intervals and the test of evaluations cover, by simulation, beside what others use.

Tasks are drawn, then their samples; an interval is right where it holds the score that all such tasks have. True scores
are spread over a range, as counts of few tasks cannot cover every single one alike (Brown, Cai, DasGupta 2001); half of
the evaluations are mirrored, so that scores near 1 are in it as those near 0 are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean

import numpy as np
import numpy.typing as npt

from polyturn.rollout.evaluation.paired import Effect, sign_flip_p_value, standard_error
from polyturn.rollout.evaluation.statistics import Z, student_quantile, wilson_interval

Array = npt.NDArray[np.float64]
Rng = np.random.Generator
NUM_TASKS = (5, 10, 20, 50, 200)
RANGES = ((0.0, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.5))
STEPS = 20
"""True scores within a range."""
NUM_RESAMPLES = 400
NUM_DRAWS = 2_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """How tasks differ, and how often each is sampled."""

    name: str
    samples: tuple[int, int]
    """The fewest and the most of a task."""
    correlation: float
    """Of two samples of one task: 0, tasks are equally hard; 1, each is always or never solved."""
    kind: str = "binary"
    """`graded`: each sample scores one of 0, 0.25, ..., 1. `smooth`: any score; one sample of each task."""

    def draw(self, rng: Rng, num_evaluations: int, num_tasks: int, truth: float) -> tuple[Array, Array]:
        """The tasks' mean scores and numbers of samples, each [num_evaluations, num_tasks]."""
        shape = (num_evaluations, num_tasks)
        rates = solve_rates(rng, shape, truth, self.correlation)
        samples = rng.integers(self.samples[0], self.samples[1] + 1, size=shape)
        if self.kind == "smooth":
            return rates, samples.astype(float)
        tries = 4 if self.kind == "graded" else 1
        return rng.binomial(samples * tries, rates) / (samples * tries), samples.astype(float)


def solve_rates(rng: Rng, shape: tuple[int, int], truth: float, correlation: float) -> Array:
    """How often each task is solved: a beta distribution about `truth`."""
    if correlation == 0:
        return np.full(shape, truth)
    weight = 1 / correlation - 1
    return rng.beta(max(truth * weight, 1e-9), max((1 - truth) * weight, 1e-9), size=shape)


DESIGNS = (
    Design(name="1 sample", samples=(1, 1), correlation=0.0),
    Design(name="4, no correlation", samples=(4, 4), correlation=0.0),
    Design(name="4, 0.2", samples=(4, 4), correlation=0.2),
    Design(name="8, 0.5", samples=(8, 8), correlation=0.5),
    Design(name="8, 0.9", samples=(8, 8), correlation=0.9),
    Design(name="32, 0.5", samples=(32, 32), correlation=0.5),
    Design(name="1 to 8, 0.3", samples=(1, 8), correlation=0.3),
    Design(name="1 to 8, 0.8", samples=(1, 8), correlation=0.8),
    Design(name="graded, 0.5", samples=(1, 1), correlation=0.5, kind="graded"),
    Design(name="smooth, 0.1", samples=(1, 1), correlation=0.1, kind="smooth"),
    Design(name="smooth, 0.02", samples=(1, 1), correlation=0.02, kind="smooth"),
)
SKEWED = (
    Design(name="smooth, 0.3", samples=(1, 1), correlation=0.3, kind="smooth"),
    Design(name="smooth, 0.5", samples=(1, 1), correlation=0.5, kind="smooth"),
    Design(name="smooth, 0.8", samples=(1, 1), correlation=0.8, kind="smooth"),
)
"""Scores that lie near 0 and 1, and are neither: of some tasks that succeed nothing shows in the others."""

Method = Callable[[Array, Array], tuple[Array, Array]]
"""From values and numbers of samples to the limits, each [num_evaluations]."""


def ours(values: Array, _samples: Array) -> tuple[Array, Array]:
    """What reports have."""
    return wilson_interval(values)


def clustered(values: Array, _samples: Array, quantile: float = Z) -> tuple[Array, Array]:
    """The mean and 1.96 standard errors clustered by task (Miller 2024, section 2.2), as inspect_ai and others."""
    error = values.std(axis=1, ddof=1) / np.sqrt(values.shape[1])
    return values.mean(axis=1) - quantile * error, values.mean(axis=1) + quantile * error


def clustered_student(values: Array, samples: Array) -> tuple[Array, Array]:
    """The same with Student's t."""
    return clustered(values, samples, student_quantile(values.shape[1] - 1))


def all_samples(values: Array, samples: Array) -> tuple[Array, Array]:
    """Wilson's interval over all samples, as if they were independent."""
    number = samples.sum(axis=1)
    return plain_wilson((values * samples).sum(axis=1) / number, number)


def effective(values: Array, _samples: Array) -> tuple[Array, Array]:
    """Wilson's interval over the effective number of tasks, without what ours corrects."""
    mean, variance = values.mean(axis=1), values.var(axis=1, ddof=1)
    is_spread = variance > 0
    number = np.where(is_spread, mean * (1 - mean) / np.where(is_spread, variance, 1), 1) * values.shape[1]
    return plain_wilson(mean, np.clip(number, 1.0, 1e9))


def bootstrap(values: Array, _samples: Array) -> tuple[Array, Array]:
    """The percentiles of means over tasks drawn again."""
    num_tasks = values.shape[1]
    weights = np.random.default_rng(0).multinomial(num_tasks, [1 / num_tasks] * num_tasks, size=NUM_RESAMPLES)
    low, high = np.percentile(values @ weights.T / num_tasks, (2.5, 97.5), axis=1)
    return low, high


def plain_wilson(mean: Array, number: Array) -> tuple[Array, Array]:
    """Wilson 1927."""
    scale = 1 + Z**2 / number
    centre = (mean + Z**2 / (2 * number)) / scale
    half = Z * np.sqrt(mean * (1 - mean) / number + Z**2 / (4 * number**2)) / scale
    return np.where(mean > 0, centre - half, 0.0), np.where(mean < 1, centre + half, 1.0)


METHODS: Mapping[str, Method] = {
    "ours": ours,
    "effective Wilson": effective,
    "clustered t": clustered_student,
    "clustered ±1.96": clustered,
    "bootstrap": bootstrap,
    "Wilson, all samples": all_samples,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What methods cover in one design, number of tasks and range of true scores."""

    design: str
    num_tasks: int
    truths: tuple[float, float]
    covered: Mapping[str, float]
    width: Mapping[str, float]

    @property
    def is_rare(self) -> bool:
        """Whether so few successes, or failures, are to be expected that no interval can cover 95 %."""
        return self.num_tasks * fmean(self.truths) < RARE


RARE = 3.0
"""Successes, or failures, in tasks."""


def coverage_cells(
    num_evaluations: int,
    *,
    designs: Sequence[Design] = DESIGNS,
    methods: Mapping[str, Method] = METHODS,
    seed: int = 0,
) -> Iterator[Cell]:
    """Every design, number of tasks and range; `num_evaluations` of each."""
    for design in designs:
        for num_tasks in NUM_TASKS:
            for truths in RANGES:
                rng = np.random.default_rng(
                    [seed, num_tasks, int(1000 * truths[0]), (*DESIGNS, *SKEWED).index(design)]
                )
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
                for step in range(STEPS):
                    truth = truths[0] + (truths[1] - truths[0]) * (step + 0.5) / STEPS
                    values, samples = design.draw(rng, num_evaluations // STEPS, num_tasks, truth)
                    if step % 2:
                        values, truth = 1 - values, 1 - truth
                    for name, method in methods.items():
                        low, high = method(values, samples)
                        is_right = (low <= truth + 1e-12) & (truth - 1e-12 <= high)
                        found[name].append((float(is_right.mean()), float((high - low).mean())))
                yield Cell(
                    design=design.name,
                    num_tasks=num_tasks,
                    truths=truths,
                    covered={name: fmean(c for c, _ in steps) for name, steps in found.items()},
                    width={name: fmean(w for _, w in steps) for name, steps in found.items()},
                )


def over_all_scores(cells: Sequence[Cell], name: str) -> dict[tuple[str, int], float]:
    """What is covered by design and number of tasks, over true scores that are spread evenly from 0 to 1."""
    return {
        (design, number): sum(
            cell.covered[name] * 2 * (cell.truths[1] - cell.truths[0])
            for cell in cells
            if (cell.design, cell.num_tasks) == (design, number)
        )
        for design, number in dict.fromkeys((cell.design, cell.num_tasks) for cell in cells)
    }


def exact_coverage(num_tasks: int, truths: tuple[float, float]) -> tuple[Array, Array]:
    """Of tasks that are all or nothing: true scores within a range, and what ours covers of each, by enumeration."""
    truth = truths[0] + (truths[1] - truths[0]) * (np.arange(400) + 0.5) / 400
    counts = np.arange(num_tasks + 1)
    low, high = wilson_interval((np.arange(num_tasks) < counts[:, None]).astype(float))
    is_right = (low[:, None] <= truth) & (truth <= high[:, None])
    return truth, (chances_of_counts(num_tasks, truth) * is_right).sum(axis=0)


def chances_of_counts(num_tasks: int, truth: Array) -> Array:
    """[num_tasks + 1, truths]"""
    counts = np.arange(num_tasks + 1)[:, None]
    ways = np.array([comb(num_tasks, count) for count in range(num_tasks + 1)], dtype=float)[:, None]
    return ways * truth**counts * (1 - truth) ** (num_tasks - counts)


def least_average(num_tasks: int, truth: Array, floor: float) -> float:
    """What any interval covers on average of these true scores that covers each of them to `floor` at least.

    Of all-or-nothing tasks an interval holds a true score for some counts, from one to another: its coverage is one of
    so many values, of which near 0 few lie between 90 and 100 %.
    """
    below = np.concatenate(
        [np.zeros((1, len(truth))), np.cumsum(chances_of_counts(num_tasks, truth), axis=0)]
    )
    least = np.ones_like(truth)
    for first in range(num_tasks + 1):
        covered = below[first + 1 :] - below[first]
        least = np.minimum(least, np.where(covered >= floor, covered, 1.0).min(axis=0))
    return float(least.mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class PairDesign:
    """Two policies on the same tasks."""

    name: str
    num_samples: int
    correlation: float
    truth: float
    changed: float = 0.0
    """The share of tasks whose rate is drawn anew for B, or, with `gain`, raised."""
    gain: float = 0.0
    """By so much of what is left to 1."""

    def draw(self, rng: Rng, num_evaluations: int, num_tasks: int) -> tuple[Array, Array, float]:
        """The tasks' mean scores of A and of B, and the true difference."""
        shape = (num_evaluations, num_tasks)
        of_a, other = (solve_rates(rng, shape, self.truth, self.correlation) for _ in range(2))
        is_changed = rng.random(shape) < self.changed
        of_b = np.where(is_changed, of_a + self.gain * (1 - of_a) if self.gain else other, of_a)
        a, b = (rng.binomial(self.num_samples, rates) / self.num_samples for rates in (of_a, of_b))
        return a, b, self.changed * self.gain * (1 - self.truth)


ALIKE = (
    PairDesign(name="1 sample, all tasks a coin", num_samples=1, correlation=0.0, truth=0.5),
    PairDesign(
        name="1 sample, a third of tasks changed", num_samples=1, correlation=0.9, truth=0.5, changed=0.33
    ),
    PairDesign(name="4 samples, correlation 0.3", num_samples=4, correlation=0.3, truth=0.5),
    PairDesign(
        name="4 samples, 0.5, a fifth changed", num_samples=4, correlation=0.5, truth=0.5, changed=0.2
    ),
    PairDesign(name="8 samples, 0.9, all changed", num_samples=8, correlation=0.9, truth=0.2, changed=1.0),
    PairDesign(name="4 samples, 0.3, a tenth solved", num_samples=4, correlation=0.3, truth=0.1),
)
APART = (
    PairDesign(
        name="1 sample, a fifth gained", num_samples=1, correlation=0.9, truth=0.5, changed=0.4, gain=1.0
    ),
    PairDesign(
        name="4 samples, all a little", num_samples=4, correlation=0.3, truth=0.5, changed=1.0, gain=0.2
    ),
    PairDesign(
        name="8 samples, a tenth by half", num_samples=8, correlation=0.5, truth=0.3, changed=0.1, gain=0.5
    ),
)


def paired_student(differences: Array) -> Array:
    """Whether a paired t test at 5 % finds a difference."""
    num_tasks = differences.shape[1]
    error = differences.std(axis=1, ddof=1) / np.sqrt(num_tasks)
    return np.abs(differences.mean(axis=1)) > student_quantile(num_tasks - 1) * error + 1e-12


def unpaired(a: Array, b: Array) -> Array:
    """Whether a test that takes the two for evaluations on different tasks does."""
    error = np.sqrt((a.var(axis=1, ddof=1) + b.var(axis=1, ddof=1)) / a.shape[1])
    return np.abs(b.mean(axis=1) - a.mean(axis=1)) > Z * error + 1e-12


def found_by_test(differences: Array, *, num_draws: int) -> Array:
    """Whether our test does, with fewer draws than in a comparison: there are many of them."""
    return np.array([sign_flip_p_value(row, num_draws=num_draws) < 0.05 for row in differences])


def sizes(
    num_evaluations: int, *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """How often each test finds a difference between policies that are alike; 5 % is right."""
    for number, design in enumerate(ALIKE):
        for num_tasks in NUM_TASKS:
            a, b, _ = design.draw(
                np.random.default_rng([seed, number, num_tasks]), num_evaluations, num_tasks
            )
            yield (
                design.name,
                num_tasks,
                {
                    "ours": float(found_by_test(b - a, num_draws=num_draws).mean()),
                    "paired t": float(paired_student(b - a).mean()),
                    "unpaired": float(unpaired(a, b).mean()),
                },
            )


def difference_coverage(
    num_evaluations: int, *, seed: int = 0
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """How often intervals of the difference hold the true one; 95 % is right."""
    for number, design in enumerate((*ALIKE, *APART)):
        for num_tasks in NUM_TASKS:
            a, b, truth = design.draw(
                np.random.default_rng([seed, number, num_tasks]), num_evaluations, num_tasks
            )
            mean, error = (b - a).mean(axis=1), standard_error(b - a)
            half = student_quantile(num_tasks - 1) * error
            plain = student_quantile(num_tasks - 1) * (b - a).std(axis=1, ddof=1) / np.sqrt(num_tasks)
            yield (
                design.name,
                num_tasks,
                {
                    "ours": float((np.abs(mean - truth) <= half + 1e-12).mean()),
                    "paired t": float((np.abs(mean - truth) <= plain + 1e-12).mean()),
                },
            )


def power_at_detectable(
    num_evaluations: int, num_tasks: int, *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> float:
    """How often a true difference of the size that is called detectable is found; 80 % is right.

    A share of the tasks gains, so that the difference is what the evaluation itself says it could find on average.
    """
    rng = np.random.default_rng(seed)
    alike = PairDesign(name="", num_samples=4, correlation=0.3, truth=0.5)
    a, b, _ = alike.draw(rng, num_evaluations, num_tasks)
    error = float(standard_error(b - a).mean())
    detectable = Effect(mean=0.0, error=error, degrees=num_tasks - 1).minimal_detectable
    assert detectable is not None
    gaining = PairDesign(
        name="", num_samples=4, correlation=0.3, truth=0.5, changed=1.0, gain=min(1.0, 2 * detectable)
    )
    a, b, truth = gaining.draw(rng, num_evaluations, num_tasks)
    return (
        float(found_by_test(b - a, num_draws=num_draws).mean())
        if truth >= detectable - 1e-9
        else float("nan")
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", type=int, default=4_000, help="simulated ones of each kind")
    parser.add_argument("--short", action="store_true", help="a twentieth of them")
    return parser.parse_args()


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """In Markdown."""
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def percent(values: list[float]) -> str:
    """Lowest, mean and highest."""
    return f"{100 * min(values):.1f} / {100 * fmean(values):.1f} / {100 * max(values):.1f}" if values else "-"


def print_coverage(cells: list[Cell]) -> dict[str, float]:
    """By method and number of tasks, then ours by design."""
    for title, is_rare in (("tasks, none rare", False), ("tasks, rare", True)):
        chosen = [cell for cell in cells if cell.is_rare == is_rare]
        rows = [
            [
                str(number),
                *(percent([c.covered[name] for c in chosen if c.num_tasks == number]) for name in METHODS),
            ]
            for number in NUM_TASKS
        ]
        print_table([title, *METHODS], [row for row in rows if row[1] != "-"])
    by_design = []
    for design in DESIGNS:
        of_design = [cell for cell in cells if cell.design == design.name]
        by_design.append(
            [
                design.name,
                *(
                    " ".join(
                        f"{100 * cell.covered['ours']:.0f}" for cell in of_design if cell.num_tasks == number
                    )
                    for number in NUM_TASKS
                ),
            ]
        )
    print_table(
        ["samples, correlation; ours by range of scores", *(f"{n} tasks" for n in NUM_TASKS)], by_design
    )
    ordinary = [cell for cell in cells if not cell.is_rare]
    return {
        "lowest": min(cell.covered["ours"] for cell in cells),
        "lowest_ordinary": min(cell.covered["ours"] for cell in ordinary),
        "highest_ordinary": max(cell.covered["ours"] for cell in ordinary),
        "lowest_clustered_t": min(cell.covered["clustered t"] for cell in cells),
        "lowest_all_samples": min(cell.covered["Wilson, all samples"] for cell in cells),
    }


def print_what_can_be(cells: Sequence[Cell]) -> dict[str, float]:
    """Where few successes are to be expected: what ours covers beside the least that any interval can."""
    rows = []
    for number in NUM_TASKS:
        for truths in RANGES:
            if number * fmean(truths) < RARE:
                truth, covered = exact_coverage(number, truths)
                bounds = [least_average(number, truth, floor) for floor in (0.9, 0.93)]
                figures = [covered.mean(), covered.min(), *bounds]
                name = f"{number} tasks, {truths[0]} to {truths[1]}"
                rows.append([name, *(f"{100 * figure:.1f}" for figure in figures)])
    header = ["all or nothing, one sample", "ours, mean", "ours, lowest"]
    print_table([*header, "any that covers each to 90", "to 93"], rows)
    everywhere = over_all_scores(cells, "ours")
    rows = [
        [str(number), percent([v for (_, n), v in everywhere.items() if n == number])] for number in NUM_TASKS
    ]
    print_table(["tasks", "ours by design, true scores spread evenly from 0 to 1"], rows)
    return {"lowest_everywhere": min(everywhere.values()), "highest_everywhere": max(everywhere.values())}


def print_skewed(num_evaluations: int) -> dict[str, float]:
    """Scores near 0 and 1 that are neither."""
    cells = list(coverage_cells(num_evaluations, designs=SKEWED))
    rows = [
        [
            f"{design.name}, {number} tasks",
            *(
                percent([c.covered[name] for c in cells if (c.design, c.num_tasks) == (design.name, number)])
                for name in METHODS
            ),
        ]
        for design in SKEWED
        for number in NUM_TASKS
    ]
    print_table(["skewed", *METHODS], rows)
    return {"lowest_skewed": min(cell.covered["ours"] for cell in cells)}


def print_by_design(title: str, found: list[tuple[str, int, dict[str, float]]]) -> None:
    """A row for each design, and in it for each number of tasks what each method has."""
    names = list(found[0][2])
    rows = [
        [design, *(" / ".join(f"{100 * v[n]:.1f}" for n in names) for d, _, v in found if d == design)]
        for design in dict.fromkeys(design for design, _, _ in found)
    ]
    print_table([f"{title}: {' / '.join(names)}", *(f"{number} tasks" for number in NUM_TASKS)], rows)


def main() -> None:
    arguments = parse_arguments()
    number = arguments.evaluations // 20 if arguments.short else arguments.evaluations
    cells = list(coverage_cells(number))
    said = print_coverage(cells) | print_what_can_be(cells) | print_skewed(number)
    of_tests = list(sizes(number // 2))
    print_by_design("differences found where there is none", of_tests)
    of_intervals = list(difference_coverage(number))
    print_by_design("differences that intervals hold", of_intervals)
    power = {str(tasks): power_at_detectable(number // 2, tasks) for tasks in NUM_TASKS[1:]}
    print_table(
        ["tasks", "found, of differences called detectable"], [[t, f"{p:.1%}"] for t, p in power.items()]
    )
    said |= {
        "largest_size": max(found["ours"] for _, _, found in of_tests),
        "lowest_of_difference": min(found["ours"] for _, _, found in of_intervals),
    }
    print(json.dumps({**said, "power": power, "evaluations": number}))


if __name__ == "__main__":
    main()
