"""Folders of sockets that killed processes have left are removed, and no others."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyturn.agents.sessions.server import SessionServer
from polyturn.agents.sessions.socket_folders import PREFIX, SOCKET, new_socket_path


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name: a kernel takes 107 characters."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


async def test_what_nobody_listens_in_is_removed(short_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    folders = {name: short_path / f"{PREFIX}{name}" for name in ("left", "empty", "begins", "other")}
    for folder in folders.values():
        folder.mkdir()
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(folders["left"] / SOCKET))
        killed.listen()
    os.utime(folders["empty"], (0, 0))
    (folders["other"] / "file").touch()
    async with SessionServer(socket_path=new_socket_path()) as server:
        path = new_socket_path()
        left = {folder.name.removeprefix(PREFIX) for folder in short_path.iterdir()}
        assert left - {"begins", "other"} == {server._socket_path.parent.name.removeprefix(PREFIX)}
        assert path.parent.parent == short_path and not path.parent.exists()
    assert {folder.name for folder in short_path.iterdir()} == {f"{PREFIX}begins", f"{PREFIX}other"}
