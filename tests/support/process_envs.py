"""Environments that a child process imports: one that holds the interpreter, and does worse."""

from __future__ import annotations

import ctypes
import os
import signal

from polyturn.envs.faults import UserFault
from polyturn.envs.messages import AssistantMessage, Grade, ListTasks, Task
from polyturn.envs.rewards import exact_match
from polyturn.envs.tool_env import HooksRun, ToolEnv
from polyturn.tools.tool import tool


class Holder(ToolEnv):
    """Its hooks run in a process of its own."""

    hooks_run: HooksRun = "own_process"
    is_replayable = True

    def tasks(self, split: str) -> ListTasks:
        return ListTasks([Task.from_prompt("t", f"Say x ({split}).", label="x")])

    @tool
    def hold(self, seconds: int) -> int:
        """Hold the interpreter: no other thread of the process runs meanwhile."""
        print("what is printed goes to standard error")
        # Unlike CDLL, PyDLL keeps the interpreter's lock during the call.
        ctypes.PyDLL(None).sleep(seconds)
        return os.getpid()

    @tool
    def draw(self) -> int:
        """A number of the episode's seed."""
        return int(self.np_random.integers(1_000_000))

    @tool
    def leave(self) -> int:
        """End the episode by the user's fault."""
        raise UserFault("the user left")

    @tool
    def fail(self) -> int:
        """End the episode."""
        raise RuntimeError("the backend is gone")

    @tool
    def die(self) -> int:
        """End the process."""
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def grade(self, message: AssistantMessage) -> Grade:
        self.metrics |= {"graded": 1.0, "engines": float(len(self.engine_urls))}
        return {"correct": exact_match(message.content, self.task.label)}


class InThread(Holder):
    """The same in this process."""

    hooks_run = "own_thread"


def made_by_a_function() -> ToolEnv:
    return Holder()
