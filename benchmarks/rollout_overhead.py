"""Rollout tokens per second through Polyturn, divided by those of bare clients with the same prompts.

Polyturn plays episodes of the two-hop environment: chat template, token ledger, real searches, requests to the engine.
Every turn has a forced length, so each episode has a known number of tokens. Bare clients then send the prompts of the
same turns to the same server, so many episodes at once, one turn of an episode after the other:

    plain        httpx as it comes
    connections  Polyturn's own client
    serving      the request function of SGLang's own benchmark (`sglang.benchmark.serving`), in a process of its own

All alternate; the prefix cache is emptied before each. `ratio_N` is Polyturn's tokens per second over those of the
faster of `plain` and `serving`, with N episodes at once.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from polyturn.agents.chat import ChatRenderer, load_tokenizer
from polyturn.agents.connections import EngineClient
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import Episode, derive_seed
from polyturn.agents.policy import SamplingParams
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.engines import EnginesConfig
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.registry import make
from polyturn.rollout.collection import play_groups
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.fleet import EngineFleet
from polyturn.rollout.engines.launch import Engines, LocalLauncher
from polyturn.rollout.engines.server import EngineSpec
from polyturn.rollout.factory import open_client, token_play
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer
from polyturn.tools.types import ToolCall

ENVIRONMENT = "polyturn/TwoHopSearch-v0"
SAMPLES_PER_PROMPT = 8
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """How much is played in one measurement."""

    num_episodes: int
    concurrency: int
    num_turns: int
    tokens_per_turn: int

    @property
    def num_tokens(self) -> int:
        return self.num_episodes * self.num_turns * self.tokens_per_turn


class AlwaysSearches:
    """A dialect that takes every answer for a search, so that no episode ends before its last turn."""

    def parse(self, text: str, *, in_thought: bool = False, tools: object = ()) -> AssistantMessage:  # noqa: ARG002
        call = ToolCall(id="call", name="search", arguments={"query": text[:40] or "town"})
        return AssistantMessage(content="", tool_calls=(call,), raw_text=text)


class Polyturn:
    """Episodes through groups, player and fleet."""

    def __init__(self, model: Path, url: str, shape: Shape) -> None:
        renderer = ChatRenderer(load_tokenizer(model))
        limits = EpisodeLimits(
            max_turns=shape.num_turns,
            max_tokens_per_turn=shape.tokens_per_turn,
            max_tokens_per_episode=1000,
        )
        self._client = open_client(timeout_s=600)
        self._policy = EngineFleet([SGLangPolicy(client=self._client, url=url, stop_token_ids=())])
        self._shape = shape
        self._player = EpisodePlayer(
            make_env=lambda: make(ENVIRONMENT, max_turns=None),
            tasks=make(ENVIRONMENT).tasks("train"),
            play=token_play(
                renderer=renderer, dialect=AlwaysSearches(), limits=limits, sampling=SamplingParams()
            ),
            limits=RolloutLimits(
                max_concurrent_requests=shape.concurrency, max_concurrent_episodes=shape.concurrency
            ),
            seed=0,
        )

    async def run(self, round_number: int) -> list[Episode]:
        """Play one round; every round has prompts of its own."""
        num_prompts = self._shape.num_episodes // SAMPLES_PER_PROMPT
        cursor = PromptCursor(len(self._player.tasks), seed=1, position=round_number * num_prompts)
        groups = await play_groups(
            self._player, cursor.take(num_prompts), samples_per_prompt=SAMPLES_PER_PROMPT, policy=self._policy
        )
        return [episode for group in groups for episode in group.episodes]

    async def close(self) -> None:
        self._player.close()
        await self._client.aclose()


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One request of an episode."""

    prompt_ids: list[int]
    num_tokens: int
    seed: int


def turns_of(episode: Episode) -> list[Turn]:
    """The requests that made an episode."""
    [segment] = episode.segments
    turns: list[Turn] = []
    start = 0
    for sampled, run in itertools.groupby(segment.sampled):
        length = len(list(run))
        if sampled:
            turns.append(
                Turn(
                    prompt_ids=segment.token_ids[:start].tolist(),
                    num_tokens=length,
                    seed=derive_seed(episode.seed, len(turns), 0),
                )
            )
        start += length
    return turns


async def send_straight(
    client: httpx.AsyncClient | EngineClient, url: str, work: Sequence[Sequence[Turn]], workers: int
) -> int:
    """A bare client: so many workers over the episodes; the number of tokens that came back."""
    waiting = iter(work)
    headers = {"Content-Type": "application/json"}

    async def worker() -> int:
        received = 0
        for turns in waiting:
            for turn in turns:
                answer = await client.post(
                    f"{url}/generate", content=json.dumps(request_body(turn)).encode(), headers=headers
                )
                received += len(answer.json()["output_ids"])
        return received

    async with client:
        return sum(await asyncio.gather(*(worker() for _ in range(workers))))


