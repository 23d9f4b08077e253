"""One client for all searches of a process: batched, cached, with deadlines, retries, a circuit breaker, and a
recording from which the same searches can be answered without a server.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson

from polyturn.tools.bounded_answers import BoundedTransport, UnreadableAnswer
from polyturn.tools.closing import Closing
from polyturn.tools.retries import CircuitBreaker, Retries, Tries, asked_wait_s, may_pass, transport_problem
from polyturn.tools.search.retrieval import Hit, SearchFailed, SearchUnavailable
from polyturn.tools.search.wire import NoHits, SearchR1Wire, Wire
from polyturn.tools.secrets import blank_credentials, public_url


class Recorder:
    """Adds answers to a JSONL file, one a line. Safe in threads."""

    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = Path(path).open("ab")  # noqa: SIM115  open until close()
        self._lock = threading.Lock()

    def add(self, query: str, top_k: int, hits: Sequence[Hit]) -> None:
        """Keep one answer."""
        row = [[hit.passage_id, hit.title, hit.text, hit.score] for hit in hits]
        line = orjson.dumps({"query": query, "top_k": top_k, "hits": row}) + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


class ReplayRetriever:
    """Answers from recorded files what was asked then; anything else is unavailable.

    Raises:
        ValueError: there is no such file, or `path:line: ...` a row that was not recorded by `Recorder`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: no such recording")
        self._answers: dict[tuple[str, int], tuple[Hit, ...]] = {}
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = orjson.loads(line)
                    key = str(row["query"]), int(row["top_k"])
                    self._answers[key] = tuple(
                        Hit(passage_id=passage_id, title=title, text=text, score=score)
                        for passage_id, title, text, score in row["hits"]
                    )
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}:{number}: not a recorded answer: {error}") from error

    def search(self, query: str, top_k: int) -> Sequence[Hit]:
        """The recorded answer.

        Raises:
            SearchUnavailable: this was not asked when the recording was made.
        """
        if (query, top_k) not in self._answers:
            raise SearchUnavailable(f"{self.path} has no answer to {query!r} with top_k {top_k}")
        return self._answers[query, top_k]


