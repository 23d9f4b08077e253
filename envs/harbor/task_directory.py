"""Tasks as directories: Harbor's form, Terminal-Bench's older one, and sets of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading import yaml_tree
from polyturn.configs.loading.loader import read_section
from polyturn.configs.loading.yaml_tree import Tree, shown_path
from polyturn.envs.harbor.task_toml import (
    Healthcheck,
    NetworkPolicy,
    TaskToml,
    User,
    megabytes,
    read_task_toml,
)
from polyturn.envs.messages import known_split

Verdict = Literal["reward_file", "pytest_summary", "swebench_result"]
"""Where the verdict of a verifier stands: in its reward file, or, in the older form, in what it prints: pytest's
summary, or what SWE-bench's harness says."""
_PARSERS: Mapping[str, Verdict] = {"pytest": "pytest_summary", "swebench": "swebench_result"}
SHIPPED = Path(__file__).with_name("data")
_OLD_HIDDEN = (
    ".git", "tests", "solution.sh", "solution.yaml", "run-tests.sh", "task.yaml", "docker-compose.yaml"
)  # fmt: skip
_HIDDEN = (".git",)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeparateVerifier:
    """The container of its own in which a verifier runs."""

    artifacts: tuple[str, ...]
    """The paths of what the agent leaves; they are copied there, and nothing else is."""
    context: Path | None
    """The folder with its Dockerfile, which puts the tests into it."""
    docker_image: str | None
    has_tests: bool
    """Whether its image brings the tests; otherwise they are copied into it."""
    build_timeout_s: float
    environment: Mapping[str, str] = field(default_factory=dict)
    workdir: str | None = None
    cpus: float | None = None
    memory_mb: int | None = None
    storage_mb: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HarborTask:
    """One task, in whichever form it was written."""

    name: str
    folder: Path
    instruction: str
    agent_network: NetworkPolicy = "public"
    verifier_network: NetworkPolicy = "public"
    context: Path | None
    """The folder with the Dockerfile; None where there is none."""
    docker_image: str | None = None
    build_timeout_s: float = 600.0
    excluded: tuple[str, ...] = _HIDDEN
    """What of the context the builder does not see."""
    tests: Mapping[str, str] = field(default_factory=dict)
    """Files and folders of the task, and where they go in the container once the agent is done."""
    test_command: str
    verdict: Verdict = "reward_file"
    solution: Mapping[str, str] = field(default_factory=dict)
    """As `tests`, for the oracle; empty where the task brings none."""
    solution_command: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    test_environment: Mapping[str, str] = field(default_factory=dict)
    solution_environment: Mapping[str, str] = field(default_factory=dict)
    agent_timeout_s: float | None = None
    verifier_timeout_s: float = 600.0
    agent_user: User = None
    verifier_user: User = None
    workdir: str | None = None
    healthcheck: Healthcheck | None = None
    cpus: float | None = None
    memory_mb: int | None = None
    storage_mb: int | None = None
    verifier: SeparateVerifier | None = None
    """None: the tests run in the agent's container."""


