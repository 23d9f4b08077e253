"""Where the turns of an episode go, when the engines' KV does not hold everything: cache hits and episodes a second.

Two real SGLang servers, each with room for the KV of about half of the live episodes, as when each episode stays on one
server. Episodes of several turns are played against them by each way of routing in turn: Polyturn's `sticky` and
`least_loaded`, which ask the servers directly, and `cache_aware` and `round_robin` of sglang-router. Prompts are
random tokens, shared by the episodes of a group; every turn samples a fixed number of tokens, waits as for a tool, and
goes on behind a result of random tokens. All ways play the same episodes; the caches are emptied before each.

`adaptive` is `sticky` with `rollout.concurrency.kind: adaptive`, which is for more live episodes than the servers hold:
`--ways sticky adaptive --live 40 --room 0.35`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from polyturn.agents.live_episodes import LiveEpisodes
from polyturn.agents.policy import SamplingParams
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.configs.schema.engines import EnginesConfig, RouterConfig
from polyturn.rollout.concurrency import Rule
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.fleet import EngineFleet, Traffic
from polyturn.rollout.engines.launch import Engines, LocalLauncher
from polyturn.rollout.engines.server import EngineSpec, Router
from polyturn.rollout.engines.watch import EngineWatch
from polyturn.rollout.factory import open_client

NUM_ENGINES = 2
DIRECT = ("sticky", "adaptive", "least_loaded")
ROUTED = ("cache_aware", "round_robin")
SAMPLE_S = 0.25
"""Between samples of the load for `adaptive`: measurements are short."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The episodes of one measurement."""

    num_episodes: int
    group: int
    live: int
    num_turns: int
    prompt: int
    sampled: int
    result: int
    tool_s: float

    @property
    def longest(self) -> int:
        """Tokens of an episode at its end."""
        return self.prompt + self.num_turns * self.sampled + (self.num_turns - 1) * self.result

    @property
    def mean_live_tokens(self) -> int:
        """Tokens of all live episodes together, in the mean over their turns."""
        return self.live * (self.prompt + self.longest) // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One measurement of one way."""

    episodes_per_second: float
    cpu_s: float
    """Processor seconds of the servers for an episode: hardly changed by what else the machine does."""
    hit_rate: float
    loss_rate: float


