"""One policy over several engines that hold the same weights."""

from __future__ import annotations

from collections.abc import Sequence

from polyturn.agents.policy import Generation, SamplingParams, TokenPolicy


class SpreadPolicy:
    """Sends each request to the engine with the fewest under way; among equals, to the first."""

    def __init__(self, policies: Sequence[TokenPolicy]) -> None:
        assert policies, "at least one engine"
        self._policies = tuple(policies)
        self._under_way = [0] * len(self._policies)

    async def generate(self, *, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """Sample a continuation. Raises `PolicyFault` when the engine that was chosen fails."""
        chosen = self._under_way.index(min(self._under_way))
        self._under_way[chosen] += 1
        try:
            return await self._policies[chosen].generate(prompt_ids=prompt_ids, sampling=sampling)
        finally:
            self._under_way[chosen] -= 1
