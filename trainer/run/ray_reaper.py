"""Ends a private Ray whose driver is gone.

Ray's own processes notice a driver that was killed, but some of them only after a minute or more. This program runs
under the supervisor, which tells it to end (SIGTERM) as soon as the driver has gone; it then kills what is left.

    python -m polyturn.trainer.run.ray_reaper RAYLET_PID [OTHER_PID ...]
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import psutil

from polyturn.rollout.engines.process import SupervisedProcess

REFRESH_S = 1.0


def ray_process_ids() -> list[int]:
    """The processes that `ray.init` started under this driver."""
    return [process.pid for process in psutil.Process().children() if is_ray(process)]


def is_ray(process: psutil.Process) -> bool:
    """Whether a child of the driver belongs to Ray."""
    with contextlib.suppress(psutil.Error):
        return any("/ray/" in part or part.startswith("ray::") for part in process.cmdline()[:3])
    return False


def start_reaper(log_path: Path) -> SupervisedProcess:
    """Watch over the Ray that this process has just started; stop it after `ray.shutdown`."""
    command = [sys.executable, "-m", "polyturn.trainer.run.ray_reaper", *map(str, ray_process_ids())]
    reaper = SupervisedProcess(command, name="Ray's reaper", log_path=log_path)
    reaper.start()
    return reaper


def descendants(roots: Iterable[psutil.Process]) -> set[psutil.Process]:
    """The processes and all of theirs. psutil tells a reused pid from the process that had it."""
    found: set[psutil.Process] = set()
    for root in roots:
        with contextlib.suppress(psutil.Error):
            found |= {root, *root.children(recursive=True)}
    return found


def main() -> None:
    roots = []
    for pid in sys.argv[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            roots.append(psutil.Process(int(pid)))
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    # A child of a process that has died belongs to init: remember the family while it is together.
    family = descendants(roots)
    while not asked.wait(REFRESH_S):
        family |= descendants(roots)
        family = {process for process in family if process.is_running()}
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
