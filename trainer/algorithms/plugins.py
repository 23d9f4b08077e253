"""From a section of the config to the function that it names: a registered one, or a plug-in of the user's own.

Nothing here needs torch, so that a plug-in's signature is checked before anything starts.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from polyturn.configs.errors import ConfigError
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.configs.schema.section import Plugin, Section
from polyturn.envs.plugins import load_object
from polyturn.trainer.algorithms.protocols import Signature
from polyturn.trainer.algorithms.registry import (
    ADVANTAGES,
    CORRECTIONS,
    POLICY_LOSSES,
    REDUCERS,
    REWARD_POSTPROCESSORS,
    Registry,
)

P = TypeVar("P")


def bind(registry: Registry[P], config: Section) -> P:
    """The function that a section names by its `kind`, with the section bound, to be called as its protocol says.

    Raises:
        ValueError: there is none of that name, or it is a plug-in that `load_plugin` refuses.
    """
    if isinstance(config, Plugin):
        return cast(P, _loaded_once(registry, config.target, json.dumps(config.options)))
    entry = registry[getattr(config, "kind")]  # noqa: B009 - a Section in general has none
    function = functools.partial(entry.function, config=config) if entry.config else entry.function
    return cast(P, function)


@functools.cache
def _loaded_once(registry: Registry[Any], target: str, options: str) -> Any:
    """A plug-in is bound for every micro-batch, but an object of a class is made once in a process."""
    return load_plugin(registry, target, json.loads(options))


def load_plugin(registry: Registry[P], target: str, options: Mapping[str, Any] | None = None) -> P:
    """The function, or an object of the class, that `module:name` or `path/to/file.py:name` names.

    A function gets the options with every call, as keyword arguments; a class is made with them.

    Raises:
        ValueError: it cannot be loaded, or cannot be called as the registry's functions are; the one sentence shows
            the right signature.
    """
    options = dict(options or {})
    signature = registry.signature
    right = f"a {registry.what} is `{signature.text}`"
    try:
        found = load_object(target)
    except ValueError as error:
        raise ValueError(f"{error}; {right}") from error
    if inspect.isclass(found):
        as_method = f"{right}, in a class as the method __call__(self, {', '.join(signature.arguments)})"
        _bind(found, target, (), options, f"the options of the class must fit its constructor; {as_method}")
        made = found(**options)
        if not callable(made):
            raise ValueError(f"{target}: its objects cannot be called; {as_method}")
        _check(made, target, signature, {}, as_method)
        return cast(P, made)
    if not callable(found):
        raise ValueError(f"{target} is of type {type(found).__name__}, not a function or a class; {right}")
    _check(found, target, signature, options, right)
    return cast(P, functools.partial(found, **options) if options else found)


def check_plugins(config: AlgorithmConfig) -> None:
    """Load all plug-ins that an algorithm names. Raises ConfigError with a sentence for the first that is wrong."""
    places: tuple[tuple[str, Registry[Any], Section], ...] = (
        ("reward_shaping", REWARD_POSTPROCESSORS, config.reward_shaping),
        ("advantage", ADVANTAGES, config.advantage),
        ("loss", POLICY_LOSSES, config.loss),
        ("reduction", REDUCERS, config.reduction),
        *((f"corrections.{i}", CORRECTIONS, section) for i, section in enumerate(config.corrections)),
    )
    for key, registry, section in places:
        if isinstance(section, Plugin):
            try:
                load_plugin(registry, section.target, section.options)
            except ValueError as error:
                raise ConfigError(f"trainer.algorithm.{key}: {error}") from error


def _check(function: Any, target: str, signature: Signature, options: dict[str, Any], right: str) -> None:
    """Raise `ValueError` unless the function takes the protocol's arguments in their order, and the options."""
    found = _bind(function, target, signature.arguments, options, right)
    names = [
        parameter.name
        for parameter in found.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ][: len(signature.arguments)]
    for name, expected in zip(names, signature.arguments, strict=False):
        # Any other name is a matter of taste; one of ours in another place is a mistake that would run.
        if name != expected and name in signature.arguments:
            raise ValueError(f"{target}{found}: {name!r} stands where {expected!r} is passed; {right}")
    result = found.return_annotation
    name = getattr(result, "__name__", str(result)) if result is not found.empty else ""
    if name in ("None", "NoneType", "str", "bool", "int", "float"):
        raise ValueError(f"{target}{found} returns {name} where {signature.result} is expected; {right}")


def _bind(
    function: Any, target: str, arguments: tuple[str, ...], options: dict[str, Any], right: str
) -> inspect.Signature:
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{target}: its signature cannot be read ({error}); {right}") from error
    try:
        found.bind(*arguments, **options)
    except TypeError as error:
        raise ValueError(f"{target}{found} cannot be called: {error}; {right}") from error
    return found
