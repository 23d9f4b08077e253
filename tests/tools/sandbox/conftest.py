"""The Docker daemon of the sandbox tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from dockerd import CannotStart, install_docker, private_dockerd


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
