"""A cgroup for each sandbox, of version 1 or 2, where this process may make them.

The one wall that bounds the memory of all processes of a sandbox together, with memfds and the files in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
REMOVAL_DEADLINE_S = 2.0


class CgroupsUnavailable(Exception):
    """Why no cgroups can be made here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CgroupParent:
    """The folders below which sandboxes get theirs."""

    version: int
    memory: Path
    pids: Path

    @classmethod
    def find(cls) -> CgroupParent:
        """A parent for this process's sandboxes, made anew. Raises CgroupsUnavailable."""
        own = _own_cgroups()
        for folder in set(own.values()):
            _sweep(folder)
        name = f"polyturn-{os.getpid()}-{next(_NUMBERS)}"
        try:
            if "memory" in own and "pids" in own:
                parent = cls(version=1, memory=own["memory"] / name, pids=own["pids"] / name)
                parent.memory.mkdir()
                parent.pids.mkdir()
            elif "" in own:
                parent = _make_v2_parent(own[""], name)
            else:
                raise CgroupsUnavailable("no memory and pids controllers are mounted below /sys/fs/cgroup")
        except OSError as error:
            raise CgroupsUnavailable(f"{error.filename}: {error.strerror}") from None
        return parent

    def make(self, name: str, *, memory_bytes: int, num_processes: int) -> Cgroup:
        """The cgroup of one sandbox. Raises OSError."""
        folders = tuple(dict.fromkeys((self.memory / name, self.pids / name)))
        for folder in folders:
            folder.mkdir()
        memory, pids = folders[0], folders[-1]
        if self.version == 1:
            (memory / "memory.limit_in_bytes").write_text(str(memory_bytes))
            with contextlib.suppress(OSError):  # only where swap is accounted for
                (memory / "memory.memsw.limit_in_bytes").write_text(str(memory_bytes))
        else:
            (memory / "memory.max").write_text(str(memory_bytes))
            with contextlib.suppress(OSError):
                (memory / "memory.swap.max").write_text("0")
        (pids / "pids.max").write_text(str(num_processes))
        return Cgroup(version=self.version, memory=memory, pids=pids)

    def close(self) -> None:
        """Removes the parent, and what is left in it; all processes have been killed."""
        folders = {self.memory, self.pids}
        _remove({left for folder in folders for left in folder.glob("*/")})
        _remove(folders)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cgroup:
    """One sandbox's cgroup."""

    version: int
    memory: Path
    pids: Path

    def add(self, pid: int) -> None:
        """Moves a process in; its children follow. Raises OSError."""
        for folder in {self.memory, self.pids}:
            (folder / "cgroup.procs").write_text(str(pid))

    def num_oom_kills(self) -> int:
        """How many processes the kernel has killed here for want of memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        for line in (self.memory / name).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0

    def close(self) -> None:
        """Removes it; its processes have been killed."""
        _remove({self.memory, self.pids})


_NUMBERS = itertools.count()


def _own_cgroups() -> Mapping[str, Path]:
    """This process's cgroup in each hierarchy, by controller; the key of version 2 is empty."""
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount = ROOT if (ROOT / "cgroup.controllers").exists() else ROOT / "unified"
            found[""] = mount / path.lstrip("/")
        for controller in filter(None, controllers.split(",")):
            for hierarchy in (ROOT / controllers, ROOT / controller):
                if hierarchy.is_dir():
                    found[controller] = hierarchy / path.lstrip("/")
    return found


def _make_v2_parent(own: Path, name: str) -> CgroupParent:
    """A child of this process's cgroup, or of an ancestor: one with processes cannot hand controllers to children."""
    problem = "the memory and pids controllers are not delegated to this process's cgroup"
    for above in (own, *own.parents):
        if not above.is_relative_to(ROOT) or not os.access(above, os.W_OK):
            break
        if not {"memory", "pids"} <= set((above / "cgroup.controllers").read_text().split()):
            continue
        try:
            (above / "cgroup.subtree_control").write_text("+memory +pids")
        except OSError as error:
            problem = f"{above}/cgroup.subtree_control: {error.strerror}"
            continue
        parent = above / name
        parent.mkdir()
        (parent / "cgroup.subtree_control").write_text("+memory +pids")
        return CgroupParent(version=2, memory=parent, pids=parent)
    raise CgroupsUnavailable(problem)


def _sweep(folder: Path) -> None:
    """Removes what owners that were killed left behind."""
    for left in folder.glob("polyturn-*"):
        pid = left.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            for path in (*left.glob("*/"), left):
                with contextlib.suppress(OSError):
                    path.rmdir()


def _remove(folders: set[Path]) -> None:
    """Processes that were killed may take a moment to leave."""
    end = time.monotonic() + REMOVAL_DEADLINE_S
    for folder in folders:
        while True:
            try:
                folder.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:
                if time.monotonic() > end:
                    break  # an empty folder stays behind, which costs next to nothing
                time.sleep(0.002)