Hits = tuple[Hit, ...]
Key = tuple[str, int]
"""A query and its top_k."""
_SHOWN = 200
BREAKER_POLL_S = 0.1
"""How often a search that waits for an open breaker looks whether it may be asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientOptions:
    """How a client asks."""

    deadline_s: float = 30.0
    """Of one search, all waiting and retries included."""
    max_batch: int = 64
    """Queries in one request."""
    max_wait_s: float = 0.002
    """How long a query waits for others."""
    max_requests: int = 8
    """Requests at once."""
    max_retries: int = 3
    """After a connection that failed or broke, an answer of 500 and above, and 408, 425 and 429. Nothing else is tried
    again."""
    first_wait_s: float = 0.1
    """Before the first retry; doubles each time, by a factor from 0.5 to 1.5."""
    breaker_threshold: int = 5
    """Failed requests in a row after which nothing is asked for `breaker_cooldown_s`: searches wait, no longer than to
    their deadlines."""
    breaker_cooldown_s: float = 5.0
    cache_size: int = 10_000
    """Answers that are kept; 0 keeps none."""
    record: Path | None = None
    """A file to which every answer is added, for `ReplayRetriever`."""


@dataclass(slots=True)
class ClientCounts:
    """What a client did."""

    num_searches: int = 0
    num_cached: int = 0
    """Answered from the cache."""
    num_joined: int = 0
    """Joined to an equal search that was under way."""
    num_requests: int = 0
    num_retries: int = 0
    num_failed: int = 0
    """Queries without an answer."""


@dataclass(slots=True)
class _Flight:
    """One query under way, and all who wait for it."""

    started: float
    waiters: list[tuple[asyncio.AbstractEventLoop | None, Any]] = field(default_factory=list)


class SearchClient(Closing):
    """Searches over HTTP. Safe in any number of threads and event loops at once.

    One thread of its own holds the connections: searches from everywhere meet there and go out in batches. It starts
    with the first search and ends with `close`, or with the process.
    """

    def __init__(
        self,
        url: str,
        *,
        options: ClientOptions | None = None,
        wire: Wire | None = None,
        transport: Callable[[], httpx.AsyncBaseTransport] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """
        Args:
            url: Of a server, with or without the path that is asked.
            options: How it asks.
            wire: What the server speaks; None: Search-R1's `/retrieve`.
            transport: What carries the requests; None for connections as httpx makes them.
            rng: Spreads the retries.

        Raises:
            ValueError: the url is none.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(
                f"a search server's url begins with http:// or https://, unlike {public_url(url)!r}"
            )
        self._wire = wire or SearchR1Wire()
        self._address = url.rstrip("/").removesuffix(self._wire.path) + self._wire.path
        self.url = public_url(self._address)
        self.options = options or ClientOptions()
        self.counts = ClientCounts()
        self._transport = transport
        self._rng = rng or random.Random()
        self._lock = threading.Lock()
        self._cache: OrderedDict[Key, Hits] = OrderedDict()
        self._flights: dict[Key, _Flight] = {}
        self._queue: deque[Key] = deque()
        self._is_scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._breaker = CircuitBreaker(
            threshold=self.options.breaker_threshold, cooldown_s=self.options.breaker_cooldown_s
        )
        self._recorder = Recorder(self.options.record) if self.options.record else None

    def search(self, query: str, top_k: int) -> Sequence[Hit]:
        """Search from any thread but this client's own. Raises as `Retriever.search`."""
        waiter: concurrent.futures.Future[Hits] = concurrent.futures.Future()
        found = self._submit((query, top_k), None, waiter)
        return waiter.result() if found is None else found

    async def search_async(self, query: str, top_k: int) -> Sequence[Hit]:
        """As `search`, without holding up the event loop."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Hits] = loop.create_future()
        found = self._submit((query, top_k), loop, waiter)
        return await waiter if found is None else found

    def close(self) -> None:
        """End the thread and the connections; searches under way fail."""
        with self._lock:
            self._is_closed = True
            thread, loop = self._thread, self._loop
        if thread is not None and loop is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
        if self._recorder is not None:
            self._recorder.close()
        self._settle(list(self._flights), SearchUnavailable(f"{self.url}: the client is closed"))

    def _submit(self, key: Key, loop: asyncio.AbstractEventLoop | None, waiter: Any) -> Hits | None:
        """The hits where they are known, else None: `waiter` will be told."""
        if key[1] < 1:
            raise ValueError(f"top_k must be at least 1, not {key[1]}")
        with self._lock:
            self.counts.num_searches += 1
            if key in self._cache:
                self.counts.num_cached += 1
                self._cache.move_to_end(key)
                return self._cache[key]
            flight = self._flights.get(key)
            if flight is not None:
                self.counts.num_joined += 1
                flight.waiters.append((loop, waiter))
                return None
            own_loop = self._running_loop()
            self._flights[key] = _Flight(time.monotonic(), [(loop, waiter)])
            self._queue.append(key)
            first, full = not self._is_scheduled, len(self._queue) == self.options.max_batch
            self._is_scheduled = True
        if full:
            own_loop.call_soon_threadsafe(self._send)
        elif first:
            own_loop.call_soon_threadsafe(own_loop.call_later, self.options.max_wait_s, self._send)
        return None

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """The client's own event loop; its thread is started when first needed. Call with the lock held."""
        if self._is_closed:
            raise SearchUnavailable(f"{self.url}: the client is closed")
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._run, args=(self._loop,), name="search-client", daemon=True
            )
            self._thread.start()
        return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        limit = self.options.max_requests
        self._http = httpx.AsyncClient(
            transport=BoundedTransport(self._transport() if self._transport else self._connections(limit)),
            timeout=None,
            trust_env=False,
        )
        self._slots = asyncio.Semaphore(limit)
        self._tasks: set[asyncio.Task[None]] = set()
        try:
            loop.run_forever()
        finally:
            for task in self._tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
            loop.run_until_complete(self._http.aclose())
            loop.close()

    def _connections(self, limit: int) -> httpx.AsyncHTTPTransport:
        # A server closes what is idle for 5 s: leave first, or a request may meet a connection that is closing.
        return httpx.AsyncHTTPTransport(
            limits=httpx.Limits(max_connections=limit, max_keepalive_connections=limit, keepalive_expiry=2.0),
            trust_env=False,
        )

    def _send(self) -> None:
        """Send what has gathered, in requests of one top_k each. Runs in the client's loop."""
        with self._lock:
            keys, self._is_scheduled = list(self._queue), False
            self._queue.clear()
        by_top_k: dict[int, list[Key]] = {}
        for key in keys:
            by_top_k.setdefault(key[1], []).append(key)
        size = self.options.max_batch
        for group in by_top_k.values():
            for start in range(0, len(group), size):
                self._start(self._answer(group[start : start + size]))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, keys: list[Key]) -> None:
        """Ask for one batch and tell everyone who waits."""
        with self._lock:
            started = min(self._flights[key].started for key in keys)
        outcome: Sequence[Hits | NoHits] | Exception
        try:
            async with asyncio.timeout(started + self.options.deadline_s - time.monotonic()), self._slots:
                outcome = await self._ask(keys)
        except TimeoutError:
            why = "; too many requests failed, and nothing is asked for a while" * self._breaker.is_open
            outcome = SearchUnavailable(f"{self.url}: no answer within {self.options.deadline_s:g} s{why}")
        except (SearchFailed, SearchUnavailable) as error:
            outcome = error
        except Exception as error:  # noqa: BLE001  an encoder may fail in any way, and who waits must be told
            outcome = SearchUnavailable(f"{self.url}: asking failed: {type(error).__name__}: {error}")
        self._settle(keys, outcome)

    async def _ask(self, keys: list[Key]) -> Sequence[Hits | NoHits]:
        """The answer to a batch. One that is refused is asked query by query: no query is refused for another."""
        try:
            return await self._post(keys)
        except _Refused as error:
            if len(keys) == 1:
                raise SearchFailed(str(error)) from error
        for key in keys:
            try:
                self._settle([key], await self._post([key]))
            except _Refused as error:
                self._settle([key], SearchFailed(str(error)))
        return []

    async def _post(self, keys: list[Key]) -> Sequence[Hits | NoHits]:
        body = await self._write([query for query, _ in keys], keys[0][1])
        options = self.options
        tries = Tries(
            Retries(
                max_retries=options.max_retries,
                first_wait_s=options.first_wait_s,
                deadline_s=options.deadline_s,
                jitter=self._rng,
            )
        )
        while True:
            while not self._breaker.admit():
                await asyncio.sleep(BREAKER_POLL_S)
            self.counts.num_requests += 1
            asked_s = None
            try:
                response = await self._http.post(
                    self._address, content=body, headers=dict(self._wire.headers)
                )
            except asyncio.CancelledError:  # its deadline has passed
                self._breaker.fail()
                raise
            except UnreadableAnswer as error:
                self._breaker.fail()
                raise SearchUnavailable(f"{self.url}: {error}") from error
            except httpx.HTTPError as error:
                # A search changes nothing, so that it may be asked again even where half an answer came.
                self._breaker.fail()
                failure = SearchUnavailable(f"{self.url}: {transport_problem(error)}")
                failure.__cause__ = error
            else:
                if not may_pass(response.status_code):
                    return self._read(response, len(keys))
                if response.status_code < 500:
                    self._breaker.succeed()  # it works, and has enough to do
                else:
                    self._breaker.fail()
                asked_s = asked_wait_s(response.headers)
                failure = SearchUnavailable(f"{self.url} answered HTTP {response.status_code}")
            wait_s = tries.next_wait_s(asked_s)
            if wait_s is None:
                raise failure
            self.counts.num_retries += 1
            await asyncio.sleep(wait_s)

    async def _write(self, queries: list[str], top_k: int) -> bytes:
        if not self._wire.is_slow:
            return self._wire.write(queries, top_k)
        return await asyncio.get_running_loop().run_in_executor(None, self._wire.write, queries, top_k)

    def _read(self, response: httpx.Response, num_queries: int) -> Sequence[Hits | NoHits]:
        if response.status_code >= 400:
            # The server works: it is the request that it does not like.
            self._breaker.succeed()
            raise _Refused(f"HTTP {response.status_code}: {blank_credentials(response.text[:_SHOWN])}")
        try:
            answers = self._wire.read(response.content, num_queries=num_queries)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._breaker.fail()
            raise SearchUnavailable(f"{self.url} does not answer as a search server: {error}") from error
        self._breaker.succeed()
        return answers

    def _settle(self, keys: Sequence[Key], outcome: Sequence[Hits | NoHits] | Exception) -> None:
        """Tell all who wait for these queries, each event loop with one wake-up."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Any, Any]]] = {}
        with self._lock:
            results: Sequence[Hits | Exception]
            results = [outcome] * len(keys) if isinstance(outcome, Exception) else outcome
            ended: list[tuple[_Flight, Any]] = []
            for key, result in zip(keys, results, strict=False):
                flight = self._flights.pop(key, None)
                if flight is None:
                    continue
                ended.append((flight, result))
                if isinstance(result, Exception):
                    self.counts.num_failed += 1
                elif self.options.cache_size:
                    self._cache[key] = result
                    while len(self._cache) > self.options.cache_size:
                        self._cache.popitem(last=False)
                if self._recorder is not None and not isinstance(result, Exception):
                    self._recorder.add(key[0], key[1], result)
        for flight, result in ended:
            for loop, waiter in flight.waiters:
                if loop is None:
                    _tell([(waiter, result)])
                else:
                    by_loop.setdefault(loop, []).append((waiter, result))
        for loop, waiters in by_loop.items():
            # A loop that was closed has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_tell, waiters)


class _Refused(Exception):
    """The server refused a request (4xx)."""


def _tell(waiters: Sequence[tuple[Any, Any]]) -> None:
    for waiter, result in waiters:
        if waiter.done():
            continue
        if isinstance(result, Exception):
            # One instance each: an exception gathers a traceback wherever it is raised.
            waiter.set_exception(type(result)(*result.args))
        else:
            waiter.set_result(result)
