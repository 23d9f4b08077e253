"""No orphan after any kind of exit: a tree of cheap processes under the supervisor, and every way to end its owner."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from polyturn.rollout.engines.placement import claim_port, free_port, is_free
from polyturn.rollout.engines.process import EngineError, SupervisedProcess

# Child and grandchild; both ignore SIGTERM. `detached` is a grandchild in a session of its own.
TREE = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
pids = [os.getpid()]
pids.append(subprocess.Popen([sys.executable, "-S", "-c", sleep]).pid)
if "detached" in sys.argv:
    pids.append(subprocess.Popen([sys.executable, "-S", "-c", sleep], start_new_session=True).pid)
open(sys.argv[1] + ".partial", "w").write(" ".join(map(str, pids)))
os.rename(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(1000)
"""

OWNER = """
import os, signal, sys, time
from pathlib import Path
from polyturn.rollout.engines.process import SupervisedProcess
# A shell starts what it puts in the background with SIGINT ignored, and so may these tests have been.
signal.signal(signal.SIGINT, signal.default_int_handler)
pids, how = Path(sys.argv[1]), sys.argv[2]
process = SupervisedProcess([sys.executable, "-S", "-c", sys.argv[3], str(pids), "detached"], name="tree",
                            log_path=pids.with_suffix(".log"))
process.start()
while not pids.exists():
    time.sleep(0.01)
if how == "fork":
    # A forked child keeps the owner's end of the pipe open.
    if os.fork() == 0:
        os.close(1)
        time.sleep(6)
        os._exit(0)
print(process.pid, flush=True)
if how == "return":
    sys.exit(0)
if how == "exception":
    raise RuntimeError("the owner fails")
if how == "_exit":
    os._exit(3)
time.sleep(1000)
"""


def wait_gone(pids: list[int], seconds: float = 15.0) -> list[int]:
    """The pids that are still running after so many seconds at most; zombies do not run."""
    deadline = time.monotonic() + seconds
    while True:
        left = [pid for pid in pids if psutil.pid_exists(pid) and _runs(pid)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start_owner(tmp_path: Path, how: str) -> tuple[subprocess.Popen[str], int, list[int]]:
    """An owner of a tree; also the supervisor's pid and those of the tree."""
    pids = tmp_path / "pids"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(pids), how, TREE],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert owner.stdout is not None
    supervisor = int(owner.stdout.readline())
    return owner, supervisor, [int(pid) for pid in pids.read_text().split()]


@pytest.mark.parametrize("how", ["return", "exception", "_exit"])
def test_nothing_is_left_when_the_owner_ends(tmp_path, how):
    owner, supervisor, tree = start_owner(tmp_path, how)
    owner.wait(timeout=20)
    assert wait_gone([supervisor, *tree]) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_owner_is_killed(tmp_path, number):
    owner, supervisor, tree = start_owner(tmp_path, "wait")
    owner.send_signal(number)
    owner.wait(timeout=20)
    assert wait_gone([supervisor, *tree]) == []


def test_nothing_is_left_when_ctrl_c_reaches_the_whole_terminal(tmp_path):
    owner, supervisor, tree = start_owner(tmp_path, "wait")
    os.killpg(owner.pid, signal.SIGINT)
    owner.wait(timeout=20)
    assert wait_gone([supervisor, *tree]) == []


def test_nothing_is_left_when_a_fork_of_the_owner_keeps_the_pipe_open(tmp_path):
    owner, supervisor, tree = start_owner(tmp_path, "fork")
    owner.kill()
    owner.wait(timeout=20)
    assert wait_gone([supervisor, *tree], seconds=5) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_supervisor_is_killed(tmp_path, number):
    owner, supervisor, tree = start_owner(tmp_path, "wait")
    os.kill(supervisor, number)
    # A child that has left for a session of its own is only found by a supervisor that lives.
    within_reach = tree if number == signal.SIGTERM else tree[:2]
    left = wait_gone([supervisor, *within_reach])
    for pid in set(tree) - set(within_reach):
        os.kill(pid, signal.SIGKILL)
    owner.kill()
    owner.wait()
    assert left == []


def test_nothing_is_left_when_the_guard_is_killed(tmp_path):
    owner, supervisor, tree = start_owner(tmp_path, "wait")
    guard = next(child for child in psutil.Process(supervisor).children() if child.pid not in tree)
    guard.kill()
    owner.kill()
    owner.wait()
    assert wait_gone([supervisor, *tree]) == []


def test_stop_ends_the_tree_and_returns_when_it_is_gone(tmp_path):
    pids = tmp_path / "pids"
    with SupervisedProcess(
        [sys.executable, "-S", "-c", TREE, str(pids), "detached"], name="tree", log_path=tmp_path / "log"
    ) as process:
        while not pids.exists():
            time.sleep(0.01)
        assert process.alive()
        tree = [int(pid) for pid in pids.read_text().split()]
        members = [process.pid, *(child.pid for child in psutil.Process(process.pid).children())]
    assert wait_gone([*tree, *members], seconds=0) == []
    assert not process.alive()
    process.stop()


def test_a_command_that_dies_takes_its_children_with_it_and_leaves_its_log(tmp_path):
    pids = tmp_path / "pids"
    dying = TREE.replace("time.sleep(1000)\n", "print('the disk is full', flush=True); sys.exit(7)\n")
    process = SupervisedProcess(
        [sys.executable, "-S", "-c", dying, str(pids)], name="engine 0", log_path=tmp_path / "log"
    )
    process.start()
    with pytest.raises(EngineError, match=r"(?s)engine 0 ended with status 7; .*the disk is full"):
        process.wait_until("http://127.0.0.1:9/health", timeout_s=20)
    assert process.ended() == "engine 0 ended with status 7"
    assert wait_gone([int(pid) for pid in pids.read_text().split()]) == []
    process.stop()


def test_a_command_that_never_listens_is_an_error_with_its_log(tmp_path):
    command = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(1000)"]
    with SupervisedProcess(command, name="engine 0", log_path=tmp_path / "log") as process:
        port = free_port("127.0.0.1")
        with pytest.raises(EngineError, match=r"(?s)engine 0 was not ready after 3 s; .*loading"):
            process.wait_until(f"http://127.0.0.1:{port}/health", timeout_s=3.0)


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        with pytest.raises(ValueError, match=f"engines.port: port {port} on 127.0.0.1 is taken"):
            claim_port("127.0.0.1", port, section="engines")
    assert claim_port("127.0.0.1", port, section="engines") == port


def test_free_ports_stay_below_those_of_outgoing_connections():
    ports = {free_port("127.0.0.1") for _ in range(20)}
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(port < max(low, 32768) for port in ports)
    port = free_port("127.0.0.1")
    assert free_port("127.0.0.1", avoid=[port]) != port
