"""Images that tasks bring along: built from a folder once for each state of it, fetched, or those that the daemon has;
and without what nobody inside should see.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyturn.tools.sandbox.container_command import ContainerFailed, docker_errors
from polyturn.tools.sandbox.docker_daemon import remove

REPOSITORY = "polyturn-task"
_HIDDEN_LABEL = "polyturn.hidden"
_LAYOUT = "1"
"""Part of every name: raise it when what is below makes other images of the same files."""
_LAST_LINES = 5
_LIST = r"""
find / -xdev \( -path /proc -o -path /sys -o -path /dev \) -prune -o -name .git -prune -print
for path in "$@"; do test ! -e "$path" || echo "$path"; done
"""
_HIDE_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildContext:
    """A folder with a Dockerfile, and what of it the builder may see."""

    folder: Path
    excluded: tuple[str, ...] = ()
    """Patterns as in .dockerignore, beside those of that file."""
    network: str = "default"
    """Of the build's own commands."""
    timeout_s: float = 600.0

    def files(self) -> list[str]:
        """The paths within, sorted."""
        from docker.utils.build import exclude_paths

        ignore = self.folder / ".dockerignore"
        lines = ignore.read_text(encoding="utf-8").splitlines() if ignore.is_file() else []
        patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        return sorted(exclude_paths(str(self.folder), [*patterns, *self.excluded], dockerfile="Dockerfile"))

    def digest(self) -> str:
        """A name for what the builder sees: paths, modes, contents."""
        digest = hashlib.sha256(_LAYOUT.encode())
        for name in self.files():
            path = self.folder / name
            status = path.lstat()
            digest.update(f"{name}\0{status.st_mode & 0o7777:o}\0".encode())
            if path.is_symlink():
                digest.update(os.readlink(path).encode())
            elif path.is_file():
                digest.update(f"{status.st_size}\0".encode())
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()[:24]

    def archive(self) -> bytes:
        """A tar of the files, without their owners and times, so that equal folders build from the same cache."""

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            return entry

        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name in self.files():
                tar.add(self.folder / name, arcname=name, recursive=False, filter=plain)
        return archive.getvalue()


def ensure_built(client: Any, context: BuildContext) -> str:
    """The name of the image of that folder, built where the daemon lacks it.

    Raises ContainerFailed with the end of what the builder said.
    """
    tag = f"{REPOSITORY}:{context.digest()}"
    with _lock_of(tag):
        if not _has(client, tag):
            _build(client, context, tag)
    return tag


def ensure_fetched(client: Any, image: str, *, may_fetch: bool) -> str:
    """The image's name, pulled where the daemon lacks it. Raises ContainerFailed."""
    with _lock_of(image):
        if _has(client, image):
            return image
        if not may_fetch:
            raise ContainerFailed(f"the daemon has no image {image} (docker pull {image})")
        name, _, tag = image.rpartition(":")
        if not name or "/" in tag:
            name, tag = image, "latest"
        with docker_errors(f"pulling {image}"):
            client.images.pull(name, tag=tag)
    return image


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenImage:
    """An image without what nobody inside should see."""

    tag: str
    original: str
    hidden: tuple[str, ...]
    """The paths that the original has, and this one has not."""

    def restore(self, client: Any, container: Any) -> None:
        """Puts what is hidden back into a `docker.models.containers.Container` of it. Raises ContainerFailed."""
        if not self.hidden:
            return
        with docker_errors("putting back what was hidden"):
            source = client.containers.create(
                self.original, entrypoint=["sh"], command=[], network_mode="none"
            )
            try:
                for path in self.hidden:
                    pieces, _ = source.get_archive(path)
                    container.put_archive(str(Path(path).parent), pieces)
            finally:
                remove(source)


