"""CPU of one whole turn with a policy that answers at once: microseconds, growth with the context, longest pause.

    python benchmarks/turn_overhead.py [--short] [--profile FILE]

A turn is what the episode loop does for it: render what the environment said, ask the policy, append what it sampled,
decode and parse it, step the environment with one tool call, and take in its result of 200 characters. Model files are
those of `builtin:tiny-searcher` (byte-level BPE, ChatML template, Hermes calls), nothing of them stands in for
anything; the policy answers without a wait, so that no engine and no HTTP is in the figure. Three environments differ
in where the tool runs: in a thread of the environment's own, which is the default and `us_per_turn`; in an `async`
tool; on the event loop. CPU time is that of all threads. It grows, too, with what else the machine does: `us_reference`
is that of a fixed piece of work (2 kB of JSON and 200 numbers written and read), alternated with the rows.

`growth` is the cost per turn with 32k tokens of context over that with 1k, in episodes that go through both.
`largest_pause_ms` is the longest that a task of the event loop overslept 1 ms while episodes got results of 1 MB,
`pause_before_ms` that of a loop with nothing else to do, which is the machine's share.

`--profile FILE` writes cProfile's figures of the event loop's thread for the first row, sorted by own time, as text.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import io
import json
import pstats
import statistics
import time
from collections.abc import Awaitable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polyturn.agents.chat import ChatRenderer, load_tokenizer
from polyturn.agents.deadlines import EpisodeLimits, Slots
from polyturn.agents.dialects import HermesDialect
from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.episode_loop import play_tokens
from polyturn.agents.policy import Generation, SamplingParams
from polyturn.configs.models import resolve_model_path
from polyturn.envs.messages import AssistantMessage, Grade, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import tool

MODEL = "builtin:tiny-searcher"
TURNS_OF_1K = 8
RESULT_CHARS = 200
LONG_RESULT_CHARS = 1_000_000
WORDS = "The mill of Ashford was built by Mara Lindqvist in the year of the flood, as its register says. "
QUESTION = "In which town is the employer of Mara Lindqvist based?"
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Mara Lindqvist"}}\n</tool_call>'
TASK = Task.from_prompt("one", QUESTION, label="Ashford")


def text_of(num_chars: int) -> str:
    """A result of so many characters."""
    return (WORDS * (num_chars // len(WORDS) + 1))[:num_chars]


class InThread(ToolEnv):
    """A tool that is a plain function."""

    result = text_of(RESULT_CHARS)

    @tool
    def search(self, query: str) -> str:
        """Search the register."""
        del query
        return self.result

    def grade(self, message: AssistantMessage) -> Grade:
        return {"correct": float(message.content == self.task.label)}


class OnLoop(InThread):
    """The same for an environment that declares that its functions return at once."""

    hooks_run = "event_loop"


class Awaited(InThread):
    """A tool that is `async`."""

    @tool
    async def search(self, query: str) -> str:  # type: ignore[override]
        """Search the register."""
        del query
        return self.result


class Model:
    """What is read of the model's files, and two turns in its tokens."""

    def __init__(self, name: str) -> None:
        tokenizer = load_tokenizer(resolve_model_path(name))
        self.renderer = ChatRenderer(tokenizer)

        def turn(text: str) -> Generation:
            token_ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            return Generation(
                token_ids=np.array(token_ids, dtype=np.int32),
                logprobs=np.full(len(token_ids), -0.5, dtype=np.float32),
                policy_versions=np.zeros(len(token_ids), dtype=np.int32),
                finish_reason="stop",
            )

        self.call, self.answer = turn(CALL), turn("Ashford")


class InstantPolicy:
    """Searches at once, turn after turn, and answers in the last one; notes the CPU time of each request."""

    def __init__(self, model: Model, num_turns: int) -> None:
        self._call, self._answer = model.call, model.answer
        self._num_turns = num_turns
        self.requests: list[tuple[int, float]] = []
        """Of each: how many tokens its prompt has, and the process's CPU seconds when it came."""

    async def generate(self, *, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams) -> Generation:
        del sampling
        await asyncio.sleep(0)
        self.requests.append((len(prompt_ids), time.process_time()))
        return self._answer if len(self.requests) == self._num_turns else self._call


async def play(model: Model, env: ToolEnv, num_turns: int, slots: Slots) -> tuple[Episode, InstantPolicy]:
    """One episode of so many turns, and the policy that played it."""
    policy = InstantPolicy(model, num_turns)
    episode = await play_tokens(
        env=env,
        policy=policy,
        renderer=model.renderer,
        dialect=HermesDialect(),
        task=TASK,
        seed=0,
        limits=EpisodeLimits(
            max_turns=num_turns,
            max_tokens_per_episode=1 << 30,
            max_tool_calls_per_episode=None,
            max_tool_result_chars=None,
        ),
        episode_id="e",
        group_id="g",
        sampling=SamplingParams(),
        slots=slots,
    )
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 1.0), episode.error
    return episode, policy


def make_slots() -> Slots:
    return Slots(requests=asyncio.Semaphore(256), steps=asyncio.Semaphore(32), timeout_s=60.0)


