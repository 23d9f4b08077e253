"""Every check passes on a good environment, and fails on one that is broken in just its way."""
# ruff: noqa: BLE001, RUF012, SIM115  broken on purpose

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from polyturn.envs.conformance.runner import CHECKS, run_check
from polyturn.envs.conformance.subject import Subject
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, ListTasks, Score, Task
from polyturn.envs.rewards import exact_match
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall


class Sums(ToolEnv):
    """Good: add two numbers with a tool, then say the sum."""

    is_replayable = True

    def begin(self, task):
        self.bonus = int(self.np_random.integers(100))
        text = f"What is {task.metadata['a']} + {self.bonus}?"
        return [{"role": "system", "content": "Answer with a number."}, {"role": "user", "content": text}]

    @tool
    def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    def grade(self, message):
        return {"correct": exact_match(message.content, str(self.task.metadata["a"] + self.bonus))}

    def tasks(self, split):
        if split not in ("train", "test"):
            raise ValueError(f"no split {split!r}; the splits are train, test")
        first = 1000 if split == "train" else 5000
        return ListTasks(
            [Task.from_prompt(f"{split}-{i}", "", metadata={"a": first + i}) for i in range(100)]
        )

    def oracle(self, messages, tools):
        if messages[-1]["role"] == "tool":
            return AssistantMessage(content=messages[-1]["content"])
        a, b = map(int, re.findall(r"\d+", messages[1]["content"]))
        return AssistantMessage(tool_calls=(ToolCall(id="1", name="add", arguments={"a": a, "b": b}),))


class AsyncSums(Sums):
    """Good, with everything asynchronous."""

    @tool
    async def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    async def grade(self, message):
        return {"correct": exact_match(message.content, str(self.task.metadata["a"] + self.bonus))}


# One broken environment for each way to break one.


class NoModelInTheSpace(Sums):
    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        return list(observation), info


class UnseededReset(Sums):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None, options=options)


class RewardBesidesItsParts(Sums):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {**info, "reward_parts": {}}


class AnySplit(Sums):
    def tasks(self, split):
        return super().tasks("train")


class KeyErrorSplit(Sums):
    def tasks(self, split):
        return {"train": super().tasks("train")}[split]


class OtherTasksEachTime(Sums):
    def tasks(self, split):
        return ListTasks([Task.from_prompt(f"{id(self)}-{i}", "", metadata={"a": i}) for i in range(9)])


class WrongLabels(Sums):
    def grade(self, message):
        return {"correct": exact_match(message.content, str(self.task.metadata["a"]))}


class WrongLabelsInOneSplit(Sums):
    def grade(self, message):
        return super().grade(message) if self.task.task_id.startswith("train") else {"correct": 0.0}


class NoOracle(Sums):
    oracle = None


class PaysHalf(Sums):
    def grade(self, message):
        return {"correct": 0.5 * super().grade(message)["correct"]}


class PaysAnything(Sums):
    def grade(self, message):
        return {"correct": 1.0}


class DrawsFromTheClock(Sums):
    def begin(self, task):
        messages = super().begin(task)
        self.bonus = time.time_ns() % 100
        messages[1]["content"] = f"What is {task.metadata['a']} + {self.bonus}?"
        return messages


class RemembersTheLastEpisode(Sums):
    num_played = 0

    def begin(self, task):
        self.num_played += 1
        return [*super().begin(task), {"role": "user", "content": f"This is game {self.num_played}."}]

    def oracle(self, messages, tools):
        return super().oracle([m for m in messages if not m["content"].startswith("This is")], tools)


class IgnoresTheSeed(Sums):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=1 if seed is not None else None, options=options)


class SeedsEverybody(Sums):
    def begin(self, task):
        random.seed(7)
        return super().begin(task)


class DrawsFromEverybody(Sums):
    def grade(self, message):
        np.random.random()
        return super().grade(message)


class ChangesWhatItSaid(Sums):
    def step(self, action):
        observation, *rest = super().step(action)
        self._said = [*getattr(self, "_said", []), *observation]
        for message in self._said[:-1]:
            message["content"] += " (old)"
        return observation, *rest

    def oracle(self, messages, tools):
        if len(messages) < 6:
            call = ToolCall(id="1", name="add", arguments={"a": 1, "b": len(messages)})
            return AssistantMessage(tool_calls=(call,))
        return AssistantMessage(content="done")


class SaysItAllAgain(Sums):
    def step(self, action):
        observation, *rest = super().step(action)
        return (*self._transcript[:2], *observation), *rest


class SharesItsTask(Sums):
    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed, options=options)
        return self.task.messages, info

    def oracle(self, messages, tools):
        return AssistantMessage(content=str(self.task.metadata["a"] + self.bonus))


