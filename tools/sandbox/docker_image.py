"""Images for the Docker backend, made without a registry: this machine's Python, or a given image, plus the runner."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import IO, Any

from polyturn.tools.sandbox.sandbox import SandboxUnavailable

REPOSITORY = "polyturn-sandbox"
RUNNER_FOLDER = "/polyturn"
"""Where an image has the runner package; see `runner.__init__`."""
_LAYOUT = "2"
"""Part of every tag: raise it when what is below puts other things into the same files' image."""

TOOLS = """
sh cat chmod cp cut date diff dirname echo env expr false find grep gzip head id ln ls md5sum mkdir mktemp mv paste
printf pwd realpath rm rmdir sed seq sha256sum sleep sort stat tail tar tee test touch tr true uname uniq wc which xargs
"""
"""Programs of this machine that code may start; those that it lacks are left out."""

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
_FOLDERS = """
import importlib.util, json, os, site, sys
assert sys.version_info >= (3, 11)
hidden = set()
spec = importlib.util.find_spec("polyturn")
for folder in spec.submodule_search_locations if spec else ():
    hidden |= {os.path.realpath(folder), os.path.dirname(os.path.realpath(os.path.join(folder, "tools")))}
print(json.dumps({"folders": site.getsitepackages(), "hidden": sorted(hidden)}))
"""
_FOLDERS_LABEL = "polyturn.folders"
_ETC = {
    "etc/passwd": "root:x:0:0::/:/sbin/nologin\n",
    "etc/group": "root:x:0:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxImage:
    """An image that has the runner."""

    tag: str
    import_folders: tuple[str, ...]
    """Its folders of third-party packages."""
    hidden: tuple[str, ...] = ()
    """Its folders that no code may see: this package, where it is installed there, has labels and solutions in it."""


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
    files |= runner_files()
    for tool in TOOLS.split():
        if found := shutil.which(tool, path="/usr/bin:/bin"):
            files[f"usr/bin/{tool}"] = os.path.realpath(found)
    for package in packages:
        for inside, path in _distribution_files(package):
            files.setdefault(f"{interpreter.site_packages.lstrip('/')}/{inside}", path)
    return files


def runner_files() -> dict[str, str]:
    """The runner's modules, in the form of `image_files`."""
    package = resources.files("polyturn.tools.sandbox") / "runner"
    folder = RUNNER_FOLDER.lstrip("/")
    return {
        f"{folder}/runner/{item.name}": str(item) for item in package.iterdir() if item.name.endswith(".py")
    }


def add_shared_libraries(files: dict[str, str], executable: str) -> None:
    """Adds what the interpreter and its extension modules are linked against, the dynamic loader among them."""
    binaries = [
        path
        for name, path in files.items()
        if path == executable or ".so" in name or name.startswith("usr/bin/")
    ]
    moved = {os.path.realpath(path) for name, path in files.items() if name != path.lstrip("/")}
    for library in _shared_libraries(binaries):
        # Packages find what they brought along relative to themselves, wherever they are.
        if os.path.realpath(library) not in moved:
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
                found.update(os.path.normpath(path) for path in re.findall(r"(/[^\s():]+)", line))
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
            _parents([*files, *_ETC, "usr/local/bin/python3", "bin/sh", "proc/x", "sys/x", "dev/shm/x"])
        ):
            tar.addfile(_entry(folder, tarfile.DIRTYPE, 0o755))
        for folder in ("tmp", "work"):
            tar.addfile(_entry(folder, tarfile.DIRTYPE, 0o1777))
        if "usr/local/bin/python3" not in files:
            link = _entry("usr/local/bin/python3", tarfile.SYMTYPE, 0o777)
            link.linkname = executable
            tar.addfile(link)
        if "bin/sh" not in files:  # where every program looks for it
            link = _entry("bin/sh", tarfile.SYMTYPE, 0o777)
            link.linkname = "/usr/bin/sh"
            tar.addfile(link)
        for name, text in _ETC.items():
            entry = _entry(name, tarfile.REGTYPE, 0o644)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
        _add_files(tar, files)


def _add_files(tar: tarfile.TarFile, files: dict[str, str]) -> None:
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


def ensure_python_image(
    client: Any, packages: Sequence[str] = (), executable: str | None = None
) -> SandboxImage:
    """An image with this machine's Python and `packages`, imported into the daemon when it lacks it.

    `client` is a `docker.DockerClient`. Takes some 2 s and 80 MiB the first time, 0.1 s afterwards.
    Raises SandboxUnavailable where the image cannot be built, ValueError for a package that is not installed.
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
    return SandboxImage(tag=tag, import_folders=(interpreter.site_packages,) if packages else ())


def ensure_derived_image(client: Any, image: str) -> SandboxImage:
    """The image of that name with the runner beside what it has; made once, and again when either changes.

    Raises SandboxUnavailable where the daemon does not have the image (it is never pulled), or where its `python3`
    is not Python 3.11 or later.
    """
    from docker.errors import DockerException, ImageNotFound

    try:
        base = client.images.get(image)
    except ImageNotFound:
        raise SandboxUnavailable(
            f"the image probe failed: the daemon has no image {image!r} (docker pull {image})"
        ) from None
    files = runner_files()
    digest = hashlib.sha256(f"{_LAYOUT} {base.id}".encode())
    for name, path in sorted(files.items()):
        digest.update(name.encode() + Path(path).read_bytes())
    version = f"derived-{digest.hexdigest()[:16]}"
    tag = f"{REPOSITORY}:{version}"
    try:
        derived = client.images.get(tag)
    except ImageNotFound:
        try:
            derived = _derive(client, base.id, files, version)
        except DockerException as error:
            raise SandboxUnavailable(f"the image probe failed: {image}: {error}") from error
    facts = json.loads(derived.labels[_FOLDERS_LABEL])
    return SandboxImage(tag=tag, import_folders=tuple(facts["folders"]), hidden=tuple(facts["hidden"]))


def _derive(client: Any, base: str, files: dict[str, str], version: str) -> Any:
    """Asks the image's Python for its facts, and commits the image with the runner."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for folder in sorted(_parents(files)):
            tar.addfile(_entry(folder, tarfile.DIRTYPE, 0o755))
        tar.addfile(_entry("work", tarfile.DIRTYPE, 0o1777))
        _add_files(tar, files)
    command = ["python3", "-I", "-c", _FOLDERS]
    container = client.containers.create(base, entrypoint=command, network_mode="none", user="65534:65534")
    try:
        container.start()
        status = container.wait(timeout=60)["StatusCode"]
        answer = container.logs(stdout=True, stderr=False).decode().strip()
        if status != 0:
            problem = container.logs(stdout=False, stderr=True).decode(errors="replace").strip()
            raise SandboxUnavailable(
                f"the image probe failed: its python3 must be 3.11 or later ({problem[-200:]})"
            )
        container.put_archive("/", archive.getvalue())
        changes = [f"LABEL {_FOLDERS_LABEL}={json.dumps(answer)}"]
        return container.commit(repository=REPOSITORY, tag=version, changes=changes)
    finally:
        container.remove(force=True)
