"""Programs that act as agents, with one socket within their reach: in a container, in bubblewrap, or on this machine.

Inside, the socket is a port of the loopback interface, so that any client finds it by an address. In a container a
helper of ours listens there, in the container's network and with files of its own: the image needs neither Python nor
socat, and the program cannot touch the helper.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from polyturn.tools.children import end_child, start_child
from polyturn.tools.sandbox.cgroups import Cgroup, CgroupParent, CgroupsUnavailable
from polyturn.tools.sandbox.container import AgentContainer, ContainerBroken, Containers
from polyturn.tools.sandbox.container_command import (
    Command,
    CommandResult,
    CommandStatus,
    ContainerFailed,
    Kept,
    docker_errors,
)
from polyturn.tools.sandbox.docker_daemon import remove
from polyturn.tools.sandbox.docker_image import RUNNER_FOLDER, ensure_python_image
from polyturn.tools.sandbox.runner import attend
from polyturn.tools.sandbox.sandbox import MIB, SandboxUnavailable

WORK = "/work"
"""Where a program in a sandbox of its own begins, and may write."""
_SOCKET_INSIDE = "/run/session.sock"
_HELPER_BYTES = 96 * MIB
_HELPER_STARTS_S = 20.0
_END_S = 5.0
_LOOK_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """What is run."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    files: Mapping[str, Path | bytes]
    """What is put into its reach before: by name there, a file or folder of this machine, or what a file holds."""
    stdin: str | None = None
    """Which of the files is its standard input."""


class Running(Protocol):
    """A program that runs."""

    def wait(
        self, timeout_s: float, *, max_output_bytes: int, max_written_bytes: int, grace_s: float
    ) -> CommandResult:
        """Waits for its end, and ends it where it takes longer or writes more."""
        ...

    def stop(self, grace_s: float = 0.0) -> None:
        """Ends it, by SIGTERM and then by SIGKILL. From any thread."""
        ...


class Place(Protocol):
    """Where one program runs, once. `close` ends all that is left of it."""

    def start(self, program: Program) -> Running:
        """Starts it. Raises ContainerFailed, ContainerBroken, OSError or SandboxUnavailable."""
        ...

    def read_file(self, path: str, *, max_bytes: int) -> bytes | None:
        """A file that it has left; None where there is none. Raises ValueError for what is no file, or too large."""
        ...

    def close(self, *, aborted: bool) -> None:
        """Frees everything; `aborted`: the program was not let come to its end."""
        ...


class ContainerPlace:
    """In a container: that of an episode, which stays, or one of its own, which goes with it."""

    def __init__(self, agent: AgentContainer, *, socket_path: Path, port: int, is_own: bool) -> None:
        check_reach(agent.containers)
        self._agent, self._is_own = agent, is_own
        self._socket_path, self._port = socket_path, port
        self._helper: Any = None

    def start(self, program: Program) -> Command:
        """As `Place`."""
        from docker.types import LogConfig

        container = self._agent.container
        image = ensure_python_image(self._agent.containers.client)
        self._helper = self._agent.containers.start_beside(
            container,
            image.tag,
            [
                "python3",
                "-I",
                f"{RUNNER_FOLDER}/runner/attend.py",
                "--socket",
                _SOCKET_INSIDE,
                "--port",
                str(self._port),
            ],
            volumes={str(self._socket_path): {"bind": _SOCKET_INSIDE, "mode": "rw"}},
            user=f"{os.getuid()}:{os.getgid()}",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            mem_limit=_HELPER_BYTES,
            pids_limit=16,
            log_config=LogConfig(type="json-file", config={"max-size": "1m"}),
        )
        self._await_helper()
        for name, source in program.files.items():
            container.put_tree(source, name) if isinstance(source, Path) else container.put_bytes(
                source, name
            )
        return container.start_command(
            program.command, user=self._agent.user, environment=program.environment, stdin_path=program.stdin
        )

    def read_file(self, path: str, *, max_bytes: int) -> bytes | None:
        """As `Place`."""
        return self._agent.container.read_file(path, max_bytes=max_bytes)

    def close(self, *, aborted: bool) -> None:
        """As `Place`; in an episode's container, what the program has left running goes on, unless it was aborted."""
        if self._helper is not None:
            with contextlib.suppress(ContainerFailed), docker_errors("removing a helper"):
                remove(self._helper)
        if self._is_own:
            self._agent.container.close()
        elif aborted:
            with contextlib.suppress(ContainerFailed, ContainerBroken):
                self._agent.container.end_processes()

    def _await_helper(self) -> None:
        deadline = time.monotonic() + _HELPER_STARTS_S
        with docker_errors("waiting for the helper of a program"):
            while b"ready" not in (said := self._helper.logs()):
                self._helper.reload()
                if self._helper.status == "exited" or time.monotonic() > deadline:
                    raise ContainerFailed(f"port {self._port} of a container cannot be had: {said[-300:]!r}")
                time.sleep(0.02)


