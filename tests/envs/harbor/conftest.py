"""A daemon that has what tasks build on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from polyturn.envs.harbor.env import HarborEnv
from polyturn.tools.sandbox.docker_daemon import LABEL
from tests.support.task_images import import_base


@pytest.fixture(scope="session")
def client(docker_host: str) -> Iterator[Any]:
    """The SDK's client of a daemon with the base image."""
    import docker

    connected = docker.DockerClient(base_url=docker_host)
    import_base(connected)
    yield connected
    connected.close()


class MakeEnv(Protocol):
    def __call__(self, path: Path | None = None, **options: Any) -> HarborEnv: ...


@pytest.fixture
def make_env(docker_host: str, client: Any) -> Iterator[MakeEnv]:
    """Makes environments that are closed at the end, after which no container may be left."""
    made: list[HarborEnv] = []

    def make(path: Path | None = None, **options: Any) -> HarborEnv:
        env = HarborEnv(path=path, docker_host=docker_host, build_network="none", **options)
        made.append(env)
        return env

    yield make
    for env in made:
        env.close()
        left = {"label": f"{LABEL}={env._containers._id}"}
        assert client.containers.list(all=True, filters=left) == []
