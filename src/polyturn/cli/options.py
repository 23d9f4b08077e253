"""Options that several commands take, and how `key=value` is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from polyturn.cli.completion import complete_policy
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.yaml_tree import read_value

PolicyName = Annotated[
    str,
    typer.Option(
        "--policy",
        metavar="NAME",
        autocompletion=complete_policy,
        help="Who plays: model, oracle, random, human, scripted:TARGET, openai:URL or best_of (docs/policies.md).",
    ),
]
PolicyOptions = Annotated[
    list[str] | None,
    typer.Option("--policy-option", metavar="KEY=VALUE", help="An option of the policy; may be repeated."),
]


def read_options(options: Sequence[str] | None) -> dict[str, Any]:
    """The values of `key=value` arguments, read as YAML. Raises ConfigError."""
    arguments: dict[str, Any] = {}
    for option in options or ():
        key, equals, text = option.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"command line: '{option}' is not of the form key=value")
        arguments[key] = read_value(text, "command line", key).plain()
    return arguments
