"""A Python image for the Docker backend, built without a registry: this machine's own interpreter as one layer."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import IO, Any

from polyturn.tools.sandbox.types import SandboxUnavailable

REPOSITORY = "polyturn-sandbox"
_LAYOUT = "1"
"""Part of every tag: raise it when what is below puts other things into the same files' image."""

_UNNEEDED = frozenset(
    (
        "test",
        "tests",
        "idlelib",
        "tkinter",
        "lib2to3",
        "ensurepip",
        "turtledemo",
        "site-packages",
        "dist-packages",
    )
)
_FACTS = (
    "import json, site, sys, sysconfig; p = sysconfig.get_path; "
    "print(json.dumps([sys.executable, p('stdlib'), p('platstdlib'), site.getsitepackages()[0], "
    "list(sys.version_info[:2])]))"
)
_ETC = {
    "etc/passwd": "root:x:0:0::/:/sbin/nologin\n",
    "etc/group": "root:x:0:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpreter:
    """A Python as it lies on this machine; it keeps its paths in the image, since libraries are found by them."""

    executable: str
    trees: tuple[str, ...]
    """The standard library's folders."""
    site_packages: str
    """Where third-party packages go in the image."""
    version: tuple[int, int]


def find_interpreter(executable: str | None = None) -> Interpreter:
    """The facts about an interpreter; by default the one under this process's virtual environment.

    Raises SandboxUnavailable where it does not run.
    """
    chosen = os.path.realpath(executable or getattr(sys, "_base_executable", None) or sys.executable)
    try:
        answer = subprocess.run(
            [chosen, "-I", "-c", _FACTS], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxUnavailable(f"the image probe failed: {chosen} does not run ({error})") from error
    path, stdlib, platstdlib, site_packages, version = json.loads(answer.stdout)
    return Interpreter(
        executable=os.path.realpath(path),
        trees=tuple(sorted({stdlib, platstdlib})),
        site_packages=site_packages,
        version=(version[0], version[1]),
    )


def image_files(interpreter: Interpreter, packages: Sequence[str] = ()) -> dict[str, str]:
    """Path in the image (without the leading slash) -> file of this machine.

    `packages` are installed distributions (`numpy`, `sympy`) that the code may import; what they depend on is
    not added by itself. Raises ValueError for one that is not installed here.
    """
    files = {interpreter.executable.lstrip("/"): interpreter.executable}
    for tree in interpreter.trees:
        for path in _walk(tree):
            files.setdefault(path.lstrip("/"), path)
    for package in packages:
        for inside, path in _distribution_files(package):
            files.setdefault(f"{interpreter.site_packages.lstrip('/')}/{inside}", path)
    return files


def add_shared_libraries(files: dict[str, str], executable: str) -> None:
    """Adds what the interpreter and its extension modules are linked against, the dynamic loader among them."""
    binaries = [path for name, path in files.items() if path == executable or ".so" in name]
    for library in _shared_libraries(binaries):
        files.setdefault(library.lstrip("/"), library)


def _walk(tree: str) -> Iterator[str]:
    for folder, folders, names in os.walk(tree):
        folders[:] = sorted(
            name for name in folders if name not in _UNNEEDED and not name.startswith("config-")
        )
        for name in sorted(names):
            if not name.endswith((".a", ".opt-1.pyc", ".opt-2.pyc")):
                yield os.path.join(folder, name)


def _distribution_files(package: str) -> Iterator[tuple[str, str]]:
    try:
        found = metadata.distribution(package).files or ()
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"cannot put {package!r} into the sandbox image: it is not installed here (pip install {package})"
        ) from None
    for file in found:
        path = str(file.locate())
        # Entry points (../../bin/…) are of no use inside, and an editable install has nothing but its link.
        if not str(file).startswith("..") and os.path.isfile(path):
            yield str(file), path


def _shared_libraries(binaries: Sequence[str]) -> list[str]:
    """The absolute paths that `ldd` names."""
    found: set[str] = set()
    for start in range(0, len(binaries), 64):
        command = ["ldd", *binaries[start : start + 64]]
        try:
            listing = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
        except OSError as error:
            raise SandboxUnavailable(f"the image probe failed: ldd does not run ({error})") from error
        for line in listing.splitlines():
            if line.startswith("\t"):
                found.update(re.findall(r"(/[^\s():]+)", line))
    return sorted(path for path in found if os.path.isfile(path))


def image_tag(files: dict[str, str]) -> str:
    """A name that changes when any of the files does (by size and time of change)."""
    digest = hashlib.sha256(_LAYOUT.encode())
    for name, path in sorted(files.items()):
        status = os.stat(path)
        digest.update(f"{name}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return f"{REPOSITORY}:{digest.hexdigest()[:16]}"


def write_image(target: IO[bytes], files: dict[str, str], executable: str) -> None:
    """The root file system as a tar: the files, owned by root, and `python3` on the path."""
    with tarfile.open(fileobj=target, mode="w") as tar:
        for folder in sorted(
            _parents([*files, *_ETC, "usr/local/bin/python3", "proc/x", "sys/x", "dev/shm/x"])
        ):
            tar.addfile(_entry(folder, tarfile.DIRTYPE, 0o755))
        for folder in ("tmp", "work"):
            tar.addfile(_entry(folder, tarfile.DIRTYPE, 0o1777))
        if "usr/local/bin/python3" not in files:
            link = _entry("usr/local/bin/python3", tarfile.SYMTYPE, 0o777)
            link.linkname = executable
            tar.addfile(link)
        for name, text in _ETC.items():
            entry = _entry(name, tarfile.REGTYPE, 0o644)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
        for name, path in sorted(files.items()):
            status = os.stat(path)
            entry = _entry(name, tarfile.REGTYPE, 0o755 if status.st_mode & 0o100 else 0o644)
            # Byte code is valid only beside a source of the same size and time.
            entry.size, entry.mtime = status.st_size, int(status.st_mtime)
            with open(path, "rb") as source:
                tar.addfile(entry, source)


def _entry(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = kind, mode
    return entry


def _parents(names: Iterable[str]) -> set[str]:
    folders = set()
    for name in names:
        while name := os.path.dirname(name):
            folders.add(name)
    return folders


def ensure_python_image(client: Any, packages: Sequence[str] = (), executable: str | None = None) -> str:
    """The tag of an image with this machine's Python and `packages`, imported into the daemon when it lacks it.

    `client` is a `docker.DockerClient`. Takes some 2 s and 60 MiB the first time, 50 ms afterwards.
    Raises SandboxUnavailable where the image cannot be built.
    """
    from docker.errors import DockerException, ImageNotFound

    interpreter = find_interpreter(executable)
    files = image_files(interpreter, packages)
    tag = image_tag(files)
    try:
        client.images.get(tag)
    except ImageNotFound:
        repository, _, version = tag.partition(":")
        add_shared_libraries(files, interpreter.executable)
        try:
            with tempfile.NamedTemporaryFile(prefix="polyturn-image-", suffix=".tar") as archive:
                write_image(archive, files, interpreter.executable)
                archive.flush()
                client.api.import_image_from_file(archive.name, repository=repository, tag=version)
            client.images.get(tag)
        except (DockerException, OSError) as error:
            raise SandboxUnavailable(
                f"the image probe failed: the Python image was not imported ({error})"
            ) from error
    return tag
