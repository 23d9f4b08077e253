"""Harbor's `task.toml` (its schema 1.4 and the older keys that it still reads), and what of it is not played here.

https://harborframework.com/docs/tasks
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import read_section
from polyturn.configs.loading.yaml_tree import Tree, shown_path

NetworkPolicy = Literal["public", "no-network", "allowlist"]
User = str | int | None
_HOST_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(:-(?P<default>[^}]*))?\}")
_NOT_PLAYED = "is not played here"
ARTIFACTS = "/logs/artifacts"
"""Where agents may leave things in any task."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Phase(_Section):
    network_mode: NetworkPolicy | None = None
    allowed_hosts: list[str] | None = None


class Author(_Section):
    name: str
    email: str | None = None


class Package(_Section):
    """`[task]`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: str | None = None
    description: str = ""
    authors: list[Author] = []
    keywords: list[str] = []


class AgentSection(_Phase):
    """`[agent]`."""

    timeout_sec: PositiveFloat | None = None
    user: User = None


class Healthcheck(_Section):
    """`[environment.healthcheck]`: a command that must exit with 0 before the agent begins."""

    command: str
    interval_sec: NonNegativeFloat = 5.0
    timeout_sec: PositiveFloat = 30.0
    start_period_sec: NonNegativeFloat = 0.0
    start_interval_sec: NonNegativeFloat = 5.0
    retries: PositiveInt = 3


class EnvironmentSection(_Section):
    """`[environment]`."""

    network_mode: NetworkPolicy = "public"
    allowed_hosts: list[str] | None = None
    build_timeout_sec: PositiveFloat = 600.0
    docker_image: str | None = None
    os: str = "linux"
    cpus: PositiveFloat | None = None
    memory_mb: PositiveInt | None = None
    storage_mb: PositiveInt | None = None
    memory: str | None = None
    """The older way to write `memory_mb`: `2G`."""
    storage: str | None = None
    gpus: int | None = None
    gpu_types: list[str] | None = None
    tpu: dict[str, Any] | None = None
    mcp_servers: list[dict[str, Any]] = []
    env: dict[str, str] = {}
    skills_dir: str | None = None
    healthcheck: Healthcheck | None = None
    workdir: str | None = None
    allow_internet: bool | None = None
    """The older way to write `network_mode`."""

    @model_validator(mode="after")
    def _playable(self) -> EnvironmentSection:
        if self.os.lower() != "linux":
            raise ValueError(f"'os': a task for {self.os} {_NOT_PLAYED}; only linux is")
        if self.gpus or self.tpu:
            raise ValueError(
                f"'{'gpus' if self.gpus else 'tpu'}': a task that needs accelerators {_NOT_PLAYED}"
            )
        for name in ("mcp_servers", "skills_dir"):
            if getattr(self, name):
                raise ValueError(f"'{name}': a task that brings its own {name.split('_')[0]} {_NOT_PLAYED}")
        for old, new in (("memory", "memory_mb"), ("storage", "storage_mb")):
            if (text := getattr(self, old)) is not None:
                setattr(self, new, megabytes(old, text))
        if self.allow_internet is not None:
            self.network_mode = "public" if self.allow_internet else "no-network"
        return self


class VerifierSection(_Phase):
    """`[verifier]`."""

    timeout_sec: PositiveFloat = 600.0
    env: dict[str, str] = {}
    user: User = None
    environment_mode: Literal["shared", "separate"] | None = None
    environment: EnvironmentSection | None = None
    """Of a verifier with a container of its own."""
    collect: list[dict[str, Any]] = []

    @property
    def is_separate(self) -> bool:
        """Whether the tests run in a container where no agent has been."""
        return self.environment_mode == "separate" or self.environment is not None

    @model_validator(mode="after")
    def _playable(self) -> VerifierSection:
        if self.environment_mode == "shared" and self.environment is not None:
            raise ValueError(
                "'environment' is of a verifier with a container of its own, and its mode is 'shared'"
            )
        if self.collect:
            raise ValueError(f"'collect' {_NOT_PLAYED}: nothing reads what it would collect")
        return self


class Artifact(_Section):
    """What the agent leaves for a verifier with a container of its own, and for people."""

    source: str
    destination: str | None = None
    """Where Harbor keeps it for people; not read."""
    exclude: list[str] = []
    service: str | None = None


class SolutionSection(_Section):
    """`[solution]`."""

    env: dict[str, str] = {}


class TaskToml(_Section):
    """A `task.toml`; an empty one is a task with every default."""

    schema_version: str = "1.4"
    version: str | None = None
    """The older name of `schema_version`."""
    task: Package | None = None
    metadata: dict[str, Any] = {}
    agent: AgentSection = AgentSection()
    verifier: VerifierSection = VerifierSection()
    environment: EnvironmentSection = EnvironmentSection()
    solution: SolutionSection = SolutionSection()
    source: str | None = None
    steps: list[dict[str, Any]] | None = None
    multi_step_reward_strategy: str | None = None
    artifacts: list[str | Artifact] = []
    """What a verifier with a container of its own is given; else read and not collected, since it changes no grade."""

    @model_validator(mode="after")
    def _playable(self) -> TaskToml:
        if self.steps:
            raise ValueError(f"'steps': a task of several steps {_NOT_PLAYED}")
        for section, names in (("environment", self.environment.env), ("verifier", self.verifier.env)):
            _resolve(f"{section}.env", names)
        _resolve("solution.env", self.solution.env)
        if self.verifier.is_separate:
            self._check_artifacts()
        return self

    def _check_artifacts(self) -> None:
        for each in self.artifacts:
            artifact = Artifact(source=each) if isinstance(each, str) else each
            path = PurePosixPath(artifact.source)
            if not path.is_absolute() or ".." in path.parts or path == PurePosixPath("/"):
                raise ValueError(f"'artifacts': {artifact.source!r} is no absolute path of a file or folder")
            if artifact.exclude or artifact.service not in (None, "main"):
                raise ValueError(
                    f"'artifacts': {artifact.source!r} with 'exclude' or 'service' {_NOT_PLAYED}"
                )

    @property
    def artifact_paths(self) -> tuple[str, ...]:
        """The paths of what the agent leaves, the folder for it that every task has first."""
        named = (each if isinstance(each, str) else each.source for each in self.artifacts)
        return tuple(dict.fromkeys((ARTIFACTS, *(path.rstrip("/") for path in named))))

    @property
    def agent_network(self) -> NetworkPolicy:
        """What the agent is to reach."""
        return self.agent.network_mode or self.environment.network_mode

    @property
    def verifier_network(self) -> NetworkPolicy:
        """What the verifier is to reach."""
        return self.verifier.network_mode or self.environment.network_mode


def read_task_toml(path: Path) -> TaskToml:
    """Raises ConfigError: the file, the key and the nearest right one, for each thing that is wrong."""
    shown = shown_path(path)
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown}: not readable TOML: {error}") from error
    return read_section(TaskToml, _tree(written, shown))


def _tree(value: Any, origin: str) -> Tree:
    if isinstance(value, dict):
        return Tree({key: _tree(child, origin) for key, child in value.items()}, origin)
    if isinstance(value, list):
        return Tree([_tree(child, origin) for child in value], origin)
    # Dates, in metadata for the most part.
    return Tree(value if isinstance(value, str | int | float | bool) else str(value), origin)


def megabytes(name: str, text: str) -> int:
    """A size such as `2G` in MiB. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG])B?\s*", text.upper())
    if found is None:
        raise ValueError(f"'{name}' must be a size such as '2G' or '512M', got {text!r}")
    return max(1, int(float(found[1]) * {"K": 1 / 1024, "M": 1, "G": 1024}[found[2]]))


def _resolve(where: str, variables: dict[str, str]) -> None:
    """Puts in defaults for variables of this machine, which are never handed on. Raises ValueError without one."""
    for name, value in variables.items():
        for found in _HOST_VARIABLE.finditer(value):
            if found["default"] is None:
                raise ValueError(
                    f"'{where}.{name}' asks for this machine's variable {found['name']}, which no task is given; "
                    f"write ${{{found['name']}:-a default}}, or the value"
                )
        variables[name] = _HOST_VARIABLE.sub(lambda found: found["default"], value)