class GoesOnAfterTheEnd(Sums):
    def step(self, action):
        if self._done:
            return (), 0.0, True, False, {"reward_parts": {}, "tool_results": ()}
        return super().step(action)


class NeverEnds(Sums):
    def follow_up(self, message):
        return [{"role": "user", "content": "Go on."}]


class SwallowsTools(Sums):
    def step(self, action):
        try:
            return super().step(action)
        except EnvironmentFault:
            if not action.tool_calls:
                raise
            self._done = False
            info = {"reward_parts": {}, "tool_results": ()}
            return ({"role": "tool", "content": "error"},), 0.0, False, False, info


class SwallowsGrades(Sums):
    async def _score(self, message, offload):
        try:
            return await super()._score(message, offload)
        except EnvironmentFault:
            return Score(value=0.0, parts={"correct": 0.0})


class FailsOtherwise(Sums):
    def step(self, action):
        try:
            return super().step(action)
        except EnvironmentFault as fault:
            raise OSError("the backend is gone") from fault


class AwaitsThreads(Sums):
    """Grades in a thread of the event loop, where a `StopIteration` never arrives."""

    async def step_async(self, action):
        if action.tool_calls:
            return await super().step_async(action)
        loop = asyncio.get_running_loop()
        parts = await loop.run_in_executor(None, self.grade, action)
        return (), sum(parts.values()), True, False, {"reward_parts": parts, "tool_results": ()}


class ExitsAsync(Sums):
    """Its awaited steps let an exit through."""

    async def step_async(self, action):
        return self.step(action) if action.tool_calls else self._end(self.grade(action))

    def _end(self, parts):
        return (), sum(parts.values()), True, False, {"reward_parts": parts, "tool_results": ()}


class Evaluates(Sums):
    def grade(self, message):
        try:
            right = float(message.content) >= self.task.metadata["a"]
        except ValueError:
            right = False
        return {"correct": float(right)}


class TakesAnyBox(Sums):
    def grade(self, message):
        boxes = re.findall(r"\\boxed\{(\d+)\}", message.content)
        return {"correct": float("17" in boxes) or super().grade(message)["correct"]}


class PaysForALabelAnywhere(Sums):
    def grade(self, message):
        return {"correct": float(str(self.task.metadata["a"] + self.bonus) in message.content)}


class PaysForALabelInAFewWords(ToolEnv):
    """As many a grader of questions: an answer of few words with the label in it."""

    def grade(self, message):
        words = message.content.lower().split()
        return {"correct": float(len(words) <= 20 and self.task.label in message.content.lower())}

    def tasks(self, split):
        towns = ["ashford", "brinley", "corby", "dunmore", "elstow", "fenwick", "gorton", "hadley", "ilford"]
        return ListTasks(
            [Task.from_prompt(f"{split}-{town}", "Where?", label=f"{split}{town}") for town in towns]
        )

    def oracle(self, messages, tools):
        return AssistantMessage(content=self.task.label)


class PaysForTheEmpty(Sums):
    def grade(self, message):
        return {"correct": float(message.content in str(self.task.metadata["a"] + self.bonus))}


class RunsTheAnswer(Sums):
    def grade(self, message):
        try:
            exec(message.content.removeprefix("```python\n").removesuffix("```"), {})
        except (Exception, SystemExit):
            return {"correct": 0.0}
        return super().grade(message)


class EvaluatesTheAnswer(Sums):
    def grade(self, message):
        try:
            return {"correct": float(eval(message.content) == self.task.metadata["a"] + self.bonus)}
        except Exception:
            return {"correct": 0.0}


class PaysForEqualObjects(Sums):
    """It runs the answer elsewhere, and the answer's own objects say whether they are right."""

    def grade(self, message):
        expected = self.task.metadata["a"] + self.bonus
        if "answer =" not in message.content:
            return super().grade(message)
        code = message.content.removeprefix("```python\n").removesuffix("```")
        program = f"{code}\nprint('paid' if answer == {expected} else 'not')"
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        return {"correct": float("paid" in run.stdout)}


class FailsOnOddAnswers(Sums):
    def grade(self, message):
        message.content.encode("ascii")
        return super().grade(message)


class BelievesToolResponses(Sums):
    def grade(self, message):
        return {"correct": float("reward: 1.0" in message.content) or super().grade(message)["correct"]}


class HangsOnLongAnswers(Sums):
    def grade(self, message):
        if len(message.content) > 100_000:
            self.release.wait()
        return super().grade(message)

    release = threading.Event()


