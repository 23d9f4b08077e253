"""What the session endpoint costs a program's calls, beside the same calls sent straight to the engine.

    python benchmarks/session_endpoint.py [--short] [--sessions N ...] [--engines served timed] [--turns T] [--tokens K]

A client in a process of its own (aiohttp; an agent program that does nothing else) plays conversations of several turns
over OpenAI chat completions, one conversation a session: a call with a tool, the tool's result, the next call. Behind
the endpoint are the parts of a run: sessions, chat template, dialect, ledger, the fleet, and an engine. The same client
then sends the same prompts, as token ids, straight to that engine. Every answer has a forced length of K tokens. Both
alternate; the prefix cache is emptied before each.

    served   a real SGLang server with the demo's model, which shares the machine's cores with endpoint and client
    timed    stands in for one that does not: a process that answers after so long as a GPU takes for K tokens, and for
             half as many to half as many again, so that calls do not come all at once

`overhead` is, by the number of sessions that call at once, the mean time of a call through the endpoint over that of a
bare one, minus 1: the median over the rounds, with the served engine; `overhead_timed` with the other. `endpoint_ms` is
the endpoint's CPU time of a call, all that is in front of the engine included; it depends little on what else the
machine does. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from aiohttp import web
from rollout_overhead import AlwaysSearches, Turn, request_body, untrained_model, without_end

from polyturn.agents.chat import ChatRenderer, load_tokenizer
from polyturn.agents.deadlines import EpisodeLimits, EpisodeTime
from polyturn.agents.episode import derive_seed
from polyturn.agents.policy import SamplingParams, policy_of_episode
from polyturn.agents.sessions.matching import loose
from polyturn.agents.sessions.requests import SessionAddress
from polyturn.agents.sessions.server import SessionServer
from polyturn.agents.sessions.session import Session
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.configs.schema.run import EnginesConfig
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.fleet import EngineFleet
from polyturn.rollout.engines.launch import Engines, LocalLauncher
from polyturn.rollout.engines.server import EngineSpec
from polyturn.rollout.factory import open_client

RESULT = "Mara Lindqvist works for Holloway Mills. Holloway Mills is based in Ashford. " * 2
TOKEN_S = 0.02
"""What a token takes the timed engine: 50 a second."""
GOLDEN = (5**0.5 - 1) / 2
"""Its multiples fill an interval evenly."""
FIRST_TEXT_ID, LAST_TEXT_ID = 300, 900
"""Of the demo's vocabulary: plain text."""
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the knowledge base.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "What to look for."}},
            "required": ["query"],
        },
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """How much is asked in one measurement."""

    num_sessions: int
    num_turns: int
    tokens_per_turn: int

    @property
    def num_calls(self) -> int:
        return self.num_sessions * self.num_turns


class Program:
    """The client, in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--client"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    async def run(self, work: dict[str, Any]) -> float:
        """Do all of it at once; the mean seconds of a call."""
        return await asyncio.to_thread(self._run, work)

    def _run(self, work: dict[str, Any]) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve_client() -> None:
    """Do what each line says, and print what a call took."""
    for line in sys.stdin:
        print(asyncio.run(client_seconds(json.loads(line))), flush=True)


async def client_seconds(work: dict[str, Any]) -> float:
    """The mean seconds of the calls of conversations that run at once."""
    seconds: list[float] = []

    async def post(url: str, body: dict[str, Any], key: str) -> Any:
        started = time.perf_counter()
        async with http.post(url, data=json.dumps(body), headers={"x-api-key": key, **kind}) as response:
            assert response.status == 200, await response.text()
            answer = await response.json()
        seconds.append(time.perf_counter() - started)
        return answer

    async def converse(session: dict[str, Any]) -> None:
        messages = [{"role": "user", "content": session["question"]}]
        for _ in range(work["num_turns"]):
            body = {"model": "policy", "messages": messages, "tools": [TOOL]}
            answer = await post(f"{session['base_url']}/chat/completions", body, session["api_key"])
            message = answer["choices"][0]["message"]
            [call] = message["tool_calls"]
            messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": RESULT}]

    async def ask(bodies: list[dict[str, Any]]) -> None:
        for body in bodies:
            await post(f"{work['url']}/generate", body, "")

    kind = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as http:
        await asyncio.gather(*map(converse, work.get("sessions", [])), *map(ask, work.get("bare", [])))
    return statistics.fmean(seconds)


class TimedEngine:
    """Answers `/generate` after a fixed time for each token, in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--timed-engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


