"""Runs a hostile snippet, and asserts that it was contained."""

from __future__ import annotations

import platform

import pytest

from polyturn.tools.sandbox import ExecResult, Sandbox
from polyturn.tools.sandbox.runner.kernel import abi
from tests.support.hostile.baits import Baits
from tests.support.hostile.snippet import Hostile

COUNT = """
import os
def is_there(process):
    try:
        state, parent = open(f"/proc/{process}/stat").read().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    # The dead children of a persistent interpreter are its own to bury; those of the runner are not.
    return state != "Z" or parent == "1"
print(sum(map(is_there, filter(str.isdigit, os.listdir("/proc")))))
"""
PATIENCE_S = 20.0
"""For what must succeed: the machine may be busy."""


def run(snippet: Hostile, sandbox: Sandbox, baits: Baits, *, fresh: bool = True) -> ExecResult:
    """Runs the snippet, or skips where it is about another processor."""
    if snippet.x86_64_only and platform.machine() != "x86_64":
        pytest.skip("it calls the system by the numbers of x86-64")
    return sandbox.exec(baits.fill_in(snippet.source), timeout_s=snippet.timeout_s, fresh=fresh)


def breached(result: ExecResult) -> bool:
    """Whether the snippet says that it got through; a traceback shows lines of its source, which say nothing."""
    return "BREACH" in result.stdout or any(line.startswith("BREACH") for line in result.stderr.splitlines())


def signals_are_scoped() -> bool:
    """Whether landlock keeps signals inside (version 6)."""
    return abi() >= 6


def num_processes(sandbox: Sandbox) -> int:
    """How many processes there are in the sandbox, the one that counts among them."""
    return int(answer(sandbox, COUNT))


def answer(sandbox: Sandbox, code: str, *, fresh: bool = True) -> str:
    """What harmless code prints; it must succeed."""
    result = sandbox.exec(code, timeout_s=PATIENCE_S, fresh=fresh)
    assert result.ok, result
    return result.stdout.strip()


def assert_contained(snippet: Hostile, sandbox: Sandbox, baits: Baits) -> None:
    """It ends as it may end, gets nothing that it must not get, and leaves sandbox and host as they were."""
    before = num_processes(sandbox)
    result = run(snippet, sandbox, baits)
    assert not breached(result), result
    assert result.status in snippet.ends, result
    assert snippet.says in result.stdout, result
    if snippet.exit_code is not None and result.status == "ok":
        assert result.exit_code == snippet.exit_code, result
    baits.assert_untouched()
    for path in snippet.plants:
        with pytest.raises(ValueError):
            sandbox.read_file(path, max_bytes=1 << 20)
        with pytest.raises((ValueError, OSError)):
            sandbox.write_file(f"{path}/x", b"escaped")
    assert sandbox.alive()
    assert answer(sandbox, "print(6 * 7)") == "42"
    assert num_processes(sandbox) == before