def ensure_hidden(client: Any, image: str, *, folders: Sequence[str], git: bool) -> HiddenImage:
    """An image without those folders, and without any `.git` where `git` says so; made once for each image.

    It is looked through by its own `find`. Raises ContainerFailed.
    """
    with docker_errors(f"looking at {image}"):
        identity = client.images.get(image).id
    digest = hashlib.sha256(f"{_LAYOUT} {identity} {git} {sorted(folders)}".encode()).hexdigest()[:24]
    tag = f"{REPOSITORY}:hidden-{digest}"
    with _lock_of(tag):
        if not _has(client, tag):
            _hide(client, identity, tag, folders=folders, git=git)
    with docker_errors(f"looking at {tag}"):
        hidden = client.images.get(tag).labels.get(_HIDDEN_LABEL, "[]")
    return HiddenImage(tag=tag, original=identity, hidden=tuple(json.loads(hidden)))


def _hide(client: Any, image: str, tag: str, *, folders: Sequence[str], git: bool) -> None:
    script = _LIST if git else _LIST.split("\n", 2)[2]
    repository, _, version = tag.partition(":")
    with docker_errors(f"looking for what {image} should not show"):
        # Its own programs list and remove: none of the policy's has run in it yet.
        script = f'{{ {script} }} | sort -u | while read -r path; do echo "$path"; rm -rf "$path"; done'
        container = client.containers.create(
            image, entrypoint=["sh", "-c", script, "sh", *folders], command=[], network_mode="none", user="0"
        )
        try:
            container.start()
            status = container.wait(timeout=_HIDE_S)["StatusCode"]
            said = container.logs(stdout=False, stderr=True).decode(errors="replace").strip()
            # `find` may not be let into some folder, which then is nobody's secret.
            if status != 0 or "not found" in said:
                raise ContainerFailed(f"{image} cannot be looked through for .git folders: {said[-300:]}")
            hidden = container.logs(stdout=True, stderr=False).decode(errors="replace").splitlines()
            if not hidden:
                client.images.get(image).tag(repository, tag=version)
                return
            config = client.api.inspect_image(image)["Config"]
            changes = [
                f"LABEL {_HIDDEN_LABEL}={json.dumps(json.dumps(hidden))}",
                f"USER {config.get('User') or '0'}",
            ]
            for name in ("Entrypoint", "Cmd"):
                changes.append(f"{name.upper()} {json.dumps(config.get(name) or [])}")
            container.commit(repository=repository, tag=version, changes=changes)
        finally:
            remove(container)


def _build(client: Any, context: BuildContext, tag: str) -> None:
    said: list[str] = []
    start = time.monotonic()
    with docker_errors(f"building the image of {context.folder}"):
        stream = client.api.build(
            fileobj=io.BytesIO(context.archive()),
            custom_context=True,
            tag=tag,
            rm=True,
            forcerm=True,
            network_mode=context.network,
            timeout=context.timeout_s,
            decode=True,
        )
        for event in stream:
            said += str(event.get("stream") or event.get("error") or "").splitlines()
            if "error" in event:
                raise ContainerFailed(_build_failed(context, tag, said))
            if time.monotonic() > start + context.timeout_s:
                stream.close()
                raise ContainerFailed(
                    f"building the image of {context.folder} took more than {context.timeout_s:g} s"
                )
    if not _has(client, tag):
        raise ContainerFailed(_build_failed(context, tag, said))


def _build_failed(context: BuildContext, tag: str, said: Sequence[str]) -> str:
    last = " / ".join([line.strip() for line in said if line.strip()][-_LAST_LINES:])
    return (
        f"the image of {context.folder} cannot be built: {last} (if its Dockerfile needs BuildKit, build it by "
        f"`docker buildx build --load -t {tag} {context.folder}`, and it is found)"
    )


def _has(client: Any, tag: str) -> bool:
    from docker.errors import ImageNotFound

    with docker_errors(f"looking for the image {tag}"):
        try:
            client.images.get(tag)
        except ImageNotFound:
            return False
    return True


@functools.lru_cache(maxsize=4096)
def _lock_of(tag: str) -> threading.Lock:
    """So that one thread builds what several want."""
    del tag
    return threading.Lock()
