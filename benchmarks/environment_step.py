"""Microseconds per environment step, beside SkyRL-Gym and GEM on the same task, in one run.

The task has the form of GSM8k with several turns: a problem in words, an answer after `####`, and another try after a
wrong one. Every environment plays the same episodes: four wrong answers, then the right one. SkyRL-Gym plays its own
`GSM8kMultiTurnEnv`. GEM has no such environment, so the task is written on its base class, as it is on `ToolEnv`; all
three grade by the same regular expression, whose own time stands in the first row and is taken off for the overhead.
A second part plays one turn on the math environment that each ships, each with its own grader.

The rows alternate in rounds; a figure is the median over rounds of CPU time, which other work on the machine changes
little. Resets are part of it, but for the row of a bare step. A peer that cannot be imported says so in its row.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyturn.envs.messages import AssistantMessage, ListTasks, Message, Task
from polyturn.envs.registry import make
from polyturn.envs.tool_env import ToolEnv

MAX_TURNS = 5
NUM_BARE_STEPS = 100
PROBLEM = "A baker sells 12 rolls on each of 6 days and eats one on each. How many rolls were there?"
AGAIN = (
    "Please provide your step-by-step reasoning, "
    "and also include a tentative numeric answer at the end in the exact format: '#### ANSWER'."
)
ANSWER = "78"
WRONG = "She sells 12 x 6 = 72 rolls.\n#### 72"
RIGHT = "She sells 12 x 6 = 72 and eats 6, so 78 rolls.\n#### 78"
REPLIES = (WRONG,) * (MAX_TURNS - 1) + (RIGHT,)
BOXED = r"She sells 72 and eats 6. The answer is \boxed{78}."
_SOLUTION = re.compile(r"#### (\-?[0-9\.\,]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What is measured: one round of some episodes, and how many steps it has."""

    name: str
    play: Callable[[], float] | None
    """Plays an episode and returns its reward; None where a package is missing."""
    num_steps: int
    reward: float = 1.0
    note: str = ""


def grade(text: str, answer: str) -> float:
    """What all three pay for: the number after `####`."""
    found = _SOLUTION.search(text)
    return float(found is not None and found[1].replace(",", "") == answer)


class PolyturnTries(ToolEnv):
    """The task on our base class."""

    max_tries = MAX_TURNS
    num_tries = 0

    def begin(self, task: Task) -> Sequence[Message]:
        self.num_tries = 0
        return task.messages

    def follow_up(self, message: AssistantMessage) -> Sequence[Message]:
        self.num_tries += 1
        self.reward = grade(message.content, self.task.label)
        if self.reward or self.num_tries == self.max_tries:
            return ()
        return [{"role": "user", "content": AGAIN}]

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        del message
        return {"correct": self.reward}


def plain_row() -> Row:
    def play() -> float:
        return [grade(reply, ANSWER) for reply in REPLIES][-1]

    return Row(name="the grader alone", play=play, num_steps=MAX_TURNS)


def polyturn_row() -> Row:
    env = make_tries()
    task = env.tasks("train")[0]
    messages = [AssistantMessage(content=reply) for reply in REPLIES]

    def play() -> float:
        env.reset(seed=None, options={"task": task})
        return sum(env.step(message)[1] for message in messages)

    return Row(name="Polyturn", play=play, num_steps=MAX_TURNS)


def bare_step_row() -> Row:
    """Steps alone: one episode, as far as that goes, of steps that answer with a message."""
    env = make_tries()
    message = AssistantMessage(content=WRONG)

    def play() -> float:
        env.reset()
        env.max_tries = NUM_BARE_STEPS + 1
        return sum(env.step(message)[1] for _ in range(NUM_BARE_STEPS))

    return Row(name="Polyturn, a bare step", play=play, num_steps=NUM_BARE_STEPS, reward=0.0)


def make_tries() -> PolyturnTries:
    return PolyturnTries(tasks=ListTasks([Task.from_prompt("baker", PROBLEM, label=ANSWER)]))


def skyrl_row() -> Row:
    name = "SkyRL-Gym"
    try:
        from skyrl_gym.envs.gsm8k.multi_turn_env import GSM8kMultiTurnEnv
    except ImportError as error:
        return missing(name, error)
    extras = {"reward_spec": {"ground_truth": ANSWER}, "max_turns": MAX_TURNS}
    prompt = [{"role": "user", "content": PROBLEM}]

    def play() -> float:
        env = GSM8kMultiTurnEnv(extras=extras)
        env.init(list(prompt))
        reward = [env.step(reply)["reward"] for reply in REPLIES][-1]
        env.close()
        return reward

    return Row(name=name, play=play, num_steps=MAX_TURNS, note="its GSM8kMultiTurnEnv, one object an episode")


