"""Rollout tokens per second through Polyturn, divided by those of a plain client with the same prompts.

Polyturn plays episodes of the two-hop environment: chat template, token ledger, real searches, router. Every turn has a
forced length, so each episode has a known number of tokens. A plain asyncio httpx client then sends the prompts of the
same turns straight to the same server, at the same concurrency, one turn of an episode after the other: once with httpx
as it comes, which is `ratio`, and once over Polyturn's own connections, which cost less, as `ratio_same_connections`.
All three alternate; the prefix cache is emptied before each.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from polyturn.agents.chat import ChatRenderer, load_tokenizer
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import Episode, derive_seed
from polyturn.agents.policy import SamplingParams
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import EnginesConfig
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.registry import make
from polyturn.rollout.collector import Collector
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.launch import Engines, LocalLauncher
from polyturn.rollout.engines.server import EngineSpec
from polyturn.rollout.factory import open_client, token_play
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.limits import RolloutLimits
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

    def parse(self, text: str, *, in_thought: bool = False) -> AssistantMessage:  # noqa: ARG002
        call = ToolCall(id="call", name="search", arguments={"query": text[:40] or "town"})
        return AssistantMessage(content="", tool_calls=(call,), raw_text=text)


class Polyturn:
    """Episodes through collector, player and router."""

    def __init__(self, model: Path, url: str, shape: Shape) -> None:
        renderer = ChatRenderer(load_tokenizer(model))
        limits = EpisodeLimits(
            max_turns=shape.num_turns,
            max_tokens_per_turn=shape.tokens_per_turn,
            max_tokens_per_episode=1000,
        )
        self._client = open_client(timeout_s=600)
        self._policy = SGLangPolicy(client=self._client, url=url, stop_token_ids=())
        self._shape = shape
        self._collector = Collector(
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
        cursor = PromptCursor(len(self._collector.tasks), seed=1, position=round_number * num_prompts)
        groups = await self._collector.collect(
            cursor.take(num_prompts), samples_per_prompt=SAMPLES_PER_PROMPT, policy=self._policy
        )
        return [episode for group in groups for episode in group.episodes]

    async def close(self) -> None:
        self._collector.close()
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
    turns, start = [], 0
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
    client: httpx.AsyncClient, url: str, work: Sequence[Sequence[Turn]], workers: int
) -> int:
    """The plain client: so many workers over the episodes; the number of tokens that came back."""
    waiting = iter(work)

    async def worker() -> int:
        received = 0
        for turns in waiting:
            for turn in turns:
                answer = await client.post(f"{url}/generate", json=request_body(turn))
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
    """CPU seconds of this process: hardly changed by what else the machine does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One measurement of each kind."""

    ours: Speed
    plain: Speed
    same_connections: Speed


async def measure(engines: Engines, model: Path, shape: Shape, rounds: int) -> list[Round]:
    """Rounds of measurements, each through Polyturn, plain, and plain over Polyturn's connections."""
    [engine_url] = engines.engine_urls
    engine = EngineControl(engine_url)
    polyturn = Polyturn(model, engines.url, shape)
    measured = []

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
        makers = {
            "plain": lambda: plain_client(shape.concurrency),
            "same": lambda: open_client(timeout_s=600),
        }
        straight: dict[str, Speed] = {}
        # In turns, so that neither is always the last.
        for name in sorted(makers, reverse=bool(number % 2)):
            play = send_straight(makers[name](), engine_url, work, shape.concurrency)
            straight[name], received = await timed(play)
            assert received == shape.num_tokens, f"{received} tokens came back, not {shape.num_tokens}"
        num_sampled = sum(episode.num_sampled_tokens for episode in episodes)
        assert num_sampled == shape.num_tokens, f"{num_sampled} tokens were sampled, not {shape.num_tokens}"
        if number == 0:
            continue  # warms up
        measured.append(Round(ours=ours, plain=straight["plain"], same_connections=straight["same"]))
        print_round(number, measured[-1])
    await polyturn.close()
    return measured


def print_round(number: int, measured: Round) -> None:
    """One row of the table."""
    ours, plain, same = (
        speed.tokens_per_second for speed in (measured.ours, measured.plain, measured.same_connections)
    )
    print(
        f"{number:>5} {ours:>14.0f} {plain:>14.0f} {same:>17.0f} {ours / plain:>7.3f} {ours / same:>10.3f}"
        f" {measured.ours.client_cpu_s:>10.2f} {measured.plain.client_cpu_s:>10.2f}",
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: rollout_overhead.py --concurrency 64 --rounds 7",
    )
    parser.add_argument(
        "--model", help="Hugging Face directory or builtin:NAME; left out: the demo's model, untrained"
    )
    parser.add_argument("--concurrency", type=int, default=64, help="episodes, and so requests, at once")
    parser.add_argument("--episodes", type=int, default=128, help="episodes per round, a multiple of 8")
    parser.add_argument("--turns", type=int, default=3, help="turns per episode")
    parser.add_argument("--tokens", type=int, default=24, help="sampled tokens per turn")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each kind")
    parser.add_argument("--short", action="store_true", help="3 rounds of 64 episodes")
    return parser.parse_args()


def untrained_model(directory: Path) -> Path:
    """The demo's model and tokenizer before any training: tokens cost the same."""
    from polyturn.trainer.base_model.initial import train_tokenizer, training_texts, write_initial_model
    from polyturn.trainer.base_model.recipe import load_recipe, recipe_path

    recipe = load_recipe(recipe_path())
    write_initial_model(train_tokenizer(training_texts(), vocab_size=recipe.vocab_size), directory)
    return directory


def main() -> None:
    arguments = parse_arguments()
    shape = Shape(
        num_episodes=64 if arguments.short else arguments.episodes,
        concurrency=arguments.concurrency,
        num_turns=arguments.turns,
        tokens_per_turn=arguments.tokens,
    )
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
        with Engines(spec, LocalLauncher(spec)) as engines:
            print(
                f"{'round':>5} {'Polyturn tok/s':>14} {'plain tok/s':>14} {'same connections':>17} {'ratio':>7} "
                f"{'ratio same':>10} {'our CPU s':>10} {'plain CPU s':>10}"
            )
            rounds = 3 if arguments.short else arguments.rounds
            measured = asyncio.run(measure(engines, model, shape, rounds))
    print(json.dumps(figures_of(measured, shape)))


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


def figures_of(measured: Sequence[Round], shape: Shape) -> dict[str, Any]:
    """Medians over the rounds."""
    ratios = [r.ours.tokens_per_second / r.plain.tokens_per_second for r in measured]
    same = [r.ours.tokens_per_second / r.same_connections.tokens_per_second for r in measured]
    return {
        "benchmark": "rollout_overhead",
        "polyturn_tokens_per_second": statistics.median(r.ours.tokens_per_second for r in measured),
        "plain_tokens_per_second": statistics.median(r.plain.tokens_per_second for r in measured),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "ratio_same_connections": statistics.median(same),
        "polyturn_client_cpu_s": statistics.median(r.ours.client_cpu_s for r in measured),
        "plain_client_cpu_s": statistics.median(r.plain.client_cpu_s for r in measured),
        "same_connections_client_cpu_s": statistics.median(r.same_connections.client_cpu_s for r in measured),
        "rounds": len(measured),
        "concurrency": shape.concurrency,
        "num_episodes": shape.num_episodes,
        "num_turns": shape.num_turns,
        "tokens_per_turn": shape.tokens_per_turn,
    }


if __name__ == "__main__":
    main()
