"""Options of the test run."""

from __future__ import annotations

import pytest


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