def gem_row() -> Row:
    name = "GEM"
    try:
        from gem.core import Env
    except ImportError as error:
        return missing(name, error)

    class Tries(Env):  # type: ignore[misc]
        def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
            super().reset(seed)
            self.turns = 0
            return PROBLEM, {}

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            self.turns += 1
            reward = grade(action, ANSWER)
            done = bool(reward) or self.turns == MAX_TURNS
            return ("" if done else AGAIN), reward, done, False, {}

        def sample_random_action(self) -> str:
            return WRONG

        def spawn(self, same_state: bool = False, **kwargs: Any) -> Any:
            raise NotImplementedError

    env = Tries()

    def play() -> float:
        env.reset()
        return sum(env.step(reply)[1] for reply in REPLIES)

    return Row(name=name, play=play, num_steps=MAX_TURNS, note="the task on its base class")


def polyturn_math_row() -> Row:
    task = Task.from_prompt("baker", PROBLEM, label=ANSWER)
    env = make("polyturn/Math-v0")
    message = AssistantMessage(content=BOXED)

    def play() -> float:
        env.reset(options={"task": task})
        return env.step(message)[1]

    return Row(name="Polyturn, Math-v0", play=play, num_steps=1, note="its math verifier")


def skyrl_math_row() -> Row:
    name = "SkyRL-Gym, GSM8kEnv"
    try:
        from skyrl_gym.envs.gsm8k.env import GSM8kEnv
    except ImportError as error:
        return missing(name, error)
    extras = {"reward_spec": {"ground_truth": ANSWER}}

    def play() -> float:
        env = GSM8kEnv(extras=extras)
        env.init([{"role": "user", "content": PROBLEM}])
        reward = env.step(RIGHT)["reward"]
        env.close()
        return reward

    return Row(name=name, play=play, num_steps=1, note="a regular expression")


def gem_math_row() -> Row:
    name = "GEM, MathEnv"
    try:
        from datasets import Dataset
        from gem.envs.math_env import MathEnv
    except ImportError as error:
        return missing(name, error)
    dataset = Dataset.from_list([{"problem": PROBLEM, "answer": ANSWER}])
    # In its own process pool a step costs about as much as a round trip to another process.
    env = MathEnv(dataset=dataset, use_mp=False)

    def play() -> float:
        env.reset(idx=0)
        return float(env.step(BOXED)[1])

    return Row(name=name, play=play, num_steps=1, note="its boxed grader, in process")


def missing(name: str, error: ImportError) -> Row:
    return Row(name=name, play=None, num_steps=1, note=f"not importable: {error}")


def measure(rows: Sequence[Row], *, num_rounds: int, round_s: float) -> dict[str, float]:
    """Microseconds of CPU time for each step, resets included, by row."""
    present = [row for row in rows if row.play is not None]
    counts: dict[str, int] = {}
    for row in present:
        assert row.play is not None
        reward = row.play()
        assert reward == row.reward, f"{row.name} pays {reward:g}"
        started = time.process_time()
        for _ in range(20):
            row.play()
        counts[row.name] = max(5, int(round_s / max((time.process_time() - started) / 20, 1e-7)))
    times: dict[str, list[float]] = {row.name: [] for row in present}
    gc.collect()
    gc.disable()
    for _ in range(num_rounds):
        for row in present:
            play, count = row.play, counts[row.name]
            assert play is not None
            started = time.process_time()
            for _ in range(count):
                play()
            times[row.name].append((time.process_time() - started) / count / row.num_steps * 1e6)
    gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="rounds in which the rows alternate")
    parser.add_argument("--round-seconds", type=float, default=0.05, help="how long each row runs in a round")
    parser.add_argument("--short", action="store_true", help="8 rounds of 0.02 s")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    num_rounds, round_s = (8, 0.02) if arguments.short else (arguments.rounds, arguments.round_seconds)
    tries = [plain_row(), polyturn_row(), bare_step_row(), skyrl_row(), gem_row()]
    single = [polyturn_math_row(), skyrl_math_row(), gem_math_row()]
    microseconds = measure([*tries, *single], num_rounds=num_rounds, round_s=round_s)
    graded = microseconds[tries[0].name]
    for title, rows in (
        (f"{MAX_TURNS} turns, one grader for all", tries),
        ("one turn, each with its own grader", single),
    ):
        print(f"{title}\n  {'':<22} {'us a step':>10}  {'overhead':>9}")
        for row in rows:
            value = microseconds.get(row.name)
            shown = "-" if value is None else f"{value:.2f}"
            over = "-" if value is None or rows is single else f"{value - graded:.2f}"
            print(f"  {row.name:<22} {shown:>10}  {over:>9}  {row.note}")
    result = {
        "us_per_step": {name: round(value, 3) for name, value in microseconds.items()},
        "overhead_us": {
            row.name: round(microseconds[row.name] - graded, 3)
            for row in tries[1:]
            if row.name in microseconds
        },
        "missing": [row.name for row in (*tries, *single) if row.play is None],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
