"""Where isolation cannot be had, nothing runs, and the error says what failed."""

import subprocess
import sys

import pytest

from polyturn.tools.sandbox import SandboxUnavailable
from polyturn.tools.sandbox.embedded import EmbeddedBackend, probe, summary

# Our own filter takes namespaces away from a process: what a container without privileges looks like from inside.
WITHOUT_NAMESPACES = """
from polyturn.tools.sandbox import SandboxUnavailable, make_backend
from polyturn.tools.sandbox.embedded import probe, summary
from polyturn.tools.sandbox.runner.kernel import PR_SET_NO_NEW_PRIVS, prctl
from polyturn.tools.sandbox.runner.kernel import Filter
prctl(PR_SET_NO_NEW_PRIVS, 1)
Filter().apply()
for name in ("embedded", "auto"):
    try:
        make_backend(name)
    except SandboxUnavailable as unavailable:
        print(unavailable)
print(summary(probe()))
"""


def test_a_machine_without_namespaces():
    told = subprocess.run(
        [sys.executable, "-c", WITHOUT_NAMESPACES], capture_output=True, text=True, timeout=60, check=True
    )
    embedded, auto, report = told.stdout.splitlines()
    for line in (embedded, auto, report):
        assert "namespace" in line
        assert "Operation not permitted" in line
    assert "docker: " in auto
    assert report.startswith("unavailable: sandbox: ")


def test_a_launcher_that_is_not_there(monkeypatch):
    monkeypatch.setitem(
        __import__("polyturn.tools.sandbox.nursery", fromlist=["ENVIRONMENT"]).ENVIRONMENT,
        "PATH",
        "/nowhere",
    )
    with pytest.raises(SandboxUnavailable, match="bubblewrap"):
        EmbeddedBackend(launcher="bubblewrap")


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="'docker'"):
        EmbeddedBackend(launcher="docker")
    with pytest.raises(FileNotFoundError):
        EmbeddedBackend(packages=["/nowhere"])


def test_the_probe_reports_what_works():
    findings = {finding.name: finding for finding in probe()}
    if not findings["sandbox"].works:
        pytest.skip(findings["sandbox"].detail)
    assert findings["seccomp"].works
    assert {"landlock", "cgroup", "user namespace", "bubblewrap"} <= set(findings)
    assert "namespaces" in summary(tuple(findings.values()))


def test_packages_and_preloaded_modules(tmp_path):
    folder = tmp_path / "with space"
    (folder / "shown").mkdir(parents=True)
    (folder / "shown" / "__init__.py").write_text("import os\nPID = os.getpid()\n")
    (folder / "shown" / "inner.py").write_text("VALUE = 42\n")
    (tmp_path / "hidden.py").write_text("")
    code = "import shown, os\nfrom shown.inner import VALUE\nprint(VALUE, shown.PID != os.getpid())"
    for preload in ([], ["shown"]):
        try:
            backend = EmbeddedBackend(packages=[folder], preload=preload, launcher="native")
        except SandboxUnavailable as reason:
            pytest.skip(str(reason))
        with backend.create() as sandbox:
            assert sandbox.exec(code, timeout_s=20).stdout == f"42 {bool(preload)}\n"
            assert "ModuleNotFoundError" in sandbox.exec("import hidden", timeout_s=20).stderr
            write = "import shown\nopen(shown.__path__[0] + '/x', 'w')"
            assert "Error" in sandbox.exec(write, timeout_s=20).stderr
        backend.close()
    with pytest.raises(SandboxUnavailable, match="no_such_module"):
        EmbeddedBackend(preload=["no_such_module"], launcher="native")
