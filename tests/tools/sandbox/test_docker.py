"""The Docker backend: what its containers are, how they come and go, and what it says where it cannot run."""

import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from polyturn.tools.sandbox import Limits, SandboxUnavailable, make_backend
from tests.support.hostile.containment import answer
from tests.support.hostile.snippet import SMALL

docker = pytest.importorskip("docker", reason="the docker SDK is missing: pip install polyturn[sandbox]")

from polyturn.tools.sandbox import docker_daemon, docker_image  # noqa: E402
from polyturn.tools.sandbox.docker import DockerBackend, Pool  # noqa: E402
from polyturn.tools.sandbox.docker_container import allowed_calls  # noqa: E402


@pytest.fixture(scope="module")
def client(docker_host):
    connected = docker.DockerClient(base_url=docker_host)
    yield connected
    connected.close()


@pytest.fixture(scope="module")
def backend(docker_host):
    with DockerBackend(host=docker_host) as running:
        yield running


def containers_of(client, backend):
    label = f"{docker_daemon.LABEL}={backend._id}"
    return client.containers.list(all=True, filters={"label": label}, sparse=True)


def eventually(condition, within_s=20.0):
    end = time.monotonic() + within_s
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return value


def test_containers_are_hardened(client, backend):
    with backend.create(SMALL) as sandbox:
        container = sandbox._runner.handle
        container.reload()
        host, config = container.attrs["HostConfig"], container.attrs["Config"]
        assert host["NetworkMode"] == "none"
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert not host["Privileged"]
        assert not host["Binds"]
        assert "no-new-privileges:true" in host["SecurityOpt"]
        assert any(option.startswith("seccomp={") for option in host["SecurityOpt"])
        assert host["PidsLimit"] < 32
        assert host["Memory"] == host["MemorySwap"] > SMALL.memory_bytes
        assert f"size={SMALL.disk_bytes}" in host["Tmpfs"]["/work"]
        assert host["OomScoreAdj"] > 0
        assert int(config["User"].partition(":")[0]) > 1000
        # What the kernel says, of a process beside the runner's own.
        status = container.exec_run(
            ["python3", "-c", "print(open('/proc/self/status').read())"]
        ).output.decode()
        values = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
        assert values["NoNewPrivs"].strip() == "1"
        assert values["Seccomp"].strip() == "2"
        assert int(values["CapBnd"], 16) == 0


def test_users_of_containers_differ(backend):
    with backend.create(SMALL) as one, backend.create(SMALL) as other:
        users = [answer(sandbox, "import os; print(os.getuid())") for sandbox in (one, other)]
    assert users[0] != users[1]


def test_the_seccomp_profile_has_no_dangerous_call():
    dangerous = """
        ptrace bpf io_uring_setup io_uring_enter mount umount2 unshare setns keyctl add_key perf_event_open clone clone3
        process_vm_readv process_vm_writev userfaultfd open_by_handle_at init_module kexec_load reboot socket setuid
    """
    assert not set(dangerous.split()) & set(allowed_calls())


def test_code_that_is_not_answered_for_in_time_costs_its_container(backend, monkeypatch):
    monkeypatch.setattr("polyturn.tools.sandbox.sandbox.GRACE_S", 0.5)
    with backend.create(SMALL) as sandbox:
        container = sandbox._runner.handle
        container.pause()
        result = sandbox.exec("print(1)", timeout_s=0.5)
        assert (result.status, result.exit_code) == ("sandbox_died", None)
        assert "did not answer" in result.detail
        assert not sandbox.alive()
        assert sandbox.exec("print(1)").status == "sandbox_died"
        with pytest.raises(OSError, match="reset"):
            sandbox.read_file("a")
        sandbox.reset()
        assert sandbox.alive()
        assert answer(sandbox, "print(1)") == "1"


def test_a_container_that_is_killed_is_noticed(backend):
    with backend.create(SMALL) as sandbox:
        sandbox._runner.handle.kill()
        assert eventually(lambda: not sandbox.alive())
        assert sandbox.exec("print(1)").status == "sandbox_died"
        sandbox.reset()
        assert answer(sandbox, "print(1)") == "1"


def test_killed_while_it_runs(backend):
    with backend.create(SMALL) as sandbox:
        container = sandbox._runner.handle
        threading.Timer(0.3, container.kill).start()
        result = sandbox.exec("import time; time.sleep(20)", timeout_s=20)
        assert result.status == "sandbox_died"
        assert result.seconds < 15


def test_the_kernels_out_of_memory_is_told_from_a_kill(backend):
    with backend.create(SMALL) as sandbox:
        # The children together take most of what there is; the parent, the largest of all, then asks for the rest.
        many = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        block = bytearray(b"1") * (40 << 20)
        time.sleep(20)
        os._exit(0)
