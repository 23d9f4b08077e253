"""An agent that is a program of anybody's: it is started for each episode, and pointed at the episode's session.

agent:
  target: polyturn.agents.programs:ProgramAgent
  options: {command: [my-agent, --task, "{instruction}"]}
"""

from __future__ import annotations

import asyncio
import functools
import shlex
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from polyturn.agents.agent_play import AgentEpisode
from polyturn.envs.faults import EnvironmentFault, shortened
from polyturn.tools.sandbox.container import (
    AgentContainer,
    ContainerBroken,
    ContainerLimits,
    Containers,
    OffersContainer,
)
from polyturn.tools.sandbox.container_command import CommandResult
from polyturn.tools.sandbox.docker_image import ensure_python_image
from polyturn.tools.sandbox.programs import (
    WORK,
    ContainerPlace,
    LocalPlace,
    Place,
    Program,
    Running,
    check_reach,
)
from polyturn.tools.sandbox.sandbox import MIB
from polyturn.tools.threads import PinnedThread

PlaceName = Literal["auto", "environment", "docker", "bubblewrap", "host"]
InstructionBy = Literal["argument", "stdin", "file"]
AnswerBy = Literal["reply", "output", "file"]
ADDRESS_VARIABLES = {
    "OPENAI_BASE_URL": "openai_base_url",
    "OPENAI_API_KEY": "api_key",
    "ANTHROPIC_BASE_URL": "anthropic_base_url",
    "ANTHROPIC_API_KEY": "api_key",
}
"""What a program is told of its session, and how."""
INSTRUCTION, INSTRUCTION_FILE = "{instruction}", "{instruction_file}"
_INSTRUCTION_NAME = "instruction.md"
_MAX_ANSWER_BYTES = 1 * MIB
_CANNOT_RUN = (126, 127)


class ProgramFailed(RuntimeError):
    """A program that ended badly before it had asked the policy anything: the policy has no part in it."""


