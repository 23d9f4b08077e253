"""Processes for tests with several ranks.

A nursery process imports Megatron-core once. Each job forks its ranks from it, one thread each, so every job finds a
process in which nothing has happened yet, for a few milliseconds a rank. The ranks die with the nursery, and the
nursery with the test process.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyturn.rollout.engines.placement import free_port

if TYPE_CHECKING:
    from polyturn.trainer.megatron.process_groups import Place

ROOT = Path(__file__).resolve().parents[3]
MAX_RANKS = 4
MAX_MEETINGS = 8
"""Process groups that one job may form, one after the other."""
GRACE_S = 3.0
"""How long the other ranks may take to fail, too, once one has failed."""


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message holds every traceback."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankContext:
    """Which rank a function runs as, and where the ranks meet; nothing has been joined yet."""

    rank: int
    world_size: int
    master_address: str
    master_port: int
    spare_ports: tuple[int, ...] = ()
    """For further meetings: a port stays taken for a while after its process group is gone."""

    def again(self, number: int) -> RankContext:
        """The same rank for the job's meeting `number`, from 0."""
        port = (self.master_port, *self.spare_ports)[number]
        return replace(self, master_port=port, spare_ports=())

    @property
    def place(self) -> Place:
        """What `MegatronPolicy` and `join_ranks` are told of it."""
        from polyturn.trainer.megatron.process_groups import Place

        return Place(
            rank=self.rank, world_size=self.world_size, address=self.master_address, port=self.master_port
        )

    @contextlib.contextmanager
    def joined(self, parallel: Any, *, seed: int = 0) -> Iterator[None]:
        """A gloo process group with Megatron-core's groups of a layout, taken down at the end."""
        from polyturn.trainer.megatron.process_groups import join_ranks, leave_ranks

        join_ranks(parallel, self.place, device="cpu", seed=seed)
        try:
            yield
        finally:
            leave_ranks()


class RankPool:
    """Runs functions as ranks."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT), *filter(None, sys.path))),
        }
        self._nursery = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self._control = ours

    def run(
        self, num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0
    ) -> list[Any]:
        """`function(context, *arguments)` on each rank at the same time; the results by rank.

        The function stands at the top level of its module; arguments and results are pickled.

        Raises:
            RankFailure: a rank raised, died, or was not done after `timeout` seconds.
        """
        assert 1 <= num_ranks <= MAX_RANKS, num_ranks
        module = sys.modules[function.__module__]
        assert module.__file__ is not None
        port, *spare_ports = _free_ports(MAX_MEETINGS)
        ranks: dict[Connection, int] = {}
        try:
            for rank in range(num_ranks):
                connection, pid = self._fork()
                ranks[connection] = pid
                context = RankContext(
                    rank=rank,
                    world_size=num_ranks,
                    master_address="127.0.0.1",
                    master_port=port,
                    spare_ports=tuple(spare_ports),
                )
                where = (function.__module__, module.__file__, function.__qualname__)
                connection.send_bytes(pickle.dumps((where, pickle.dumps((context, arguments)))))
            results, failures, hung = _collect(list(ranks), timeout)
        except BaseException:
            _kill(ranks.values())
            raise
        finally:
            for connection in ranks:
                connection.close()
        if failures or hung:
            _kill(list(ranks.values())[rank] for rank in hung)
            told = {**failures, **dict.fromkeys(hung, "did not end in time")}
            raise RankFailure("\n".join(f"rank {rank}: {text}" for rank, text in sorted(told.items())))
        return [results[rank] for rank in range(num_ranks)]

    def close(self) -> None:
        self._control.close()
        try:
            self._nursery.wait(10)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()

    def _fork(self) -> tuple[Connection, int]:
        ours, theirs = socket.socketpair()
        socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
        theirs.close()
        answer = self._control.recv(64)
        if not answer:
            raise RankFailure(f"the nursery of the ranks ended with {self._nursery.wait()}")
        return Connection(ours.detach()), int(answer)


def _collect(
    connections: list[Connection], timeout: float
) -> tuple[dict[int, Any], dict[int, str], list[int]]:
    """Results and tracebacks by rank, and the ranks that gave neither."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(connections))
    while waiting:
        ready = wait(list(waiting.values()), max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for rank in [rank for rank, connection in waiting.items() if connection in ready]:
            connection = waiting.pop(rank)
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                succeeded, value = False, "the process died"
            if succeeded:
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return results, failures, list(waiting)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    for _ in range(count):
        ports.append(free_port("127.0.0.1", avoid=ports))
    return ports


def _serve(control: socket.socket) -> None:
    """The nursery: fork a rank for each descriptor that comes in, until the other end is closed."""
    _die_with_parent()
    # What is pickled here must be of the module that the tests import.
    sys.modules["tests.support.megatron.ranks_pool"] = sys.modules["__main__"]
    for name in ("engine", "policy", "weights", "process_groups"):
        importlib.import_module(f"polyturn.trainer.megatron.{name}")
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 16, 1)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _die_with_parent()
            _run_job(Connection(descriptors[0]))
            # No exit handlers: the nursery's are not this process's to run.
            os._exit(0)
        os.close(descriptors[0])
        control.sendall(str(pid).encode())


def _run_job(connection: Connection) -> None:
    try:
        where, payload = pickle.loads(connection.recv_bytes())
        function = _find(*where)
        context, arguments = pickle.loads(payload)
        answer = pickle.dumps((True, function(context, *arguments)))
    except BaseException:  # noqa: BLE001 - it is told to the test process, which raises
        answer = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(BrokenPipeError):
        connection.send_bytes(answer)


def _find(module_name: str, path: str, qualified_name: str) -> Any:
    """The function; a test's module is loaded from its file, under the name that pytest gave it."""
    if module_name not in sys.modules and not module_name.startswith("polyturn."):
        spec = importlib.util.spec_from_file_location(module_name, Path(path))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    found: Any = importlib.import_module(module_name)
    for part in qualified_name.split("."):
        found = getattr(found, part)
    return found


def _die_with_parent() -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
