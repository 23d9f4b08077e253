"""Thousands of live episodes on one worker process: how near to what the engines could serve, memory, and fairness.

    python benchmarks/live_episodes.py [--short] [--hooks own_thread|event_loop|async]

Two measurements, each through the real groups, episode loop, chat template, ledger and environment steps, with mock
engines that take their time and nothing else:

- `engine`: 2,048 live episodes of 16 turns, each turn of which takes 2 s on an engine without a limit. The ideal is the
  time of one episode, 32 s.
- `fleet`: 10,000 live episodes of 8 turns and about 2k tokens on a fleet that serves 1,500 turns a second in all, first
  come, first served. The ideal is all turns at that rate.

`share_of_ideal` is the ideal time over that from the first reset, the making of all environments included, to the last
result. Fairness is read at half the ideal time: the least and the most turns that a live episode has had, and Jain's
index of them, (sum x)^2 / (n sum x^2), which is 1 where all have had the same. `cpu_share` is the process's CPU time
over the wall time: beyond 1 minus the share of other work on the machine nothing can be ideal. `peak_mb` is the
process's largest resident size, with all libraries. `--hooks` says where the environment's tool runs; an environment in
threads of their own holds a thread for each live episode. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import json
import resource
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyturn.agents.chat import ChatRenderer, load_tokenizer
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.dialects import HermesDialect
from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.policy import Generation, SamplingParams
from polyturn.configs.models import resolve_model_path
from polyturn.envs.messages import AssistantMessage, Grade, ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.collection import play_groups
from polyturn.rollout.factory import token_play
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.limits import RolloutLimits, spare_what_stays
from polyturn.rollout.player import EpisodePlayer
from polyturn.tools.tool import tool

MODEL = "builtin:tiny-searcher"
SAMPLES_PER_PROMPT = 8
RESULT_CHARS = {8: 640, 16: 260}
"""With which an episode of so many turns has about 2k tokens."""
WORDS = "The mill of Ashford was built by Mara Lindqvist in the year of the flood, as its register says. "
QUESTION = "In which town is the employer of Mara Lindqvist based?"
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Mara Lindqvist"}}\n</tool_call>'


class Register(ToolEnv):
    """A tool that is a plain function, in a thread of the environment's own."""

    result = ""
    num_calls = 0
    """Of the episode that is played."""

    @tool
    def search(self, query: str) -> str:
        """Search the register."""
        del query
        self.num_calls += 1
        return self.result

    def grade(self, message: AssistantMessage) -> Grade:
        return {"correct": float(message.content == self.task.label)}


class RegisterOnLoop(Register):
    """The same on the event loop."""

    hooks_run = "event_loop"


class RegisterAwaited(Register):
    """The same with functions that are `async`."""

    @tool
    async def search(self, query: str) -> str:  # type: ignore[override]
        """Search the register."""
        del query
        self.num_calls += 1
        return self.result

    async def grade(self, message: AssistantMessage) -> Grade:  # type: ignore[override]
        return {"correct": float(message.content == self.task.label)}


HOOKS: dict[str, type[Register]] = {
    "own_thread": Register,
    "event_loop": RegisterOnLoop,
    "async": RegisterAwaited,
}


