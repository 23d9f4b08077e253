"""Requests to an inference server, tried again while that may help."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from polyturn.agents.policy import PolicyFault

_MAX_SHOWN = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Retries:
    """How often, and after how long, a request is sent again. Waits double, each times a factor in [0.5, 1.5)."""

    max_retries: int = 4
    first_wait_s: float = 0.25
    jitter: random.Random = field(default_factory=random.Random)

    def wait_s(self, attempt: int) -> float:
        """Seconds before the retry that follows attempt 0, 1, ..."""
        return self.first_wait_s * 2**attempt * (0.5 + self.jitter.random())


async def post_json(
    client: httpx.AsyncClient,
    url: str,
    payload: Mapping[str, Any],
    *,
    retries: Retries,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The JSON object that `url` answers. Broken connections and statuses from 500 on are tried again.

    Raises:
        PolicyFault: the request was refused (4xx), took too long, or failed at every try.
    """
    attempt = 0
    cause: httpx.TransportError | None
    while True:
        try:
            response = await client.post(url, json=dict(payload), headers=dict(headers or {}))
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as error:
            raise PolicyFault(f"{url}: no answer in time ({type(error).__name__})") from error
        except httpx.TransportError as error:
            problem, cause = f"{type(error).__name__}: {error}", error
        else:
            if response.status_code < 400:
                return _json_object(url, response)
            problem, cause = f"HTTP {response.status_code}: {response.text[:_MAX_SHOWN]}", None
            if response.status_code < 500:
                raise PolicyFault(f"{url}: {problem}")
        if attempt == retries.max_retries:
            raise PolicyFault(f"{url}: {problem} (tried {attempt + 1} times)") from cause
        await asyncio.sleep(retries.wait_s(attempt))
        attempt += 1


def _json_object(url: str, response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError as error:
        raise PolicyFault(f"{url}: the answer is not JSON: {response.text[:_MAX_SHOWN]}") from error
    if not isinstance(answer, dict):
        raise PolicyFault(f"{url}: the answer is a {type(answer).__name__}, not an object")
    return answer