async def serve_timed_engine() -> None:
    """Listen on a free port, which is printed, until the process is ended."""
    numbers = itertools.count()

    async def begin_anew(request: web.Request) -> web.Response:  # noqa: ARG001
        nonlocal numbers
        numbers = itertools.count()
        return web.Response()

    async def generate(request: web.Request) -> web.Response:
        num_tokens = (await request.json())["sampling_params"]["max_new_tokens"]
        await asyncio.sleep(num_tokens * TOKEN_S * (0.5 + next(numbers) * GOLDEN % 1.0))
        token_ids = [random.randrange(FIRST_TEXT_ID, LAST_TEXT_ID) for _ in range(num_tokens)]
        meta = {
            "output_token_logprobs": [[-0.5, token_id, None] for token_id in token_ids],
            "finish_reason": {"type": "length"},
            "weight_version": "0",
        }
        return web.json_response({"output_ids": token_ids, "meta_info": meta})

    application = web.Application()
    application.router.add_post("/generate", generate)
    application.router.add_post("/flush_cache", begin_anew)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One round."""

    call_ms: float
    """Through the endpoint."""
    bare_ms: float
    endpoint_ms: float
    """CPU time of this process for a call."""

    @property
    def overhead(self) -> float:
        return self.call_ms / self.bare_ms - 1


async def measure(
    renderer: ChatRenderer, url: str, empty_cache: Callable[[], object], shape: Shape, program: Program
) -> AsyncIterator[Measured]:
    """Measurements without end; a first one warms up."""
    client = open_client(timeout_s=600)
    fleet = EngineFleet([SGLangPolicy(client=client, url=url, stop_token_ids=())])
    async with client, SessionServer() as server:
        for number in itertools.count():
            with ExitStack() as policies:
                sessions = {
                    f"round {number}/{index}": a_session(
                        f"{number}/{index}", policies.enter_context(policy_of_episode(fleet)), renderer, shape
                    )
                    for index in range(shape.num_sessions)
                }
                addresses = [await server.open(name, session) for name, session in sessions.items()]
                empty_cache()
                gc.collect()
                cpu_started = time.process_time()
                call_s = await program.run(conversations(addresses, number, shape))
                cpu_s = time.process_time() - cpu_started
                for name, session in sessions.items():
                    await server.close(name)
                    await session.close()
            empty_cache()
            turns = [turns_of(session, index) for index, session in enumerate(sessions.values())]
            bare_s = await program.run(
                {"url": url, "bare": [[request_body(turn) for turn in several] for several in turns]}
            )
            if number:
                endpoint_ms = cpu_s * 1e3 / shape.num_calls
                yield Measured(call_ms=call_s * 1e3, bare_ms=bare_s * 1e3, endpoint_ms=endpoint_ms)


def nobody_hears(message: AssistantMessage, new: tuple[Message, ...]) -> None:
    """No episode is recorded here."""


def a_session(name: str, policy: Any, renderer: ChatRenderer, shape: Shape) -> Session:
    """A session as an episode has it."""
    limits = EpisodeLimits(
        max_turns=shape.num_turns, max_tokens_per_turn=shape.tokens_per_turn, max_tokens_per_episode=4000
    )
    return Session(
        session_id=name,
        policy=policy,
        renderer=renderer,
        dialect=AlwaysSearches(),
        limits=limits,
        sampling=SamplingParams(),
        clock=EpisodeTime.of(limits, None),
        seed=derive_seed(name),
        rule=loose,
        on_answer=nobody_hears,
    )


def conversations(addresses: Sequence[SessionAddress], number: int, shape: Shape) -> dict[str, Any]:
    """What the client is told: where each session is, and what to ask it first."""
    return {
        "num_turns": shape.num_turns,
        "sessions": [
            {
                "base_url": address.base_url,
                "api_key": address.api_key,
                "question": f"In which town is the employer of person {index} of round {number} based?",
            }
            for index, address in enumerate(addresses)
        ],
    }


def turns_of(session: Session, index: int) -> list[Turn]:
    """The calls of a session, as the engine got them."""
    [segment] = session.segments()
    turns = []
    for number in sorted(set(segment.turns[segment.sampled].tolist())):
        [at] = [(segment.turns == number) & segment.sampled]
        positions = at.nonzero()[0]
        seed = derive_seed(index, number)
        prompt_ids = segment.token_ids[: positions[0]].tolist()
        turns.append(Turn(prompt_ids=prompt_ids, num_tokens=len(positions), seed=seed))
    return turns


def figures_of(measured: dict[str, dict[int, list[Measured]]], shape: Shape) -> dict[str, Any]:
    """Medians over the rounds, by the number of sessions."""
    figures: dict[str, Any] = {
        "benchmark": "session_endpoint",
        "turns": shape.num_turns,
        "tokens": shape.tokens_per_turn,
    }
    for engine, found in measured.items():
        for name in ("overhead", "call_ms", "bare_ms", "endpoint_ms"):
            figures[name if engine == "served" else f"{name}_{engine}"] = {
                str(num_sessions): round(statistics.median(getattr(one, name) for one in rounds), 4)
                for num_sessions, rounds in found.items()
            }
    return figures


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 64, 256], help="that call at once")
    parser.add_argument("--turns", type=int, default=4, help="calls of a session")
    parser.add_argument("--tokens", type=int, default=64, help="sampled tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each number of sessions")
    parser.add_argument("--short", action="store_true", help="2 rounds of 2 calls a session")
    parser.add_argument(
        "--engines", nargs="+", choices=["served", "timed"], default=["served", "timed"], help="behind both"
    )
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--timed-engine", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


@contextmanager
def open_engine(kind: str, model: Path, scratch: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """The address of an engine, and what empties its prefix cache."""
    if kind == "timed":
        with closing(TimedEngine()) as engine:
            yield engine.url, lambda: httpx.post(f"{engine.url}/flush_cache").raise_for_status()
        return
    spec = EngineSpec(
        config=EnginesConfig(device="cpu"),
        model_path=model,
        dtype="float32",
        seeded=True,
        log_directory=scratch,
    )
    with Engines(spec, LocalLauncher(spec)) as engines:
        [url] = engines.engine_urls
        with closing(EngineControl(url)) as control:
            yield url, control.flush_cache


async def measure_all(
    renderer: ChatRenderer, url: str, empty_cache: Callable[[], object], shape: Shape, rounds: int
) -> list[Measured]:
    """So many rounds, each printed."""
    found: list[Measured] = []
    with closing(Program()) as program:
        async with aclosing(measure(renderer, url, empty_cache, shape, program)) as measurements:
            async for one in measurements:
                found.append(one)
                print(
                    f"{shape.num_sessions:>8} {one.overhead:>9.3f} {one.call_ms:>9.1f} {one.bare_ms:>9.1f} "
                    f"{one.endpoint_ms:>12.2f}",
                    flush=True,
                )
                if len(found) == rounds:
                    break
    return found


def main() -> None:
    arguments = parse_arguments()
    if arguments.client:
        serve_client()
        return
    if arguments.timed_engine:
        asyncio.run(serve_timed_engine())
        return
    rounds = 2 if arguments.short else arguments.rounds
    measured: dict[str, dict[int, list[Measured]]] = {}
    num_turns = 2 if arguments.short else arguments.turns
    shape = Shape(num_sessions=0, num_turns=num_turns, tokens_per_turn=arguments.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        model = without_end(untrained_model(Path(scratch) / "m"), Path(scratch) / "served")
        renderer = ChatRenderer(load_tokenizer(model))
        for kind in arguments.engines:
            measured[kind] = {}
            with open_engine(kind, model, Path(scratch)) as (url, empty_cache):
                print(f"{kind}\n{'sessions':>8} {'overhead':>9} {'call ms':>9} {'bare ms':>9} {'CPU ms':>12}")
                for num_sessions in arguments.sessions:
                    here = replace(shape, num_sessions=num_sessions)
                    found = asyncio.run(measure_all(renderer, url, empty_cache, here, rounds))
                    measured[kind][num_sessions] = found
    print(json.dumps(figures_of(measured, shape)))


if __name__ == "__main__":
    main()
