"""The one pool of ranks of a test run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.megatron.ranks_pool import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Runs top-level functions as up to four ranks over gloo; see `ranks_pool.RankPool.run`."""
    pool = RankPool()
    yield pool
    pool.close()
