"""Whether a function can be a reward, found out before anything starts."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from polyturn.envs.plugins import load_object
from polyturn.envs.rewards.rules import call_with_options
from polyturn.envs.rewards.types import GROUP_SIGNATURE, SIGNATURE


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