def find_tasks(path: Path, split: str) -> Mapping[str, Path]:
    """The folders of the tasks of a split by id, sorted.

    `path` is a task, or a folder of tasks, all of which are `train`, or one with a folder of tasks for each split.

    Raises:
        ValueError: there is no such folder or split, or there are no tasks.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such directory of tasks")
    if _is_task(path):
        known_split(split, ("train",))
        return {path.name: path}
    if tasks := _tasks_in(path):
        known_split(split, ("train",))
        return tasks
    splits = {
        folder.name: tasks
        for folder in sorted(path.iterdir())
        if folder.is_dir() and (tasks := _tasks_in(folder))
    }
    if not splits:
        raise ValueError(
            f"{path}: neither a task nor a directory of tasks: none has a task.toml or a task.yaml"
        )
    return splits[known_split(split, splits)]


def read_task(folder: Path, name: str | None = None) -> HarborTask:
    """One task of either form.

    Raises:
        ConfigError: what is missing, cannot be read, or is not played here, with the file.
    """
    name = name or folder.name
    if (folder / "task.toml").is_file():
        return _read_harbor(folder, name)
    return _read_terminal_bench(folder, name)


def _is_task(folder: Path) -> bool:
    return (folder / "task.toml").is_file() or (folder / "task.yaml").is_file()


def _tasks_in(folder: Path) -> dict[str, Path]:
    return {entry.name: entry for entry in sorted(folder.iterdir()) if entry.is_dir() and _is_task(entry)}


def _read_harbor(folder: Path, name: str) -> HarborTask:
    written = read_task_toml(folder / "task.toml")
    environment = written.environment
    context = folder / "environment"
    # Compose files of other names are Harbor's no more than ours: material that a task is about.
    if (context / "docker-compose.yaml").exists():
        raise ConfigError(
            f"{shown_path(context / 'docker-compose.yaml')}: a task of several containers is not played here"
        )
    if not (context / "Dockerfile").is_file() and environment.docker_image is None:
        raise ConfigError(
            f"{shown_path(folder)}: there is neither environment/Dockerfile nor environment.docker_image in task.toml"
        )
    _required(folder / "tests" / "test.sh", "the script that grades")
    has_solution = (folder / "solution" / "solve.sh").is_file()
    return HarborTask(
        name=name,
        folder=folder,
        instruction=_text(folder / "instruction.md"),
        agent_network=written.agent_network,
        verifier_network=written.verifier_network,
        context=context if (context / "Dockerfile").is_file() else None,
        docker_image=environment.docker_image,
        build_timeout_s=environment.build_timeout_sec,
        tests={"tests": "/tests"},
        test_command="/tests/test.sh",
        solution={"solution": "/solution"} if has_solution else {},
        solution_command="/solution/solve.sh",
        environment=environment.env,
        test_environment=written.verifier.env,
        solution_environment=written.solution.env,
        agent_timeout_s=written.agent.timeout_sec,
        verifier_timeout_s=written.verifier.timeout_sec,
        agent_user=written.agent.user,
        verifier_user=written.verifier.user,
        workdir=environment.workdir,
        healthcheck=environment.healthcheck,
        cpus=environment.cpus,
        memory_mb=environment.memory_mb,
        storage_mb=environment.storage_mb,
        verifier=_separate_verifier(folder, written) if written.verifier.is_separate else None,
    )


def _separate_verifier(folder: Path, written: TaskToml) -> SeparateVerifier:
    """As Harbor has it: an image that is named, or made of `tests/Dockerfile`, or else another of the agent's kind."""
    environment = written.verifier.environment or written.environment
    named = written.verifier.environment.docker_image if written.verifier.environment is not None else None
    has_tests = named is not None or (folder / "tests" / "Dockerfile").is_file()
    context: Path | None = folder / ("tests" if has_tests else "environment")
    if not has_tests:
        named = written.environment.docker_image
    if context is not None and (named is not None or not (context / "Dockerfile").is_file()):
        context = None
    return SeparateVerifier(
        artifacts=written.artifact_paths,
        context=context,
        docker_image=named,
        has_tests=has_tests,
        build_timeout_s=environment.build_timeout_sec,
        environment=environment.env,
        workdir=environment.workdir,
        cpus=environment.cpus,
        memory_mb=environment.memory_mb,
        storage_mb=environment.storage_mb,
    )


class TerminalBenchYaml(BaseModel):
    """What is read of Terminal-Bench's `task.yaml`; the rest of it describes the task to people."""

    model_config = ConfigDict(extra="ignore")

    instruction: str
    parser_name: str = "pytest"
    max_agent_timeout_sec: PositiveFloat = 360.0
    max_test_timeout_sec: PositiveFloat = 60.0


def _read_terminal_bench(folder: Path, name: str) -> HarborTask:
    path = folder / "task.yaml"
    tree = yaml_tree.read_file(path)
    known = {key: child for key, child in tree.value.items() if key in TerminalBenchYaml.model_fields}
    written = read_section(TerminalBenchYaml, Tree(known, tree.origin))
    if written.parser_name not in _PARSERS:
        raise ConfigError(
            f"{shown_path(path)}: 'parser_name': what {' and '.join(_PARSERS)} print is read here, "
            f"not {written.parser_name!r}"
        )
    service = _only_service(folder)
    context = folder / service.get("build", ".")
    _required(context / "Dockerfile", "what its image is made of")
    _required(folder / "run-tests.sh", "the script that grades")
    has_solution = (folder / "solution.sh").is_file()
    tests = {"tests": "/tests"} if (folder / "tests").is_dir() else {}
    return HarborTask(
        name=name,
        folder=folder,
        instruction=written.instruction,
        context=context,
        excluded=_OLD_HIDDEN,
        tests={**tests, "run-tests.sh": "/tests/run-tests.sh"},
        test_command="bash /tests/run-tests.sh",
        test_environment={"TEST_DIR": "/tests"},
        verdict=_PARSERS[written.parser_name],
        solution={"solution.sh": "/oracle/solution.sh"} if has_solution else {},
        solution_command="bash /oracle/solution.sh",
        environment=service.get("environment", {}),
        workdir=service.get("working_dir"),
        agent_timeout_s=written.max_agent_timeout_sec,
        verifier_timeout_s=written.max_test_timeout_sec,
        cpus=service.get("cpus"),
        memory_mb=service.get("memory_mb"),
    )


