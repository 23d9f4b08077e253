"""verifiers 0.1: a `ToolEnv` and a rubric, in one process, with its results on the disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import verifiers as vf
from datasets import Dataset
from work import EXPECTED, SYSTEM, look_up, measure, question


def lookup(key: str) -> str:
    """Look up a key of the register.

    Args:
        key: The key.
    """
    return look_up(key)


async def found(completion: list[vf.Message]) -> float:
    return float(EXPECTED in str(completion[-1].content))


def play(url: str, number: int, at_once: int, directory: Path) -> tuple[int, int]:
    rows = [{"question": question(index), "answer": EXPECTED} for index in range(number)]
    env = vf.ToolEnv(
        tools=[lookup],
        max_turns=8,
        dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        system_prompt=SYSTEM,
        rubric=vf.Rubric(funcs=[found]),
    )
    client = vf.ClientConfig(
        api_base_url=url,
        api_key_var="BENCHMARK_KEY",
        max_connections=at_once,
        max_keepalive_connections=at_once,
    )
    results = asyncio.run(
        env.evaluate(
            client,
            "mock",
            num_examples=number,
            max_concurrent=at_once,
            save_results=True,
            results_path=directory,
            on_progress=lambda *_: None,
        )
    )
    outputs = results["outputs"]
    failed = sum(bool(output.get("error")) for output in outputs)
    return sum(output["reward"] == 1.0 for output in outputs), failed


if __name__ == "__main__":
    measure(play)
