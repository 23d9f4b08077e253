"""Requests to an inference server, tried again while that may help."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Protocol

import httpx
import orjson

from polyturn.agents.policy import EngineUnavailable, GarbledAnswer, PolicyFault
from polyturn.tools.retries import Retries, Tries, asked_wait_s, may_pass, transport_problem
from polyturn.tools.secrets import public_url

_MAX_SHOWN = 300


class HTTPAnswer(Protocol):
    """An answer with any status."""

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def content(self) -> bytes: ...

    @property
    def text(self) -> str: ...

    def json(self) -> Any:
        """Raises `ValueError`."""
        ...


class HTTPClient(Protocol):
    """`httpx.AsyncClient`, or `EngineClient`, which costs less."""

    async def post(self, url: str, *, content: bytes, headers: Mapping[str, str]) -> HTTPAnswer:
        """The answer to a body. Raises `httpx.RequestError`."""
        ...

    async def get(self, url: str) -> HTTPAnswer:
        """The answer without one. Raises `httpx.RequestError`."""
        ...


async def post_json(
    client: HTTPClient,
    url: str,
    payload: Mapping[str, Any],
    *,
    retries: Retries,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The JSON object that `url` answers to `payload`, which may hold arrays, within the deadline of `retries`.

    Broken connections, statuses from 500 on, and 408, 425 and 429 are tried again, after the time that the server asks
    for.

    Raises:
        EngineUnavailable: it failed at every try, or took too long.
        GarbledAnswer: its answer is no JSON object.
        PolicyFault: it was refused (another 4xx).
    """
    body = orjson.dumps(dict(payload), option=orjson.OPT_SERIALIZE_NUMPY)
    headers = {"Content-Type": "application/json", **(headers or {})}
    return await _tried(partial(client.post, url, content=body, headers=headers), url, retries=retries)


async def get_json(client: HTTPClient, url: str, *, retries: Retries) -> dict[str, Any]:
    """The JSON object at `url`; see `post_json`."""
    return await _tried(partial(client.get, url), url, retries=retries)


async def _tried(send: Callable[[], Awaitable[HTTPAnswer]], url: str, *, retries: Retries) -> dict[str, Any]:
    tries, shown_url = Tries(retries), public_url(url)
    while True:
        problem, asked_s, cause = "", None, None
        deadline = asyncio.timeout(tries.left_s)
        try:
            async with deadline:
                response = await send()
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout, TimeoutError) as error:
            message = f"{shown_url}: no answer in time ({type(error).__name__})"
            raise EngineUnavailable(message, is_gone=False) from error
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
            message = f"{shown_url}: {tries.over(problem, asked_s)}"
            raise EngineUnavailable(message, is_gone=cause is not None) from cause
        await asyncio.sleep(wait_s)


def _json_object(url: str, response: HTTPAnswer) -> dict[str, Any]:
    try:
        answer = _from_json(response)
    except ValueError as error:
        raise GarbledAnswer(f"{url}: the answer is not JSON: {response.text[:_MAX_SHOWN]}") from error
    if not isinstance(answer, dict):
        raise GarbledAnswer(f"{url}: the answer is a {type(answer).__name__}, not an object")
    return answer


def _from_json(response: HTTPAnswer) -> Any:
    try:
        return orjson.loads(response.content)
    except ValueError:
        return response.json()  # which knows NaN, and encodings other than UTF-8
