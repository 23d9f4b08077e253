"""Registration: Gymnasium's registry, filled also by the entry points of installed packages.

A package offers environments with an entry point of the group `polyturn.envs`, a function without arguments that calls
`register`. `make` and `list_environments` load these first; `gymnasium.make` sees the built-in environments in every
program that imports `polyturn`, and those of other packages after `load_plugins()`.
"""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import gymnasium

from polyturn.envs.builtin import BUILTIN, EnvironmentInfo
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.tool_env import ToolEnv
from polyturn.envs.wrappers import WrappedEnv

ENTRY_POINT_GROUP = "polyturn.envs"


# Gymnasium's own registry has no room for descriptions. The built-in ones are registered with it by `polyturn` itself.
_registered = {info.env_id: info for info in BUILTIN}


def register(
    env_id: str,
    entry_point: str | Callable[..., gymnasium.Env[Any, Any]],
    *,
    description: str = "",
    kwargs: dict[str, Any] | None = None,
    nondeterministic: bool = False,
) -> None:
    """Register an environment, with Gymnasium too.

    Args:
        env_id: `namespace/Name-v0`.
        entry_point: A `ToolEnv` class, or a function that makes one and may wrap it; or `module:name` of either, which
            is imported at first use.
        description: One line for `polyturn env list`.
        kwargs: Arguments of the constructor that `make` may override.
        nondeterministic: Whether the same seed and actions may give different observations.

    Raises:
        ValueError: the id is taken by another environment, or is not of that form.
    """
    name = (
        entry_point
        if isinstance(entry_point, str)
        else f"{entry_point.__module__}:{entry_point.__qualname__}"
    )
    info = EnvironmentInfo(env_id=env_id, entry_point=name, description=description, kwargs=kwargs or {})
    if _registered.get(env_id) == info:
        return
    if env_id in gymnasium.registry:
        taken = gymnasium.registry[env_id].entry_point
        raise ValueError(f"the environment id {env_id!r} is already registered for {taken}")
    try:
        gymnasium.register(
            env_id,
            entry_point,
            kwargs=kwargs or {},
            nondeterministic=nondeterministic,
            order_enforce=False,
        )
    except gymnasium.error.Error as error:
        raise ValueError(f"cannot register {env_id!r}: {error}") from error
    _registered[env_id] = info


def make(env_id: str, /, **kwargs: Any) -> PlayedEnv:
    """The environment of that id, a `ToolEnv`; `kwargs` go to its constructor.

    One with Gymnasium's wrappers around it, such as `max_episode_steps=` adds, comes as a `WrappedEnv`.

    Raises:
        ValueError: there is none, or it is no `ToolEnv`, or it does not take these arguments.
    """
    find(env_id)
    try:
        env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    except TypeError as error:
        raise ValueError(f"cannot make {env_id!r}: {error}") from error
    if isinstance(env, ToolEnv):
        return env
    if isinstance(env.unwrapped, ToolEnv):
        return WrappedEnv(env)
    raise ValueError(
        f"{env_id!r} is a {type(env.unwrapped).__name__}, not a polyturn.ToolEnv; "
        "polyturn/TextEnv-v0 plays environments of texts and numbers"
    )


def find(env_id: str) -> EnvironmentInfo:
    """What is registered under that id, with Polyturn or with Gymnasium alone.

    Raises:
        ValueError: nothing; the text names the nearest id.
    """
    load_plugins()
    if env_id in _registered:
        return _registered[env_id]
    if env_id in gymnasium.registry:
        entry_point = str(gymnasium.registry[env_id].entry_point)
        return EnvironmentInfo(env_id=env_id, entry_point=entry_point, description="")
    near = difflib.get_close_matches(env_id, _registered, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(_registered)) or 'none'}"
    raise ValueError(f"there is no environment {env_id!r}; {hint}")


def list_environments() -> tuple[EnvironmentInfo, ...]:
    """All environments that were registered here, by id."""
    load_plugins()
    return tuple(_registered[env_id] for env_id in sorted(_registered))


@functools.cache
def load_plugins() -> None:
    """Let every installed package register its environments; once per process.

    A package whose registration fails is named in a warning, and does not keep the others from use.
    """
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()()
        except Exception as error:  # noqa: BLE001  another package's code may fail in any way
            package = entry_point.dist.name if entry_point.dist else entry_point.value
            what = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"the environments of package {package!r} could not be registered: {what}", stacklevel=2
            )
