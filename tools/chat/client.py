"""Asks an OpenAI-compatible endpoint, again where that may help, and reads what it answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx
import orjson

from polyturn.configs.schema.endpoint import ChatEndpoint
from polyturn.tools.bounded_answers import BoundedTransport
from polyturn.tools.chat.answers import ChatAnswer, ChatFault, PassingFault, read_answer, read_error
from polyturn.tools.chat.streams import EventReader, StreamedAnswer
from polyturn.tools.retries import Retries, Tries, asked_wait_s, transport_problem
from polyturn.tools.secrets import (
    Secrets,
    blank_credentials,
    public_url,
    read_secret,
    secrets_in_mapping,
    secrets_in_url,
)
from polyturn.tools.types import ToolSpec

CONNECT_S = 30.0
CONNECTIONS_PER_POOL = 8
"""httpx's pool looks at all its connections whenever a request begins or ends."""
_RETRY_DELAY = re.compile(rb'"retryDelay":\s*"(\d{1,6}(?:\.\d{1,9})?)s"')
"""How Gemini asks to wait."""


class ChatClient:
    """The client of one endpoint, for one event loop."""

    def __init__(self, endpoint: ChatEndpoint) -> None:
        """Sends nothing yet. Raises `ValueError` for a key that cannot be read, or a secret in a header or the url."""
        self.endpoint = endpoint
        in_headers = [("headers", name) for name, _ in secrets_in_mapping(endpoint.headers)]
        for option, name in in_headers + [("url", name) for name, _ in secrets_in_url(endpoint.url)]:
            raise ValueError(
                f"{option}: {name!r} looks like a secret, and configs are stored; put it into a file and name that "
                "with api_key_file and api_key_header"
            )
        key = (
            None
            if endpoint.api_key_file is None
            else read_secret(endpoint.api_key_file, option="api_key_file")
        )
        self._secrets = Secrets([("api key", key)] if key else [])
        self._headers = {"Content-Type": "application/json", **endpoint.headers}
        if key is not None:
            is_bearer = endpoint.api_key_header.lower() == "authorization"
            self._headers[endpoint.api_key_header] = f"Bearer {key}" if is_bearer else key
        url = httpx.URL(endpoint.url)
        self._url = url.copy_with(path=f"{url.path.rstrip('/')}/chat/completions")
        self.where = public_url(str(self._url))
        self._retries = Retries(max_retries=endpoint.max_retries, deadline_s=endpoint.timeout_s)
        self._slots = asyncio.Semaphore(endpoint.max_concurrent_requests)
        self._clients: list[httpx.AsyncClient] = []
        self._under_way: list[int] = []
        """Requests of each of them."""

    async def ask(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[ToolSpec] = ()) -> ChatAnswer:
        """The answer to a conversation in the shape of the OpenAI chat format.

        Raises:
            ChatFault: it failed at every try, took too long, was refused, or cannot be read.
        """
        body, asked = orjson.dumps(self._payload(messages, tools)), time.monotonic()
        async with self._slots:
            tries = Tries(self._retries)
            while True:
                waited_s = time.monotonic() - asked
                try:
                    return replace(await self._try(body, tries.left_s), waited_s=waited_s)
                except PassingFault as fault:
                    wait_s = tries.next_wait_s(fault.asked_wait_s)
                    if wait_s is None:
                        raise self._fault(tries.over(str(fault), fault.asked_wait_s)) from fault
                except ChatFault as fault:
                    raise self._fault(str(fault)) from fault
                await asyncio.sleep(wait_s)

    async def aclose(self) -> None:
        """Close the connections."""
        clients, self._clients = self._clients, []
        for client in clients:
            await client.aclose()

    def _payload(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[ToolSpec]) -> dict[str, Any]:
        endpoint = self.endpoint
        payload: dict[str, Any] = {"model": endpoint.model, "messages": list(messages)}
        payload |= {"temperature": endpoint.temperature, "max_tokens": endpoint.max_tokens}
        if tools:
            payload["tools"] = [tool.to_openai() for tool in tools]
        if endpoint.stream:
            payload |= {"stream": True, "stream_options": {"include_usage": True}}
        return {name: value for name, value in (payload | endpoint.request).items() if value is not None}

    async def _try(self, body: bytes, left_s: float) -> ChatAnswer:
        """One request. Raises `ChatFault`, and `PassingFault` where another may be answered."""
        deadline = asyncio.timeout(left_s)
        try:
            async with (
                deadline,
                self._least_busy() as client,
                client.stream("POST", self._url, content=body, headers=self._headers) as response,
            ):
                if response.status_code != 200:
                    return await self._read_refusal(response)
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    return await self._read_stream(response)
                return read_answer(_json(await response.aread()))
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise ChatFault(f"no answer within {self.endpoint.timeout_s:g} s") from error
        except httpx.TransportError as error:
            raise PassingFault(transport_problem(error)) from error
        except httpx.RequestError as error:
            raise ChatFault(f"{type(error).__name__}: {error}") from error

    async def _read_refusal(self, response: httpx.Response) -> ChatAnswer:
        body = await response.aread()
        try:
            answer = orjson.loads(body)
        except ValueError:
            answer = body.decode(errors="replace")[:300]
        status = response.status_code
        try:
            return read_error(answer, status=status)
        except PassingFault as fault:
            asked_s = asked_wait_s(response.headers)
            if asked_s is None and (found := _RETRY_DELAY.search(body)):
                asked_s = float(found[1])
            raise PassingFault(f"HTTP {status}: {fault}", asked_wait_s=asked_s) from fault
        except ChatFault as fault:
            raise ChatFault(f"HTTP {status}: {fault}") from fault

    async def _read_stream(self, response: httpx.Response) -> ChatAnswer:
        reader, streamed = EventReader(), StreamedAnswer()
        async for chunk in response.aiter_bytes():
            for data in reader.read(chunk):
                if (instead := streamed.add(data)) is not None:
                    return instead
            if streamed.is_done:
                break
        for data in reader.finish():
            if (instead := streamed.add(data)) is not None:
                return instead
        return streamed.answer()

    @contextlib.asynccontextmanager
    async def _least_busy(self) -> AsyncIterator[httpx.AsyncClient]:
        """The client with the fewest requests under way, which has one more meanwhile."""
        if not self._clients:
            self._clients = self._open()
            self._under_way = [0] * len(self._clients)
        place = self._under_way.index(min(self._under_way))
        under_way = self._under_way
        under_way[place] += 1
        try:
            yield self._clients[place]
        finally:
            under_way[place] -= 1

    def _open(self) -> list[httpx.AsyncClient]:
        """Clients that have together as many connections as there may be requests."""
        idle_s = self.endpoint.idle_timeout_s if self.endpoint.stream else None
        timeout = httpx.Timeout(None, connect=CONNECT_S, read=idle_s)
        limits = httpx.Limits(
            max_connections=CONNECTIONS_PER_POOL, max_keepalive_connections=CONNECTIONS_PER_POOL
        )
        number = math.ceil(self.endpoint.max_concurrent_requests / CONNECTIONS_PER_POOL)
        # One for all: to read the certificates takes longer than many requests.
        context = httpx.create_ssl_context(trust_env=False)
        transports = [
            httpx.AsyncHTTPTransport(verify=context, trust_env=False, limits=limits) for _ in range(number)
        ]
        return [
            httpx.AsyncClient(transport=BoundedTransport(transport), timeout=timeout, trust_env=False)
            for transport in transports
        ]

    def _fault(self, problem: str) -> ChatFault:
        """Without secrets: an endpoint may say back what it was sent."""
        return ChatFault(f"{self.where}: {blank_credentials(self._secrets.blank(problem))}")


class BlockingChat:
    """A `ChatClient` for code that may block.

    The requests of all threads run in one event loop, in a thread of its own, and share its connections and limits.
    """

    def __init__(self, endpoint: ChatEndpoint) -> None:
        """Sends nothing yet. Raises `ValueError` as `ChatClient` does."""
        self._client = ChatClient(endpoint)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat endpoint", daemon=True)
        self._starting = threading.Lock()

    @property
    def where(self) -> str:
        """The address, as it may be read."""
        return self._client.where

    def ask(self, messages: Sequence[Mapping[str, Any]]) -> ChatAnswer:
        """As `ChatClient.ask`."""
        with self._starting:
            if not self._thread.is_alive():
                self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._client.ask(messages), self._loop).result()

    def close(self) -> None:
        """Close the connections and end the thread. Nothing may be under way."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()


def _json(body: bytes) -> Any:
    """Raises `ChatFault`."""
    try:
        return orjson.loads(body)
    except ValueError:
        pass
    try:
        return json.loads(body)  # which knows NaN, and encodings other than UTF-8
    except (ValueError, RecursionError) as error:
        text = body[:300].decode(errors="replace")
        raise ChatFault(f"the answer is not JSON: {text}") from error
