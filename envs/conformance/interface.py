"""Checks of what callers rely on: Gymnasium's interface, splits, spaces, ends, seeds, and episodes at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import random
import sys
import time
import warnings
from collections.abc import Callable

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from polyturn.envs.conformance.subject import (
    Nonconforming,
    PolicyName,
    Subject,
    Trace,
    difference,
    innermost,
    play,
    play_async,
    policy_of,
)
from polyturn.envs.messages import AssistantMessage, Message, script_of
from polyturn.envs.played_env import PlayedEnv

_NO_SPEC = "Not able to test alternative render modes"
_UNHEARD_OF_SPLIT = "no such split"


def check_gymnasium(subject: Subject) -> str:
    """Gymnasium's own checker has no complaint and no warning."""
    with subject.open() as env, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(env.unwrapped)
        except AssertionError as error:
            raise Nonconforming(f"gymnasium.utils.env_checker.check_env: {error}") from error
    warned = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    if warned := [text for text in warned if _NO_SPEC not in text]:
        raise Nonconforming(f"gymnasium.utils.env_checker.check_env warns: {warned[0]}")
    return "check_env has no complaint"


def check_spaces(subject: Subject) -> str:
    """What is returned lies in the spaces; rewards are finite, and are the sum of their parts."""
    count = 0
    with subject.open() as env:
        for seed in range(subject.num_tasks):
            for name in ("oracle", "random"):
                script = policy_of(env, name, seed)  # type: ignore[arg-type]
                trace = play(env, script, seed=seed)
                _check_trace(env, trace)
                count += len(trace.turns)
    return f"{count} steps"


def _check_trace(env: PlayedEnv, trace: Trace) -> None:
    if trace.first not in env.observation_space:
        raise Nonconforming(
            f"the first observation of task {trace.task_id!r} is not in the observation space: return a tuple of "
            "messages with role and content"
        )
    for turn in trace.turns:
        if turn.action not in env.action_space:
            raise Nonconforming(f"a policy of the environment acts outside the action space: {turn.action!r}")
        if turn.observation not in env.observation_space:
            raise Nonconforming(
                f"an observation on task {trace.task_id!r} is not in the observation space: {turn.observation!r}; "
                "return a tuple of messages with role and content"
            )
        if not isinstance(turn.reward, float) or not math.isfinite(turn.reward):
            raise Nonconforming(f"a reward is {turn.reward!r}: it must be a finite float")
        if type(turn.terminated) is not bool or type(turn.truncated) is not bool:
            raise Nonconforming("terminated and truncated must be bool")
        parts = turn.info.get("reward_parts")
        if parts is None or not math.isclose(sum(parts.values()), turn.reward, abs_tol=1e-9):
            raise Nonconforming(
                f"info['reward_parts'] is {parts!r} and does not sum up to the reward {turn.reward:g}: "
                "return every part of the reward from grade()"
            )


def check_splits(subject: Subject) -> str:
    """Every split gives the same tasks each time, ids are its own, and an unknown split is a ValueError."""
    with subject.open() as env, subject.open() as other:
        splits = subject.splits(env)
        for split, source in splits.items():
            ids = [task.task_id for task in subject.tasks(source)]
            if ids != [task.task_id for task in subject.tasks(other.tasks(split))]:
                raise Nonconforming(
                    f"two instances have different tasks in split {split!r}: position i must be the same task in "
                    "every process, so draw tasks from a seed of their own"
                )
            if len(set(ids)) != len(ids):
                raise Nonconforming(
                    f"two tasks of split {split!r} share an id; groups and results go by task id"
                )
        if innermost(env)._given_tasks is None:
            try:
                env.tasks(_UNHEARD_OF_SPLIT)
            except ValueError:
                pass
            else:
                raise Nonconforming(
                    f"tasks({_UNHEARD_OF_SPLIT!r}) returned tasks: raise a ValueError that names the splits, or a "
                    "misspelt split trains on something else"
                )
    return ", ".join(f"{split} {len(source):,}" for split, source in splits.items())


def check_end(subject: Subject) -> str:
    """Stepping before reset and after the end raises `gymnasium.error.ResetNeeded`."""
    message = AssistantMessage(content="x")
    with subject.open() as env:
        for when in ("before reset()", "after the end"):
            if when == "after the end" and not play(env, policy_of(env, "oracle"), seed=0).done:
                raise Nonconforming("the oracle's episode does not end")
            try:
                env.step(message)
            except gymnasium.error.ResetNeeded:
                continue
            raise Nonconforming(
                f"step() {when} answers: raise gymnasium.error.ResetNeeded, as ToolEnv.step does"
            )
        env.reset(seed=0)
    return "ResetNeeded before reset() and after the end"


