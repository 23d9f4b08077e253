"""What `polyturn doctor` makes of machines: pretended ones, and this one."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyturn.cli.doctor import facts as reading
from polyturn.cli.doctor.facts import Disk, Docker, Facts, Gpu, read_disk, read_facts, unmet_wishes
from polyturn.cli.doctor.findings import GIB, Status, Wants, findings
from polyturn.cli.main import app
from polyturn.packages import PACKAGES
from polyturn.tools.sandbox.embedded import Finding as Wall

H200 = Gpu(name="NVIDIA H200", total_bytes=140 * GIB, used_bytes=0)
WALL = Wall(name="seccomp", works=True, needed=True, detail="x86_64")
SOUND = Facts(
    python=(3, 11, 9),
    executable="/usr/bin/python",
    versions={package.distribution: "1.0" for package in PACKAGES},
    torch_cuda="12.8",
    gpus=(H200,),
    driver="570.1",
    driver_cuda="12.8",
    cores=16,
    memory_bytes=64 * GIB,
    limit_bytes=64 * GIB,
    available_bytes=60 * GIB,
    shared_memory_bytes=32 * GIB,
    open_files=(1024, 1_048_576),
    disk=Disk(path=Path("/runs"), free_bytes=500 * GIB),
    sandbox=(WALL,),
    programs={"bwrap": "/usr/bin/bwrap", "runsc": "/usr/bin/runsc"},
    docker=Docker(version="28", runtimes=("runc", "runsc")),
    now=2e9,
    newest_file=1.9e9,
)


def test_a_sound_machine_has_nothing_to_say() -> None:
    found = findings(SOUND, Wants(gpus=True))
    assert {finding.status for finding in found} == {Status.OK}
    assert all(not finding.next_step for finding in found)


@pytest.mark.parametrize(
    ("changed", "name", "status", "what", "next_step"),
    [
        ({"python": (3, 12, 1)}, "python", "fail", "Polyturn is for 3.11", "uv venv --python 3.11"),
        ({"versions": {}}, "package sglang", "fail", "missing, for rollout engines", "polyturn[train]"),
        ({"versions": {}}, "package matplotlib", "warn", "missing", "polyturn[plot]"),
        (
            {"unmet": ("sglang wants torch==2",)},
            "versions",
            "warn",
            "sglang wants torch==2",
            "polyturn[train]",
        ),
        ({"gpus": (), "gpu_problem": "there is no nvidia-smi"}, "gpu", "fail", "no nvidia-smi", "--gpus all"),
        ({"gpus": (replace(H200, used_bytes=100 * GIB),)}, "gpu 0", "warn", "100.0 GiB in use", "nvidia-smi"),
        ({"gpus": (replace(H200, is_split=True),)}, "gpu 0", "warn", "MIG", "NCCL"),
        ({"torch_cuda": None}, "driver", "fail", "torch is built for no GPU", "CUDA builds"),
        (
            {"torch_cuda": "13.0"},
            "driver",
            "fail",
            "torch is built for CUDA 13.0",
            "or install a torch for 12.8",
        ),
        ({"available_bytes": 2 * GIB}, "memory", "warn", "2.0 GiB available", "end what else runs"),
        ({"limit_bytes": 2 * GIB}, "memory", "warn", "this container may have 2.0 GiB", "--memory"),
        ({"shared_memory_bytes": 64 * 1024**2}, "/dev/shm", "warn", "64.0 MiB free", "--shm-size=8g"),
        ({"shared_memory_bytes": None}, "/dev/shm", "fail", "there is none", "mount"),
        ({"open_files": (256, 1024)}, "open files", "warn", "256, and up to 1,024", "nofile=65536"),
        ({"processes_left": 100}, "processes", "warn", "100 more", "--pids-limit"),
        (
            {"disk": Disk(path=Path("/"), free_bytes=0, problem="Read-only file system")},
            "disk",
            "fail",
            "/: Read-only file system",
            "set output_dir",
        ),
        ({"disk": Disk(path=Path("/"), free_bytes=GIB)}, "disk", "warn", "1.0 GiB free at /", "make room"),
        (
            {"sandbox": (replace(WALL, works=False, detail="refused"),)},
            "sandbox",
            "warn",
            "unavailable: seccomp: refused",
            "unprivileged_userns",
        ),
        ({"programs": {}}, "bwrap", "warn", "not installed", "apt-get install bubblewrap"),
        ({"docker": Docker(problem="no socket")}, "docker", "warn", "no socket", "start dockerd"),
        ({"docker": Docker(runtimes=("runc",))}, "docker", "warn", "does not know runsc", "runsc install"),
        ({"ray_processes": 2}, "ray", "warn", "2 processes of Ray", "ray stop"),
        ({"now": 1.0}, "clock", "warn", "before Polyturn's own files", "set-ntp"),
        (
            {"disk": Disk(path=Path("/nfs"), free_bytes=500 * GIB, clock_difference_s=-90)},
            "clock",
            "warn",
            "/nfs is 90 s behind",
            "NTP",
        ),
    ],
)
def test_each_trouble_is_told_with_the_next_step(
    changed: dict[str, object], name: str, status: str, what: str, next_step: str
) -> None:
    found = {finding.name: finding for finding in findings(replace(SOUND, **changed), Wants(gpus=True))}
    assert found[name].status == status, found[name]
    assert what in found[name].what and next_step in found[name].next_step, found[name]


def test_a_machine_without_gpus_is_sound_where_none_are_wanted() -> None:
    without = replace(SOUND, gpus=(), gpu_problem="there is no nvidia-smi", torch_cuda=None)
    assert {finding.status for finding in findings(without, Wants())} == {Status.OK}
    other = findings(replace(SOUND, torch_cuda="13.0"), Wants())
    assert Status.FAIL not in {finding.status for finding in other}


def test_what_packages_want_of_each_other_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    wishes = {
        "polyturn": ["ray==9; extra == 'train'", "ray==8; extra == 'plot'", "numpy>=2", "no requirement ="],
        "sglang": ["torch==3.1", "transformers>=5,<6", "torch==1; python_version < '3'"],
    }
    installed = {"ray": "2.60.0", "torch": "3.1+cu130", "transformers": "4.9"}
    monkeypatch.setattr(reading, "requires", lambda name: wishes.get(name))
    monkeypatch.setattr(reading, "version", installed.__getitem__)
    assert unmet_wishes(("sglang", "ray", "transformers")) == [
        "polyturn wants ray==9, and 2.60.0 is installed",
        "sglang wants transformers<6,>=5, and 4.9 is installed",
    ]
    installed["torch"] = "2.13.0+cpu"
    assert not any("torch" in sentence for sentence in unmet_wishes(("sglang",)))


def test_gpus_are_read_as_their_tool_tells_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n[ -n \"$1\" ] && echo 'NVIDIA H200, 143771, 1024, 570.86, Disabled' || "
        "echo '| NVIDIA-SMI 570.86  Driver Version: 570.86  CUDA Version: 12.8  |'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpus, driver, problem = reading._gpus()
    assert driver == "570.86" and not problem and reading._driver_cuda() == "12.8"
    assert gpus == (Gpu(name="NVIDIA H200", total_bytes=143771 * 1024**2, used_bytes=GIB),)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert reading._gpus() == ((), None, "nvidia-smi fails")


def test_a_directory_that_cannot_be_written_to_is_found(tmp_path: Path) -> None:
    found = read_disk(tmp_path / "not" / "yet")
    assert found.path == tmp_path and found.free_bytes > 0 and not found.problem
    assert abs(found.clock_difference_s) < 5 and not list(tmp_path.iterdir())
    assert read_disk(Path("/proc/polyturn")).problem


def test_this_machine_is_looked_at(workspace: Path) -> None:
    """What is told of it is what is there; a recipe that asks for what it has not fails, and nothing is started."""
    facts = read_facts(workspace)
    assert facts.cores >= 1 and facts.memory_bytes >= facts.available_bytes > 0
    assert facts.versions["pydantic"] and facts.shared_memory_bytes and facts.sandbox
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["doctor", "recipe.yaml", f"engines.port={port}", "--json"])
    value = json.loads(result.output)
    [recipe] = [finding for finding in value["findings"] if finding["name"] == "recipe"]
    assert result.exit_code == 1 and value["ready"] is False
    assert f"port {port} on 127.0.0.1 is taken" in recipe["what"]
    assert recipe["next_step"] == "choose another, or 0 for a free one"
    assert not (workspace / "runs").exists()


def test_the_doctor_prints_a_line_and_a_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for facts, code, line in (
        (SOUND, 0, "\nready to train"),
        (replace(SOUND, versions={}), 1, "not ready to train"),
    ):
        monkeypatch.setattr("polyturn.cli.doctor.command.read_facts", lambda _, facts=facts: facts)
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == code and line in result.output, result.output
    assert "fail  package sglang" in result.output and "→ pip install 'polyturn[train]'" in result.output
    assert CliRunner().invoke(app, ["doctor", "no-such-recipe"]).exit_code == 2
