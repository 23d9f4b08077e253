"""Episodes that search through a server whose answers are late, broken off, refused or lost: how many are scored.

    python benchmarks/search_faults.py [--short] [--episodes 1000] [--faults 0.4] [--seed 0]

A real search server (`tools/search/server.py`) over the two-hop world's passages stands behind a small proxy, which
spoils that share of the requests, a quarter of it each: it holds them back for up to 2 s, answers 503 in the server's
place, resets the connection, or breaks off in the middle of the answer. All episodes are live at once, in SearchR1
environments of their own, and a script plays them that answers with what it has read: what it reads wrong costs reward.

Two ways to ask: `batched`, as the client is shipped (searches of all episodes meet in up to 8 requests at once), and
`one_by_one`, a request and a connection for each search, 1,000 at once.

`scored` are episodes that got a reward although a search of theirs had no true answer: its result is not what the index
gives, the model was told of a failure, or the reward is not that of the right answer. It has to be 0. `failed_attempts`
were played again, `dropped` are samples that failed too often. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.episode_loop import play_messages
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.envs.search.env import SearchEnv, next_oracle_message
from polyturn.envs.search.styles import style_named
from polyturn.envs.two_hop.env import build_index
from polyturn.envs.two_hop.world import WorldSize
from polyturn.rollout.collection import play_groups
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer
from polyturn.tools.search.client import ClientOptions, SearchClient
from polyturn.tools.search.retrieval import Retriever
from polyturn.tools.search.server import SearchApp, served
from polyturn.tools.types import ToolSpec

KINDS = ("delay", "status", "reset", "half")
LONGEST_DELAY_S = 2.0
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"


class FaultyProxy:
    """Stands before a server of HTTP/1.1 and spoils a share of the requests. Runs in a thread of its own."""

    def __init__(self, url: str, *, share: float, seed: int) -> None:
        target = urlsplit(url)
        self._target = (str(target.hostname), int(target.port or 80))
        self._share = share
        self._rng = random.Random(seed)
        self.num_requests = 0
        self.faults: Counter[str] = Counter()

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """The proxy's url, for as long as the block runs."""
        loop, started = asyncio.new_event_loop(), threading.Event()
        ports: list[int] = []

        async def serve() -> None:
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=4096)
            ports.append(server.sockets[0].getsockname()[1])
            started.set()

        def run() -> None:
            asyncio.set_event_loop(loop)
            loop.create_task(serve())
            loop.run_forever()
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.close()

        thread = threading.Thread(target=run, name="faulty proxy", daemon=True)
        thread.start()
        started.wait()
        try:
            yield f"http://127.0.0.1:{ports[0]}"
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection's requests, until either side or a fault ends it."""
        behind: asyncio.StreamWriter | None = None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            answers, behind = await asyncio.open_connection(*self._target)
            while await self._request(reader, writer, answers, behind):
                pass
        for end in (writer, behind):
            if end is not None:
                end.close()

    async def _request(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answers: asyncio.StreamReader,
        behind: asyncio.StreamWriter,
    ) -> bool:
        """Carry one request and its answer; whether the connection goes on."""
        request = await _message(reader)
        self.num_requests += 1
        kind = self._rng.choice(KINDS) if self._rng.random() < self._share else ""
        if kind:
            self.faults[kind] += 1
        if kind == "status":
            writer.write(UNAVAILABLE)
            await writer.drain()
            return False
        if kind == "reset":
            # Nothing lingers: the client is told by a reset and not by an end.
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            return False
        if kind == "delay":
            await asyncio.sleep(LONGEST_DELAY_S * self._rng.random())
        behind.write(request)
        answer = await _message(answers)
        writer.write(answer[: len(answer) // 2] if kind == "half" else answer)
        await writer.drain()
        return kind != "half"


async def _message(reader: asyncio.StreamReader) -> bytes:
    """A request or an answer, whole, by the length that its head tells."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.partition(b":")[2])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length:")
    )
    return head + await reader.readexactly(length)


class Reader:
    """A policy that searches twice and answers with what it has read; it knows nothing itself."""

    style = style_named("search_r1")

    async def reply(self, *, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        del tools
        question = next(message["content"] for message in messages if message["role"] == "user")
        return next_oracle_message(self.style, messages, question=question, gold=None)


def is_true(episode: Episode, index: Retriever) -> bool:
    """Whether every search of an episode was answered as the index answers it, and the right answer was found."""
    style = Reader.style
    queries = [
        call["function"]["arguments"]["query"]
        for message in episode.messages
        if message["role"] == "assistant"
        for call in message.get("tool_calls", ())
    ]
    results = [message["content"] for message in episode.messages if message["role"] == "tool"]
    told = [style.layout(index.search(query, style.top_k)) for query in queries]
    return results == told and episode.num_tool_errors == 0 and episode.reward == 1.0


async def play(url: str, index: Retriever, num_episodes: int, options: ClientOptions) -> dict[str, Any]:
    """Play so many episodes at once through a server."""
    questions = SearchEnv().tasks("train")
    with SearchClient(url, options=options) as client:
        player = EpisodePlayer(
            make_env=lambda: SearchEnv(retriever=client, tasks=questions),
            tasks=questions,
            play=partial(play_messages, limits=EpisodeLimits(max_turns=5)),
            limits=RolloutLimits(
                max_concurrent_requests=num_episodes,
                max_concurrent_episodes=num_episodes,
                max_concurrent_tools=num_episodes,
                max_failure_share=1.0,
                retry_delay_s=0.1,
            ),
            seed=0,
        )
        attempts: list[Episode] = []
        started = time.perf_counter()
        try:
            groups = await play_groups(
                player,
                PromptCursor(len(questions), seed=0).take(num_episodes),
                samples_per_prompt=1,
                policy=Reader(),
                on_episode=attempts.append,
            )
        finally:
            player.close()
        seconds = time.perf_counter() - started
        counts = client.counts
    survivors = [episode for group in groups for episode in group.episodes]
    failed = [episode for episode in attempts if episode.outcome is Outcome.FAILED]
    return {
        "episodes": num_episodes,
        "searches": counts.num_searches,
        "requests": counts.num_requests,
        "retries": counts.num_retries,
        "failed_searches": counts.num_failed,
        "failed_attempts": len(failed),
        "survived": len(survivors),
        "dropped": num_episodes - len(survivors),
        "scored": sum(not is_true(episode, index) for episode in survivors)
        + sum(episode.reward is not None for episode in failed),
        "seconds": round(seconds, 1),
        "reasons": dict(Counter(episode.stop_reason for episode in failed)),
    }


def measure(num_episodes: int, share: float, seed: int) -> dict[str, Any]:
    """Both ways to ask, each through a server and a proxy of its own."""
    index = build_index(1, WorldSize())
    figures: dict[str, Any] = {}
    ways = {
        "batched": ClientOptions(cache_size=0),
        "one_by_one": ClientOptions(cache_size=0, max_batch=1, max_wait_s=0.0, max_requests=num_episodes),
    }
    for name, options in ways.items():
        with served(SearchApp(index)) as server:
            proxy = FaultyProxy(server, share=share, seed=seed)
            with proxy.serving() as url:
                found = asyncio.run(play(url, index, num_episodes, options))
        found["faults"] = dict(proxy.faults)
        figures[name] = found
        print(f"{name:>10}: " + "  ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    figures["scored"] = sum(figures[name]["scored"] for name in ways)
    return figures


def main() -> None:
    """Measure as asked, and print the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=1000, help="live at once; default: 1000")
    parser.add_argument("--faults", type=float, default=0.4, help="share of the requests; default: 0.4")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--short", action="store_true", help="100 episodes; a few seconds")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    figures = measure(100 if options.short else options.episodes, options.faults, options.seed)
    print(json.dumps({"benchmark": "search_faults", "load": os.getloadavg()[0], **figures}))


if __name__ == "__main__":
    main()
