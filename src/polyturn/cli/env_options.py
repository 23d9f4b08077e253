"""How commands name an environment and the arguments of its constructor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.yaml_tree import read_value

EnvId = Annotated[str, typer.Argument(metavar="ID", help="As `polyturn env list` shows it.")]
Options = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Arguments of the environment's constructor."),
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
