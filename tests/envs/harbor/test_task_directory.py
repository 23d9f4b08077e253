"""What of a task's directory is read, and what is refused, in which words."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.envs.harbor.artifacts import harmless
from polyturn.envs.harbor.task_directory import SHIPPED, find_tasks, read_task
from polyturn.envs.harbor.verdicts import (
    NoVerdict,
    read_pytest_summary,
    read_reward_json,
    read_reward_text,
    read_swebench_result,
)
from tests.support.harbor_tasks import write_task


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[environment]\ncpu = 1", "unknown key 'environment.cpu', did you mean 'environment.cpus'?"),
        ("[agnt]\ntimeout_sec = 1.0", "unknown key 'agnt', did you mean 'agent'?"),
        ("[agent]\ntimeout_sec = 'long'", "'agent.timeout_sec' must be a number, got 'long'"),
        ("[verifier]\ntimeout_sec = 0", "'verifier.timeout_sec' must be a value greater than 0"),
        ("[task]\nname = 'no-organisation'", "'task.name' must be text that matches"),
        ("[environment]\ngpus = 1", "'gpus': a task that needs accelerators is not played here"),
        ("[environment]\nos = 'windows'", "'os': a task for windows is not played here; only linux is"),
        ("[environment]\nmemory = 'much'", "'memory' must be a size such as '2G' or '512M', got 'much'"),
        ("[[environment.mcp_servers]]\nname = 'a'", "'mcp_servers': a task that brings its own mcp is not"),
        (
            "artifacts = ['answer']\n[verifier]\nenvironment_mode = 'separate'",
            "'answer' is no absolute path of a file or folder",
        ),
        (
            "[[artifacts]]\nsource = '/a'\nservice = 'database'\n[verifier.environment]\n",
            "'/a' with 'exclude' or 'service' is not played here",
        ),
        ("[verifier]\nenvironment_mode = 'shared'\n[verifier.environment]\n", "its mode is 'shared'"),
        ("[[steps]]\nname = 'a'", "'steps': a task of several steps is not played here"),
        ("[verifier.env]\nKEY = '${KEY}'", "'verifier.env.KEY' asks for this machine's variable KEY"),
        ("[agent", "not readable TOML"),
    ],
)
def test_what_is_wrong_in_a_task_toml_is_said(tmp_path: Path, toml: str, says: str) -> None:
    task = write_task(tmp_path / "task")
    (task / "environment" / "Dockerfile").write_text("FROM scratch\n")
    (task / "task.toml").write_text(toml)
    with pytest.raises(ConfigError) as raised:
        read_task(task)
    assert says in str(raised.value)
    assert str(task / "task.toml") in str(raised.value)


def test_an_empty_task_toml_has_every_default(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", dockerfile="FROM scratch\n")
    (task / "task.toml").write_text("")
    read = read_task(task)
    assert (read.verifier_timeout_s, read.agent_timeout_s, read.agent_network) == (600.0, None, "public")
    assert read.context == task / "environment"


def test_older_keys_are_read(tmp_path: Path) -> None:
    toml = "version = '1.0'\n[metadata]\nmade = 2026-01-01\n[verifier.env]\nMODE = '${MODE:-strict}'\n"
    old = "memory = '2G'\nstorage = '512M'\nallow_internet = false"
    read = read_task(write_task(tmp_path / "task", toml=toml, environment=old))
    assert (read.memory_mb, read.storage_mb, read.verifier_network) == (2048, 512, "no-network")
    assert read.test_environment == {"MODE": "strict"}


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("instruction.md", "instruction.md: there is no such file"),
        ("tests/test.sh", "tests/test.sh: there is no such file"),
        ("environment/Dockerfile", "there is neither environment/Dockerfile nor environment.docker_image"),
    ],
)
def test_a_file_that_is_missing_is_named(tmp_path: Path, missing: str, says: str) -> None:
    task = write_task(tmp_path / "task", dockerfile="FROM scratch\n")
    (task / missing).unlink()
    with pytest.raises(ConfigError, match=says):
        read_task(task)


def test_where_a_verifier_of_its_own_runs(tmp_path: Path) -> None:
    toml = "artifacts = ['/root/out/', {source = '/app/a.json'}]\n[verifier]\nenvironment_mode = 'separate'\n"
    task = write_task(tmp_path / "task", toml=toml, dockerfile="FROM scratch\n", environment="cpus = 2")
    found = read_task(task).verifier
    assert found is not None
    assert (found.context, found.docker_image, found.has_tests) == (task / "environment", None, False)
    assert (found.artifacts, found.cpus) == (("/logs/artifacts", "/root/out", "/app/a.json"), 2.0)
    (task / "tests" / "Dockerfile").write_text("FROM scratch\nCOPY . /tests/\n")
    found = read_task(task).verifier
    assert found is not None and (found.context, found.has_tests) == (task / "tests", True)
    named = "[verifier.environment]\ndocker_image = 'own:1'\nmemory_mb = 64\n"
    found = read_task(write_task(tmp_path / "named", toml=named)).verifier
    assert found is not None
    assert (found.context, found.docker_image, found.has_tests, found.memory_mb) == (None, "own:1", True, 64)
    assert read_task(write_task(tmp_path / "shared")).verifier is None


def archive_of(*entries: tuple[str, bytes, str | bytes]) -> bytes:
    taken = io.BytesIO()
    with tarfile.open(fileobj=taken, mode="w") as tar:
        for name, kind, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = kind, 0o4755
            if isinstance(content, str):
                entry.linkname = content
            else:
                entry.size = len(content)
            tar.addfile(entry, None if isinstance(content, str) else io.BytesIO(content))
    return taken.getvalue()


def test_no_link_or_device_of_an_agent_leads_to_the_tests() -> None:
    given = archive_of(
        ("out", tarfile.DIRTYPE, b""),
        ("out/a", tarfile.REGTYPE, b"one"),
        ("out/twin", tarfile.LNKTYPE, "out/a"),
        ("out/inside", tarfile.SYMTYPE, "a"),
        ("out/answer", tarfile.SYMTYPE, "../../tests/expected"),
        ("out/absolute", tarfile.SYMTYPE, "/tests/expected"),
        ("out/pipe", tarfile.FIFOTYPE, b""),
        ("../tests/test.sh", tarfile.REGTYPE, b"echo 1"),
    )
    with tarfile.open(fileobj=io.BytesIO(harmless(given, "/root/out"))) as tar:
        found = {entry.name: (entry.mode, entry.type) for entry in tar}
        twin = tar.extractfile("root/out/twin")
        assert twin is not None and twin.read() == b"one"
    assert set(found) == {"root/out", *(f"root/out/{name}" for name in ("a", "twin", "inside"))}
    assert {mode for mode, _ in found.values()} == {0o755}
    linked = archive_of(("answer.json", tarfile.SYMTYPE, "expected.json"))
    with tarfile.open(fileobj=io.BytesIO(harmless(linked, "/app/answer.json"))) as tar:
        assert tar.getnames() == []


def test_several_containers_are_refused(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task")
    (task / "environment" / "docker-compose.yml").write_text("what the task is about, as in Harbor\n")
    assert read_task(task).name == "task"
    (task / "environment" / "docker-compose.yaml").write_text("services: {}\n")
    with pytest.raises(ConfigError, match="a task of several containers is not played here"):
        read_task(task)


def write_old_task(folder: Path, compose: str = "", yaml: str = "") -> Path:
    (folder / "tests").mkdir(parents=True)
    (folder / "task.yaml").write_text(
        f"instruction: |-\n  Do it.\ndifficulty: easy\nparser_name: pytest\n{yaml}"
    )
    (folder / "Dockerfile").write_text("FROM debian:12-slim\nWORKDIR /app\n")
    (folder / "run-tests.sh").write_text("echo none\n")
    (folder / "solution.sh").write_text("touch /app/done\n")
    (folder / "docker-compose.yaml").write_text(compose or "services:\n  client:\n    build: .\n")
    return folder


def test_the_older_form_of_terminal_bench_is_read(tmp_path: Path) -> None:
    compose = (
        "services:\n  client:\n    build:\n      dockerfile: Dockerfile\n    command: [sh, -c, sleep infinity]\n"
        "    working_dir: /app\n    environment:\n      - TEST_DIR=${T_BENCH_TEST_DIR}\n      - MODE=fast\n"
        "    volumes:\n      - ${T_BENCH_TASK_LOGS_PATH}:${T_BENCH_CONTAINER_LOGS_PATH}\n"
        "    tty: true\n    stdin_open: true\n"
        "    deploy:\n      resources:\n        limits: {cpus: '2', memory: 4G}\n"
    )
    read = read_task(write_old_task(tmp_path / "old", compose, "max_test_timeout_sec: 12.5\n"))
    assert read.instruction == "Do it."
    assert (read.verifier_timeout_s, read.workdir, read.environment) == (12.5, "/app", {"MODE": "fast"})
    assert (read.cpus, read.memory_mb) == (2.0, 4096)
    assert {"tests", "solution.sh", "run-tests.sh", ".git"} <= set(read.excluded)


@pytest.mark.parametrize(
    ("compose", "yaml", "says"),
    [
        ("services:\n  client: {build: .}\n  database: {image: postgres}\n", "", "a task of 2 containers"),
        ("services:\n  client: {build: ., privileged: true}\n", "", "a container with 'privileged' is not"),
        ("services:\n  client: {build: ., volumes: ['/:/host']}\n", "", "mounts folders of this machine"),
        ("services:\n  client: {build: {dockerfile: other}}\n", "", "a build with dockerfile='other' is not"),
        ("services:\n  client: {deploy: {replicas: 2}}\n", "", "'deploy' of 'replicas' is not"),
        (
            "services:\n  client: {deploy: {resources: {limits: {memory: 4Q}}}}\n",
            "",
            "'memory' must be a size",
        ),
        ("services:\n  client: build\n", "", "a container must be a mapping"),
        ("", "max_test_timeout_sec: soon\n", "'max_test_timeout_sec' must be a number"),
    ],
)
def test_what_the_older_form_asks_in_vain_is_refused(
    tmp_path: Path, compose: str, yaml: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        read_task(write_old_task(tmp_path / "old", compose, yaml))


def test_parsers_that_are_not_known_are_refused(tmp_path: Path) -> None:
    task = write_old_task(tmp_path / "old")
    (task / "task.yaml").write_text("instruction: Do it.\nparser_name: mlebench\n")
    with pytest.raises(ConfigError, match="what pytest and swebench print is read here, not 'mlebench'"):
        read_task(task)
    (task / "task.yaml").write_text("instruction: Do it.\nparser_name: swebench\n")
    assert read_task(task).verdict == "swebench_result"


def test_where_tasks_are_found(tmp_path: Path) -> None:
    one = write_task(tmp_path / "set" / "b")
    write_task(tmp_path / "set" / "a")
    assert list(find_tasks(tmp_path / "set", "train")) == ["a", "b"]
    assert find_tasks(one, "train") == {"b": one}
    assert set(find_tasks(SHIPPED, "train")) == {"count-levels", "repair-total"}
    assert set(find_tasks(SHIPPED, "heldout")) == {"merge-settings"}
    with pytest.raises(ValueError, match="unknown split 'test'; the splits are heldout, train"):
        find_tasks(SHIPPED, "test")
    with pytest.raises(ValueError, match="unknown split 'heldout'"):
        find_tasks(tmp_path / "set", "heldout")
    with pytest.raises(ValueError, match="there is no such directory"):
        find_tasks(tmp_path / "none", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a task nor a directory of tasks"):
        find_tasks(tmp_path / "empty", "train")


def test_rewards_are_read() -> None:
    assert read_reward_text(" 0.5\n").reward == 0.5
    assert read_reward_json('{"reward": 1, "lines": 0.25}').reward == 1.0
    assert read_reward_json('{"reward": 1, "lines": 0.25}').further == {"lines": 0.25}
    assert read_reward_json('{"a": 1, "b": 0}').reward == 0.5
    for text in ("", "yes", "nan", "inf"):
        with pytest.raises(NoVerdict):
            read_reward_text(text)
    for text in ("", "[]", "{}", "1", '{"reward": true}', '{"reward": "1"}', '{"reward": NaN}'):
        with pytest.raises(NoVerdict):
            read_reward_json(text)


def test_the_summary_of_pytest_is_read() -> None:
    head = "FAILED is printed by a test\n=========== short test summary info ============\n"
    assert (
        read_pytest_summary(head + "PASSED a.py::b\nXFAIL a.py::c\nSKIPPED [1] d\n=== 2 passed ===").reward
        == 1
    )
    found = read_pytest_summary(head + "PASSED a.py::b\n\x1b[31mFAILED\x1b[0m a.py::c - assert\n")
    assert (found.reward, found.further) == (0.0, {"tests_passed": 0.5})
    for text in ("", "5 passed", head, head + "SKIPPED [1] d\n"):
        with pytest.raises(NoVerdict):
            read_pytest_summary(text)


def test_the_result_of_swe_bench_is_read() -> None:
    said = "SWEBench results starts here\r\n{}\r\nSWEBench results ends here\n"
    assert read_swebench_result("a test printed PASSED\n" + said.format("PASSED")).reward == 1.0
    assert read_swebench_result(said.format("PASSED") + said.format("FAILED")).reward == 0.0
    assert read_swebench_result(said.format("")).reward == 0.0
    with pytest.raises(NoVerdict):
        read_swebench_result("PASSED\n")