class ProgramAgent:
    """Runs a program for each episode, in a sandbox where it reaches nothing but its session.

    Where the environment's tasks are done in a container, the program runs there, and what it leaves is graded.
    """

    def __init__(
        self,
        *,
        command: Sequence[str],
        place: PlaceName = "auto",
        instruction: InstructionBy = "argument",
        answer: AnswerBy | None = None,
        answer_file: str = "answer.txt",
        variables: Mapping[str, str] = ADDRESS_VARIABLES,
        environment: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        grace_s: float = 3.0,
        max_output_chars: int = 4_000,
        max_written_mb: int = 64,
        port: int = 47831,
        image: str | None = None,
        packages: Sequence[str] = (),
        readable: Sequence[str] = (),
        memory_mb: int = 2048,
        cpus: float = 1.0,
        docker_host: str | None = None,
    ) -> None:
        """
        Args:
            command: The program and its arguments. `{instruction}` and `{instruction_file}` in them stand for the
                task's text, and for the name of a file that holds it.
            place: `environment`: in the container of the environment's task; `docker`: in a container of its own;
                `bubblewrap`: on this machine, in namespaces of its own; `host`: on this machine without any walls, for
                programs that you trust as yourself. `auto`: the environment's where it has one, else docker.
            instruction: Where no argument names it: as the last `argument`, on `stdin`, or in a `file` alone.
            answer: What is graded: what the policy said last (`reply`), what the program wrote (`output`, its end), or
                what it left in `answer_file` (`file`). None: its output in an environment's container, whose files are
                graded, and else the reply.
            answer_file: For `answer: file`. Where paths in the sandbox are relative, they are below the folder that the
                program begins in, or below /tmp in an environment's container.
            variables: Its variables that hold `openai_base_url`, `anthropic_base_url` or `api_key`.
            environment: Further variables. It gets none of this process's.
            files: What is put into its reach: paths in the sandbox, and files or folders of this machine.
            timeout_s: How long it may run; None: what the task says, or no limit but the episode's.
            grace_s: Between SIGTERM and SIGKILL.
            max_output_chars: What is kept of its output, the beginning and the end.
            max_written_mb: A program that writes more is ended.
            port: Of the loopback interface in the sandbox, where its session is.
            image: For `docker`: an image that the daemon has, with `sh`. None: this machine's Python.
            packages: For `docker` without `image`: distributions installed here that it gets.
            readable: For `bubblewrap`: files and folders of this machine that it may read, such as an interpreter's.
            memory_mb: For `docker` and `bubblewrap`.
            cpus: For `docker`.
            docker_host: For `docker`: the daemon's address.

        Raises:
            ValueError: an option that cannot be.
        """
        if isinstance(command, str) or not command:
            raise ValueError(f"command must be a list of a program and its arguments, not {command!r}")
        for name, value, allowed in (
            ("place", place, get_args(PlaceName)),
            ("instruction", instruction, get_args(InstructionBy)),
            ("answer", answer, (None, *get_args(AnswerBy))),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
        for name, number in (
            ("timeout_s", timeout_s),
            ("max_written_mb", max_written_mb),
            ("memory_mb", memory_mb),
        ):
            if number is not None and not number > 0:
                raise ValueError(f"{name} must be above 0, not {number!r}")
        for name, meaning in variables.items():
            if meaning not in ADDRESS_VARIABLES.values():
                known = ", ".join(sorted({*ADDRESS_VARIABLES.values()}))
                raise ValueError(f"variables.{name} must be one of {known}, not {meaning!r}")
        self._files = {inside: Path(outside) for inside, outside in (files or {}).items()}
        self._readable = [Path(path) for path in readable]
        for path in (*self._files.values(), *self._readable):
            if not path.exists():
                raise ValueError(f"{path}: there is no such file or folder on this machine")
        self._command, self._place, self._instruction = list(command), place, instruction
        self._answer, self._answer_file = answer, answer_file
        self._variables, self._environment = dict(variables), dict(environment or {})
        self._timeout_s, self._grace_s = timeout_s, grace_s
        self._max_output_chars, self._max_written_bytes = max_output_chars, max_written_mb * MIB
        self._port, self._image, self._packages = port, image, tuple(packages)
        self._limits = ContainerLimits(cpus=cpus, memory_bytes=memory_mb * MIB)
        self._docker_host = docker_host
        self._lock = threading.Lock()
        self._containers: Containers | None = None

    async def __call__(self, episode: AgentEpisode) -> str | None:
        """Runs the program to its end; what is graded.

        Raises:
            ProgramFailed: it ended badly before it had asked anything.
            EnvironmentFault: its sandbox failed.
        """
        attempt = _Attempt(functools.partial(self._open, episode), self._grace_s)
        thread = PinnedThread("program")
        try:
            run = functools.partial(attempt.run, self._max_output_chars, self._max_written_bytes)
            result, answer = await thread(run)
        except asyncio.CancelledError:
            attempt.is_aborted = True
            raise
        finally:
            # In a thread of its own: the other one may be waiting for the program.
            ending = PinnedThread("end of a program")
            await asyncio.shield(asyncio.ensure_future(ending(attempt.close)))
            ending.shutdown()
            thread.shutdown()
        return self._outcome(episode, result, answer)

    def _outcome(self, episode: AgentEpisode, result: CommandResult, answer: str | None) -> str | None:
        said = shortened(result.output.strip(), self._max_output_chars)
        if result.status == "broken" or (
            result.exit_code != 0 and result.status == "ended" and not episode.has_asked
        ):
            how = (
                "could not be started"
                if result.exit_code in _CANNOT_RUN
                else f"ended with {result.exit_code}"
            )
            raise ProgramFailed(
                f"{shlex.join(self._command)} {how} before it had asked the policy anything: {said}"
            )
        episode.metrics["program_ended"] = float(result.status == "ended")
        if result.exit_code is not None:
            episode.metrics["exit_code"] = float(result.exit_code)
        episode.metrics["program_seconds"] = result.seconds
        episode.metrics["output_bytes"] = float(result.num_output_bytes)
        return answer

    def _open(self, episode: AgentEpisode) -> _Opened:
        """Where the program of an episode runs, and what it is."""
        agent: AgentContainer | None = None
        if self._place in ("auto", "environment") and isinstance(episode.env, OffersContainer):
            agent = episode.env.agent_container()
        elif self._place == "environment":
            raise ValueError(f"{type(episode.env).__name__} has no container that a program could run in")
        folder, place = self._make_place(episode, agent)
        text = instruction_of(episode)
        name = f"{folder}/{_INSTRUCTION_NAME}"
        filled = [word.replace(INSTRUCTION, text).replace(INSTRUCTION_FILE, name) for word in self._command]
        if self._instruction == "argument" and filled == self._command:
            filled.append(text)
        program = Program(
            command=tuple(filled),
            environment={**self._addresses(episode), **self._environment},
            files={**{_below(folder, name): path for name, path in self._files.items()}, name: text.encode()},
            stdin=name if self._instruction == "stdin" else None,
        )
        limits = [
            limit for limit in (self._timeout_s, agent.timeout_s if agent is not None else None) if limit
        ]
        return _Opened(
            place=place,
            program=program,
            timeout_s=min(limits, default=float("inf")),
            answer=self._answer or ("output" if agent is not None else "reply"),
            answer_file=_below(folder, self._answer_file),
        )

    def _make_place(self, episode: AgentEpisode, agent: AgentContainer | None) -> tuple[str, Place]:
        """A place, and the folder in it for what is ours."""
        if self._place == "host":
            local = LocalPlace(socket_path=None, port=self._port, walls=False)
            return local.work, local
        socket_path = episode.socket_path
        if socket_path is None:
            raise ValueError("a program in a sandbox needs a session that is served on a Unix socket")
        if self._place == "bubblewrap":
            local = LocalPlace(
                socket_path=socket_path,
                port=self._port,
                walls=True,
                readable=self._readable,
                memory_bytes=self._limits.memory_bytes,
            )
            return local.work, local
        is_own = agent is None
        if agent is None:
            containers = self._own_containers()
            image = self._image or ensure_python_image(containers.client, self._packages).tag
            check_reach(containers)
            container = containers.start(image, limits=self._limits, workdir=WORK)
            agent = AgentContainer(
                containers=containers, container=container, user=None, timeout_s=float("inf")
            )
        place = ContainerPlace(agent, socket_path=socket_path, port=self._port, is_own=is_own)
        return WORK if is_own else "/tmp", place

    def _own_containers(self) -> Containers:
        with self._lock:
            if self._containers is None:
                self._containers = Containers(host=self._docker_host)
            return self._containers

    def _addresses(self, episode: AgentEpisode) -> dict[str, str]:
        """The variables that say where the session is, as the program sees it."""

        def seen(url: str) -> str:
            if self._place == "host":
                return url
            return urlsplit(url)._replace(netloc=f"127.0.0.1:{self._port}").geturl()

        known = {
            "openai_base_url": seen(episode.base_url),
            "anthropic_base_url": seen(episode.anthropic_base_url),
            "api_key": episode.api_key,
        }
        return {name: known[meaning] for name, meaning in self._variables.items()}


class _Opened:
    """A program that is about to run."""

    def __init__(
        self, *, place: Place, program: Program, timeout_s: float, answer: AnswerBy, answer_file: str
    ) -> None:
        self.place, self.program, self.timeout_s = place, program, timeout_s
        self.answer, self.answer_file = answer, answer_file


class _Attempt:
    """One run of a program: begun in one thread, and ended from another where the episode is over before."""

    def __init__(self, open_place: Any, grace_s: float) -> None:
        self._open_place, self._grace_s = open_place, grace_s
        self._lock = threading.Lock()
        self._opened: _Opened | None = None
        self._running: Running | None = None
        self.is_aborted = False

    def run(self, max_output_bytes: int, max_written_bytes: int) -> tuple[CommandResult, str | None]:
        """How the program ended, and what is graded. Raises EnvironmentFault."""
        try:
            with self._lock:
                if self.is_aborted:
                    raise EnvironmentFault("the episode was over before its program had begun")
                opened = self._opened = self._open_place()
                running = self._running = opened.place.start(opened.program)
            result = running.wait(
                opened.timeout_s,
                max_output_bytes=max_output_bytes,
                max_written_bytes=max_written_bytes,
                grace_s=self._grace_s,
            )
            return result, self._answer(opened, result)
        except ContainerBroken as error:
            raise EnvironmentFault(str(error)) from error

    def close(self) -> None:
        """Ends what is left of it."""
        with self._lock:  # it may be starting
            if self._running is not None and self.is_aborted:
                self._running.stop(self._grace_s)
            if self._opened is not None:
                self._opened.place.close(aborted=self.is_aborted)

    @staticmethod
    def _answer(opened: _Opened, result: CommandResult) -> str | None:
        if opened.answer == "reply":
            return None
        if opened.answer == "output":
            return result.output
        try:
            written = opened.place.read_file(opened.answer_file, max_bytes=_MAX_ANSWER_BYTES)
        except ValueError:  # its own doing
            written = None
        return (written or b"").decode("utf-8", "replace")


def _below(folder: str, name: str) -> str:
    return name if name.startswith("/") else f"{folder}/{name}"


def instruction_of(episode: AgentEpisode) -> str:
    """The task in one text: what users say in it. What a system message says is of tools that a program has not."""
    return "\n\n".join(message["content"] for message in episode.messages if message["role"] == "user")
