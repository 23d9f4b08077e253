"""The backends that the sandbox tests run on, and what must be out of their reach."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from polyturn.tools.sandbox import Sandbox, SandboxBackend, SandboxUnavailable, make_backend
from tests.support.hostile.baits import Baits, lay_out_baits
from tests.support.hostile.snippet import SMALL


@pytest.fixture(scope="session")
def baits() -> Iterator[Baits]:
    with lay_out_baits() as laid_out:
        yield laid_out


@pytest.fixture(scope="session", params=["embedded", "docker"])
def backend(request: pytest.FixtureRequest, baits: Baits) -> Iterator[SandboxBackend]:
    """Each backend in turn, started in the presence of the baits."""
    if request.param == "docker":
        running = make_backend("docker", host=request.getfixturevalue("docker_host"))
    else:
        try:
            running = make_backend("embedded")
        except SandboxUnavailable as reason:
            pytest.skip(str(reason))
    yield running
    running.close()


@pytest.fixture
def sandbox(backend: SandboxBackend) -> Iterator[Sandbox]:
    """A sandbox under the limits that the hostile snippets are measured against."""
    with backend.create(SMALL) as created:
        yield created