# What is honoured, and what changes nothing for a container that stands alone and waits for commands.
_COMPOSE_KEYS = frozenset(
    (
        *("build", "deploy", "environment", "volumes", "working_dir"),
        *(
            "command",
            "container_name",
            "expose",
            "image",
            "init",
            "labels",
            "logging",
            "ports",
            "pull_policy",
        ),
        *("restart", "stdin_open", "stop_grace_period", "stop_signal", "tty"),
    )
)


def _only_service(folder: Path) -> Mapping[str, Any]:
    """What docker-compose.yaml says of the one container. Raises ConfigError for several, or for more than is given."""
    path = folder / "docker-compose.yaml"
    if not path.is_file():
        return {}
    shown = shown_path(path)
    services = yaml_tree.read_file(path).plain().get("services") or {}
    if not isinstance(services, dict) or len(services) != 1:
        raise ConfigError(f"{shown}: a task of {len(services)} containers is not played here; only one is")
    (service,) = services.values()
    if not isinstance(service, dict):
        raise ConfigError(f"{shown}: a container must be a mapping, not {service!r}")
    for key in service:
        if key not in _COMPOSE_KEYS:
            raise ConfigError(f"{shown}: a container with {key!r} is not played here")
    volumes = [volume for volume in service.get("volumes") or () if not str(volume).startswith("${T_BENCH_")]
    if volumes:
        raise ConfigError(
            f"{shown}: a task that mounts folders of this machine ({volumes[0]}) is not played here"
        )
    return {
        "build": _build_context(service.get("build") or ".", shown),
        "environment": _variables(service.get("environment") or {}),
        **({"working_dir": workdir} if (workdir := service.get("working_dir")) else {}),
        **_compose_limits(service.get("deploy") or {}, shown),
    }


def _build_context(build: str | Mapping[str, Any], shown: str) -> str:
    """The folder of the Dockerfile. Raises ConfigError where a build is asked to do more than to build it."""
    if isinstance(build, str):
        return build
    for key, value in build.items():
        if key != "context" and (key, value) != ("dockerfile", "Dockerfile"):
            raise ConfigError(f"{shown}: a build with {key}={value!r} is not played here")
    return str(build.get("context", "."))


def _compose_limits(deploy: Mapping[str, Any], shown: str) -> dict[str, float | int]:
    """`deploy.resources.limits` as a container's limits; what is reserved is no limit."""
    resources = deploy.get("resources") or {}
    limits = resources.get("limits") or {}
    known = [*(key for key in deploy if key != "resources"), *limits]
    if odd := [key for key in known if key not in ("cpus", "memory", "pids")]:
        raise ConfigError(f"{shown}: a container with 'deploy' of {odd[0]!r} is not played here")
    if "devices" in (resources.get("reservations") or {}):
        raise ConfigError(f"{shown}: a task that needs accelerators is not played here")
    try:
        return {
            **({"cpus": float(limits["cpus"])} if "cpus" in limits else {}),
            **({"memory_mb": megabytes("memory", str(limits["memory"]))} if "memory" in limits else {}),
        }
    except ValueError as error:
        raise ConfigError(f"{shown}: 'deploy.resources.limits': {error}") from error


def _variables(written: Mapping[str, Any] | Sequence[str]) -> dict[str, str]:
    """Compose's variables, without those of this machine."""
    pairs = (
        written.items()
        if isinstance(written, Mapping)
        else (str(text).partition("=")[::2] for text in written)
    )
    return {name: str(value) for name, value in pairs if value is not None and "${" not in str(value)}


def _required(path: Path, what: str) -> None:
    if not path.is_file():
        raise ConfigError(f"{shown_path(path)}: there is no such file, {what}")


def _text(path: Path) -> str:
    _required(path, "what the agent is asked to do")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown_path(path)}: cannot be read: {error}") from error
    if not text.strip():
        raise ConfigError(f"{shown_path(path)}: it is empty")
    return text
