"""From what a config or a row says of a reward to the reward, and whether a function can be one."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from polyturn.configs.errors import did_you_mean
from polyturn.configs.schema.tasks import (
    EnvironmentReward,
    FunctionReward,
    GroupRewardConfig,
    RemoteReward,
    RewardChoice,
    RubricReward,
    RuleReward,
)
from polyturn.envs.messages import GROUP_SIGNATURE, SIGNATURE, Reward
from polyturn.envs.plugins import load_object
from polyturn.envs.rewards.rubric import BUILTIN, EnvironmentGrade, GroupPart, Part, Rubric
from polyturn.envs.rewards.rules import call_with_options, make_rule


def load_reward(target: str, options: Mapping[str, Any] | None = None, *, of_groups: bool = False) -> Any:
    """The function, or an object of the class, that `module:name` or `file.py:name` names.

    A function gets the options with every call, as keyword arguments; a class is made with them.

    Raises:
        ValueError: it cannot be loaded, or cannot be called as a reward; the message shows the right signature.
    """
    found = load_object(target)
    options = options or {}
    if inspect.isclass(found):
        made = call_with_options(found, options, what=target)
        if not callable(made):
            raise ValueError(
                f"{target}: its objects cannot be called; a reward is\n{_right(of_groups, method=True)}"
            )
        check_signature(made, name=target, of_groups=of_groups, method=True)
        return made
    if not callable(found):
        raise ValueError(
            f"{target} is a {type(found).__name__}, not a function or a class; a reward is\n{_right(of_groups)}"
        )
    check_signature(found, options, name=target, of_groups=of_groups)
    return functools.partial(found, **options) if options else found


def check_signature(
    function: Any,
    options: Mapping[str, Any] | None = None,
    *,
    name: str,
    of_groups: bool = False,
    method: bool = False,
) -> None:
    """Raise `ValueError` unless `function(view, **options)` is a call that it takes."""
    options = options or {}
    right = _right(of_groups, method=method)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: its signature cannot be read ({error}); a reward is\n{right}") from error
    try:
        signature.bind(None, **options)
    except TypeError as error:
        raise ValueError(
            f"{name}{signature} cannot be called as a reward: {error}; a reward is\n{right}"
        ) from error
    returns = _return_type(function)
    wrong = (str, bytes, type(None)) if not of_groups else (str, bytes, float, int, bool, type(None))
    if returns in wrong or (not of_groups and typing.get_origin(returns) in (list, tuple)):
        shown = inspect.formatannotation(returns)
        raise ValueError(f"{name}{signature} returns {shown}, which is no reward; a reward is\n{right}")


def _return_type(function: Any) -> Any:
    """The annotated return type; `inspect.Signature.empty` where there is none or it cannot be evaluated."""
    plain = inspect.unwrap(function)
    if not inspect.isfunction(plain) and not inspect.ismethod(plain):
        plain = type(plain).__call__
    try:
        hints = typing.get_type_hints(plain)
    except (NameError, TypeError, AttributeError):
        return inspect.Signature.empty
    return hints.get("return", inspect.Signature.empty)


def _right(of_groups: bool, *, method: bool = False) -> str:
    signature = GROUP_SIGNATURE if of_groups else SIGNATURE
    if method:
        signature = signature.replace("def reward(", "def __call__(self, ")
    return f"    {signature}\nor the same with `async def`"


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
        return load_reward(config.target, config.options)
    if isinstance(config, RemoteReward):
        return _remote(config)
    assert isinstance(config, RubricReward)
    parts = []
    for part in config.parts:
        try:
            parts.append(Part(name=part.name, weight=part.weight, reward=make_reward(part.reward)))
        except ValueError as error:
            raise ValueError(f"part {part.name!r}: {error}") from error
    return Rubric(parts)


def make_group_rewards(configs: Sequence[GroupRewardConfig]) -> tuple[GroupPart, ...]:
    """The group rewards of a run. Raises `ValueError` as `make_reward` does."""
    names = [config.name for config in configs]
    if len(set(names)) != len(names):
        raise ValueError(f"two group rewards have the name {next(n for n in names if names.count(n) > 1)!r}")
    return tuple(
        GroupPart(name=config.name, weight=config.weight, reward=_group_function(config))
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
        return load_reward(config.target, config.options, of_groups=True)
    if config.target not in BUILTIN:
        near = did_you_mean(config.target, BUILTIN) or f"; there are {', '.join(BUILTIN)}, or module:name"
        raise ValueError(f"there is no group reward {config.target!r}{near}")
    function = BUILTIN[config.target]
    bound = functools.partial(function, **config.options)
    check_signature(function, config.options, name=config.target, of_groups=True)
    return bound


@functools.lru_cache(maxsize=32)
def _remote(config: RemoteReward) -> Reward:
    from polyturn.envs.rewards.remote import RemoteGrader

    return RemoteGrader(config)
