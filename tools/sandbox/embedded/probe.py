"""What this machine offers for embedded sandboxes: a report for people, made by trying."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from polyturn.tools.sandbox.embedded.backend import EmbeddedBackend
from polyturn.tools.sandbox.runner import landlock, seccomp
from polyturn.tools.sandbox.types import SandboxUnavailable


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was tried."""

    name: str
    works: bool
    needed: bool
    """Whether there are no embedded sandboxes without it."""
    detail: str


def probe() -> tuple[Finding, ...]:
    """Makes a sandbox, runs code in it, and says which walls stand. Takes a fraction of a second; never raises."""
    machine = os.uname().machine
    known = machine in seccomp.AUDIT_ARCHITECTURES
    abi = landlock.abi()
    bubblewrap = _bubblewrap_version()
    findings = [
        Finding(
            name="seccomp", works=known, needed=True, detail=machine if known else f"no filter for {machine}"
        ),
        Finding(
            name="landlock",
            works=abi > 0,
            needed=False,
            detail=f"ABI {abi}"
            if abi
            else "not in this kernel, or switched off: file access rests on mounts alone",
        ),
        Finding(
            name="bubblewrap",
            works=bubblewrap is not None,
            needed=False,
            detail=bubblewrap or "not installed",
        ),
    ]
    try:
        backend = EmbeddedBackend()
    except SandboxUnavailable as unavailable:
        failure = Finding(name="sandbox", works=False, needed=True, detail=str(unavailable))
        return (failure, *findings)
    try:
        sandbox = Finding(name="sandbox", works=True, needed=True, detail=f"{backend.launcher} namespaces")
        users = Finding(
            name="user namespace",
            works=backend.user_namespace,
            needed=False,
            detail=""
            if backend.user_namespace
            else "refused to users other than root; root makes the others",
        )
        cgroup = Finding(
            name="cgroup",
            works=not backend.no_cgroups,
            needed=False,
            detail=backend.no_cgroups and f"memory is limited per process only: {backend.no_cgroups}",
        )
        return (sandbox, *findings, users, cgroup)
    finally:
        backend.close()


def summary(findings: tuple[Finding, ...]) -> str:
    """One line: what works, or the first thing needed that does not."""
    for finding in findings:
        if finding.needed and not finding.works:
            return f"unavailable: {finding.name}: {finding.detail}"
    walls = [finding.name for finding in findings[1:] if finding.works and finding.name != "bubblewrap"]
    missing = [
        f"no {finding.name} ({finding.detail})"
        for finding in findings
        if not finding.works and finding.detail
    ]
    missing = [text for text in missing if not text.startswith("no bubblewrap")]
    return "; ".join([f"{findings[0].detail}, {', '.join(walls)}", *missing])


def _bubblewrap_version() -> str | None:
    program = shutil.which("bwrap")
    if program is None:
        return None
    told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    return told.stdout.strip() or None
