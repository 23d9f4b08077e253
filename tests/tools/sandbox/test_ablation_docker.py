"""Each layer of a Docker sandbox stops something that gets through without it."""

import dataclasses

import pytest

from polyturn.tools.sandbox.docker import DockerBackend
from polyturn.tools.sandbox.docker_container import DockerLayers
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

RUNNER_LAYERS = ("rlimits", "landlock", "kill_all", "oom_score")
"""What the runner puts on; `seccomp` alone is a name on both sides, of the container here."""


def status_beside(sandbox):
    """What the kernel says of a program that is started beside the runner, which takes more away from code itself."""
    command = ["python3", "-c", "print(open('/proc/self/status').read())"]
    lines = sandbox._runner.handle.exec_run(command).output.decode().splitlines()
    return dict(line.split(":\t") for line in lines if ":\t" in line)


def may_gain_privileges(sandbox, baits):
    """Whether a set-uid file would be heeded."""
    return status_beside(sandbox)["NoNewPrivs"].strip() != "1"


def may_have_capabilities(sandbox, baits):
    """Whether root would be more than a name."""
    return int(status_beside(sandbox)["CapBnd"], 16) != 0


BESIDE = ("runner_seccomp", "landlock")

ABLATIONS = [
    by_snippet("seccomp", "parts of the kernel with a history", without=("runner_seccomp",)),
    by_snippet("runner_seccomp", "parts of the kernel with a history", without=("seccomp",)),
    by_snippet("runner_seccomp", "starves the runner of CPU, files and processors"),
    by_snippet("no_network", "connects to a server of the host", without=("seccomp", *BESIDE)),
    by_snippet("read_only", "writes beside the work folder", without=("own_user", "landlock")),
    Ablation(layer="drop_capabilities", probe=may_have_capabilities, of="programs beside"),
    Ablation(
        layer="no_new_privileges", probe=may_gain_privileges, without=("seccomp",), of="programs beside"
    ),
    by_snippet("own_user", "becomes root"),
    by_snippet("memory", "memory of many children"),
    Ablation(layer="pids", probe=forks_at_will, without=("rlimits",), of="a hundred processes"),
    by_snippet("sized_tmpfs", "fill the disk"),
    by_snippet("sized_tmpfs", "a hundred thousand files"),
    by_snippet("rlimits", "a sparse file of a terabyte"),
    Ablation(layer="rlimits", probe=forks_at_will, without=("pids",), of="a hundred processes"),
    Ablation(layer="landlock", probe=kills_its_neighbour, of="kills the persistent interpreter"),
    Ablation(layer="kill_all", probe=leaves_a_process, of="a daemon"),
    Ablation(layer="oom_score", probe=is_not_the_first_to_go, of="whom the kernel kills first"),
]


def probe(ablation, away, docker_host, baits):
    runner_away = {name.removeprefix("runner_") for name in away if name not in LAYERS}
    backend = DockerBackend(
        host=docker_host,
        warm=0,
        layers=dataclasses.replace(DockerLayers(), **dict.fromkeys(LAYERS & set(away), False)),
        runner_layers=dict.fromkeys(runner_away, False),
    )
    with backend, backend.create(SMALL) as sandbox:
        return ablation.probe(sandbox, baits)


LAYERS = {field.name for field in dataclasses.fields(DockerLayers)}


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_without_the_layer_it_gets_through(ablation, docker_host, baits):
    if ablation.layer == "landlock" and not signals_are_scoped():
        pytest.skip("the kernel's landlock has no scopes (Linux 6.12)")
    assert not probe(ablation, ablation.without, docker_host, baits)
    assert probe(ablation, (ablation.layer, *ablation.without), docker_host, baits)
    baits.forget_visits()


def test_every_layer_has_an_ablation():
    assert {ablation.layer for ablation in ABLATIONS} == {*LAYERS, *RUNNER_LAYERS, "runner_seccomp"}
