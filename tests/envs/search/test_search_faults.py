"""A search server that stumbles, real clients and real episodes: `benchmarks/search_faults.py` in short."""

from __future__ import annotations

import runpy
from pathlib import Path

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "search_faults.py"


def test_no_episode_is_scored_on_a_search_that_failed():
    figures = runpy.run_path(str(BENCHMARK))["measure"](60, share=0.4, seed=0)
    one_by_one = figures["one_by_one"]
    assert set(one_by_one["faults"]) == {"delay", "status", "reset", "half"}
    assert one_by_one["retries"] > 0 and one_by_one["survived"] > 30
    assert figures["scored"] == 0
