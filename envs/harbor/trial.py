"""One task being worked on: its image, its container, and what its verifier says in the end."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from polyturn.envs.harbor.artifacts import hand_over
from polyturn.envs.harbor.task_directory import HarborTask, SeparateVerifier
from polyturn.envs.harbor.verdicts import (
    NoVerdict,
    Verdict,
    read_pytest_summary,
    read_reward_json,
    read_reward_text,
    read_swebench_result,
)
from polyturn.tools.sandbox.container import Container, ContainerBroken, ContainerLimits, Containers
from polyturn.tools.sandbox.container_command import CommandResult, ContainerFailed
from polyturn.tools.sandbox.container_image import (
    BuildContext,
    HiddenImage,
    ensure_built,
    ensure_fetched,
    ensure_hidden,
)
from polyturn.tools.sandbox.sandbox import MIB

ImagePolicy = Literal["auto", "build", "local"]
SECRET_FOLDERS = ("/tests", "/solution", "/oracle")
"""What an image may have brought along, and no agent should see."""
_REWARDS = (("/logs/verifier/reward.json", read_reward_json), ("/logs/verifier/reward.txt", read_reward_text))
_LOGS = ("logs", "logs/agent", "logs/verifier", "logs/artifacts")
_FRESH = ("/logs/verifier", "/tests")
"""What the verifier must find as it would without the agent: nobody's rewards, nobody's tests."""
_MAX_REWARD_BYTES = 64 * 1024
_MAX_TEST_OUTPUT_BYTES = 2 * MIB
_SHOWN_CHARS = 600
_HOUSEKEEPING_S = 60.0


class VerifierFailed(RuntimeError):
    """The verifier of a task does not work, whatever was done before: never a reward of 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialOptions:
    """How tasks are played, where the task does not say."""

    images: ImagePolicy = "auto"
    hide_git: bool = True
    keep_processes: bool = False
    network: bool = False
    verifier_timeout_s: float | None = None
    cpus: float = 1.0
    memory_mb: int = 2048
    storage_mb: int = 10240
    build_network: str = "default"

    def __post_init__(self) -> None:
        if self.images not in get_args(ImagePolicy):
            raise ValueError(f"images must be one of {', '.join(get_args(ImagePolicy))}, not {self.images!r}")
        for name in ("cpus", "memory_mb", "storage_mb", "verifier_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value!r}")

    def limits_for(self, task: HarborTask | SeparateVerifier) -> ContainerLimits:
        """Its own where it has some."""
        return ContainerLimits(
            cpus=task.cpus or self.cpus,
            memory_bytes=(task.memory_mb or self.memory_mb) * MIB,
            disk_bytes=(task.storage_mb or self.storage_mb) * MIB,
        )

    def has_network(self, task: HarborTask) -> bool:
        """Whether both the task and the user want one."""
        return self.network and task.agent_network == "public"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What came of a trial."""

    verdict: Verdict
    broken_by_agent: bool = False
    """The verifier works where nobody has been, and not here: what was done is worth nothing."""
    num_changed_programs: int | None = None
    """Programs and libraries of the image that were changed, which a verifier may rely on; None: the verifier does
    not run there, or the daemon did not say in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskImages:
    """What the containers of a task are made of."""

    agent: HiddenImage
    """Without what the agent must not see."""
    verifier: str | None
    """Of a verifier with a container of its own."""


def prepare_images(containers: Containers, task: HarborTask, options: TrialOptions) -> TaskImages:
    """The task's images, built, fetched or found. Raises ContainerFailed."""
    image = _prepare(containers, task, options, excluded=task.excluded)
    verifier = task.verifier
    return TaskImages(
        agent=ensure_hidden(containers.client, image, folders=SECRET_FOLDERS, git=options.hide_git),
        verifier=None if verifier is None else _prepare(containers, verifier, options),
    )