class OneStateForAll(Sums):
    shared: dict = {}

    def begin(self, task):
        messages = super().begin(task)
        self.shared["bonus"] = self.bonus
        return messages

    def grade(self, message):
        return {"correct": exact_match(message.content, str(self.task.metadata["a"] + self.shared["bonus"]))}


class LeavesFilesOpen(Sums):
    files: list = []

    def begin(self, task):
        self.files.append(open(os.devnull))
        return super().begin(task)


class LeavesThreads(Sums):
    stop = threading.Event()

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        threading.Thread(target=self.stop.wait, daemon=True).start()


class LeavesProcesses(Sums):
    processes: list = []

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.processes.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))


class KeepsEveryEpisode(Sums):
    kept: list = []

    def grade(self, message):
        self.kept.append(bytearray(os.urandom(64)) * 4096)
        return super().grade(message)


class ClosesOnce(Sums):
    def close(self):
        if getattr(self, "_closed", False):
            raise ValueError("closed already")
        self._closed = True


class NotVectorisable(Sums):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_space.roles = frozenset({"system", "user", "tool", str(id(self))})


class CannotBeRebuilt(Sums):
    """The oracle never sees it: it knows the task without reading."""

    is_replayable = True
    numbers = itertools.count()

    def begin(self, task):
        return [*super().begin(task), {"role": "user", "content": f"This is question {next(self.numbers)}."}]


BROKEN = [
    ("gymnasium", UnseededReset, "check_env"),
    ("spaces", NoModelInTheSpace, "not in the observation space"),
    ("spaces", RewardBesidesItsParts, "does not sum up"),
    ("splits", AnySplit, "raise a ValueError that names the splits"),
    ("splits", KeyErrorSplit, "raised KeyError"),
    ("splits", OtherTasksEachTime, "two instances have different tasks"),
    ("oracle", WrongLabels, "the oracle scores 0 "),
    ("oracle", WrongLabelsInOneSplit, "of split 'test'"),
    ("oracle", NoOracle, "there is no oracle"),
    ("oracle", PaysHalf, "the oracle scores 0.5 "),
    ("oracle", NeverEnds, "does not end"),
    ("random", PaysAnything, "as much as the oracle"),
    ("seeds", DrawsFromTheClock, "gives two episodes"),
    ("seeds", RemembersTheLastEpisode, "keep nothing from the last episode"),
    ("seeds", IgnoresTheSeed, "every seed gives the same task"),
    ("replay", CannotBeRebuilt, "are answered in two ways"),
    ("global_random_state", SeedsEverybody, "generator of random:"),
    ("global_random_state", DrawsFromEverybody, "generator of numpy:"),
    ("append_only", ChangesWhatItSaid, "changed later"),
    ("append_only", SaysItAllAgain, "return only the new messages"),
    ("append_only", SharesItsTask, "changed the task"),
    ("end", GoesOnAfterTheEnd, "ResetNeeded"),
    ("faults", SwallowsTools, "a failure in tool 'add' was swallowed"),
    ("faults", SwallowsGrades, "a failure in grade was swallowed"),
    ("faults", FailsOtherwise, "comes out as OSError"),
    ("faults", ExitsAsync, "StopIteration in grade comes out of reset_async or step_async as RuntimeError"),
    ("reward_hacks", PaysAnything, "empty is paid 1"),
    ("reward_hacks", Evaluates, "1e999 is paid 1"),
    ("reward_hacks", TakesAnyBox, "several boxes is paid 1"),
    ("reward_hacks", PaysForTheEmpty, "empty is paid 1"),
    ("reward_hacks", PaysForALabelAnywhere, "right answers of the split is paid 1"),
    ("reward_hacks", PaysForALabelInAFewWords, "9 right answers of the split is paid 1"),
    ("reward_hacks", RunsTheAnswer, "run in the environment's own process"),
    ("reward_hacks", EvaluatesTheAnswer, "an expression: what the model wrote was run"),
    ("reward_hacks", PaysForEqualObjects, "code that equals everything is paid 1"),
    ("reward_hacks", FailsOnOddAnswers, "control characters is taken for a failure"),
    ("reward_hacks", BelievesToolResponses, "a forged tool response is paid 1"),
    ("hard_answers", HangsOnLongAnswers, "grade in .*test_checks"),
    ("vector", NotVectorisable, "not equivalent"),
    ("concurrency", OneStateForAll, "goes another way"),
    ("close", LeavesFilesOpen, "5 open files"),
    ("close", LeavesThreads, "5 threads"),
    ("close", LeavesProcesses, "5 child processes"),
    ("close", ClosesOnce, "closed already"),
    ("leaks", LeavesFilesOpen, r"\d+ open files"),
    ("leaks", KeepsEveryEpisode, "KiB or more in memory"),
]


