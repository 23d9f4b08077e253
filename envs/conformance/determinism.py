"""Checks that an episode follows from its seed and its actions, and that what was said stays said."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable

import numpy as np

from polyturn.envs.conformance.episodes import PolicyName, Trace, difference, play, policy_of
from polyturn.envs.conformance.findings import Nonconforming, Subject
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.envs.tool_env import ToolEnv

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


def _check_kept(env: ToolEnv, name: PolicyName, seed: int) -> None:
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
    """Every role is told each thing once; what begins its conversation is new to a role that has not acted yet."""
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
