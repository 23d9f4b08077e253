"""What a sandbox shows of the machine: what code needs, and nothing that is installed beside it."""

import contextlib
from pathlib import Path

import pytest

from polyturn.tools.sandbox import SandboxUnavailable
from polyturn.tools.sandbox.embedded import EmbeddedBackend
from polyturn.tools.sandbox.runner import jail

FINDS_LABELS = """
import os, sys
found = []
for folder, folders, files in os.walk("/"):
    folders[:] = [name for name in folders if (folder, name) not in (("/", "proc"), ("/", "sys"))]
    packages = os.path.basename(folder) in ("site-packages", "dist-packages") and (folders or files)
    if packages or folder.endswith("/polyturn") and "envs" in folders:
        found.append(folder)
    found += [f"{folder}/{name}" for name in files if name.startswith("unit_tests_")]
print(found)
"""


def test_no_labels_and_no_packages_that_were_not_asked_for_are_shown(sandbox):
    assert sandbox.exec(FINDS_LABELS, timeout_s=60).stdout == "[]\n"


@pytest.mark.parametrize("launcher", ["native", "bubblewrap"])
def test_polyturn_among_the_packages_is_hidden(tmp_path, launcher):
    (tmp_path / "polyturn" / "envs").mkdir(parents=True)
    (tmp_path / "polyturn" / "envs" / "unit_tests_train.jsonl").write_text("labels")
    (tmp_path / "other.py").write_text("x = 42")
    tmp_path.chmod(0o755)
    try:
        backend = EmbeddedBackend(launcher=launcher, packages=[tmp_path])
    except SandboxUnavailable as reason:
        pytest.skip(str(reason))
    with contextlib.closing(backend), backend.create() as sandbox:
        assert sandbox.exec("import other\nprint(other.x)", timeout_s=20).stdout == "42\n"
        assert sandbox.exec(FINDS_LABELS, timeout_s=60).stdout == "[]\n"


def test_what_is_installed_beside_an_interpreter_is_hidden(tmp_path, monkeypatch):
    for place in (
        "lib/python3.11/site-packages",
        "lib/python3.9/dist-packages",
        "lib/python3.11/json",
        "bin",
    ):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.setattr(jail.sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(jail, "PRIVATE_FOLDERS", {"/work": "0700"})
    made = jail.Layout.of_this_machine([])
    assert (f"{tmp_path}/lib", f"{tmp_path}/lib") in made.shown
    assert {f"{tmp_path}/lib/python3.11/site-packages", f"{tmp_path}/lib/python3.9/dist-packages"} <= set(
        made.hidden
    )
    assert f"{tmp_path}/lib/python3.11/json" not in made.hidden
    # This package itself, where it lies in what is shown.
    above = str(Path(jail.__file__).resolve().parents[3])
    made = jail.Layout.of_this_machine([above])
    assert "/packages/0" in made.hidden
    below = f"/packages/0/{Path(above).name}"
    assert below in jail.Layout.of_this_machine([str(Path(above).parent)]).hidden
