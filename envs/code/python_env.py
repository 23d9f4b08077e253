"""PythonTool: questions that are answered with the help of a Python interpreter (ReTool, arXiv 2504.11536)."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence

from polyturn.envs.code.puzzles import make_puzzle
from polyturn.envs.messages import AssistantMessage, Message, known_split
from polyturn.envs.rewards.math import verify
from polyturn.envs.spaces import Script
from polyturn.envs.tasks import ListTasks, Task, TaskSource
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.python import BackendName, PythonTool, SharedSandboxes
from polyturn.tools.sandbox import Limits
from polyturn.tools.types import ToolCall, ToolSpec

SYSTEM_PROMPT = (
    "Solve the problem. You can run Python with the tool; variables stay from one call to the next. "
    r"End with the answer in \boxed{}."
)
SIZES = {"train": 500, "heldout": 100}


class PythonToolEnv(ToolEnv):
    """Mathematical questions, with a stateful Python interpreter in a sandbox of the episode's own.

    The reward is `correct`: 1.0 if the last box of the answer holds what equals the label, else 0.0; it is graded
    outside the sandbox, so nothing that the code does there counts.
    """

    def __init__(
        self,
        *,
        tasks_seed: int = 1,
        timeout_s: float = 5.0,
        backend: BackendName = "auto",
        limits: Limits | None = None,
        split: str = "train",
        max_turns: int | None = 6,
        tasks: TaskSource | None = None,
        render_mode: str | None = None,
    ) -> None:
        r"""
        Args:
            tasks_seed: Which puzzles; the same seed gives the same ones.
            timeout_s: Seconds for one call of the tool.
            backend: Of the sandbox.
            limits: Of the sandbox.
            split: `train` or `heldout`.
            max_turns: Calls and the answer together.
            tasks: Other questions; the label is the answer, as text or number. Should ask for a `\boxed{}`.
            render_mode: None or "ansi".

        Raises:
            ValueError: a split that does not exist, or limits that cannot be.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, not {timeout_s}")
        known_split(split, SIZES)
        self.tasks_seed = tasks_seed
        self.sandboxes = SharedSandboxes(backend)
        super().__init__(
            tools=[PythonTool.using(sandboxes=self.sandboxes, timeout_s=timeout_s, limits=limits)],
            tasks=tasks,
            split=split,
            max_turns=max_turns,
            render_mode=render_mode,
        )

    def tasks(self, split: str) -> TaskSource:
        """The puzzles of `train` or `heldout`, or the tasks given to the constructor."""
        return (
            self._given_tasks
            if self._given_tasks is not None
            else puzzle_tasks(self.tasks_seed, known_split(split, SIZES))
        )

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """Whether the boxed answer equals the label."""
        self.state_of(
            PythonTool
        ).close()  # the episode is over: do not hold its interpreter until the next one
        return {"correct": verify(str(self.task.label), message.content, mode="box_only").score()}

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:  # type: ignore[override]
        """Runs the task's own program, and answers with what it prints."""
        del tools
        if messages[-1]["role"] != "tool":
            arguments = {"code": self.task.metadata["program"]}
            return AssistantMessage(tool_calls=(ToolCall(id="call_0", name="python", arguments=arguments),))
        return AssistantMessage(content=rf"The answer is \boxed{{{messages[-1]['content'].strip()}}}.")

    def random_policy(self, seed: int) -> Script:
        """Runs nothing of use and guesses a number."""
        rng = random.Random(seed)

        def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
            del messages, tools
            number = rng.randint(0, 999)
            if rng.random() < 0.5:
                arguments = {"code": f"x = {number}\nprint(x)"}
                return AssistantMessage(
                    tool_calls=(ToolCall(id="call_0", name="python", arguments=arguments),)
                )
            return AssistantMessage(content=rf"\boxed{{{number}}}")

        return script

    def close(self) -> None:
        """Free the sandboxes."""
        super().close()
        self.sandboxes.close()


@functools.lru_cache(maxsize=4)
def puzzle_tasks(seed: int, split: str) -> ListTasks:
    """The puzzles of one split; no question is in both."""
    rng = random.Random(f"puzzles {seed}")
    questions: set[str] = set()
    tasks: dict[str, list[Task]] = {name: [] for name in SIZES}
    for name, size in SIZES.items():
        while len(tasks[name]) < size:
            puzzle = make_puzzle(rng)
            if puzzle.question in questions:
                continue
            questions.add(puzzle.question)
            tasks[name].append(
                Task(
                    task_id=f"{name}-{len(tasks[name])}",
                    messages=(
                        {"role": "system", "content": SYSTEM_PROMPT},
                        {"role": "user", "content": puzzle.question},
                    ),
                    label=str(puzzle.answer),
                    metadata={"program": puzzle.program},
                )
            )
    return ListTasks(tasks[split])
