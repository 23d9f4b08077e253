"""Options of the test run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from dockerd import CannotStart, install_docker, private_dockerd


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("polyturn")
    group.addoption(
        "--install-docker",
        action="store_true",
        help="install dockerd by apt-get where it is missing (as root), for the tests of the Docker sandbox",
    )
    group.addoption(
        "--docker-host",
        metavar="URL",
        help="test the Docker sandbox on this running daemon (unix:///…) instead of one that the tests start",
    )


@pytest.fixture(scope="session")
def docker_host(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a daemon: one named by --docker-host, or one of our own.

    Where there is none the tests skip; with --install-docker they fail.
    """
    pytest.importorskip("docker", reason="the docker SDK is missing: pip install polyturn[sandbox]")
    given = request.config.getoption("--docker-host")
    if given:
        yield given
        return
    needed = request.config.getoption("--install-docker")
    with contextlib.ExitStack() as stack:
        try:
            if needed:
                install_docker()
            address = stack.enter_context(private_dockerd())
        except CannotStart as reason:
            if needed:
                raise
            pytest.skip(f"no Docker daemon: {reason}")
        yield address
