"""Odd configs of every family: what is loaded is computed as transformers computes it, and all else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyturn.configs.schema.trainer import ParallelConfig
from tests.support.megatron.config_sweep import BASES, LIKE_OTHERS, Outcome, cases_of, run_case
from tests.support.megatron.ranks_pool import RankContext, RankPool

pytestmark = pytest.mark.stack

TOLERANCE = 3e-6


def run_family(context: RankContext, base: str, directory: Path) -> list[Outcome]:
    with context.joined(ParallelConfig()):
        return [run_case(case, directory) for case in cases_of(base)]


@pytest.mark.parametrize("base", BASES)
def test_each_odd_config_is_exact_or_refused(rank_pool: RankPool, base: str, tmp_path: Path) -> None:
    (outcomes,) = rank_pool.run(1, run_family, base, tmp_path / "model", timeout=300)
    wrong = [
        f"{case}: {outcome}"
        for case, outcome in zip(cases_of(base), outcomes, strict=True)
        if outcome.crashed or (outcome.error is not None and outcome.error > TOLERANCE)
    ]
    assert not wrong, "\n".join(wrong)
    exact = sum(outcome.error is not None for outcome in outcomes)
    refused = sum(outcome.refused is not None for outcome in outcomes)
    unread = sum(outcome.transformers is not None for outcome in outcomes)
    least_exact, least_refused = (3, 3) if base in LIKE_OTHERS else (12, 8)
    assert exact >= least_exact and refused >= least_refused and unread <= 8, (
        f"{exact} exact, {refused} refused, {unread} unread"
    )
