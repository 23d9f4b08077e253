"""Options of the test run."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.dockerd import CannotStart, install_docker, private_dockerd

STACK_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start the stack have more time. Their files come first, then the others, the largest before.

    A file is one worker's (`--dist loadfile`): what takes minutes must not be the last to begin. Of the stack's files
    those of the whole loop begin, which stand above those of its parts.
    """
    sizes = Counter(item.path for item in items)
    depths = {item.path: len(item.path.parts) for item in items if item.get_closest_marker("stack")}
    items.sort(key=lambda item: (depths.get(item.path, sys.maxsize), -sizes[item.path], item.path))
    for item in items:
        if item.get_closest_marker("stack") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(STACK_TIMEOUT_S))


def pytest_collection_finish() -> None:
    """What has been imported stays, and need not be walked through whenever a test collects garbage.

    The processes of a run share the cores, so torch takes one thread in each.
    """
    gc.collect()
    gc.freeze()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("polyturn")
    group.addoption(
        "--install-docker",
        action="store_true",
        help="have the tests of the Docker sandbox fail, not skip, where there is no daemon; dockerd is installed by "
        "apt-get where it is missing (as root)",
    )
    group.addoption(
        "--docker-host",
        metavar="URL",
        help="test the Docker sandbox on this running daemon (unix:///…) instead of one that the tests start",
    )
    group.addoption(
        "--require-chromium",
        action="store_true",
        help="have the tests of the viewer's page fail, not skip, where there is no Chromium",
    )
    group.addoption(
        "--write-screenshots",
        action="store_true",
        help="have the tests of the viewer's page write the pictures that docs/viewer.md shows",
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
