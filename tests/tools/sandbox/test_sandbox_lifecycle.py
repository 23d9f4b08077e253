"""Nothing stays behind: not after close, nor an exception, nor the death of the nursery, a runner, or the owner."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from polyturn.tools.sandbox import Limits, SandboxUnavailable
from polyturn.tools.sandbox.embedded import EmbeddedBackend

PATIENCE_S = 30.0

OWNER = """
import signal, sys, threading, time
# Whoever started the tests in the background had them ignore it, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from polyturn.tools.sandbox.embedded import EmbeddedBackend
backend = EmbeddedBackend(launcher=sys.argv[1])
sandboxes = [backend.create() for _ in range(3)]
daemon = "import os, time\\nif os.fork() == 0:\\n    os.setsid()\\n    time.sleep(1000)\\n"
for sandbox in sandboxes:
    sandbox.exec("x = 1", fresh=False)
    arguments = dict(code=daemon + "time.sleep(1000)", timeout_s=1000)
    threading.Thread(target=sandbox.exec, kwargs=arguments, daemon=True).start()
time.sleep(0.5)
print("ready", flush=True)
input()
{then}
"""


@pytest.fixture(scope="module")
def launchers():
    """The launchers that work here."""
    works = []
    for launcher in ("native", "bubblewrap"):
        try:
            EmbeddedBackend(launcher=launcher).close()
        except SandboxUnavailable as reason:
            problem = str(reason)
        else:
            works.append(launcher)
    if not works:
        pytest.skip(problem)
    return works


@pytest.fixture(params=["native", "bubblewrap"])
def launcher(request, launchers):
    if request.param not in launchers:
        pytest.skip(f"{request.param} does not work here")
    return request.param


@pytest.fixture
def embedded(launchers):
    backend = EmbeddedBackend()
    yield backend
    backend.close()


def nursery_of(backend):
    return psutil.Process(backend._nursery.pid)


def await_end(processes):
    """Waits until processes have ended, and says which have not."""
    return psutil.wait_procs(processes, timeout=PATIENCE_S)[1]


ENDS = {
    "killed": "time.sleep(1000)",
    "exits": "raise SystemExit(0)",
    "raises": "raise RuntimeError",
    "exits at once": "import os; os._exit(0)",
    "interrupted": "time.sleep(1000)",
    "killed without references": "del backend, sandboxes, sandbox; time.sleep(1000)",
}


@pytest.mark.parametrize(
    ("launcher", "how"),
    [*(("native", how) for how in ENDS), ("bubblewrap", "killed"), ("bubblewrap", "exits")],
    indirect=["launcher"],
)
def test_no_process_outlives_its_owner(launcher, how):
    command = [sys.executable, "-c", OWNER.replace("{then}", ENDS[how]), launcher]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdout.readline() == "ready\n"
        descendants = psutil.Process(owner.pid).children(recursive=True)
        assert len(descendants) >= 1 + 3 * 4  # the nursery; each runner, interpreter, code and its daemon
        owner.stdin.write("go\n")
        owner.stdin.flush()
        if how.startswith("killed"):
            owner.kill()
        elif how == "interrupted":
            owner.send_signal(signal.SIGINT)
        try:
            owner.wait(PATIENCE_S)
        finally:
            owner.kill()  # or leaving the block would wait for it without end
    assert not await_end(descendants)


def test_a_thread_that_made_the_backend_may_end(launchers):
    backends = []
    maker = threading.Thread(target=lambda: backends.append(EmbeddedBackend()))
    maker.start()
    maker.join()
    time.sleep(0.2)
    with backends[0].create() as sandbox:
        nursery = nursery_of(backends[0])
        assert sandbox.exec("print(1)", timeout_s=PATIENCE_S).ok
        assert nursery_of(backends[0]) == nursery
    backends[0].close()
    assert not await_end([nursery])


def test_hundreds_of_sandboxes_leave_nothing(embedded):
    def open_and_close(_):
        with embedded.create():
            pass

    def traces():
        nursery = nursery_of(embedded)
        cgroups = 0 if embedded._cgroups is None else len(list(embedded._cgroups.memory.glob("*/")))
        return {
            "own descriptors": len(os.listdir("/proc/self/fd")),
            "nursery's descriptors": nursery.num_fds(),
            "processes": len(nursery.children(recursive=True)),
            "own mounts": Path("/proc/self/mountinfo").read_text().count("nr_inodes=4096"),
            "nursery's mounts": Path(f"/proc/{nursery.pid}/mountinfo").read_text(),
            "cgroups": cgroups,
            "threads": threading.active_count(),
        }

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(open_and_close, range(8)))
    gc.collect()
    before = traces()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(open_and_close, range(300)))
    gc.collect()
    assert traces() == before


def test_sandboxes_that_nobody_closes_leave_nothing(embedded):
    if embedded.no_cgroups:
        pytest.skip(f"no cgroups: {embedded.no_cgroups}")
    parent = embedded._cgroups.memory

    def drop():
        sandbox = embedded.create()
        assert sandbox.exec("print(1)", fresh=False, timeout_s=PATIENCE_S).ok

    for _ in range(5):
        drop()
    gc.collect()
    with embedded.create():
        assert len(list(parent.glob("*/"))) == 1
        drop()
        gc.collect()
    embedded.close()
    assert not parent.exists()


def test_more_sandboxes_than_a_third_of_the_descriptors(launchers):
    code = """