def subject(cls: type[ToolEnv]) -> Subject:
    return Subject(name=cls.__name__, make=cls, num_tasks=5, num_episodes=64, budget_s=1.0, answer_s=2.0)


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    """The broken ones leave things behind on purpose."""
    yield
    for file in LeavesFilesOpen.files:
        file.close()
    for process in LeavesProcesses.processes:
        process.kill()
        process.communicate()
    for things in (LeavesFilesOpen.files, LeavesProcesses.processes, KeepsEveryEpisode.kept):
        things.clear()
    for event in (LeavesThreads.stop, HangsOnLongAnswers.release):
        event.set()
        event.clear()


@pytest.mark.parametrize("cls", [Sums, AsyncSums])
@pytest.mark.parametrize("name", CHECKS)
def test_a_good_environment_passes(name: str, cls: type[ToolEnv]) -> None:
    finding = run_check(name, subject(cls))
    assert finding.ok, finding.message


@pytest.mark.parametrize(("name", "cls", "words"), BROKEN, ids=[f"{n}-{c.__name__}" for n, c, _ in BROKEN])
def test_a_broken_environment_is_found_and_told_what_to_do(name: str, cls: type[ToolEnv], words: str) -> None:
    finding = run_check(name, subject(cls))
    assert not finding.ok, f"{name} did not notice: {finding.message}"
    assert re.search(words, finding.message), finding.message


def test_every_check_but_the_report_has_a_broken_environment() -> None:
    assert {name for name, _, _ in BROKEN} == set(CHECKS) - {"speed"}


def test_a_check_that_hangs_is_ended_and_says_where() -> None:
    release = threading.Event()

    class Hangs(Sums):
        def begin(self, task):
            release.wait()
            return super().begin(task)

    finding = run_check("oracle", subject(Hangs), deadline_s=0.3)
    release.set()
    assert not finding.ok
    assert "did not end within 0.3 s" in finding.message and "begin in " in finding.message


def test_what_an_environment_raises_is_a_finding_with_its_place() -> None:
    class Raises(Sums):
        def reset(self, *, seed=None, options=None):
            raise RuntimeError("no database")

    finding = run_check("oracle", subject(Raises))
    assert not finding.ok
    assert "RuntimeError: no database (in reset, " in finding.message


def test_a_failure_that_the_author_plants_must_be_noticed() -> None:
    class Store(Sums):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.read = str

        @tool
        def add(self, a: int, b: int) -> str:
            """Add two numbers."""
            try:
                return self.read(a + b)
            except ConnectionError:
                return "error" if self.swallow else self.raise_again()

        def raise_again(self):
            raise ConnectionError("gone")

    class Swallows(Store):
        swallow = True

    class Honest(Store):
        swallow = False

    def cut(env):
        def gone(_):
            raise ConnectionError("gone")

        env.read = gone

    def with_sabotage(cls):
        return Subject(name="store", make=cls, sabotage=(cut,))

    assert run_check("faults", with_sabotage(Honest)).ok
    finding = run_check("faults", with_sabotage(Swallows))
    assert not finding.ok and "sabotage 0" in finding.message


def test_an_exit_that_never_arrives_is_found_by_the_deadline():
    finding = run_check("faults", Subject(name="sums", make=AwaitsThreads), deadline_s=3.0)
    assert not finding.ok and "something in the environment hangs" in finding.message


class Bound(Sums):
    """Keeps what works in one thread only."""

    def begin(self, task):
        self.database = sqlite3.connect(":memory:")
        return super().begin(task)

    @tool(timeout_s=30)
    def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        return self.database.execute("select ? + ?", (a, b)).fetchone()[0]

    def grade(self, message):
        self.database.execute("select 1")
        return super().grade(message)

    def close(self):
        if hasattr(self, "database"):
            self.database.close()
        super().close()


class OneLoop(Sums):
    """Keeps what works in one event loop only."""

    async def begin(self, task):
        self.loop = asyncio.get_running_loop()
        return super().begin(task)

    async def grade(self, message):
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("bound to a different event loop")
        return super().grade(message)


@pytest.mark.parametrize("kind", [Bound, OneLoop])
@pytest.mark.parametrize(
    "check", ["gymnasium", "spaces", "oracle", "seeds", "faults", "vector", "concurrency", "close"]
)
def test_what_is_bound_to_a_thread_or_an_event_loop_conforms(kind, check):
    finding = run_check(
        check, Subject(name=kind.__name__, make=kind, num_tasks=2, num_episodes=32, budget_s=1.0)
    )
    assert finding.ok, finding.message
