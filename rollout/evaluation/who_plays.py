"""Who plays an evaluation, brought up once for all entries of a suite: engines where a model is served."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyturn.agents.policies.episodes import NamedPolicy
from polyturn.agents.policies.named import make_policy
from polyturn.configs.schema.run import EvaluatedTasks, RunConfig
from polyturn.rollout.engines.groups import ServedGroups, with_urls
from polyturn.rollout.engines.launch import Engines, LocalLauncher
from polyturn.rollout.engines.server import EngineSpec
from polyturn.rollout.factory import build_player, evaluation_sampling, open_policy
from polyturn.rollout.named_play import ModelEpisodes, named_player
from polyturn.rollout.player import EpisodePlayer

MODEL = "model"
SGLANG = "sglang:"
"""Begins the name of a policy whose tokens an SGLang server samples that others started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WhoPlays:
    """A policy by its name, and the model that it is made of."""

    name: str
    """As `agents.policies.named.make_policy` takes it; `model` where the engines' tokens are played as they come."""
    options: Mapping[str, Any] = field(default_factory=dict)
    model_path: Path | None = None
    """The Hugging Face directory of the model; where `url` serves it, of its tokenizer alone. None: no model plays."""
    url: str | None = None
    """An SGLang server that serves it already; None: engines are started."""


def served_elsewhere(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any], str | None]:
    """A policy whose model an SGLang server serves, told as one of `model`, and where; None: it is of no such server.

    Raises `ValueError` where the name has no address.
    """
    if name == "best_of":
        inner, inner_options, url = served_elsewhere(
            str(options.get("policy", "")), options.get("options") or {}
        )
        if url is None:
            return name, dict(options), None
        return name, {**options, "policy": inner, "options": inner_options}, url
    if not name.startswith(SGLANG):
        return name, dict(options), None
    url = name.removeprefix(SGLANG).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{name!r} has no address; write it as in {SGLANG}http://127.0.0.1:30000")
    return MODEL, dict(options), url


@contextmanager
def served(
    configs: Sequence[RunConfig], who: WhoPlays, *, log_directory: Path
) -> Iterator[tuple[list[RunConfig], str | list[str] | None]]:
    """Judges and engines of a suite, started once and stopped at the end.

    What is given are the configs with the judges' addresses, and where generation is asked for; None: nowhere.

    Raises:
        EngineError: an engine did not come up.
        ValueError: there is no place for one.
    """
    first = configs[0]
    with ExitStack() as stack:
        judges = stack.enter_context(ServedGroups(first, log_directory=log_directory, judges_alone=True))
        at_judges = [with_urls(config, judges.urls) for config in configs]
        if who.model_path is None:
            yield at_judges, None
        elif who.url is not None:
            yield at_judges, [who.url]
        else:
            spec = EngineSpec.from_config(first, model_path=who.model_path, log_directory=log_directory)
            engines = stack.enter_context(Engines(spec, LocalLauncher(spec)))
            yield at_judges, engines.request_urls


@dataclass(frozen=True, kw_only=True, slots=True)
class Playable:
    """What plays the tasks of one config."""

    player: EpisodePlayer
    policy: Any
    """What the player's episodes are played with."""
    label: str
    """For people."""


@asynccontextmanager
async def opened(
    configs: Sequence[RunConfig], who: WhoPlays, url: str | list[str] | None
) -> AsyncIterator[list[Playable]]:
    """What plays each of the configs, with connections that all of them share.

    Raises `ValueError` where environment, tasks, rewards, tokenizer or policy cannot be had.
    """
    async with AsyncExitStack() as stack:
        fleet = None
        if url is not None:
            assert who.model_path is not None, "who asks engines has a tokenizer"
            fleet = await stack.enter_async_context(
                open_policy(configs[0], model_path=who.model_path, url=url)
            )
        playables = []
        for config in configs:
            if fleet is not None and who.name == MODEL:
                playable = _tokens(config, who, fleet)
            else:
                named = _named(config, who, fleet)
                stack.push_async_callback(named.aclose)
                player = named_player(config, max_at_once=named.max_at_once)
                playable = Playable(player=player, policy=named, label=named.label)
            stack.enter_context(closing(playable.player))
            await stack.enter_async_context(playable.player.serves)
            playables.append(playable)
        yield playables


def _tokens(config: RunConfig, who: WhoPlays, fleet: Any) -> Playable:
    assert who.model_path is not None
    settings = config.evaluation
    player = build_player(
        config, model_path=who.model_path, split=settings.split, sampling=evaluation_sampling(settings)
    )
    return Playable(player=player, policy=fleet, label=MODEL)


def _named(config: RunConfig, who: WhoPlays, fleet: Any) -> NamedPolicy:
    model = None
    if fleet is not None:
        assert who.model_path is not None
        sampling = evaluation_sampling(config.evaluation)
        model = ModelEpisodes(config, model_path=who.model_path, policy=fleet, sampling=sampling)
    return make_policy(who.name, sampled(who.name, who.options, config.evaluation), model=model)


def sampled(name: str, options: Mapping[str, Any], settings: EvaluatedTasks) -> dict[str, Any]:
    """The options of a policy, with the sampling of the entry where they say nothing of it.

    An endpoint's temperature is its option `temperature`, and what it may be asked beside, its fields `request`.
    """
    if name == "best_of":
        inner = sampled(str(options.get("policy", "")), options.get("options") or {}, settings)
        return {**options, **({"options": inner} if inner else {})}
    if not name.startswith("openai:"):
        return dict(options)
    fields = {
        key: getattr(settings, key)
        for key, off in (("top_p", 1.0), ("top_k", -1), ("min_p", 0.0))
        if getattr(settings, key) != off
    }
    request = {**fields, **(options.get("request") or {})}
    return {"temperature": settings.temperature, **options, **({"request": request} if request else {})}
