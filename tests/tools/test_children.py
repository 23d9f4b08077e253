"""A child ends with its owner, and with nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from polyturn.tools.children import end_child, how_it_ended, start_child

CHILD = """
import sys, time
from polyturn.tools.children import end_with
end_with(int(sys.argv[1]))
print("up", flush=True)
time.sleep(1000)
"""
OWNER = f"""
import os, subprocess, sys, time
from polyturn.tools.children import start_child
child = start_child([sys.executable, "-c", {CHILD!r}, str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
if sys.argv[1] == "fork" and os.fork() == 0:
    time.sleep(1000)
print(child.pid, flush=True)
if sys.argv[1] == "exception":
    raise RuntimeError
time.sleep(1000 if sys.argv[1] != "return" else 0)
"""


def wait_gone(pid: int, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def child_of_this_process() -> subprocess.Popen[bytes]:
    child = start_child([sys.executable, "-c", CHILD, str(os.getpid())], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"up\n"
    return child


@pytest.mark.parametrize("how", ["return", "exception", "SIGTERM", "SIGKILL", "fork"])
def test_a_child_ends_with_its_owner(how):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    if how not in ("return", "exception"):
        owner.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    owner.wait(timeout=30)
    assert wait_gone(child)
    if how == "fork":
        os.killpg(owner.pid, signal.SIGKILL)
    owner.stdout.close()


def test_a_child_outlives_the_thread_that_asked_for_it_and_is_ended_by_its_owner():
    children = []
    thread = threading.Thread(target=lambda: children.append(child_of_this_process()))
    thread.start()
    thread.join()
    (child,) = children
    time.sleep(0.1)
    assert child.poll() is None
    end_child(child)
    assert child.returncode == -signal.SIGKILL
    child.stdout.close()


def test_a_child_whose_owner_is_gone_before_it_can_say_so_ends():
    child = subprocess.run([sys.executable, "-c", CHILD, "1"], stdout=subprocess.PIPE, check=False)
    assert (child.returncode, child.stdout) == (1, b"")


def test_a_program_that_cannot_be_started_is_told():
    with pytest.raises(FileNotFoundError):
        start_child(["/no/such/program"])


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-9, "was killed by SIGKILL"),
        (137, "was killed by SIGKILL"),
        (143, "was killed by SIGTERM"),
        (1, "ended with status 1"),
        (0, "ended with status 0"),
        (255, "ended with status 255"),
    ],
)
def test_a_status_is_told_in_words(status: int, words: str) -> None:
    assert how_it_ended(status) == words
