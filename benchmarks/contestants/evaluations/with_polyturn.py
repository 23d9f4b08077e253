"""Polyturn: an environment with the tool, played by an endpoint, with its trajectories on the disk."""

from __future__ import annotations

from pathlib import Path

from work import EXPECTED, SYSTEM, look_up, measure, question

import polyturn

ENV_ID = "benchmark/Register-v0"


class Register(polyturn.ToolEnv):
    """Look up keys of a register."""

    hooks_run = "event_loop"

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self._num_tasks = num_tasks

    @polyturn.tool
    def lookup(self, key: str) -> str:
        """Look up a key of the register.

        Args:
            key: The key.
        """
        return look_up(key)

    def tasks(self, split: str) -> polyturn.TaskSource:
        del split
        return polyturn.ListTasks([task(number) for number in range(self._num_tasks)])

    def grade(self, message: polyturn.AssistantMessage) -> dict[str, float]:
        return {"found": float(EXPECTED in message.content)}


def task(number: int) -> polyturn.Task:
    messages: tuple[polyturn.Message, ...] = (
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": question(number)},
    )
    return polyturn.Task(task_id=f"task-{number}", messages=messages)


def play(url: str, number: int, at_once: int, directory: Path) -> tuple[int, int]:
    [report] = polyturn.evaluate(
        "quickstart",
        f"environment.id={ENV_ID}",
        f"environment.options={{num_tasks: {number}}}",
        "environment.max_turns=8",
        f"evaluation.num_tasks={number}",
        f"rollout.max_concurrent_episodes={at_once}",
        f"rollout.max_concurrent_requests={at_once}",
        policy=f"openai:{url}",
        policy_options={"model": "mock", "max_concurrent_requests": at_once},
        directory=directory,
    )
    result = report.result
    return round(result.mean * result.num_episodes), result.num_failed


if __name__ == "__main__":
    polyturn.register(ENV_ID, Register)
    measure(play)
