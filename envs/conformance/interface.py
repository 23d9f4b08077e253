"""Checks of the interface: Gymnasium's own, spaces, splits, vector environments, and steps outside an episode."""

from __future__ import annotations

import math
import warnings

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from polyturn.envs.conformance.episodes import Trace, play, policy_of
from polyturn.envs.conformance.findings import Nonconforming, Subject
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.tool_env import ToolEnv

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
    told = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    if told := [text for text in told if _NO_SPEC not in text]:
        raise Nonconforming(f"gymnasium.utils.env_checker.check_env warns: {told[0]}")
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


def _check_trace(env: ToolEnv, trace: Trace) -> None:
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
        if env._given_tasks is None:
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
