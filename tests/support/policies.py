"""A policy that samples what a test writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from polyturn.agents.policy import Generation, SamplingParams

CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Mara"}}\n</tool_call>'


class Says:
    """Writes what `say` gives for the number of the answer; the logprobs number the answers, too."""

    def __init__(self, tokenizer: Any, say: Callable[[int], str]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.written: list[tuple[list[int], list[int]]] = []
        """Of each answer the tokens before it, and its own."""
        self.sampling: list[SamplingParams] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def generate(self, *, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams) -> Generation:
        number = len(self.written)
        text = self.say(number)
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        self.written.append((prompt_ids.tolist(), ids))
        self.sampling.append(sampling)
        await asyncio.sleep(0)
        await self.may_answer.wait()
        return Generation(
            token_ids=np.array(ids, dtype=np.int32),
            logprobs=np.full(len(ids), -float(number + 1), dtype=np.float32),
            policy_versions=np.zeros(len(ids), dtype=np.int32),
            finish_reason="stop",
        )