def _prepare(
    containers: Containers,
    made_of: HarborTask | SeparateVerifier,
    options: TrialOptions,
    *,
    excluded: tuple[str, ...] = (".git",),
) -> str:
    if made_of.context is not None and (options.images == "build" or made_of.docker_image is None):
        context = BuildContext(
            folder=made_of.context,
            excluded=excluded,
            network="none" if options.images == "local" else options.build_network,
            timeout_s=made_of.build_timeout_s,
        )
        return ensure_built(containers.client, context)
    assert made_of.docker_image is not None, "a task has a Dockerfile or an image"
    return ensure_fetched(containers.client, made_of.docker_image, may_fetch=options.images == "auto")


class Trial:
    """A task in its container, which is made when something first needs it. Not for several threads at a time."""

    def __init__(
        self, containers: Containers, task: HarborTask, images: TaskImages, options: TrialOptions
    ) -> None:
        self.task = task
        self._containers, self._images, self._options = containers, images, options
        self._container: Container | None = None

    def container(self) -> Container:
        """Where the agent works. Raises ContainerFailed, and VerifierFailed where the task's own check of it fails."""
        if self._container is None:
            self._container = self._start()
            if self.task.healthcheck is not None:
                self._await_health(self._container)
        return self._container

    def bash(self, command: str, *, timeout_s: float, max_output_bytes: int) -> CommandResult:
        """Runs a command as the agent. Raises ContainerFailed."""
        return self.container().run(
            ["sh", "-c", _BASH_OR_SH, "sh", command],
            timeout_s=timeout_s,
            max_output_bytes=max_output_bytes,
            user=_user(self.task.agent_user),
        )

    def show_solution(self) -> str:
        """Puts the task's own solution into the container; the command that runs it.

        Raises ValueError where the task brings none, and ContainerFailed.
        """
        if not self.task.solution:
            raise ValueError(f"task {self.task.name!r} brings no solution that could be played")
        for source, target in self.task.solution.items():
            self.container().put_tree(self.task.folder / source, target, executable=("solve.sh",))
        return exported(self.task.solution_environment) + self.task.solution_command

    def verify(self) -> Verified:
        """Runs the tests on what the agent has left. The container is of no use to anybody afterwards.

        Where they do not come to a verdict, they are run once more where no agent has been: if they come to one there,
        the agent has broken them, and its work is worth nothing.

        Raises VerifierFailed, and ContainerFailed.
        """
        touched = self._container is not None
        try:
            changed = self._num_changed_programs()
            verdict = self._verify(self.container(), touched=touched)
        except (NoVerdict, ContainerBroken) as failure:
            where = f"the verifier of task {self.task.name!r}"
            if not touched:
                raise VerifierFailed(f"{where}: {failure}") from failure
            with contextlib.closing(self._start()) as untouched:
                try:
                    self._verify(untouched, touched=False)
                except NoVerdict as again:
                    raise VerifierFailed(f"{where}: {again}") from again
            return Verified(verdict=Verdict(reward=0.0), broken_by_agent=True)
        return Verified(verdict=verdict, num_changed_programs=changed)

    def close(self) -> None:
        """Removes the container. Again is harmless."""
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def _num_changed_programs(self) -> int | None:
        """As `Verified` has it. To compare all of a large image may take a daemon longer than it has."""
        if self._container is None or self.task.verifier is not None:
            return None
        with contextlib.suppress(ContainerFailed):
            return self._container.num_changed_programs()
        return None

    def _start(self) -> Container:
        container = self._containers.start(
            self._images.agent.tag,
            limits=self._options.limits_for(self.task),
            network="bridge" if self._options.has_network(self.task) else "none",
            environment={"DEBIAN_FRONTEND": "noninteractive", **self.task.environment},
            workdir=self.task.workdir,
        )
        try:
            container.make_folders(*_LOGS)
        except BaseException:
            container.close()
            raise
        return container

    def _await_health(self, container: Container) -> None:
        check = self.task.healthcheck
        assert check is not None
        start, failures = time.monotonic(), 0
        while True:
            result = container.run(["sh", "-c", check.command], timeout_s=check.timeout_sec)
            if result.ok:
                return
            starting = time.monotonic() < start + check.start_period_sec
            failures += not starting
            if failures >= check.retries:
                raise VerifierFailed(
                    f"the health check of task {self.task.name!r} fails: {result.output[-_SHOWN_CHARS:].strip()}"
                )
            time.sleep(check.start_interval_sec if starting else check.interval_sec)

    def _verify(self, container: Container, *, touched: bool) -> Verdict:
        """Raises NoVerdict, ContainerBroken and ContainerFailed."""
        if touched and not self._options.keep_processes:
            container.end_processes()
        if self.task.verifier is not None:
            with contextlib.closing(self._start_verifier(self.task.verifier)) as there:
                return self._verify_elsewhere(self.task.verifier, container, there)
        if touched:
            self._make_fresh(container)
        self._images.agent.restore(self._containers.client, container.handle)
        self._put_tests(container)
        return self._run_tests(container)

    def _verify_elsewhere(
        self, verifier: SeparateVerifier, container: Container, there: Container
    ) -> Verdict:
        try:
            for path in verifier.artifacts:
                hand_over(path, container, there)
        except ValueError as error:
            raise NoVerdict(str(error)) from error
        if verifier.has_tests:
            there.make_folders(*_LOGS)
            there.run(["chmod", "+x", "/tests/test.sh"], timeout_s=_HOUSEKEEPING_S, user="0")
        else:
            self._put_tests(there)
        return self._run_tests(there)

    def _start_verifier(self, verifier: SeparateVerifier) -> Container:
        image = self._images.verifier
        assert image is not None, "the images of a task have that of its verifier"
        return self._containers.start(
            image,
            limits=self._options.limits_for(verifier),
            network="bridge" if self._options.network and self.task.verifier_network == "public" else "none",
            environment={"DEBIAN_FRONTEND": "noninteractive", **verifier.environment},
            workdir=verifier.workdir,
        )

    def _put_tests(self, container: Container) -> None:
        container.make_folders(*_LOGS)
        for source, target in self.task.tests.items():
            container.put_tree(self.task.folder / source, target, executable=("test.sh",))

    def _run_tests(self, container: Container) -> Verdict:
        timeout_s = self._options.verifier_timeout_s or self.task.verifier_timeout_s
        result = container.run(
            ["sh", "-c", self.task.test_command],
            timeout_s=timeout_s,
            max_output_bytes=_MAX_TEST_OUTPUT_BYTES,
            user=_user(self.task.verifier_user),
            environment=self.task.test_environment,
        )
        if result.status != "ended":
            raise NoVerdict(
                f"the tests did not end by themselves ({result.status} after {result.seconds:.0f} s)"
            )
        if self.task.verdict == "pytest_summary":
            return read_pytest_summary(result.output)
        if self.task.verdict == "swebench_result":
            return read_swebench_result(result.output)
        return self._read_rewards(container, result)

    def _make_fresh(self, container: Container) -> None:
        container.run(["rm", "-rf", *_FRESH], timeout_s=_HOUSEKEEPING_S, user="0")
        for path in _FRESH:
            if container.exists(path):
                raise NoVerdict(f"{path} was put in the verifier's way and cannot be removed")

    def _read_rewards(self, container: Container, result: CommandResult) -> Verdict:
        for path, read in _REWARDS:
            try:
                written = container.read_file(path, max_bytes=_MAX_REWARD_BYTES)
            except ValueError as error:
                raise NoVerdict(str(error)) from error
            if written is not None:
                return read(written.decode("utf-8", "replace"))
        said = result.output[-_SHOWN_CHARS:].strip() or "nothing"
        raise NoVerdict(f"it wrote no reward file (exit code {result.exit_code}; it printed: {said})")


def exported(variables: Mapping[str, str]) -> str:
    """Shell that sets variables for what follows."""
    return "".join(f"export {name}={shlex.quote(value)}; " for name, value in variables.items())


_BASH_OR_SH = 'if command -v bash >/dev/null 2>&1; then exec bash -c "$1"; else exec sh -c "$1"; fi'


def _user(user: str | int | None) -> str | None:
    return None if user is None else str(user)
