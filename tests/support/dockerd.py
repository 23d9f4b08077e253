"""A Docker daemon of the tests' own: its own socket, data in a temporary folder, ended by process id."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("dockerd", "containerd", "runc")
INSTALL = ("apt-get", "install", "-y", "--no-install-recommends", "docker.io", "runc", "containerd")
START_S = 30.0


class CannotStart(Exception):
    """Why there is no daemon here."""


def install_docker() -> None:
    """Installs the daemon by apt where it is missing; raises CannotStart where that fails."""
    if all(_program(name) for name in PROGRAMS):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], list(INSTALL)):
        try:
            subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
        except (OSError, subprocess.SubprocessError) as error:
            raise CannotStart(f"{' '.join(command)} failed: {error}") from error


@contextlib.contextmanager
def private_dockerd() -> Iterator[str]:
    """Runs a daemon for as long as the block lasts, and gives its address.

    Raises CannotStart where a program is missing, or the daemon does not answer.
    """
    if os.getuid() != 0:
        raise CannotStart("dockerd needs root")
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        raise CannotStart(
            f"{', '.join(missing)} not installed (pytest --install-docker installs them by apt-get)"
        )
    # Unix socket paths are short: 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="dockerd-"))
    log = folder / "log"
    try:
        with log.open("wb") as output:
            daemon = subprocess.Popen(
                _command(folder),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                preexec_fn=_die_with_parent,
            )
        try:
            _wait_until_up(daemon, folder / "docker.sock", log)
            yield f"unix://{folder / 'docker.sock'}"
        finally:
            _end(daemon)
    finally:
        _remove(folder)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _command(folder: Path) -> list[str]:
    """dockerd without a bridge, firewall rules or the system's own folders; gVisor's runtime where it is installed."""
    program = _program("dockerd")
    assert program is not None
    command = [
        program,
        "--data-root",
        f"{folder}/data",
        "--exec-root",
        f"{folder}/exec",
        "--pidfile",
        f"{folder}/pid",
    ]
    command += ["--host", f"unix://{folder}/docker.sock", "--exec-opt", "native.cgroupdriver=cgroupfs"]
    command += [
        "--bridge=none",
        "--iptables=false",
        "--ip6tables=false",
        "--ip-forward=false",
        "--ip-masq=false",
    ]
    command += ["--storage-driver=overlay2", "--config-file", f"{folder}/daemon.json"]
    command += ["--cgroup-parent", f"/{folder.name}"]
    (folder / "daemon.json").write_text("{}")
    if runsc := _program("runsc"):
        wrapper = folder / "runsc.sh"
        wrapper.write_text(f'#!/bin/sh\nexec {runsc} --platform=ptrace --network=none "$@"\n')
        wrapper.chmod(0o755)
        command += ["--add-runtime", f"runsc={wrapper}"]
    return command


def _die_with_parent() -> None:
    """A daemon must not outlive tests that are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


def _wait_until_up(daemon: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and daemon.poll() is None:
        with socket.socket(socket.AF_UNIX) as probe:
            if path.exists() and probe.connect_ex(str(path)) == 0:
                probe.settimeout(START_S)
                probe.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
                if b"200" in probe.recv(256):
                    return
        time.sleep(0.05)
    lines = log.read_text(errors="replace").strip().splitlines() or ["it wrote nothing"]
    raise CannotStart(f"dockerd did not come up: {lines[-1]}")


def _end(daemon: subprocess.Popen[bytes]) -> None:
    """Asks it to end, which stops its containers and its containerd; kills it when it does not."""
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _remove(folder: Path) -> None:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((path for path in mounts if path.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)
    for cgroup in (
        *Path("/sys/fs/cgroup").glob(folder.name),
        *Path("/sys/fs/cgroup").glob(f"*/{folder.name}"),
    ):
        with contextlib.suppress(OSError):
            cgroup.rmdir()
