"""A mock engine: continuous batching over a KV pool, with a prefix cache, preemption, pauses and new weights.

All requests that run decode at one speed, which depends on how many they are and on how much KV is read, so that one
number, the tokens that a request which ran from the beginning would have, says how far each of them is: only the
beginning and the end of a request are events.

    submitted -> waiting -> prefill -> running -> answered
                    ^                    |
                    |   KV is full, or   |
                    +--- new weights ----+
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from polyturn.agents.policy import Generation, SamplingParams

PREFILL_CHUNK = 8192
"""Tokens that are computed before the next prompts are looked at."""
LOOK_AGAIN_TOKENS = 256
"""After so many tokens of each request the speed is computed anew: the KV that is read has grown."""
RESERVED_SHARE = 0.1
"""Of what a request may still sample, kept free when another one is admitted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRates:
    """How quick an engine is, and how much it holds.

    A decoding step of b requests that read k tokens of KV takes

        overhead_s + max(weights_s, request_s * b) + kv_token_s * k

    and a prompt of n tokens that are not cached prefill_s + prefill_token_s * n, in which nothing decodes.
    """

    overhead_s: float
    """Of a step, whatever is in it: launches, scheduling, sampling."""
    weights_s: float
    """To read the weights once."""
    request_s: float
    """To compute one token."""
    kv_token_s: float
    prefill_s: float
    prefill_token_s: float
    kv_tokens: int
    """That fit into the pool."""
    max_running: int
    """Requests that decode at once."""
    has_prefix_cache: bool = True

    def step_s(self, num_requests: int, num_kv_tokens: float) -> float:
        """Seconds of a decoding step."""
        compute_s = max(self.weights_s, self.request_s * num_requests)
        return self.overhead_s + compute_s + self.kv_token_s * num_kv_tokens


@dataclass(kw_only=True, slots=True)
class EngineCounts:
    """What an engine did."""

    busy_s: float = 0.0
    decode_s: float = 0.0
    request_seconds: float = 0.0
    """The integral of how many were decoding."""
    num_sampled: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    kv_peak: float = 0.0
    """Of the pool."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Request:
    identity: int
    num_context: int
    """Tokens whose KV it needs before it can go on."""
    num_left: int
    answer: asyncio.Future[None]
    begun_at: float = 0.0
    """What the engine's count of tokens was ..."""
    end: float = 0.0
    """... and what it is when the request ends."""
    num_cached: int = 0
    """Of its prompt."""
    num_retractions: int = 0
    versions: list[tuple[int, int]] = field(default_factory=list)
    """Versions with how many tokens were sampled by each."""
    is_running: bool = False

    def took(self, num_tokens: int, version: int) -> None:
        """So many tokens more."""
        if self.versions and self.versions[-1][0] == version:
            num_tokens += self.versions.pop()[1]
        self.versions.append((version, num_tokens))