import resource
from polyturn.tools.sandbox.embedded import EmbeddedBackend
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
backend = EmbeddedBackend(launcher="native")
sandboxes = [backend.create() for _ in range(200)]
print(sum(sandbox.exec("print(1)", timeout_s=60).ok for sandbox in sandboxes[::20]))
backend.close()
"""
    if "native" not in launchers:
        pytest.skip("native does not work here")
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert told.stdout == "10\n"


def test_owners_do_not_share_users(launchers):
    if os.geteuid() != 0:
        pytest.skip("sandboxes of an ordinary user have that user")
    backends = [EmbeddedBackend(), EmbeddedBackend()]
    sandboxes = [backend.create() for backend in backends for _ in range(20)]
    users = [
        process.uids().real
        for backend in backends
        for process in nursery_of(backend).children(recursive=True)
    ]
    assert len(set(users)) == len(users) == len(sandboxes)
    assert min(users) >= 2_000_000_000
    for backend in backends:
        backend.close()


def test_closing_the_backend_ends_everything(launcher):
    backend = EmbeddedBackend(launcher=launcher)
    sandboxes = [backend.create() for _ in range(3)]
    for sandbox in sandboxes:
        sandbox.exec("x = 1", fresh=False, timeout_s=PATIENCE_S)
    nursery = nursery_of(backend)
    processes = [nursery, *nursery.children(recursive=True)]
    assert len(processes) >= 1 + 3 * 2
    backend.close()
    backend.close()
    assert not await_end(processes)
    assert not any(sandbox.alive() for sandbox in sandboxes)
    result = sandboxes[0].exec("pass")
    assert (result.status, result.exit_code) == ("sandbox_died", None)
    with pytest.raises(ValueError, match="closed"):
        backend.create()


def test_closing_a_sandbox_ends_what_runs_in_it(embedded):
    sandbox = embedded.create()
    results = []
    runner = threading.Thread(
        target=lambda: results.append(sandbox.exec("import time; time.sleep(1000)", timeout_s=1000))
    )
    runner.start()
    time.sleep(0.2)
    sandbox.close()
    runner.join(PATIENCE_S)
    assert results[0].status == "sandbox_died"


def test_a_runner_that_dies_is_told_and_reset_heals(embedded):
    with embedded.create() as sandbox, embedded.create() as other:
        runner = min(nursery_of(embedded).children(), key=lambda process: process.create_time())
        threading.Timer(0.3, runner.kill).start()
        result = sandbox.exec("import time; time.sleep(1000)", timeout_s=1000)
        assert (result.status, result.exit_code) == ("sandbox_died", None)
        assert result.detail
        assert not sandbox.alive()
        assert sandbox.exec("print(1)").status == "sandbox_died"
        with pytest.raises(OSError):
            sandbox.read_file("x")
        sandbox.reset()
        assert sandbox.exec("print(1)", timeout_s=PATIENCE_S).stdout == "1\n"
        assert other.exec("print(1)", timeout_s=PATIENCE_S).stdout == "1\n"


def test_a_runner_that_hangs_is_given_up(embedded, monkeypatch):
    monkeypatch.setattr("polyturn.tools.sandbox.sandbox.GRACE_S", 0.2)
    with embedded.create() as sandbox:
        (runner,) = nursery_of(embedded).children()
        runner.suspend()
        result = sandbox.exec("print(1)", timeout_s=0.3)
        assert result.status == "sandbox_died"
        assert "did not answer" in result.detail
        assert not sandbox.alive()
        assert not await_end([runner])
        sandbox.reset()
        assert sandbox.exec("print(1)", timeout_s=PATIENCE_S).ok


def test_a_nursery_that_dies_takes_its_sandboxes_and_comes_back(embedded):
    sandbox = embedded.create()
    nursery = nursery_of(embedded)
    processes = [nursery, *nursery.children(recursive=True)]
    nursery.kill()
    assert not await_end(processes)
    assert sandbox.exec("print(1)").status == "sandbox_died"
    assert not sandbox.alive()
    sandbox.reset()
    assert sandbox.exec("print(1)", timeout_s=PATIENCE_S).ok
    sandbox.close()


def test_a_fork_of_the_owner_ends_nothing(embedded):
    with embedded.create() as sandbox:
        pid = os.fork()
        if pid == 0:
            # What multiprocessing does not do, but a daemon does: an ordinary end, with all finalizers.
            try:
                embedded._finalizer()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert sandbox.exec("print(1)", timeout_s=PATIENCE_S).ok


def test_more_memory_than_all_processes_may_have_together(embedded):
    if embedded.no_cgroups:
        pytest.skip(f"no cgroups: {embedded.no_cgroups}")
    limits = Limits(memory_bytes=96 << 20, disk_bytes=8 << 20)
    code = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        held = bytearray(60 << 20)
        held[::4096] = b"1" * len(held[::4096])
        time.sleep(1000)
statuses = [os.wait()[1] for _ in range(4)]
print(statuses)
"""
    with embedded.create(limits) as sandbox:
        assert sandbox.exec(code, timeout_s=PATIENCE_S).stdout == "[9, 9, 9, 9]\n"
        assert sandbox.alive()
