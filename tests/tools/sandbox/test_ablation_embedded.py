"""Each layer of the embedded sandbox stops something that gets through without it."""

import dataclasses
import os

import pytest

from polyturn.tools.sandbox import SandboxUnavailable
from polyturn.tools.sandbox.embedded import EmbeddedBackend, Layers
from tests.support.hostile.ablation import (
    Ablation,
    by_snippet,
    forks_at_will,
    is_not_the_first_to_go,
    kills_its_neighbour,
    leaves_a_process,
)
from tests.support.hostile.containment import signals_are_scoped
from tests.support.hostile.snippet import SMALL


def shares_files(sandbox, baits):
    """Whether a sandbox finds what another one wrote, in a work folder without bounds."""
    size = sandbox.exec("import os; s = os.statvfs('.'); print(s.f_blocks * s.f_frsize)")
    return int(size.stdout) > SMALL.disk_bytes


AS_ROOT = ("uid_drop", "drop_capabilities", "seccomp", "landlock")

ABLATIONS = [
    by_snippet("seccomp", "parts of the kernel with a history"),
    by_snippet("seccomp", "starves the runner of CPU, files and processors"),
    Ablation(layer="landlock", probe=kills_its_neighbour, of="kills the persistent interpreter"),
    by_snippet("rlimits", "a sparse file of a terabyte"),
    by_snippet("rlimits", "open files without end"),
    Ablation(layer="rlimits", probe=forks_at_will, without=("cgroup",), of="a hundred processes"),
    by_snippet("cgroup", "memory of many children"),
    Ablation(layer="cgroup", probe=forks_at_will, without=("rlimits",), of="a hundred processes"),
    by_snippet("network_namespace", "connects to a server of the host", without=("seccomp", "landlock")),
    by_snippet("network_namespace", "connects to an abstract Unix socket of the host", without=("landlock",)),
    by_snippet("landlock", "connects to an abstract Unix socket of the host", without=("network_namespace",)),
    Ablation(layer="fresh_tmpfs", probe=shares_files, of="files without bounds"),
    by_snippet("fresh_tmpfs", "fill the disk"),
    by_snippet("fresh_tmpfs", "a hundred thousand files"),
    by_snippet("drop_capabilities", "renames the machine", without=("seccomp", "landlock")),
    Ablation(layer="uid_drop", probe=forks_at_will, without=("cgroup",), of="a hundred processes"),
    by_snippet("user_namespace", "commands the machine", without=AS_ROOT),
    Ablation(layer="kill_all", probe=leaves_a_process, of="a daemon"),
    Ablation(layer="oom_score", probe=is_not_the_first_to_go, of="whom the kernel kills first"),
]


@pytest.fixture(scope="module")
def machine(baits):
    """The backend with every layer; the tests skip where there is none, or where the owner's rights are too few."""
    if os.getuid() != 0:
        pytest.skip("the layers are told apart by root, who can go without any of them")
    try:
        whole = EmbeddedBackend(launcher="native")
    except SandboxUnavailable as reason:
        pytest.skip(str(reason))
    yield whole
    whole.close()


def probe(ablation, away, baits):
    layers = dataclasses.replace(Layers(), **dict.fromkeys(away, False))
    backend = EmbeddedBackend(launcher="native", layers=layers)
    try:
        with backend.create(SMALL) as sandbox:
            return ablation.probe(sandbox, baits)
    finally:
        backend.close()


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_without_the_layer_it_gets_through(ablation, machine, baits):
    if "cgroup" in (ablation.layer, *ablation.without) and machine.no_cgroups:
        pytest.skip(f"no cgroups here: {machine.no_cgroups}")
    if ablation.layer == "landlock" and not signals_are_scoped():
        pytest.skip("the kernel's landlock has no scopes (Linux 6.12)")
    assert not probe(ablation, ablation.without, baits)
    assert probe(ablation, (ablation.layer, *ablation.without), baits)
    baits.forget_visits()


def test_every_layer_has_an_ablation():
    assert {ablation.layer for ablation in ABLATIONS} == {field.name for field in dataclasses.fields(Layers)}