class SimulatedEngine:
    """A `TokenPolicy`. What a prompt says is its identity, in each of its places; it ends after `max_tokens`."""

    def __init__(self, rates: EngineRates, *, prompts: Mapping[int, int], samples_per_prompt: int) -> None:
        """`prompts` has the tokens of the prompts by their positions; an identity is position x samples + sample."""
        self.rates = rates
        self.counts = EngineCounts()
        self._loop = asyncio.get_running_loop()
        self._prompts = prompts
        self._samples_per_prompt = samples_per_prompt
        self._version = 0
        self._waiting: deque[_Request] = deque()
        self._ends: list[tuple[float, int, _Request]] = []
        """Those that run, by the count of tokens at which they end; a heap."""
        self._num_running = 0
        self._running_kv = self._sum_of_ends = 0.0
        self._cache: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._cached_tokens = 0
        self._count = 0.0
        """Tokens of a request that ran from the beginning."""
        self._since = self._loop.time()
        self._step_s = 0.0
        self._timer: asyncio.Handle | None = None
        self._prefilling: list[_Request] = []
        self._is_paused = False
        self._serial = 0

    async def generate(self, *, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams) -> Generation:
        """`sampling.max_tokens` tokens."""
        request = _Request(
            identity=int(prompt_ids[0]),
            num_context=len(prompt_ids),
            num_left=sampling.max_tokens,
            answer=self._loop.create_future(),
        )
        self.counts.num_prompt_tokens += len(prompt_ids)
        self._waiting.append(request)
        self._plan_soon()
        try:
            await request.answer
        except asyncio.CancelledError:
            self._drop(request)
            raise
        self.counts.num_cached_tokens += request.num_cached
        self.counts.num_sampled += sampling.max_tokens
        return _generation(request, sampling.max_tokens)

    def pause(self) -> None:
        """Nothing goes on until `go_on`."""
        self._advance()
        self._is_paused = True
        self._plan()

    def renew(self, *, version: int, keeps_kv: bool) -> None:
        """Take new weights, with the KV that there is, or with none; a paused engine alone does."""
        assert self._is_paused
        running = [entry for entry in sorted(self._ends, key=lambda entry: entry[1]) if entry[2].is_running]
        for _, _, request in running:
            self._settle(request)
        self._version = version
        if keeps_kv:
            return
        self._cache.clear()
        self._cached_tokens = 0
        for _, _, request in reversed(running):
            self._retract(request)
        self._ends.clear()

    def go_on(self) -> None:
        """End a pause."""
        self._advance()
        self._is_paused = False
        self._set_timer(self._loop.call_soon(self._plan))

    def _plan_soon(self) -> None:
        """What comes at one moment is looked at together."""
        if not self._prefilling and not self._is_paused:
            self._advance()
            self._set_timer(self._loop.call_soon(self._plan))

    def _set_timer(self, timer: asyncio.Handle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer

    def _advance(self) -> None:
        """Take what was decoded since the last look into account."""
        now = self._loop.time()
        seconds, self._since = now - self._since, now
        if not seconds or self._is_paused or not (self._num_running or self._prefilling):
            return
        self.counts.busy_s += seconds
        if self._num_running and not self._prefilling:
            num_tokens = seconds / self._step_s
            self._count += num_tokens
            self._running_kv += num_tokens * self._num_running
            self.counts.decode_s += seconds
            self.counts.request_seconds += seconds * self._num_running

    def _plan(self) -> None:
        """End what has ended, admit what fits, and set the time of the next event."""
        self._advance()
        self._set_timer(None)
        while self._ends and (self._ends[0][0] <= self._count + 1e-6 or not self._ends[0][2].is_running):
            request = heapq.heappop(self._ends)[2]
            if request.is_running:
                self._end(request)
        self._make_room()
        if self._is_paused:
            return
        seconds = self._admit()
        if seconds:
            self._set_timer(self._loop.call_later(seconds, self._end_prefill))
        elif self._num_running:
            self._step_s = self.rates.step_s(self._num_running, self._running_kv)
            num_tokens = min(
                self._ends[0][0] - self._count,
                LOOK_AGAIN_TOKENS,
                max(1.0, (self.rates.kv_tokens - self._running_kv) / self._num_running),
            )
            self._set_timer(self._loop.call_later(num_tokens * self._step_s, self._plan))

    def _admit(self) -> float:
        """Take waiting requests as long as there is room; the seconds of their prompts."""
        num_new = 0
        reserved = RESERVED_SHARE * (self._sum_of_ends - self._num_running * self._count)
        free = self.rates.kv_tokens - self._running_kv - reserved
        while self._waiting and num_new < PREFILL_CHUNK:
            if self._num_running + len(self._prefilling) >= self.rates.max_running:
                break
            request = self._waiting[0]
            need = request.num_context + RESERVED_SHARE * request.num_left
            if need > free and (self._num_running or self._prefilling):
                break
            self._waiting.popleft()
            free -= need
            num_cached = self._take_cached(request)
            if not request.versions:
                request.num_cached = num_cached
            num_new += max(1, request.num_context - num_cached)
            self._running_kv += request.num_context
            self._prefilling.append(request)
        self._evict()
        return self.rates.prefill_s + num_new * self.rates.prefill_token_s if self._prefilling else 0.0

    def _end_prefill(self) -> None:
        self._advance()
        begun, self._prefilling = self._prefilling, []
        for request in begun:
            if request.answer.done():
                self._running_kv -= request.num_context
                continue
            request.begun_at, request.is_running = self._count, True
            self._serial += 1
            request.end = self._count + request.num_left
            heapq.heappush(self._ends, (request.end, self._serial, request))
            self._num_running += 1
            self._sum_of_ends += request.end
            self._keep("prompt", request.identity // self._samples_per_prompt, self._shared(request))
        self._plan()

    def _end(self, request: _Request) -> None:
        """A request has all its tokens; its KV stays as long as there is room."""
        self._stop(request)
        self._keep("sample", request.identity, request.num_context)
        if not request.answer.done():
            request.answer.set_result(None)

    def _stop(self, request: _Request) -> None:
        """Take a request out of the batch, with what it has got."""
        self._settle(request)
        self._running_kv -= request.num_context
        request.is_running = False
        self._num_running -= 1
        self._sum_of_ends -= request.end
        if not self._num_running and not self._prefilling:
            self._running_kv = self._sum_of_ends = 0.0  # no drift of rounding

    def _settle(self, request: _Request) -> None:
        """Note the tokens that a request got since the last time, by the version that there was."""
        num_tokens = min(request.num_left, round(self._count - request.begun_at))
        if num_tokens:
            request.took(num_tokens, self._version)
        self._running_kv += num_tokens - (self._count - request.begun_at)
        request.begun_at = self._count
        request.num_context += num_tokens
        request.num_left -= num_tokens

    def _retract(self, request: _Request) -> None:
        """Back to the queue's front: its KV is computed again."""
        self._stop(request)
        request.num_retractions += 1
        self._waiting.appendleft(request)

    def _make_room(self) -> None:
        """While the pool is overfull, the newest requests give way; one is always left."""
        while self._running_kv > self.rates.kv_tokens and self._num_running > 1:
            running = [entry for entry in self._ends if entry[2].is_running]
            self._retract(max(running, key=lambda entry: entry[1])[2])
            self.counts.num_preemptions += 1
        self.counts.kv_peak = max(self.counts.kv_peak, self._running_kv / self.rates.kv_tokens)
        self._evict()

    def _drop(self, request: _Request) -> None:
        """Nobody waits for it any more."""
        self._advance()
        if request.is_running:
            self._stop(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        self._plan_soon()

    def _shared(self, request: _Request) -> int:
        """The tokens of its prompt, which the others of its group have, too."""
        return self._prompts.get(request.identity // self._samples_per_prompt, 0)

    def _take_cached(self, request: _Request) -> int:
        """Tokens of its context that need not be computed; what was kept of it alone is in use again."""
        own = self._cache.pop(("sample", request.identity), 0)
        self._cached_tokens -= own
        prompt = ("prompt", request.identity // self._samples_per_prompt)
        shared = self._cache.get(prompt, 0)
        if shared:
            self._cache.move_to_end(prompt)
        return min(max(own, shared), request.num_context)

    def _keep(self, kind: str, number: int, num_tokens: int) -> None:
        if self.rates.has_prefix_cache:
            self._cached_tokens += num_tokens - self._cache.pop((kind, number), 0)
            self._cache[kind, number] = num_tokens
            self._evict()

    def _evict(self) -> None:
        """What was used longest ago goes first."""
        while self._cache and self._cached_tokens + self._running_kv > self.rates.kv_tokens:
            self._cached_tokens -= self._cache.popitem(last=False)[1]


def _generation(request: _Request, num_tokens: int) -> Generation:
    """Arrays of the right lengths in no memory."""
    versions = [version for version, _ in request.versions]
    counts = [count for _, count in request.versions]
    counts[-1] += num_tokens - sum(counts)
    policy_versions = (
        np.broadcast_to(np.int32(versions[0]), num_tokens)
        if len(versions) == 1
        else np.repeat(np.array(versions, dtype=np.int32), counts)
    )
    return Generation(
        token_ids=np.broadcast_to(np.int32(request.identity), num_tokens),
        logprobs=np.broadcast_to(np.float32(-1.0), num_tokens),
        policy_versions=policy_versions,
        finish_reason="stop",
        num_cached_tokens=request.num_cached,
        num_retractions=request.num_retractions,
    )