time.sleep(1)
block = bytearray(b"1") * (110 << 20)
print("BREACH")
"""
        result = sandbox.exec(many, timeout_s=15)
        assert result.status == "oom", result
        killed = sandbox.exec("import os; os.kill(os.getpid(), 9)")
        assert (killed.status, killed.exit_code) == ("ok", -9)


def test_a_warm_container_waits_and_a_closed_backend_leaves_none(client, docker_host):
    backend = DockerBackend(host=docker_host, warm=2)
    sandbox = backend.create(SMALL)
    assert eventually(lambda: len(containers_of(client, backend)) == 3)
    sandbox.close()
    assert eventually(lambda: len(containers_of(client, backend)) == 2)
    other = backend.create(SMALL)
    backend.close()
    backend.close()
    assert containers_of(client, backend) == []
    assert not other.alive()
    with pytest.raises(ValueError, match="closed"):
        backend.create(SMALL)


def test_many_threads(backend):
    answers = []

    def work(number):
        with backend.create(SMALL) as sandbox:
            for _ in range(3):
                answers.append((number, int(answer(sandbox, f"print({number} ** 2)"))))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == sorted([(number, number**2) for number in range(6)] * 3)


DYING_OWNER = """
import os, sys, time
from polyturn.tools.sandbox.docker import DockerBackend
backend = DockerBackend(host=sys.argv[1], warm=0)
sandbox = backend.create()
sandbox._runner.handle.pause()  # as one that hangs: it cannot end when its input does
print(backend._id, flush=True)
os.kill(os.getpid(), 9)
"""


def test_what_a_dead_process_left_is_swept(client, docker_host):
    dead = subprocess.run(
        [sys.executable, "-c", DYING_OWNER, docker_host], capture_output=True, text=True, check=False
    )
    assert dead.returncode == -9, dead.stderr
    label = f"{docker_daemon.LABEL}={dead.stdout.strip()}"
    assert len(client.containers.list(all=True, filters={"label": label}, sparse=True)) == 1
    with DockerBackend(host=docker_host, warm=0) as living, living.create(SMALL) as sandbox:
        assert client.containers.list(all=True, filters={"label": label}, sparse=True) == []
        with DockerBackend(host=docker_host, warm=0):
            pass
        # Another backend's sweep, at start or close, leaves those of the living alone.
        assert answer(sandbox, "print(1)") == "1"


def test_a_runner_ends_with_its_owner(client, docker_host):
    code = DYING_OWNER.replace("sandbox._runner.handle.pause()", "sandbox.exec('import os; os.fork()')")
    dead = subprocess.run(
        [sys.executable, "-c", code, docker_host], capture_output=True, text=True, check=False
    )
    label = f"{docker_daemon.LABEL}={dead.stdout.strip()}"
    assert eventually(lambda: client.containers.list(filters={"label": label}, sparse=True) == [])
    DockerBackend(host=docker_host, warm=0).close()
    assert client.containers.list(all=True, filters={"label": label}, sparse=True) == []


def test_whose_containers_are_left_over():
    owner = docker_daemon.Owner.this_process()
    mine = owner.labels("b")
    other_boot = {**mine, "polyturn.boot": "another"}
    other_namespace = {**mine, "polyturn.pid_namespace": "pid:[1]", "polyturn.owner": "999999999:1"}
    dead = {**mine, "polyturn.owner": "999999999:1"}
    reused = {**mine, "polyturn.owner": f"{os.getpid()}:1"}
    assert not owner.knows_dead(mine, running=True)
    assert not owner.knows_dead(mine, running=False)
    assert not owner.knows_dead(other_boot, running=True)
    assert owner.knows_dead(other_boot, running=False)
    assert not owner.knows_dead(other_namespace, running=True)
    assert owner.knows_dead(dead, running=True)
    assert owner.knows_dead(reused, running=True)


def test_packages_of_this_machine_can_be_had_inside(docker_host):
    with DockerBackend(host=docker_host, warm=0, packages=["idna"], preload=["idna"]) as backend:
        with backend.create(SMALL) as sandbox:
            assert (
                answer(sandbox, "import sys; print('idna' in sys.modules, 'numpy' in sys.modules)")
                == "True False"
            )
            assert answer(sandbox, "import idna; print(idna.encode('ドメイン').decode())").startswith("xn--")
    with pytest.raises(ValueError, match="not installed"):
        DockerBackend(host=docker_host, packages=["no-such-distribution"])


def _folder(name):
    with io.BytesIO() as archive:
        with tarfile.open(fileobj=archive, mode="w") as tar:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        return archive.getvalue()


def test_an_image_of_ones_own(client, docker_host):
    ours = docker_image.ensure_python_image(client).tag
    folder = docker_image.RUNNER_FOLDER
    # A stand-in for what people have: another image with a Python, an entry point and a user of its own.
    made = client.containers.create(ours, command=["true"])
    with io.BytesIO() as archive:
        with tarfile.open(fileobj=archive, mode="w") as tar:
            labels = tarfile.TarInfo("polyturn/envs/code/data/unit_tests_train.jsonl")
            for entry in (labels, tarfile.TarInfo("polyturn/__init__.py")):
                tar.addfile(entry)
        places = docker_image.find_interpreter().site_packages
        assert made.put_archive(str(Path(places).parent), _folder(Path(places).name))
        assert made.put_archive(places, archive.getvalue())
    changes = ['ENTRYPOINT ["/nothing"]', "USER 1:1", "WORKDIR /nowhere", f"ENV MARK={folder}"]
    made.commit(repository="polyturn-test-image", tag="own", changes=changes)
    made.remove()
    try:
        for _ in range(2):  # the second time it is there already
            with DockerBackend(host=docker_host, image="polyturn-test-image:own", warm=0) as backend:
                with backend.create(SMALL) as sandbox:
                    assert (
                        answer(sandbox, "import os; print(os.getcwd(), os.environ['MARK'])")
                        == f"/work {folder}"
                    )
                    # What is installed there is to be had, but for Polyturn, which has labels in it.
                    looks = f"import os; print(os.listdir({places!r}), os.listdir({places + '/polyturn'!r}))"
                    assert answer(sandbox, looks) == "['polyturn'] []"
    finally:
        client.images.remove("polyturn-test-image:own", force=True)


def test_the_image_changes_with_the_runner(tmp_path):
    files = {"a": __file__}
    tag = docker_image.image_tag(files)
    other = tmp_path / "other"
    other.write_text("x")
    assert docker_image.image_tag({"a": str(other)}) != tag
    assert docker_image.image_tag(dict(files)) == tag
    assert f"{docker_image.RUNNER_FOLDER[1:]}/runner/serve.py" in docker_image.runner_files()


def test_libraries_that_a_package_brings_along_go_with_it():
    interpreter = docker_image.find_interpreter()
    files = docker_image.image_files(interpreter, ["numpy"])
    before = set(files)
    docker_image.add_shared_libraries(files, interpreter.executable)
    added = set(files) - before
    assert any("libc.so" in name for name in added)
    assert not any("numpy" in name or ".." in name for name in added)


def test_gvisor(client, docker_host):
    if "runsc" not in client.info()["Runtimes"]:
        pytest.skip("gVisor (runsc) is not installed")
    with (
        DockerBackend(host=docker_host, runtime="runsc", warm=0) as backend,
        backend.create(SMALL) as sandbox,
    ):
        assert answer(sandbox, "print(6 * 7)") == "42"
        assert sandbox.exec("while True: pass", timeout_s=1).status == "timeout"
        assert answer(sandbox, "print(6 * 7)") == "42"


def test_unavailable_names_the_probe(docker_host, tmp_path):
    with pytest.raises(SandboxUnavailable, match=r"socket probe.*nothing\.sock"):
        make_backend("docker", host=f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(SandboxUnavailable, match=r"image probe.*no-such-image"):
        make_backend("docker", host=docker_host, image="no-such-image:1")
    with pytest.raises(SandboxUnavailable, match=r"runtime probe.*no-such-runtime"):
        make_backend("docker", host=docker_host, runtime="no-such-runtime")


def test_unavailable_where_nobody_answers():
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    with pytest.raises(SandboxUnavailable, match="ping probe"):
        make_backend("docker", host=f"tcp://127.0.0.1:{port}")


def test_unavailable_without_the_sdk():
    code = """