def plain_client(num_connections: int) -> httpx.AsyncClient:
    """httpx as it comes."""
    limits = httpx.Limits(max_connections=num_connections, max_keepalive_connections=num_connections)
    return httpx.AsyncClient(timeout=600, limits=limits, trust_env=False)


def request_body(turn: Turn) -> dict[str, Any]:
    """What Polyturn asks for the same turn."""
    params = {
        "temperature": 1.0,
        "max_new_tokens": turn.num_tokens,
        "stop_token_ids": [],
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "sampling_seed": turn.seed,
    }
    return {"input_ids": turn.prompt_ids, "sampling_params": params, "return_logprob": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """One measurement."""

    tokens_per_second: float
    client_cpu_s: float
    """CPU seconds of the client: hardly changed by what else the machine does."""


Round = dict[str, Speed]
"""One measurement of each kind, by name."""


class ServingBench:
    """SGLang's own benchmark client in a process of its own: it needs the stand-ins of our servers on a CPU."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serving-client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def send(self, url: str, work: Sequence[Sequence[Turn]], workers: int) -> dict[str, float]:
        """Seconds, CPU seconds and tokens of all turns."""
        assert self._process.stdin is not None and self._process.stdout is not None
        turns = [[request_body(turn) for turn in turns] for turns in work]
        self._process.stdin.write(json.dumps({"url": url, "workers": workers, "work": turns}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve_serving_client() -> None:
    """Answer each line of work with what it took `async_request_sglang_generate`."""
    from polyturn.rollout.engines.sglang_main import install

    install(seeded=False)
    from sglang.benchmark import serving

    taken: list[argparse.Namespace] = []
    serving.run_benchmark = taken.append
    sys.argv = ["serving", "--backend", "sglang", "--disable-stream", "--return-logprob"]
    serving.cli_main()
    serving.set_global_args(taken[0])

    async def send(url: str, workers: int, work: list[list[dict[str, Any]]]) -> int:
        waiting = iter(work)

        async def worker() -> int:
            received = 0
            for turns in waiting:
                for body in turns:
                    request = serving.RequestFuncInput(
                        prompt=body["input_ids"],
                        api_url=f"{url}/generate",
                        prompt_len=len(body["input_ids"]),
                        output_len=body["sampling_params"]["max_new_tokens"],
                        model="",
                        lora_name="",
                        image_data=None,
                        extra_request_body={"sampling_params": body["sampling_params"]},
                    )
                    answer = await serving.async_request_sglang_generate(request)
                    assert answer.success, answer.error
                    received += answer.output_len
            return received

        return sum(await asyncio.gather(*(worker() for _ in range(workers))))

    for line in sys.stdin:
        started, cpu_started = time.perf_counter(), time.process_time()
        received = asyncio.run(send(**json.loads(line)))
        figures = {
            "seconds": time.perf_counter() - started,
            "cpu_s": time.process_time() - cpu_started,
            "tokens": received,
        }
        print(json.dumps(figures), flush=True)


async def measure(url: str, model: Path, shape: Shape, rounds: int, serving: ServingBench) -> list[Round]:
    """Rounds of measurements; a first one warms up."""
    engine = EngineControl(url)
    polyturn = Polyturn(model, url, shape)
    measured: list[Round] = []

    async def timed(play: Awaitable[Value]) -> tuple[Speed, Value]:
        engine.flush_cache()
        gc.collect()
        started, cpu_started = time.perf_counter(), time.process_time()
        value = await play
        speed = Speed(
            tokens_per_second=shape.num_tokens / (time.perf_counter() - started),
            client_cpu_s=time.process_time() - cpu_started,
        )
        return speed, value

    for number in range(rounds + 1):
        ours, episodes = await timed(polyturn.run(number))
        work = [turns_of(episode) for episode in episodes]
        clients: dict[str, Callable[[], httpx.AsyncClient | EngineClient]] = {
            "plain": lambda: plain_client(shape.concurrency),
            "connections": lambda: open_client(timeout_s=600),
        }
        found: Round = {"polyturn": ours}
        # In turns, so that none is always the last.
        for name in sorted([*clients, "serving"], reverse=bool(number % 2)):
            if name in clients:
                found[name], received = await timed(
                    send_straight(clients[name](), url, work, shape.concurrency)
                )
            else:
                engine.flush_cache()
                told = serving.send(url, work, shape.concurrency)
                received = int(told["tokens"])
                found[name] = Speed(
                    tokens_per_second=shape.num_tokens / told["seconds"], client_cpu_s=told["cpu_s"]
                )
            assert received == shape.num_tokens, f"{name}: {received} tokens, not {shape.num_tokens}"
        num_sampled = sum(episode.num_sampled_tokens for episode in episodes)
        assert num_sampled == shape.num_tokens, f"{num_sampled} tokens were sampled, not {shape.num_tokens}"
        if number == 0:
            continue  # warms up
        measured.append(found)
        print_round(shape.concurrency, found)
    await polyturn.close()
    engine.close()
    return measured


KINDS = ("polyturn", "plain", "connections", "serving")


def print_round(concurrency: int, found: Round) -> None:
    """One row of the table."""
    speeds = " ".join(f"{found[kind].tokens_per_second:>12.0f}" for kind in KINDS)
    seconds = " ".join(f"{found[kind].client_cpu_s:>12.2f}" for kind in KINDS)
    print(f"{concurrency:>7} {speeds} {ratio_of(found):>7.3f} {seconds}", flush=True)


def ratio_of(found: Round) -> float:
    """Polyturn's speed over that of the faster client of others."""
    best = max(found["plain"].tokens_per_second, found["serving"].tokens_per_second)
    return found["polyturn"].tokens_per_second / best


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: rollout_overhead.py --concurrency 1 64 --rounds 7",
    )
    parser.add_argument(
        "--model", help="Hugging Face directory or builtin:NAME; left out: the demo's model, untrained"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[1, 16, 64, 256],
        help="episodes, and so requests, at once",
    )
    parser.add_argument("--turns", type=int, default=3, help="turns per episode")
    parser.add_argument("--tokens", type=int, default=24, help="sampled tokens per turn")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind")
    parser.add_argument("--short", action="store_true", help="2 rounds of fewer episodes")
    parser.add_argument("--serving-client", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def num_episodes(concurrency: int, *, short: bool) -> int:
    """Of a measurement: enough to keep all busy for a while, a multiple of the group."""
    wanted = concurrency if short and concurrency >= 64 else 2 * concurrency
    return max(SAMPLES_PER_PROMPT, wanted - wanted % SAMPLES_PER_PROMPT)


def untrained_model(directory: Path) -> Path:
    """The demo's model and tokenizer before any training: tokens cost the same."""
    from polyturn.trainer.base_model.initial import train_tokenizer, training_texts, write_initial_model
    from polyturn.trainer.base_model.recipe import load_recipe, recipe_path

    recipe = load_recipe(recipe_path())
    write_initial_model(train_tokenizer(training_texts(), vocab_size=recipe.vocab_size), directory)
    return directory


def main() -> None:
    arguments = parse_arguments()
    if arguments.serving_client:
        serve_serving_client()
        return
    rounds = 2 if arguments.short else arguments.rounds
    measured: dict[int, list[Round]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = (
            resolve_model_path(arguments.model) if arguments.model else untrained_model(Path(scratch) / "m")
        )
        spec = EngineSpec(
            config=EnginesConfig(device="cpu"),
            model_path=without_end(model, Path(scratch) / "served"),
            dtype="float32",
            seeded=True,
            log_directory=Path(scratch),
        )
        with Engines(spec, LocalLauncher(spec)) as engines, closing(ServingBench()) as serving:
            [url] = engines.engine_urls
            print("tokens per second, the ratio to the faster client of others, CPU seconds of the client")
            names = " ".join(f"{kind:>12}" for kind in KINDS)
            print(f"{'at once':>7} {names} {'ratio':>7} {names}")
            for concurrency in arguments.concurrency:
                shape = Shape(
                    num_episodes=num_episodes(concurrency, short=arguments.short),
                    concurrency=concurrency,
                    num_turns=arguments.turns,
                    tokens_per_turn=arguments.tokens,
                )
                measured[concurrency] = asyncio.run(measure(url, model, shape, rounds, serving))
    print(json.dumps(figures_of(measured, rounds)))


def without_end(model: Path, copy: Path) -> Path:
    """A copy of a model that no token ends, so that every turn has its full length."""
    shutil.copytree(model, copy)
    for name, key in (
        ("config.json", "eos_token_id"),
        ("generation_config.json", "eos_token_id"),
        ("tokenizer_config.json", "eos_token"),
    ):
        path = copy / name
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | {key: None}))
    return copy


def figures_of(measured: dict[int, list[Round]], rounds: int) -> dict[str, Any]:
    """Medians over the rounds, by the number of episodes at once."""
    figures: dict[str, Any] = {"benchmark": "rollout_overhead", "rounds": rounds}
    for concurrency, found in measured.items():
        ratios = [ratio_of(one) for one in found]
        figures[f"ratio_{concurrency}"] = statistics.median(ratios)
        figures[f"ratio_low_{concurrency}"], figures[f"ratio_high_{concurrency}"] = min(ratios), max(ratios)
        for kind in KINDS:
            figures[f"{kind}_tokens_per_second_{concurrency}"] = statistics.median(
                one[kind].tokens_per_second for one in found
            )
            figures[f"{kind}_client_cpu_s_{concurrency}"] = statistics.median(
                one[kind].client_cpu_s for one in found
            )
    figures["ratio"] = min(figures[f"ratio_{concurrency}"] for concurrency in measured)
    return figures


if __name__ == "__main__":
    main()
