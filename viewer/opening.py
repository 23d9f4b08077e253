"""The viewer's parts, put together as a command asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from polyturn.agents.policies.episodes import MessageEpisodes
from polyturn.agents.policies.named import make_policy
from polyturn.configs.addresses import bind_address
from polyturn.configs.errors import ConfigError
from polyturn.envs.plugins import Signature, load_plugin
from polyturn.viewer.answers import Answers
from polyturn.viewer.blocks import checked
from polyturn.viewer.catalogue import Catalogue
from polyturn.viewer.playing_on import PlayingOn
from polyturn.viewer.renderers import Renderer
from polyturn.viewer.server import ViewerServer

RENDERER = Signature(
    what="renderer",
    arguments=("message",),
    text="def show(message: Mapping[str, Any]) -> list[dict[str, Any]]",
)


def open_answers(directories: Sequence[Path], *, renderers: Sequence[str] = ()) -> Answers:
    """What answers about these runs.

    Args:
        renderers: `ENV_ID=module:name` or `ENV_ID=path/to/file.py:name` each.

    Raises:
        ConfigError: a renderer cannot be loaded, or there is no run at all; one sentence.
    """
    catalogue = Catalogue(directories)
    if not catalogue.runs():
        raise ConfigError(
            f"{'; '.join(catalogue.problems)}. Name the directory of a run, or the folder that `output_dir` names"
        )
    return Answers(catalogue, renderers=dict(_renderer(text) for text in renderers))


def open_viewer(
    directories: Sequence[Path],
    *,
    host: str,
    port: int,
    policy_url: str | None = None,
    policy_options: Mapping[str, Any] | None = None,
    renderers: Sequence[str] = (),
) -> ViewerServer:
    """The server, which does not listen yet. Raises `ConfigError` for what cannot be had."""
    answers = open_answers(directories, renderers=renderers)
    try:
        address = bind_address(host)
        playing_on = None
        if policy_url is not None:
            policy = cast(MessageEpisodes, make_policy(f"openai:{policy_url}", policy_options))
            playing_on = PlayingOn(answers, policy)
    except ValueError as error:
        raise ConfigError(f"command line: {error}") from error
    return ViewerServer(answers, host=address, port=port, playing_on=playing_on)


def _renderer(text: str) -> tuple[str, Renderer]:
    env_id, is_pair, target = text.partition("=")
    if not is_pair or not env_id or not target:
        raise ConfigError(f"command line: --renderer is written ENV_ID=module:name, not '{text}'")
    try:
        return env_id, checked(load_plugin(RENDERER, target))
    except ValueError as error:
        raise ConfigError(f"command line: --renderer: {error}") from error
