"""What the tests of the viewer share: the files of one small fixture, which none of them changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.viewer.fixture import FixtureRun


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FixtureRun]:
    """Runs and evaluations, as `tests.viewer.fixture` writes them."""
    pytest.importorskip("tokenizers")
    from tests.viewer.fixture import write_fixture

    yield write_fixture(tmp_path_factory.mktemp("viewer"))
