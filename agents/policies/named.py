"""Policies by their names: the one place where the command line and evaluations find them.

oracle             the environment's scripted oracle
random             the environment's random policy
human              a person at the terminal
scripted:TARGET    a function of one's own, by `module:name` or `path/to/file.py:name`
openai:URL         a model behind an OpenAI-compatible endpoint
model              the model that an evaluation serves
best_of            the best of several samples of another of these
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from polyturn.agents.policies.best_of import BestOfEpisodes, BestOfTurns, make_choice
from polyturn.agents.policies.episodes import MessageEpisodes, NamedPolicy
from polyturn.agents.policies.human import HumanPolicy
from polyturn.agents.policies.openai import OpenAIPolicy
from polyturn.agents.policies.scripted import SCRIPT, ScriptedPolicy
from polyturn.agents.policy import MessagePolicy
from polyturn.configs.errors import did_you_mean
from polyturn.configs.schema.endpoint import ChatEndpoint
from polyturn.configs.schema.policies import BestOf
from polyturn.configs.schema.section import Section
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.plugins import load_plugin
from polyturn.tools.chat.client import ChatClient

Options = TypeVar("Options", bound=Section)
NAMES = ("oracle", "random", "human", "scripted:TARGET", "openai:URL", "model", "best_of")


def make_policy(
    name: str, options: Mapping[str, Any] | None = None, *, model: NamedPolicy | None = None
) -> NamedPolicy:
    """The policy of that name. Nothing is sent or started yet.

    Args:
        options: Of `scripted`: keyword arguments; of `openai`: those of `ChatEndpoint` without the url; of `best_of`:
            those of `BestOf`. The others have none.
        model: What is called `model`; None: nothing is served.

    Raises:
        ValueError: there is none of that name, or not with these options; one sentence says what is right.
    """
    options = dict(options or {})
    kind, colon, target = name.partition(":")
    if kind == "scripted" and target:
        return _scripted(target, options)
    if kind == "openai" and target:
        return _openai(target, options)
    if kind == "best_of" and not colon:
        return _best_of(_read(BestOf, options, "best_of"), model)
    if name in (*_PLAIN, "model") and options:
        raise ValueError(f"the policy {name!r} has no options, so none of the name {next(iter(options))!r}")
    if name == "model":
        if model is None:
            raise ValueError("the policy 'model' is one that is served, and nothing is served here")
        return model
    if name in _PLAIN:
        return MessageEpisodes(name, _PLAIN[name], max_at_once=1 if name == "human" else None)
    if kind in ("scripted", "openai"):
        what = "module:name or path/to/file.py:name" if kind == "scripted" else "its URL, up to and with /v1"
        raise ValueError(f"the policy {kind!r} is written with {what}, as {kind}:...")
    near = did_you_mean(kind, [known.partition(":")[0] for known in NAMES])
    raise ValueError(f"there is no policy {name!r}{near}; there are {', '.join(NAMES)}")


def serves_model(name: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a policy is, or is made of, the model that is served. Raises `ValueError` as `make_policy` does."""
    if name != "best_of":
        return name == "model"
    settings = _read(BestOf, dict(options or {}), "best_of")
    return serves_model(settings.policy, settings.options)


def _oracle(env: PlayedEnv, seed: int) -> MessagePolicy:
    del seed
    if env.oracle is None:
        raise ValueError(f"{env.env_id} has no scripted oracle")
    return ScriptedPolicy(env.oracle)


def _random(env: PlayedEnv, seed: int) -> MessagePolicy:
    return ScriptedPolicy(env.random_policy(seed))


def _human(env: PlayedEnv, seed: int) -> MessagePolicy:
    del env, seed
    return HumanPolicy()


_PLAIN: Mapping[str, Callable[[PlayedEnv, int], MessagePolicy]] = {
    "oracle": _oracle,
    "random": _random,
    "human": _human,
}


def _scripted(target: str, options: dict[str, Any]) -> MessageEpisodes:
    def make(env: PlayedEnv, seed: int) -> MessagePolicy:
        # A class is made anew for each episode, so that it may keep what it has done.
        del env, seed
        return ScriptedPolicy(load_plugin(SCRIPT, target, options))

    load_plugin(SCRIPT, target, options)
    return MessageEpisodes(f"scripted:{target}", make)


def _openai(url: str, options: dict[str, Any]) -> MessageEpisodes:
    endpoint = _read(ChatEndpoint, {"url": url, **options}, "openai")
    client = ChatClient(endpoint)

    def make(env: PlayedEnv, seed: int) -> MessagePolicy:
        del env, seed
        return OpenAIPolicy(client)

    return MessageEpisodes(
        f"{endpoint.model} at {client.where}",
        make,
        max_at_once=endpoint.max_concurrent_requests,
        client=client,
    )


def _best_of(settings: BestOf, model: NamedPolicy | None) -> NamedPolicy:
    inner = make_policy(settings.policy, settings.options, model=model)
    choice = make_choice(settings)
    label = f"best of {settings.num_samples} {settings.per}s by {choice.label} of {inner.label}"
    if settings.per == "episode":
        return BestOfEpisodes(inner, settings.num_samples, choice, label=label)
    if not isinstance(inner, MessageEpisodes):
        raise ValueError(
            f"best_of: per 'turn' takes a policy that speaks in messages, and {settings.policy!r} does not; take per "
            "'episode'"
        )
    make = inner.make

    def make_best(env: PlayedEnv, seed: int) -> MessagePolicy:
        return BestOfTurns(make(env, seed), settings.num_samples, choice)

    most = inner.max_at_once
    if most is not None and most < settings.num_samples:
        raise ValueError(
            f"best_of: {settings.num_samples} samples of a turn are asked for at once, and {settings.policy!r} takes "
            f"{most}; raise its max_concurrent_requests, or take per 'episode'"
        )
    return MessageEpisodes(
        label,
        make_best,
        max_at_once=None if most is None else most // settings.num_samples,
        client=inner.client,
    )


def _read(section: type[Options], options: dict[str, Any], what: str) -> Options:
    """The options as a section of the config. Raises `ValueError`."""
    try:
        return section.model_validate(options)
    except ValidationError as error:
        # A name that is not known first: it may be what another lacks.
        first = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in first["loc"])
        near = did_you_mean(where, section.model_fields) if first["type"] == "extra_forbidden" else ""
        raise ValueError(f"{what}: {where}: {first['msg']}{near}") from error