async def us_per_turn(model: Model, env: ToolEnv, num_episodes: int) -> float:
    """Microseconds of CPU for each turn of episodes that grow to about 1k tokens, resets included: their median."""
    slots = make_slots()
    await play(model, env, TURNS_OF_1K, slots)
    seconds = []
    for _ in range(num_episodes):
        started = time.process_time()
        await play(model, env, TURNS_OF_1K, slots)
        seconds.append(time.process_time() - started)
    return statistics.median(seconds) / TURNS_OF_1K * 1e6


def us_of_reference() -> float:
    """Microseconds of CPU of a fixed piece of work, which tells how fast the machine is while it does other work."""
    value = {"text": text_of(2_000), "numbers": list(range(200))}
    started = time.process_time()
    for _ in range(200):
        json.loads(json.dumps(value))
    return (time.process_time() - started) / 200 * 1e6


async def cost_by_context(model: Model, env: ToolEnv, num_tokens: int) -> dict[int, list[float]]:
    """Microseconds of CPU for each turn of one long episode, by thousands of tokens in its prompt."""
    episode, _ = await play(model, env, TURNS_OF_1K, make_slots())
    [segment] = episode.segments
    num_turns = num_tokens * TURNS_OF_1K // len(segment) + TURNS_OF_1K
    gc.collect()
    _, policy = await play(model, env, num_turns, make_slots())
    costs: dict[int, list[float]] = {}
    for (length, before), (_, after) in zip(policy.requests, policy.requests[1:], strict=False):
        costs.setdefault(length // 1024, []).append((after - before) * 1e6)
    return costs


async def longest_pause(work: Awaitable[object]) -> float:
    """Milliseconds that a task overslept 1 ms at most while `work` was awaited."""
    worst = 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            asked = time.perf_counter()
            await asyncio.sleep(0.001)
            worst = max(worst, time.perf_counter() - asked - 0.001)

    watching = asyncio.create_task(watch())
    try:
        await work
    finally:
        watching.cancel()
    return worst * 1e3


async def play_long_results(model: Model, num_episodes: int) -> None:
    """Episodes at once, each of which gets two results of 1 MB."""
    slots = make_slots()
    envs = [InThread() for _ in range(num_episodes)]
    for env in envs:
        env.result = text_of(LONG_RESULT_CHARS)
    await asyncio.gather(*(play(model, env, 3, slots) for env in envs))
    for env in envs:
        env.close()


async def measure(model: Model, *, rounds: int, num_episodes: int) -> dict[str, object]:
    envs = {"in a thread": InThread(), "async": Awaited(), "event loop": OnLoop()}
    micros: dict[str, list[float]] = {name: [] for name in envs}
    reference = []
    for _ in range(rounds):
        gc.collect()
        reference.append(us_of_reference())
        for name, env in envs.items():
            micros[name].append(await us_per_turn(model, env, num_episodes))
    growth = []
    by_context: dict[int, list[float]] = {}
    for _ in range(max(2, rounds // 3)):
        costs = await cost_by_context(model, envs["in a thread"], 33 * 1024)
        growth.append(statistics.median(costs[32]) / statistics.median(costs[1]))
        for length in (1, 2, 4, 8, 16, 32):
            by_context.setdefault(length, []).append(statistics.median(costs[length]))
    for env in envs.values():
        env.close()
    before = await longest_pause(asyncio.sleep(1.0))
    pause = await longest_pause(play_long_results(model, 4))
    print(f"  reference      {statistics.median(reference):8.1f} us")
    for name, values in micros.items():
        print(f"  {name:<14} {statistics.median(values):8.1f} us a turn")
    for length, values in by_context.items():
        print(f"  {length:>3}k tokens    {statistics.median(values):8.1f} us a turn")
    print(f"  longest pause  {pause:8.1f} ms with results of 1 MB, {before:.1f} ms with nothing to do")
    return {
        "us_per_turn": round(statistics.median(micros["in a thread"]), 1),
        "us_per_turn_async": round(statistics.median(micros["async"]), 1),
        "us_per_turn_event_loop": round(statistics.median(micros["event loop"]), 1),
        "us_reference": round(statistics.median(reference), 1),
        "growth": round(statistics.median(growth), 3),
        "largest_pause_ms": round(pause, 1),
        "pause_before_ms": round(before, 1),
        "model": MODEL,
    }


def write_profile(model: Model, path: Path, num_episodes: int) -> None:
    """cProfile of the event loop's thread for turns with a tool in a thread."""
    profile, env = cProfile.Profile(), InThread()
    asyncio.run(us_per_turn(model, env, 4))
    profile.enable()
    asyncio.run(us_per_turn(model, env, num_episodes))
    profile.disable()
    env.close()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(60)
    path.write_text(text.getvalue(), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds in which the rows alternate")
    parser.add_argument("--episodes", type=int, default=40, help="episodes of 1k tokens in a round")
    parser.add_argument("--short", action="store_true", help="3 rounds of 20 episodes")
    parser.add_argument("--profile", type=Path, help="write cProfile's figures here")
    arguments = parser.parse_args()
    rounds, num_episodes = (3, 20) if arguments.short else (arguments.rounds, arguments.episodes)
    model = Model(MODEL)
    figures = asyncio.run(measure(model, rounds=rounds, num_episodes=num_episodes))
    if arguments.profile is not None:
        write_profile(model, arguments.profile, num_episodes)
    print(json.dumps({"benchmark": "turn_overhead", **figures}))


if __name__ == "__main__":
    main()
