"""Harbor's and Terminal-Bench's tasks: work in a container of the task's own, graded by the task's own tests."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from polyturn.envs.harbor.task_directory import SHIPPED, HarborTask, find_tasks, read_task
from polyturn.envs.harbor.trial import ImagePolicy, TaskImages, Trial, TrialOptions, prepare_images
from polyturn.envs.messages import AssistantMessage, ListTasks, Message, Script, Task, TaskSource, script_of
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.sandbox.container import AgentContainer, Containers
from polyturn.tools.sandbox.container_command import CommandResult
from polyturn.tools.sandbox.sandbox import SandboxUnavailable
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall, ToolError, ToolSpec

SYSTEM_PROMPT = (
    "You work on a Linux machine with the tool `bash`. Each call is a shell of its own: files stay, variables and the "
    "current folder do not. When you are done, answer without calling a tool; tests that you do not see then grade "
    "what you have left on the machine."
)
NO_OUTPUT = "(no output)"
_OUT_OF_TIME = "[The time for this task is used up.]"


class HarborEnv(ToolEnv):
    """A task from a directory in the form of Harbor or Terminal-Bench, with a shell in the task's own container.

    The reward is `tests`: what the task's verifier writes, once the agent is done and its processes have ended. Tests
    come into the container only then. A verifier that does not work is an `EnvironmentFault`.
    """

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        images: ImagePolicy = "auto",
        network: bool = False,
        hide_git: bool = True,
        keep_processes: bool = False,
        command_timeout_s: float = 120.0,
        agent_timeout_s: float | None = None,
        verifier_timeout_s: float | None = None,
        max_output_chars: int = 16_000,
        cpus: float = 1.0,
        memory_mb: int = 2048,
        storage_mb: int = 10240,
        build_network: str = "default",
        docker_host: str | None = None,
        split: str = "train",
        max_turns: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            path: A task, a directory of tasks, or one with such a directory for each split; None: three that ship.
            images: `auto` takes the image that a task names, and else builds its Dockerfile; `build` builds it in any
                case; `local` fetches nothing: neither images, nor anything while it builds.
            network: Whether tasks that ask for a network get one.
            hide_git: Whether `.git` folders are out of the agent's sight until the tests run.
            keep_processes: Whether what the agent has left running is there for the tests, as tasks want whose outcome
                is a service.
            command_timeout_s: Seconds for a call of `bash` that names none.
            agent_timeout_s: Seconds for all calls of an episode together; None: what the task says.
            verifier_timeout_s: Seconds for the tests; None: what the task says.
            max_output_chars: What the model is shown of a call's output, the beginning and the end.
            cpus: Of a container, where the task does not say.
            memory_mb: Of a container, where the task does not say.
            storage_mb: For files of a container beyond its image, where the task does not say.
            build_network: Of commands while an image is built: `default`, `none` or `host`.
            docker_host: The daemon's address; None: DOCKER_HOST, or the usual socket.
            split: Which tasks; `train`, or a folder of `path`.
            max_turns: Calls and the answer together; None leaves limits to the caller.
            render_mode: None or "ansi".

        Raises:
            ValueError: a directory, task or option that cannot be; or Docker is not to be had here.
        """
        for name, value in (("command_timeout_s", command_timeout_s), ("agent_timeout_s", agent_timeout_s)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value!r}")
        if max_output_chars < 200:
            raise ValueError(f"max_output_chars must be at least 200, not {max_output_chars}")
        self._options = TrialOptions(
            images=images,
            hide_git=hide_git,
            keep_processes=keep_processes,
            network=network,
            verifier_timeout_s=verifier_timeout_s,
            cpus=cpus,
            memory_mb=memory_mb,
            storage_mb=storage_mb,
            build_network=build_network,
        )
        self._path = Path(path) if path is not None else SHIPPED
        self._command_timeout_s, self._agent_timeout_s = command_timeout_s, agent_timeout_s
        self._max_output_chars = max_output_chars
        self._images: dict[Path, TaskImages] = {}
        self._trial: Trial | None = None
        self._left_s = 0.0
        for folder in find_tasks(self._path, split).values():
            self._check(_read(folder))
        super().__init__(split=split, max_turns=max_turns, render_mode=render_mode)
        try:
            self._containers = Containers(host=docker_host)
        except SandboxUnavailable as error:
            raise ValueError(
                f"polyturn/Harbor-v0 plays in Docker containers, and {error}; "
                "`apt-get install docker.io` installs Docker's engine, `systemctl start docker` starts it"
            ) from error

    def tasks(self, split: str) -> TaskSource:
        """The tasks of that folder of `path`; all of them where it has no folders for splits."""
        return ListTasks(
            [_as_task(name, _read(folder)) for name, folder in find_tasks(self._path, split).items()]
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are."""
        return tuple(sorted({"train", *(entry.name for entry in self._path.iterdir() if entry.is_dir())}))

    def begin(self, task: Task) -> Sequence[Message]:
        """Gets the task's image ready; the container starts with the first call."""
        self._end_trial()
        found = _read(Path(task.metadata["folder"]))
        self._left_s = self._agent_timeout_s or found.agent_timeout_s or float("inf")
        if found.folder not in self._images:
            self._images[found.folder] = prepare_images(self._containers, found, self._options)
        self._trial = Trial(self._containers, found, self._images[found.folder], self._options)
        return task.messages

    def agent_container(self) -> AgentContainer:
        """The container of the episode, for a program that acts in it in place of `bash`. Raises ContainerFailed."""
        trial = self._current()
        user = trial.task.agent_user
        return AgentContainer(
            containers=self._containers,
            container=trial.container(),
            user=None if user is None else str(user),
            timeout_s=self._left_s,
        )

    @tool
    def bash(self, command: str, timeout_s: float | None = None) -> str:
        """Run a command in a shell on the machine, and get what it writes.

        Args:
            command: What to run.
            timeout_s: After so many seconds it is ended.
        """
        trial = self._current()
        if timeout_s is not None and not timeout_s > 0:
            raise ToolError(f"timeout_s must be above 0, not {timeout_s:g}.")
        seconds = min(timeout_s or self._command_timeout_s, self._left_s)
        result = trial.bash(command, timeout_s=seconds, max_output_bytes=self._max_output_chars)
        self.metrics["commands"] = self.metrics.get("commands", 0.0) + 1.0
        self._left_s -= result.seconds
        if self._left_s <= 0:
            self.metrics["out_of_time"] = 1.0
            self.finish()
        text = _shown(result, seconds) + (f"\n{_OUT_OF_TIME}" if self._left_s <= 0 else "")
        if result.status == "ended":
            return text
        raise ToolError(text)

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """What the verifier says of the machine as it was left."""
        del message
        try:
            verified = self._current().verify()
        finally:
            self._end_trial()
        self.metrics |= {f"verifier/{name}": value for name, value in verified.verdict.further.items()}
        self.metrics["verifier_broken_by_agent"] = float(verified.broken_by_agent)
        if verified.num_changed_programs is not None:
            self.metrics["changed_programs"] = float(verified.num_changed_programs)
        return {"tests": verified.verdict.reward}

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:  # type: ignore[override]
        """Runs the task's own solution."""
        del tools
        if messages[-1]["role"] == "tool":
            return AssistantMessage(content="Done.")
        command = self._current().show_solution()
        arguments = {"command": command, "timeout_s": min(self._left_s, 24 * 3600.0)}
        return AssistantMessage(tool_calls=(ToolCall(id="call_0", name="bash", arguments=arguments),))

    def random_policy(self, seed: int) -> Script:
        """Looks around, or answers at once."""
        rng = random.Random(seed)

        def act() -> AssistantMessage:
            if rng.random() < 0.5:
                return AssistantMessage(content="Done.")
            arguments = {"command": rng.choice(["pwd", "ls", "echo 42 >/tmp/answer.txt", "no-such-program"])}
            return AssistantMessage(tool_calls=(ToolCall(id="call_0", name="bash", arguments=arguments),))

        return script_of(act)

    def close(self) -> None:
        """Remove the container, whatever goes on in it."""
        try:
            self._end_trial()
            super().close()
        finally:
            self._containers.close()

    def _current(self) -> Trial:
        assert self._trial is not None, "a task has begun, and was not graded"
        return self._trial

    def _end_trial(self) -> None:
        trial, self._trial = self._trial, None
        if trial is not None:
            trial.close()

    def _check(self, task: HarborTask) -> None:
        """Raise ValueError for what a task asks and this environment does not give."""
        networks = (task.agent_network, task.verifier_network)
        if self._options.network and ("allowlist" in networks or len(set(networks)) > 1):
            raise ValueError(
                f"task {task.name!r} asks for a network for the agent ({networks[0]}) and the verifier ({networks[1]}) "
                "with a list of allowed hosts, or for two that differ, which is not kept here; leave `network` false "
                "to play it without any"
            )
        if self._options.images == "build" and task.context is None:
            raise ValueError(f"task {task.name!r} has no Dockerfile to build; take images=auto")


@functools.lru_cache(maxsize=65536)
def _read(folder: Path) -> HarborTask:
    return read_task(folder)


def _as_task(name: str, task: HarborTask) -> Task:
    messages: tuple[Message, ...] = (
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": task.instruction},
    )
    return Task(task_id=name, messages=messages, metadata={"folder": str(task.folder)})


def _shown(result: CommandResult, seconds: float) -> str:
    """A result as the model reads it."""
    said = result.output.rstrip("\n")
    ended = {
        "timeout": f"[It was ended after {seconds:g} s.]",
        "output_limit": "[It was ended, because it wrote too much.]",
        "disk_limit": "[It was ended, because the machine's disk is full: remove what is not needed.]",
        "broken": "[The machine cannot run it any more.]",
        "ended": f"[exit code {result.exit_code}]" if result.exit_code else "",
    }[result.status]
    return "\n".join(part for part in (said, ended) if part) or NO_OUTPUT