class Mock:
    """Engines that take their time: each turn so many seconds, or so many turns a second first come, first served."""

    def __init__(self, answer: Generation, *, turn_s: float = 0.0, turns_per_s: float | None = None) -> None:
        self._answer = answer
        self._turn_s = turn_s
        self._gap_s = 0.0 if turns_per_s is None else 1.0 / turns_per_s
        self._free_at = 0.0

    async def generate(self, *, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams) -> Generation:
        del prompt_ids, sampling
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._free_at = max(now, self._free_at) + self._gap_s
        await asyncio.sleep(self._free_at + self._turn_s - now)
        return self._answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One measurement."""

    share_of_ideal: float
    cpu_share: float
    us_per_turn: float
    """CPU time, with the making of environments, resets and the groups."""
    tokens_per_episode: float
    fewest_turns: int
    most_turns: int
    jain: float
    num_threads: int
    """At half the ideal time."""


async def measure(
    make_env: Callable[[], Register],
    policy: Mock,
    renderer: ChatRenderer,
    *,
    num_episodes: int,
    num_turns: int,
    ideal_s: float,
) -> Measured:
    """Play so many episodes at once."""
    envs: list[Register] = []
    num_chars = RESULT_CHARS[num_turns]

    def make() -> Register:
        envs.append(make_env())
        envs[-1].result = (WORDS * (num_chars // len(WORDS) + 1))[:num_chars]
        return envs[-1]

    num_prompts = num_episodes // SAMPLES_PER_PROMPT
    tasks = ListTasks([Task.from_prompt(f"t{number}", QUESTION, label="x") for number in range(num_prompts)])
    limits = EpisodeLimits(max_turns=num_turns, max_tokens_per_episode=4096)
    player = EpisodePlayer(
        make_env=make,
        tasks=tasks,
        play=token_play(renderer=renderer, dialect=HermesDialect(), limits=limits, sampling=SamplingParams()),
        limits=RolloutLimits(max_concurrent_requests=num_episodes, max_concurrent_episodes=num_episodes),
        seed=0,
    )
    turns: list[int] = []
    num_threads = 0

    def look() -> None:
        nonlocal num_threads
        num_threads = threading.active_count()
        turns.extend(env.num_calls for env in envs)

    gc.collect()
    asyncio.get_running_loop().call_later(ideal_s / 2, look)
    started, cpu_started = time.perf_counter(), time.process_time()
    groups = await play_groups(
        player,
        PromptCursor(len(tasks), seed=0).take(num_prompts),
        samples_per_prompt=SAMPLES_PER_PROMPT,
        policy=policy,
    )
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    player.close()
    episodes = [episode for group in groups for episode in group.episodes]
    assert len(episodes) == num_episodes, f"{len(episodes)} of {num_episodes} episodes survived"
    check(episodes, num_turns)
    turns += [0] * (num_episodes - len(turns))  # those whose environment was not made yet
    return Measured(
        share_of_ideal=ideal_s / wall_s,
        cpu_share=cpu_s / wall_s,
        us_per_turn=cpu_s / num_episodes / num_turns * 1e6,
        tokens_per_episode=sum(len(episode.segments[0]) for episode in episodes) / num_episodes,
        fewest_turns=min(turns),
        most_turns=max(turns),
        jain=sum(turns) ** 2 / max(1, num_episodes * sum(count**2 for count in turns)),
        num_threads=num_threads,
    )


def check(episodes: Sequence[Episode], num_turns: int) -> None:
    for episode in episodes:
        assert (episode.outcome, episode.stop_reason) == (Outcome.TRUNCATED, "max_turns"), episode.error
        assert episode.num_tool_calls == episode.num_turns == num_turns


def turn_of(tokenizer: object, text: str) -> Generation:
    """The turn of this text as an engine would give it."""
    token_ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]  # type: ignore[attr-defined]
    return Generation(
        token_ids=np.array(token_ids, dtype=np.int32),
        logprobs=np.full(len(token_ids), -0.5, dtype=np.float32),
        policy_versions=np.zeros(len(token_ids), dtype=np.int32),
        finish_reason="stop",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hooks", choices=HOOKS, default="event_loop", help="where the tool runs")
    parser.add_argument("--only", choices=("engine", "fleet"), help="one of the two measurements")
    parser.add_argument("--short", action="store_true", help="a tenth of the episodes, and of the fleet")
    arguments = parser.parse_args()
    scale = 10 if arguments.short else 1
    tokenizer = load_tokenizer(resolve_model_path(MODEL))
    renderer, answer = ChatRenderer(tokenizer), turn_of(tokenizer, CALL)
    live, many, rate = 2048 // scale // 8 * 8, 10_000 // scale, 1500 / scale
    runs = {
        "engine": (live, 16, Mock(answer, turn_s=2.0), 16 * 2.0),
        "fleet": (many, 8, Mock(answer, turns_per_s=rate), 8 * many / rate),
    }
    measured: dict[str, Measured] = {}
    for name, (num_episodes, num_turns, policy, ideal_s) in runs.items():
        if arguments.only in (None, name):
            play = functools.partial(measure, HOOKS[arguments.hooks], policy, renderer)
            with spare_what_stays():
                one = measured[name] = asyncio.run(
                    play(num_episodes=num_episodes, num_turns=num_turns, ideal_s=ideal_s)
                )
            print(
                f"  {name:<7} {num_episodes:>6} episodes of {one.tokens_per_episode:,.0f} tokens: "
                f"{one.share_of_ideal:.1%} of the ideal {ideal_s:.1f} s, CPU {one.cpu_share:.0%} of the time, "
                f"{one.us_per_turn:.0f} us a turn, "
                f"{one.fewest_turns} to {one.most_turns} turns at half-time (Jain {one.jain:.4f}), "
                f"{one.num_threads} threads",
                flush=True,
            )
    print(
        json.dumps(
            {
                "benchmark": "live_episodes",
                "hooks": arguments.hooks,
                "share_of_ideal": {name: round(one.share_of_ideal, 4) for name, one in measured.items()},
                "cpu_share": {name: round(one.cpu_share, 3) for name, one in measured.items()},
                "us_per_turn": {name: round(one.us_per_turn) for name, one in measured.items()},
                "jain": {name: round(one.jain, 5) for name, one in measured.items()},
                "fewest_turns": {name: one.fewest_turns for name, one in measured.items()},
                "most_turns": {name: one.most_turns for name, one in measured.items()},
                "threads": {name: one.num_threads for name, one in measured.items()},
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