def check_vector(subject: Subject) -> str:
    """Vector environments run, and autoreset in the same step keeps the last observation and info."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vector = SyncVectorEnv([subject.make] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    try:
        observations, infos = vector.reset(seed=0)
        messages = [list(observation) for observation in observations]
        alone = [env.unwrapped for env in vector.envs]
        scripts = [policy_of(env, "oracle") for env in alone]  # type: ignore[arg-type]
        earned = np.zeros(2)
        for _ in range(64):
            actions = tuple(
                script(tuple(said), env.tools)  # type: ignore[attr-defined]
                for script, said, env in zip(scripts, messages, alone, strict=True)
            )
            observations, rewards, terminated, truncated, infos = vector.step(actions)
            earned += rewards
            for said, action, observation in zip(messages, actions, observations, strict=True):
                said += [action.to_message(), *observation]
            if np.any(terminated | truncated):
                break
        else:
            raise Nonconforming("the oracle's episode does not end in a vector environment")
        index = int(np.argmax(terminated | truncated))
        if "final_info" not in infos or infos["final_obs"][index] is None:
            raise Nonconforming("autoreset in the same step lost the last observation or info")
        if not math.isclose(float(earned[index]), 1.0, abs_tol=1e-6):
            raise Nonconforming(f"the oracle earns {earned[index]:g} in a vector environment")
    finally:
        vector.close()
    return "SyncVectorEnv of 2, autoreset in the same step"


POLICIES: tuple[PolicyName, ...] = ("oracle", "random")


def check_seeds(subject: Subject) -> str:
    """Two fresh instances give the same episode for the same seed, whatever was played before."""
    task_ids = set()
    with subject.open() as env:
        if env.spec is not None and env.spec.nondeterministic:
            return "registered as nondeterministic: not checked"
        num_tasks = max(len(source) for source in subject.splits(env).values())
        for seed in range(subject.num_tasks):
            for name in POLICIES:
                with subject.open() as fresh:
                    one = play(env, policy_of(env, name, seed), seed=seed)
                    other = play(fresh, policy_of(fresh, name, seed), seed=seed)
                task_ids.add(one.task_id)
                if where := difference(one, other):
                    raise Nonconforming(
                        f"seed {seed} gives two episodes under the {name} policy: {where}; "
                        "draw from self.np_random only, and keep nothing from the last episode"
                    )
    if len(task_ids) == 1 and num_tasks > 1 and subject.num_tasks > 4:
        raise Nonconforming("every seed gives the same task: let the seed draw it, as ToolEnv.reset does")
    return f"{subject.num_tasks} seeds, {len(POLICIES)} policies, 2 instances"


def check_replay(subject: Subject) -> str:
    """What says that it can be rebuilt answers the same actions in the same way, whatever was played in between."""
    with subject.open() as env, subject.open() as other:
        if not env.is_replayable:
            return "does not say is_replayable, so episodes never branch in it: not checked"
        for seed in range(subject.num_tasks):
            for name in POLICIES:
                trace = play(env, policy_of(env, name, seed), seed=seed)
                actions = [turn.action for turn in trace.turns]
                again = play(other, script_of(iter(actions).__next__), seed=seed, max_turns=len(actions))
                if where := difference(trace, again):
                    raise Nonconforming(
                        f"the actions of the {name} policy with seed {seed} are answered in two ways: {where}; "
                        "episodes cannot branch from such: let all follow from the seed, the task and the actions, or "
                        "do not say is_replayable"
                    )
    return f"{subject.num_tasks} seeds, {len(POLICIES)} policies, stepped again in another instance"


def check_global_random_state(subject: Subject) -> str:
    """Nothing draws from, or seeds, the generators that a whole process shares."""
    readers = _generators()
    before = {name: read() for name, read in readers.items()}
    with subject.open() as env:
        for name in POLICIES:
            play(env, policy_of(env, name, 0), seed=0)
    touched = [name for name, read in readers.items() if read() != before[name]]
    if touched:
        raise Nonconforming(
            f"an episode changed the global generator of {', '.join(touched)}: draw from self.np_random, and never "
            "seed what the whole process shares"
        )
    return ", ".join(readers)


def _generators() -> dict[str, Callable[[], object]]:
    def numpy_state() -> object:
        name, keys, *rest = np.random.get_state()
        return name, np.asarray(keys).tobytes(), tuple(rest)

    readers: dict[str, Callable[[], object]] = {"random": random.getstate, "numpy": numpy_state}
    if torch := sys.modules.get("torch"):
        readers["torch"] = lambda: torch.get_rng_state().numpy().tobytes()
    return readers


def check_append_only(subject: Subject) -> str:
    """An observation is only what is new; neither it nor an action changes later, and nobody's copy is shared."""
    for seed in range(min(subject.num_tasks, 4)):
        for name in POLICIES:
            with subject.open() as env:
                _check_kept(env, name, seed)
    with subject.open() as env:
        task = env.tasks(next(iter(subject.splits(env))))[0]
        first, _ = env.reset(seed=0, options={"task": task})
        kept = copy.deepcopy(first)
        for message in first:
            message["content"] = "changed by whoever got it"
        again, _ = env.reset(seed=0, options={"task": task})
        if again != kept:
            raise Nonconforming(
                "changing a returned observation changed the task: return copies of messages, as ToolEnv does"
            )
    return "earlier observations and actions stay as they were"


