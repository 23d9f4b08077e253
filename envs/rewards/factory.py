"""From what a config or a row says of a reward to the reward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import NoneType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from polyturn.configs.errors import did_you_mean
from polyturn.configs.schema.tasks import (
    EnvironmentReward,
    FunctionReward,
    GroupRewardConfig,
    JudgeReward,
    RemoteReward,
    RewardChoice,
    RubricReward,
    RuleReward,
)
from polyturn.envs.messages import Reward
from polyturn.envs.plugins import Signature, check_signature, load_plugin
from polyturn.envs.rewards.rubric import BUILTIN, Criterion, EnvironmentGrade, GroupCriterion, Rubric
from polyturn.envs.rewards.rules import make_rule

REWARD = Signature(
    what="reward",
    arguments=("episode",),
    text="def reward(episode: EpisodeView) -> float | Mapping[str, float]",
    may_be_async=True,
    wrong_results=(str, bytes, list, tuple, NoneType),
)
GROUP_REWARD = Signature(
    what="group reward",
    arguments=("episodes",),
    text="def reward(episodes: Sequence[EpisodeView]) -> Sequence[float | Mapping[str, float]]",
    may_be_async=True,
)
_CHOICE: TypeAdapter[Any] = TypeAdapter(RewardChoice)


def make_reward(config: RewardChoice) -> Reward:
    """The reward that a config describes; equal remote ones share their connections.

    Raises:
        ValueError: it cannot be had: a name, an option, a file or a signature is wrong.
    """
    if isinstance(config, EnvironmentReward):
        return EnvironmentGrade()
    if isinstance(config, RuleReward):
        return make_rule(config.name, config.options)
    if isinstance(config, FunctionReward):
        return load_plugin(REWARD, config.target, config.options)
    if isinstance(config, RemoteReward):
        return _remote(config)
    if isinstance(config, JudgeReward):
        return _judge(config.model_dump_json())
    assert isinstance(config, RubricReward)
    parts = []
    for part in config.parts:
        try:
            parts.append(Criterion(name=part.name, weight=part.weight, reward=make_reward(part.reward)))
        except ValueError as error:
            raise ValueError(f"part {part.name!r}: {error}") from error
    return Rubric(parts)


def make_group_rewards(configs: Sequence[GroupRewardConfig]) -> tuple[GroupCriterion, ...]:
    """The group rewards of a run. Raises `ValueError` as `make_reward` does."""
    names = [config.name for config in configs]
    if len(set(names)) != len(names):
        raise ValueError(f"two group rewards have the name {next(n for n in names if names.count(n) > 1)!r}")
    return tuple(
        Criterion(name=config.name, weight=config.weight, reward=_group_function(config))
        for config in configs
    )


def read_reward(given: Any) -> Reward:
    """A reward from the name of a rule, or from a mapping as the section `reward`, whose `kind` may be left out of a
    rule. It may load code: not for data that nobody vouches for. Raises `ValueError`.
    """
    if isinstance(given, str):
        given = {"kind": "rule", "name": given}
    if isinstance(given, dict) and "kind" not in given and "name" in given:
        given = {"kind": "rule", **given}
    try:
        config = _CHOICE.validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from error
    return make_reward(config)


def _group_function(config: GroupRewardConfig) -> Any:
    if ":" in config.target:
        return load_plugin(GROUP_REWARD, config.target, config.options)
    if config.target not in BUILTIN:
        near = did_you_mean(config.target, BUILTIN) or f"; there are {', '.join(BUILTIN)}, or module:name"
        raise ValueError(f"there is no group reward {config.target!r}{near}")
    function = BUILTIN[config.target]
    check_signature(GROUP_REWARD, function, config.target, config.options)
    return functools.partial(function, **config.options)


@functools.lru_cache(maxsize=32)
def _remote(config: RemoteReward) -> Reward:
    from polyturn.envs.rewards.remote import RemoteGrader

    return RemoteGrader(config)


@functools.lru_cache(maxsize=32)
def _judge(config: str) -> Reward:
    from polyturn.envs.rewards.judge import JudgeGrader

    return JudgeGrader(JudgeReward.model_validate_json(config))