async def play(
    fleet: EngineFleet, shape: Shape, vocabulary: int, *, seed: int, servers: Sequence[psutil.Process]
) -> Measured:
    """Play all episodes, `shape.live` at once."""
    sampling = SamplingParams(max_tokens=shape.sampled)
    live = asyncio.Semaphore(shape.live)

    async def episode(number: int) -> None:
        prompts = np.random.default_rng([seed, number // shape.group])
        own = np.random.default_rng([seed, number // shape.group, number])
        context = prompts.integers(10, vocabulary, shape.prompt, dtype=np.int32)
        ticket = object()
        async with live:
            with fleet.for_episode() as policy:
                for turn in range(shape.num_turns):
                    if fleet.live is not None:
                        await fleet.live.enter(ticket)
                    generation = await policy.generate(prompt_ids=context, sampling=sampling)
                    assert len(generation) == shape.sampled, "a turn of another length"
                    if turn < shape.num_turns - 1:
                        await asyncio.sleep(own.exponential(shape.tool_s))
                        result = own.integers(10, vocabulary, shape.result, dtype=np.int32)
                        context = np.concatenate([context, generation.token_ids, result])
        if fleet.live is not None:
            fleet.live.leave(ticket)

    before = sum(fleet.traffic.values(), Traffic())
    started, cpu_started = time.perf_counter(), cpu_seconds(servers)
    await asyncio.gather(*(episode(number) for number in range(shape.num_episodes)))
    seconds = time.perf_counter() - started
    figures = (sum(fleet.traffic.values(), Traffic()) - before).figures()
    return Measured(
        episodes_per_second=shape.num_episodes / seconds,
        cpu_s=(cpu_seconds(servers) - cpu_started) / shape.num_episodes,
        hit_rate=figures["cache_hit_rate"],
        loss_rate=figures["cache_loss_rate"],
    )


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """That these processes and their descendants have used so far."""
    all_of_them = {child for process in processes for child in (process, *process.children(recursive=True))}
    return sum(sum(process.cpu_times()[:2]) for process in all_of_them)


async def measure(
    urls: dict[str, Sequence[str]], engines: Engines, shape: Shape, vocabulary: int, rounds: int
) -> dict[str, list[Measured]]:
    """All ways in turns, each round in another order; a first round warms up."""
    measured: dict[str, list[Measured]] = {way: [] for way in urls}
    controls = [EngineControl(url) for url in engines.engine_urls]
    servers = [
        process
        for process in psutil.Process().children()
        if any(child.name() == "sglang::scheduler" for child in process.children(recursive=True))
    ]
    assert len(servers) == NUM_ENGINES, f"{len(servers)} processes with servers"
    async with open_client(timeout_s=600) as client:

        def policy_of(way: str) -> EngineFleet:
            return EngineFleet(
                [SGLangPolicy(client=client, url=url, stop_token_ids=()) for url in urls[way]],
                sticky=way != "least_loaded",
                live=LiveEpisodes(shape.live) if way == "adaptive" else None,
            )

        warm_up = Shape(**{name: getattr(shape, name) for name in Shape.__slots__} | {"num_episodes": 8})
        for number in range(rounds + 1):
            ways = list(urls)[number % len(urls) :] + list(urls)[: number % len(urls)]
            for way in ways:
                for control in controls:
                    control.flush_cache()
                fleet = policy_of(way)
                rule = Rule(smallest=2, largest=shape.live) if way == "adaptive" else None
                watch = EngineWatch(fleet, urls=engines.engine_urls, client=client, rule=rule)
                async with watch.watching(every_s=SAMPLE_S):
                    found = await play(
                        fleet, shape if number else warm_up, vocabulary, seed=number, servers=servers
                    )
                if number:
                    measured[way].append(found)
                    print(
                        f"{number:>5} {way:>13} {found.episodes_per_second:>10.2f} {found.cpu_s:>14.2f} "
                        f"{found.hit_rate:>9.1%} {found.loss_rate:>14.1%}",
                        flush=True,
                    )
    for control in controls:
        control.close()
    return measured


def write_model(directory: Path, width: int) -> int:
    """A random model in which computing a prompt costs something, without an end of text; its vocabulary's size."""
    import torch
    from transformers import Qwen3ForCausalLM

    from polyturn.trainer.base_model.initial import model_config, train_tokenizer, training_texts

    tokenizer = train_tokenizer(training_texts(), vocab_size=512)
    config = model_config(tokenizer)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = width, 3 * width, 2
    config.num_attention_heads = config.num_key_value_heads = width // 32
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.max_position_embeddings = 4096
    config.eos_token_id = None
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(torch.float32)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    return len(tokenizer)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: routing.py --live 24 --turns 8 --rounds 5",
    )
    parser.add_argument("--episodes", type=int, default=64, help="episodes of a measurement")
    parser.add_argument("--group", type=int, default=4, help="episodes of one prompt")
    parser.add_argument("--live", type=int, default=16, help="episodes at once")
    parser.add_argument("--turns", type=int, default=6, help="turns of an episode")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=12, help="sampled tokens of a turn")
    parser.add_argument("--result", type=int, default=120, help="tokens of a tool's result")
    parser.add_argument("--tool-s", type=float, default=0.1, help="mean seconds of a tool")
    parser.add_argument(
        "--room", type=float, default=0.6, help="KV of a server over that of all live episodes"
    )
    parser.add_argument("--width", type=int, default=512, help="of the model")
    parser.add_argument("--ways", nargs="+", choices=[*DIRECT, *ROUTED], default=[*DIRECT, *ROUTED])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way")
    parser.add_argument("--short", action="store_true", help="1 round of 32 episodes")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    shape = Shape(
        num_episodes=32 if arguments.short else arguments.episodes,
        group=arguments.group,
        live=arguments.live,
        num_turns=arguments.turns,
        prompt=arguments.prompt,
        sampled=arguments.tokens,
        result=arguments.result,
        tool_s=arguments.tool_s,
    )
    room = int(arguments.room * shape.mean_live_tokens)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        vocabulary = write_model(Path(scratch) / "model", arguments.width)
        config = EnginesConfig(device="cpu", num_engines=NUM_ENGINES)
        spec = EngineSpec(
            config=config,
            model_path=Path(scratch) / "model",
            dtype="float32",
            seeded=False,
            log_directory=Path(scratch),
            sglang={"max_total_tokens": room},
        )
        engines = stack.enter_context(Engines(spec, LocalLauncher(spec)))
        urls: dict[str, Sequence[str]] = {way: engines.engine_urls for way in DIRECT if way in arguments.ways}
        for way in (way for way in ROUTED if way in arguments.ways):
            router = Router(
                config=RouterConfig.model_validate({"policy": way}),
                worker_urls=engines.engine_urls,
                request_timeout_s=600,
                log_path=Path(scratch) / f"{way}.log",
            )
            stack.callback(router.stop)
            router.start()
            router.wait_ready()
            urls[way] = [router.url]
        print(
            f"KV of {room:,} tokens a server; live episodes have {shape.mean_live_tokens:,} in the mean, and "
            f"{shape.live * shape.longest:,} at their ends"
        )
        print(
            f"{'round':>5} {'way':>13} {'episodes/s':>10} {'CPU s/episode':>14} {'hit rate':>9} {'computed again':>14}"
        )
        rounds = 1 if arguments.short else arguments.rounds
        measured = asyncio.run(measure(urls, engines, shape, vocabulary, rounds))
    print(json.dumps(figures_of(measured, shape, room)))


def figures_of(measured: dict[str, list[Measured]], shape: Shape, room: int) -> dict[str, Any]:
    """Medians over the rounds, and how much faster `sticky` was than each other way in the same round."""
    figures: dict[str, Any] = {"benchmark": "routing", "room": room, "live_tokens": shape.mean_live_tokens}
    for way, found in measured.items():
        figures[f"{way}_episodes_per_second"] = statistics.median(one.episodes_per_second for one in found)
        figures[f"{way}_cpu_s"] = statistics.median(one.cpu_s for one in found)
        figures[f"{way}_hit_rate"] = statistics.median(one.hit_rate for one in found)
        if way in DIRECT:
            figures[f"{way}_loss_rate"] = statistics.median(one.loss_rate for one in found)
        if way != "sticky" and "sticky" in measured:
            pairs = zip(measured["sticky"], found, strict=True)
            figures[f"sticky_over_{way}"] = statistics.median(
                ours.episodes_per_second / other.episodes_per_second for ours, other in pairs
            )
    return figures


if __name__ == "__main__":
    main()