def check_reach(containers: Containers) -> None:
    """Raises ValueError where no container of that daemon could reach a socket of this machine."""
    if not str(containers.client.api.base_url).startswith("http+docker"):
        raise ValueError(
            "a program in a container reaches its session only where the Docker daemon is this machine's"
        )


class LocalPlace:
    """On this machine: in bubblewrap, with a folder of its own and nothing else; or without any walls."""

    def __init__(
        self,
        *,
        socket_path: Path | None,
        port: int,
        walls: bool,
        readable: Sequence[Path] = (),
        memory_bytes: int = 2048 * MIB,
        num_processes: int = 512,
    ) -> None:
        """
        Args:
            socket_path: None: it is reached by the address that is given to the program, which only walls keep it from.
            readable: Further files and folders that are shown in bubblewrap, where they are.
            memory_bytes: Of all its processes, where cgroups can be written.

        Raises SandboxUnavailable where walls are wanted and there is no bubblewrap.
        """
        self._walls, self._socket_path, self._port = walls, socket_path, port
        self._readable = tuple(readable)
        if walls and shutil.which("bwrap") is None:
            raise SandboxUnavailable("there is no program bwrap (apt-get install bubblewrap)")
        self._folder = Path(tempfile.mkdtemp(prefix="polyturn-program-"))
        self._work = self._folder / "work"
        self._work.mkdir()
        self._running: LocalProgram | None = None
        self._parent: CgroupParent | None = None
        self._cgroup: Cgroup | None = None
        with contextlib.suppress(CgroupsUnavailable):
            self._parent = CgroupParent.find()
            self._cgroup = self._parent.make(
                self._folder.name, memory_bytes=memory_bytes, num_processes=num_processes
            )

    @property
    def work(self) -> str:
        """The folder that it begins in, as it sees it."""
        return WORK if self._walls else str(self._work)

    def start(self, program: Program) -> LocalProgram:
        """As `Place`. Names of files are taken below the folder that it begins in."""
        for name, source in program.files.items():
            self._put(self._inside(name), source)
        control, told = os.pipe()
        try:
            attending = ["--control", str(control)]
            if self._walls and self._socket_path is not None:
                attending += ["--socket", _SOCKET_INSIDE, "--port", str(self._port)]
            python, script = os.path.realpath(sys.executable), str(Path(attend.__file__).resolve())
            command = [
                python,
                "-I",
                "/run/attend.py" if self._walls else script,
                *attending,
                "--",
                *program.command,
            ]
            if self._walls:
                command = [*self._bubblewrap(script), "--", *command]
            stdin = (
                subprocess.DEVNULL
                if program.stdin is None
                else os.open(self._inside(program.stdin), os.O_RDONLY)
            )
            try:
                process = start_child(
                    command,
                    stdin=stdin,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    cwd=self._work,
                    env={
                        "PATH": f"{sys.base_prefix}/bin:{os.defpath}",
                        "HOME": self.work,
                        "LANG": "C.UTF-8",
                        **program.environment,
                    },
                    pass_fds=(control,),
                    preexec_fn=self._enter_cgroup,
                )
            finally:
                if stdin != subprocess.DEVNULL:
                    os.close(stdin)
        except BaseException:
            os.close(told)
            raise
        finally:
            os.close(control)
        self._running = LocalProgram(process, told)
        return self._running

    def read_file(self, path: str, *, max_bytes: int) -> bytes | None:
        """As `Place`, of the folder that it began in."""
        try:
            found = os.open(self._inside(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(f"{path} is no file ({error.strerror})") from error
        with open(found, "rb") as file:
            if not os.path.isfile(f"/proc/self/fd/{found}"):
                raise ValueError(f"{path} is no regular file")
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ValueError(f"{path} is larger than {max_bytes} bytes")
        return data

    def close(self, *, aborted: bool) -> None:
        """As `Place`."""
        del aborted  # nothing is left in any case
        if self._running is not None:
            self._running.stop()
        for cgroup in (self._cgroup, self._parent):
            if cgroup is not None:
                cgroup.close()
        self._cgroup = self._parent = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _inside(self, name: str) -> Path:
        relative = Path(name)
        if relative.is_absolute() and relative.is_relative_to(self.work):
            relative = relative.relative_to(self.work)
        path = Path(os.path.normpath(self._work / relative))
        # What the program has made may lead elsewhere by a link.
        if not path.is_relative_to(self._work) or not path.parent.resolve().is_relative_to(
            self._work.resolve()
        ):
            raise ValueError(f"{name} is not below {self.work}, the folder that the program begins in")
        return path

    def _put(self, path: Path, source: Path | bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            path.write_bytes(source)
        elif source.is_dir():
            shutil.copytree(source, path, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy(source, path)

    def _enter_cgroup(self) -> None:
        if self._cgroup is not None:
            self._cgroup.add(os.getpid())

    def _bubblewrap(self, script: str) -> list[str]:
        """bubblewrap with what a program needs to run: programs, libraries, an interpreter without its packages."""
        etc = {"passwd": "program:x:65532:65532::/work:/bin/sh\n", "hosts": "127.0.0.1 localhost\n"}
        words = [
            "bwrap",
            "--unshare-all",
            "--die-with-parent",
            "--uid",
            "65532",
            "--gid",
            "65532",
            "--hostname",
            "program",
        ]
        words += ["--cap-drop", "ALL", "--ro-bind", "/usr", "/usr"]
        for name in ("bin", "sbin", "lib", "lib64"):
            if os.path.islink(f"/{name}"):
                words += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
            elif os.path.isdir(f"/{name}"):
                words += ["--ro-bind", f"/{name}", f"/{name}"]
        for name in ("ld.so.cache", "alternatives", "ssl", "localtime"):
            words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        for name, text in etc.items():
            (self._folder / name).write_text(text)
            words += ["--ro-bind", str(self._folder / name), f"/etc/{name}"]
        words += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--dir", "/run"]
        if not Path(sys.base_prefix).is_relative_to("/usr"):
            words += ["--ro-bind", sys.base_prefix, sys.base_prefix]
        for folder in _package_folders():
            words += ["--tmpfs", folder, "--remount-ro", folder]
        for path in self._readable:
            words += ["--ro-bind", str(path), str(path)]
        words += ["--ro-bind", script, "/run/attend.py", "--bind", str(self._work), WORK, "--chdir", WORK]
        if self._socket_path is not None:
            words += ["--ro-bind", str(self._socket_path), _SOCKET_INSIDE]
        return words


class LocalProgram:
    """A program on this machine, attended by `runner/attend.py`."""

    def __init__(self, process: subprocess.Popen[bytes], control: int) -> None:
        """`control` is the descriptor whose end ends the program."""
        self._process, self._control = process, control
        self._ending = threading.Lock()
        self._has_ended = False

    def wait(
        self, timeout_s: float, *, max_output_bytes: int, max_written_bytes: int, grace_s: float
    ) -> CommandResult:
        """As `Running`."""
        start = time.monotonic()
        kept = Kept(max_output_bytes)
        status = self._read(kept, start + timeout_s, max_written_bytes)
        self.stop(0.0 if status == "ended" else grace_s)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return CommandResult(
            status=status,
            exit_code=self._process.returncode if status == "ended" else None,
            output=kept.text(),
            num_output_bytes=kept.num_bytes,
            seconds=time.monotonic() - start,
        )

    def stop(self, grace_s: float = 0.0) -> None:
        """As `Running`."""
        with self._ending:
            if self._has_ended:
                return
            if grace_s > 0 and self._process.poll() is None:
                with contextlib.suppress(OSError):
                    os.write(self._control, b"t")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(grace_s)
            self._has_ended = True
            os.close(self._control)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
            end_child(self._process)

    def _read(self, kept: Kept, deadline: float, max_written_bytes: int) -> CommandStatus:
        output = self._process.stdout
        assert output is not None
        poll = select.poll()
        poll.register(output, select.POLLIN)
        while (left_s := deadline - time.monotonic()) > 0:
            if poll.poll(1000 * min(left_s, _LOOK_S)):
                data = os.read(output.fileno(), 1 << 18)
                if not data:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(_END_S)
                    return "ended"
                kept.add(data)
                if kept.num_bytes > max_written_bytes:
                    return "output_limit"
            elif self._process.poll() is not None:
                return "ended"
        return "timeout"


def _package_folders() -> Iterator[str]:
    """Folders of packages beside the interpreter and in /usr, which programs are not shown unless they are named."""
    folders = {
        *site.getsitepackages([sys.base_prefix]),
        sysconfig.get_path("purelib", vars={"base": sys.base_prefix}),
    }
    folders |= {
        str(path)
        for pattern in ("lib/python3*/*-packages", "local/lib/python3*/*-packages")
        for path in Path("/usr").glob(pattern)
    }
    return (folder for folder in sorted(folders) if os.path.isdir(folder))
