"""configs/clusters/: what Ray's launcher, KubeRay and Docker are given, checked as far as that goes without a cloud."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from polyturn.configs.loading.loader import load_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "clusters"
PINNED = {
    name: version
    for name, _, version in (
        requirement.partition("==")
        for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]["train"]
    )
    if version
}


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def check_ray_start(command: str) -> dict[str, str]:
    """The options of a `ray start`, each of which it must know."""
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    given = dict(word.partition("=")[::2] for word in shlex.split(command)[2:])
    assert given.keys() <= known, given.keys() - known
    return given


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_ray_takes_the_files_of_its_launcher(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(name))
    validate_config(config)
    head, worker = (config["available_node_types"][kind] for kind in ("head", "gpu"))
    assert worker["min_workers"] * worker["resources"]["GPU"] == 64 and "GPU" not in head["resources"]
    assert config["max_workers"] == worker["max_workers"] == worker["min_workers"]
    _, start_head = config["head_start_ray_commands"]
    _, start_worker = config["worker_start_ray_commands"]
    at_head, at_worker = check_ray_start(start_head), check_ray_start(start_worker)
    assert at_head["--num-gpus"] == "0" and at_worker["--num-gpus"] == str(worker["resources"]["GPU"])
    # Who reaches the dashboard may run anything.
    assert at_head["--dashboard-host"] == "127.0.0.1"
    assert at_worker["--address"].endswith(f":{at_head['--port']}")
    config["available_node_types"]["gpu"]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validate_config(config)


CONTAINER_KEYS = {"name", "image", "resources", "env", "volumeMounts"}
GROUP_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
JOB_KEYS = {
    *("entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
    "rayClusterSpec",
}


@pytest.mark.parametrize("name", ["kuberay_cluster.yaml", "kuberay_job.yaml"])
def test_kuberay_is_given_what_it_knows(name: str) -> None:
    """The whole schema of KubeRay 1.7 was compared by hand (docs/many_nodes.md); this holds the keys that it has."""
    document = read(name)
    assert (
        document.keys() == {"apiVersion", "kind", "metadata", "spec"}
        and document["apiVersion"] == "ray.io/v1"
    )
    spec = document["spec"]
    if document["kind"] == "RayJob":
        assert spec.keys() == JOB_KEYS and spec["submissionMode"] == "K8sJobMode"
        program, command, recipe, *overrides = shlex.split(spec["entrypoint"])
        assert (program, command) == ("polyturn", "train")
        assert load_config(recipe, overrides).cluster.address == "auto"
        spec = spec["rayClusterSpec"]
    assert spec.keys() == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert spec["rayVersion"] == PINNED["ray"]
    (worker,) = spec["workerGroupSpecs"]
    assert worker.keys() == GROUP_KEYS
    assert worker["replicas"] == worker["minReplicas"] == worker["maxReplicas"]
    for group, gpus in ((spec["headGroupSpec"], 0), (worker, 8)):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container.keys() == CONTAINER_KEYS
        options = " ".join(f"--{key}={value}" for key, value in group["rayStartParams"].items())
        assert check_ray_start(f"ray start {options}")["--num-gpus"] == str(gpus)
        limits = container["resources"]["limits"]
        assert int(limits.get("nvidia.com/gpu", 0)) == gpus and limits == container["resources"]["requests"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
        # Keys come as files, never as variables, which a dump of the environment would show.
        assert all("valueFrom" not in variable for variable in container["env"])


@pytest.mark.parametrize("name", ["cpu.Dockerfile", "gpu.Dockerfile"])
def test_container_files_hold_together(name: str) -> None:
    """As far as reading goes: docs/many_nodes.md says which of them was built."""
    text = re.sub(r"\\\n", " ", (FOLDER / name).read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    stages: list[str] = []
    for line in lines:
        word, _, rest = line.partition(" ")
        assert word in ("ARG", "FROM", "RUN", "ENV", "WORKDIR", "ENTRYPOINT", "CMD", "COPY"), line
        if word == "FROM":
            base, _, stage = rest.partition(" AS ")
            assert base == "${BASE}" or base in stages, line
            stages.append(stage)
        if word == "COPY":
            source, _ = rest.split()
            assert (ROOT / source).exists(), line
        if word == "ENTRYPOINT":
            # A shell's would not pass signals on.
            assert rest.startswith('["tini"')
    assert stages[-1] == "polyturn"
    for package, version in re.findall(r"(\S+)==([\w.]+)", text):
        assert PINNED[package] == version, package
    if name == "gpu.Dockerfile":
        assert f"lmsysorg/sglang:v{PINNED['sglang']}" in text
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)


def test_the_documented_commands_are_rays() -> None:
    text = (ROOT / "docs" / "many_nodes.md").read_text()
    commands = re.findall(r"^ray start .*$", text, re.MULTILINE)
    assert len(commands) == 2
    head, worker = map(check_ray_start, commands)
    assert "--head" in head and worker["--address"].endswith(f":{head['--port']}")
