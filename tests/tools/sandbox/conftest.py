"""The backends that the sandbox tests run on, and what must be out of their reach."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from baits import Baits, lay_out_baits
from dockerd import CannotStart, install_docker, private_dockerd
from hostile import SMALL

from polyturn.tools.sandbox import Sandbox, SandboxBackend, SandboxUnavailable, make_backend


@pytest.fixture(scope="session")
def docker_host(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a daemon: one named by --docker-host, or one of our own; the tests skip where there is none."""
    pytest.importorskip("docker", reason="the docker SDK is missing: pip install polyturn[sandbox]")
    given = request.config.getoption("--docker-host")
    if given:
        yield given
        return
    with contextlib.ExitStack() as stack:
        try:
            if request.config.getoption("--install-docker"):
                install_docker()
            address = stack.enter_context(private_dockerd())
        except CannotStart as reason:
            pytest.skip(f"no Docker daemon: {reason}")
        yield address


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