import sys
sys.modules["docker"] = None
from polyturn.tools.sandbox import make_backend, SandboxUnavailable
try:
    make_backend("docker")
except SandboxUnavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install polyturn[sandbox]" in done.stdout


def test_a_pool_replaces_what_died_and_discards_what_is_too_many():
    alive, discarded, started = set(), [], []

    def start(kind):
        started.append(kind)
        thing = (kind, len(started))
        alive.add(thing)
        return thing

    pool = Pool(start=start, is_alive=alive.__contains__, discard=discarded.append, size=1)
    pool.take("a")
    assert eventually(lambda: pool._ready["a"])
    alive.clear()
    assert pool.take("a") in alive
    assert discarded == [("a", 2)]
    for kind in "bcdef":
        pool.take(kind)
    pool.close()
    # All that was started ahead has been discarded: none is ready, none was forgotten.
    assert len(discarded) + 7 == len(started)


@pytest.mark.parametrize(
    "limits", [Limits(memory_bytes=64 << 20), Limits(num_processes=8, disk_bytes=1 << 20)]
)
def test_limits_reach_the_container(backend, limits):
    with backend.create(limits) as sandbox:
        size = answer(sandbox, "import os; s = os.statvfs('.'); print(s.f_blocks * s.f_frsize)")
        assert int(size) == limits.disk_bytes
        limit = answer(sandbox, "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[1])")
        assert int(limit) == limits.num_open_files