def _check_kept(env: PlayedEnv, name: PolicyName, seed: int) -> None:
    script = policy_of(env, name, seed)
    said: list[tuple[object, object]] = []

    def remembering(messages: object, tools: object) -> AssistantMessage:
        action = script(messages, tools)  # type: ignore[arg-type]
        said.append((action, copy.deepcopy(action)))
        said.extend((message, copy.deepcopy(message)) for message in messages)  # type: ignore[attr-defined]
        return action

    trace = play(env, remembering, seed=seed)
    env.reset(seed=seed + 1)
    for kept, as_it_was in said:
        if kept != as_it_was:
            raise Nonconforming(
                f"what was said on task {trace.task_id!r} changed later, from {as_it_was!r} to {kept!r}: "
                "build new messages, and never change one that was returned or received"
            )
    _check_new(trace)


def _check_new(trace: Trace) -> None:
    """Every role hears each thing once; what begins its conversation is new to a role that has not acted yet."""
    begun = {trace.role: trace.first}
    for number, turn in enumerate(trace.turns, start=1):
        role = turn.info.get("role", "")
        if role not in begun:
            begun[role] = turn.observation
            continue
        first, roles = begun[role], [message["role"] for message in turn.observation]
        resent = len(first) > 0 and turn.observation[: len(first)] == first
        if resent or "assistant" in roles or _is_system(first[:1], turn.observation):
            raise Nonconforming(
                f"the observation of turn {number} on task {trace.task_id!r} says again what was said before: "
                "return only the new messages, the history belongs to the agent"
            )


def _is_system(first: tuple[Message, ...], observation: tuple[Message, ...]) -> bool:
    """Whether the system prompt comes again."""
    return bool(first) and first[0]["role"] == "system" and first[0] in observation


NUM_AT_ONCE = 8


def check_concurrency(subject: Subject) -> str:
    """Episodes in turn and in threads, each on an instance of its own, give what each gives alone."""
    count = _how_many(subject)
    alone: list[Trace] = []
    with subject.open() as env:
        nondeterministic = env.spec is not None and env.spec.nondeterministic
        for seed in range(min(count, 64)):
            alone.append(play(env, policy_of(env, _policy(seed), seed), seed=seed))
    together = asyncio.run(_together(subject, count))
    if nondeterministic:
        return f"{count} episodes at once; registered as nondeterministic, so not compared"
    for seed, trace in enumerate(together):
        if where := difference(alone[seed % len(alone)], trace):
            raise Nonconforming(
                f"an episode goes another way when {count} are played at the same time: {where}; keep what belongs "
                "to an episode on the instance, share read-only things only, and guard what threads share"
            )
    return f"{count} episodes at once, each as if alone"


def _policy(seed: int):  # type: ignore[no-untyped-def]
    return "random" if seed % 2 else "oracle"


def _how_many(subject: Subject) -> int:
    """As many episodes as asked for, or as the budget allows, but never fewer than 16."""
    started = time.perf_counter()
    for seed in range(3):
        with subject.open() as env:
            play(env, policy_of(env, _policy(seed), seed), seed=seed)
    seconds = (time.perf_counter() - started) / 3
    return max(min(16, subject.num_episodes), min(subject.num_episodes, int(4 * subject.budget_s / seconds)))


async def _together(subject: Subject, count: int) -> list[Trace]:
    """`count` episodes of 64 seeds at most, all begun before any ends."""
    with contextlib.ExitStack() as stack:
        envs: list[PlayedEnv] = [stack.enter_context(subject.open()) for _ in range(count)]
        slots = asyncio.Semaphore(NUM_AT_ONCE)
        return await asyncio.gather(
            *(
                play_async(env, policy_of(env, _policy(seed), seed), seed=seed, slots=slots)
                for seed, env in ((index % 64, env) for index, env in enumerate(envs))
            )
        )
