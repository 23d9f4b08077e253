"""One turn of a policy that samples tokens: what is new as tokens, and the answer, which an engine may interrupt."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeTime, Slots
from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import FinishReason, Generation, PolicyFault, SamplingParams, TokenPolicy
from polyturn.envs.messages import Observation
from polyturn.tools.types import ToolSpec

LONG_TEXT_CHARS = 8_192
"""From here on an observation is rendered in a thread: tokenising it would hold up all other episodes."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 5.0
"""Before a generation is taken up again that an engine aborted without a token; doubles each time."""


async def render_ids(
    renderer: ChatRenderer,
    ledger: Ledger,
    observation: Observation,
    tools: Sequence[ToolSpec],
    slots: Slots | None,
) -> npt.NDArray[np.int32]:
    """The tokens of an observation: of a whole conversation so far where the ledger is empty, else what it adds."""
    if len(ledger):
        last = ledger.last_token_id
        render = functools.partial(renderer.extend, observation, last_token_id=last, tools=tools)
    else:
        render = functools.partial(renderer.start, observation, tools)
    # Lists of numbers are made into arrays there, too: a million of them are a pause of many milliseconds.
    if sum(len(message["content"]) for message in observation) < LONG_TEXT_CHARS:
        return np.array(render(), dtype=np.int32)
    async with slots.long_renders if slots is not None else contextlib.nullcontext():
        return await asyncio.to_thread(lambda: np.array(render(), dtype=np.int32))


async def generate_turn(
    policy: TokenPolicy,
    prompt_ids: npt.NDArray[np.int32],
    sampling: SamplingParams,
    seeds: Callable[[int], int],
    clock: EpisodeTime,
    interruption: Interruption,
) -> Generation:
    """One turn. A generation that the engine aborted goes on from its tokens, which stay as they are."""
    parts: list[Generation] = []
    num_sampled = num_routed = 0
    for attempt in itertools.count():
        request = replace(
            sampling,
            max_tokens=sampling.max_tokens - num_sampled,
            seed=seeds(attempt),
            routing_from=sampling.routing_from + num_routed,
        )
        so_far = np.concatenate([prompt_ids, *(part.token_ids for part in parts)]) if parts else prompt_ids
        ask = functools.partial(policy.generate, prompt_ids=so_far, sampling=request)
        part = await clock.request(ask, counts=_is_an_answer)
        if part.waited_s and _is_an_answer(part):
            clock.take_back(part.waited_s)
        clock.num_drawn_tokens += len(part)
        parts.append(part)
        num_sampled += len(part)
        num_routed += 0 if part.routed_experts is None else len(part.routed_experts)
        finish_reason: FinishReason = part.finish_reason
        if finish_reason == "abort" and num_sampled >= sampling.max_tokens:
            finish_reason = "length"
        if finish_reason != "abort":
            break
        if len(part):
            interruption.end()
        else:
            await interruption.wait()
    if not num_sampled:
        raise PolicyFault("the engine sampled no token")
    if len(parts) == 1 and finish_reason == parts[0].finish_reason:
        return parts[0]
    return Generation.joined(parts, finish_reason)


def _is_an_answer(part: Generation) -> bool:
    """Whether the engine did what it was asked for."""
    return len(part) > 0 or part.finish_reason != "abort"


class Interruption:
    """An engine that aborts what it has not begun, as it does while it takes new weights."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.end()

    def end(self) -> None:
        """The engine sampled something."""
        self._deadline: float | None = None
        self._wait_s = FIRST_WAIT_S

    async def wait(self) -> None:
        """Give it a little time. Raises `PolicyFault` when it had enough of that."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._timeout_s
        if now >= self._deadline:
            raise PolicyFault(
                f"the engine aborted the generation of one turn again and again for {self._timeout_s:g} s"
            )
        await asyncio.sleep(min(self._wait_s, self._deadline - now))
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
