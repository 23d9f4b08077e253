"""Requests to an inference server, tried again while that may help."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx

from polyturn.agents.policy import PolicyFault
from polyturn.tools.retries import Retries, Tries, asked_wait_s, may_pass, transport_problem
from polyturn.tools.secrets import public_url

_MAX_SHOWN = 300


async def post_json(
    client: httpx.AsyncClient,
    url: str,
    payload: Mapping[str, Any],
    *,
    retries: Retries,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The JSON object that `url` answers, within the deadline of `retries`.

    Broken connections, statuses from 500 on, and 408, 425 and 429 are tried again, after the time that the server asks
    for.

    Raises:
        PolicyFault: the request was refused (another 4xx), took too long, or failed at every try.
    """
    tries, shown_url = Tries(retries), public_url(url)
    while True:
        problem, asked_s, cause = "", None, None
        deadline = asyncio.timeout(tries.left_s)
        try:
            async with deadline:
                response = await client.post(url, json=dict(payload), headers=dict(headers or {}))
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout, TimeoutError) as error:
            raise PolicyFault(f"{shown_url}: no answer in time ({type(error).__name__})") from error
        except (httpx.TransportError, OSError) as error:
            problem, cause = transport_problem(error), error
        except httpx.RequestError as error:
            raise PolicyFault(f"{shown_url}: {error}") from error
        else:
            if response.status_code < 400:
                return _json_object(shown_url, response)
            problem = f"HTTP {response.status_code}: {response.text[:_MAX_SHOWN]}"
            if not may_pass(response.status_code):
                raise PolicyFault(f"{shown_url}: {problem}")
            asked_s = asked_wait_s(response.headers)
        wait_s = tries.next_wait_s(asked_s)
        if wait_s is None:
            raise PolicyFault(f"{shown_url}: {tries.over(problem, asked_s)}") from cause
        await asyncio.sleep(wait_s)


def _json_object(url: str, response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError as error:
        raise PolicyFault(f"{url}: the answer is not JSON: {response.text[:_MAX_SHOWN]}") from error
    if not isinstance(answer, dict):
        raise PolicyFault(f"{url}: the answer is a {type(answer).__name__}, not an object")
    return answer
