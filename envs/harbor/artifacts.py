"""What the agent has left is handed over to a verifier in a container of its own, and nothing else comes along."""

from __future__ import annotations

import io
import posixpath
import tarfile

from polyturn.tools.sandbox.container import Container
from polyturn.tools.sandbox.sandbox import MIB

MAX_BYTES = 256 * MIB
_HOUSEKEEPING_S = 60.0


def hand_over(path: str, source: Container, target: Container) -> None:
    """Copy a file or folder to the same place in another container, in place of what stands there.

    Left out are devices, pipes, and links that lead out of the folder: in the other container they would lead to the
    tests. Nothing of that name is nothing to copy.

    Raises:
        ValueError: it is larger than `MAX_BYTES`.
        ContainerFailed: a daemon that does not answer.
    """
    archive = source.read_archive(path, max_bytes=MAX_BYTES)
    target.run(["rm", "-rf", path], timeout_s=_HOUSEKEEPING_S, user="0")
    if archive is not None:
        target.put(harmless(archive, path))


def harmless(archive: bytes, path: str) -> bytes:
    """A tar that a daemon made of `path`, as one of paths from the root on, without what `hand_over` leaves out."""
    root = path.strip("/")
    name = posixpath.basename(root)
    taken = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as given, tarfile.open(fileobj=taken, mode="w") as tar:
        inside = [entry for entry in given if entry.name == name or entry.name.startswith(f"{name}/")]
        names = {entry.name for entry in inside}
        for entry in inside:
            made = entry.replace(
                name=root + entry.name.removeprefix(name),
                mode=entry.mode & 0o777,
                uname="",
                gname="",
                deep=False,
            )
            if entry.isdir() or (entry.issym() and _stays_inside(entry, name)):
                tar.addfile(made)
            elif entry.isreg() or (entry.islnk() and entry.linkname in names):
                content = given.extractfile(entry)
                assert content is not None, "a regular file has contents"
                data = content.read()
                made.type, made.linkname, made.size = tarfile.REGTYPE, "", len(data)
                tar.addfile(made, io.BytesIO(data))
    return taken.getvalue()


def _stays_inside(entry: tarfile.TarInfo, name: str) -> bool:
    if entry.linkname.startswith("/"):
        return False
    leads = posixpath.normpath(posixpath.join(posixpath.dirname(entry.name), entry.linkname))
    return leads == name or leads.startswith(f"{name}/")
