"""The agent of online training: a program outside takes each episode up, and gives its reward."""

from __future__ import annotations

import json
import os
from pathlib import Path

from polyturn.agents.agent_play import AgentEpisode


class OnlineAgent:
    """Offers its episodes to programs outside, which find address and key in a file.

    POST {url}/episodes                  -> its messages, tools, base_url and api_key; 429 where none waits
    any client at base_url with api_key  -> the policy
    POST {url}/sessions/{id}/end         <- {"reward": 0.7, "metrics": {...}}
    """

    def __init__(self, *, file: str = "online.json") -> None:
        """`file` is written with the first episode, for its owner alone: `{"url": ..., "api_key": ...}`."""
        self._file = Path(file)
        self._written: str | None = None

    async def __call__(self, episode: AgentEpisode) -> None:
        """Wait until a program has played the episode."""
        url, key = await episode.offers_address()
        if self._written != url:
            self._write(url, key)
            self._written = url
        worth = await episode.offer()
        episode.metrics.update(worth.metrics)
        episode.end(worth.reward)

    def _write(self, url: str, key: str) -> None:
        part = self._file.with_name(f"{self._file.name}.part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"url": url, "api_key": key}, file)
        part.replace(self._file)
