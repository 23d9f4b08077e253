"""inspect_ai: a task with `use_tools` and `generate`, scored by `includes`, with its log on the disk."""

from __future__ import annotations

from pathlib import Path

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, system_message, use_tools
from inspect_ai.tool import tool
from work import EXPECTED, SYSTEM, look_up, measure, question


@tool
def lookup():  # type: ignore[no-untyped-def]
    async def execute(key: str) -> str:
        """Look up a key of the register.

        Args:
            key: The key.
        """
        return look_up(key)

    return execute


def play(url: str, number: int, at_once: int, directory: Path) -> tuple[int, int]:
    samples = [Sample(input=question(index), target=EXPECTED) for index in range(number)]
    (log,) = eval(
        Task(
            dataset=samples,
            solver=[system_message(SYSTEM), use_tools(lookup()), generate()],
            scorer=includes(),
        ),
        model="openai-api/mock/mock",
        model_base_url=url,
        model_args={"api_key": "none"},
        log_dir=str(directory),
        display="none",
        max_connections=at_once,
        max_samples=at_once,
        max_tasks=1,
        fail_on_error=False,
    )
    assert log.samples is not None
    right = sum(
        sample.scores is not None and sample.scores["includes"].value == "C" for sample in log.samples
    )
    return right, sum(sample.error is not None for sample in log.samples)


if __name__ == "__main__":
    measure(play)
