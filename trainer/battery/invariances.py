"""What must change nothing of what a function makes of token rows, whatever its kind; and how a difference is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from polyturn.trainer.algorithms.tokens import GlobalCounts
from polyturn.trainer.battery.rows import Row, count, padded, poisoned, random_rows, without_masked

Check = Callable[[Any, int], None]
"""Takes a function of a kind and a seed. Raises `BatteryFailure`."""


class BatteryFailure(AssertionError):
    """A function breaks one of the rules; the sentence says which, and where."""


def require(condition: bool, sentence: str) -> None:
    """Raise `BatteryFailure` with the sentence unless the condition holds."""
    if not condition:
        raise BatteryFailure(sentence)


def require_equal(found: torch.Tensor, expected: torch.Tensor, what: str, *, tolerance: float = 0.0) -> None:
    """Raise `BatteryFailure` unless two tensors are equal, up to `tolerance` relative to the larger of 1 and each."""
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    gap = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
    # Not `any(gap > tolerance)`, so that a NaN on either side fails.
    if not bool((gap <= tolerance).all()):
        worst = int(torch.where(gap.isnan(), torch.inf, gap).argmax())
        raise BatteryFailure(
            f"{what}: {found.flatten()[worst].item():.9g} instead of {expected.flatten()[worst].item():.9g} at "
            f"element {worst}"
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outcome:
    """What a function makes of rows."""

    columns: Mapping[str, Sequence[torch.Tensor]]
    """By name, of each row [T]."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def at(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The columns at the trainable tokens."""
        return {
            name: torch.cat([part[row.mask].double() for part, row in zip(parts, rows, strict=True)])
            for name, parts in self.columns.items()
        }

    def require_same(
        self, rows: Sequence[Row], expected: Mapping[str, torch.Tensor], what: str, *, tolerance: float
    ) -> None:
        """Raise `BatteryFailure` unless the columns are these at the trainable tokens of their rows."""
        for name, column in self.at(rows).items():
            require_equal(column, expected[name], f"{what} changes the {name}", tolerance=tolerance)

    def require_silence(self, rows: Sequence[Row], what: str) -> None:
        """Raise `BatteryFailure` unless everything is 0 at the masked tokens."""
        for name, column in self.at([replace(row, mask=~row.mask) for row in rows]).items():
            require_equal(column, torch.zeros_like(column), f"{what} the {name} of a masked token is not 0")


Evaluate = Callable[[Any, Sequence[Row], GlobalCounts], Outcome]
"""A function of a kind, applied to some rows of the update that the counts are of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Invariances:
    """The checks that functions of tokens have in common."""

    evaluate: Evaluate
    tolerance: float
    """Of sums in another order."""

    def checks(self, *, split: bool) -> dict[str, Check]:
        """By name. `split`: the function sees micro-batches, not whole steps."""
        found: dict[str, Check] = {
            "deletion": self.check_deletion,
            "poison": self.check_poison,
            "padding": self.check_padding,
            "permutation": self.check_permutation,
        }
        return {**found, "split": self.check_split} if split else found

    def check_deletion(self, function: Any, seed: int) -> None:
        """Deleting masked tokens changes nothing."""
        rows = random_rows(seed)
        self._compare(function, [without_masked(row) for row in rows], rows, "deleting masked tokens")

    def check_poison(self, function: Any, seed: int) -> None:
        """Whatever stands in masked slots changes nothing, to the last bit."""
        rows = random_rows(seed)
        for poison in (math.nan, math.inf, -math.inf, 1e9, -1e9):
            bad, what = [poisoned(row, poison) for row in rows], f"{poison} in masked slots"
            found = self._compare(function, bad, rows, what, tolerance=0.0)
            found.require_silence(rows, f"with {what}")

    def check_padding(self, function: Any, seed: int) -> None:
        """Masked tokens after a row change nothing."""
        rows = random_rows(seed)
        wide = [padded(row, 1 + index % 3) for index, row in enumerate(rows)]
        self._compare(function, wide, rows, "padding")

    def check_permutation(self, function: Any, seed: int) -> None:
        """The order of the samples changes nothing."""
        rows = random_rows(seed)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [rows[index] for index in order]
        expected = self.evaluate(function, rows, count(rows))
        moved = Outcome(
            columns={name: [parts[index] for index in order] for name, parts in expected.columns.items()}
        )
        self.evaluate(function, shuffled, count(rows)).require_same(
            shuffled, moved.at(shuffled), "the order of the samples", tolerance=self.tolerance
        )

    def check_split(self, function: Any, seed: int) -> None:
        """A token counts the same in any micro-batch: parts add up to the whole however it is packed."""
        rows = random_rows(seed)
        counts = count(rows)
        expected = self.evaluate(function, rows, counts).at(rows)
        every = tuple(range(len(rows) + 1))
        for bounds in (every, (0, 1, len(rows)), (0, len(rows) // 2, len(rows))):
            parts = [
                self.evaluate(function, rows[low:high], counts).columns for low, high in pairwise(bounds)
            ]
            joined = Outcome(
                columns={name: [row for part in parts for row in part[name]] for name in expected}
            )
            what = f"splitting into {len(bounds) - 1} micro-batches"
            joined.require_same(rows, expected, what, tolerance=self.tolerance)

    def _compare(
        self,
        function: Any,
        changed: Sequence[Row],
        rows: Sequence[Row],
        what: str,
        *,
        tolerance: float | None = None,
    ) -> Outcome:
        """The outcome of changed rows, which must be that of the rows."""
        expected = self.evaluate(function, rows, count(rows))
        found = self.evaluate(function, changed, count(rows))
        found.require_same(
            changed, expected.at(rows), what, tolerance=self.tolerance if tolerance is None else tolerance
        )
        for name, value in expected.metrics.items():
            other = found.metrics.get(name, math.nan)
            require(
                math.isclose(other, value, rel_tol=1e-5, abs_tol=1e-7),
                f"{what} changes the metric {name} from {value} to {other}",
            )
        return found
