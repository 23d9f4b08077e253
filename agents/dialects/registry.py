"""Dialects by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from polyturn.agents.dialects.bare_json import JSONDialect
from polyturn.agents.dialects.dialect import Dialect
from polyturn.agents.dialects.families import dialect_of_model
from polyturn.agents.dialects.hermes import HermesDialect
from polyturn.agents.dialects.python_calls import PythonDialect
from polyturn.agents.dialects.sglang_parsers import SGLangDialect
from polyturn.agents.dialects.tags import TagDialect
from polyturn.configs.dialects import AUTO, SGLANG, check_dialect, split_sglang_name
from polyturn.envs.plugins import Signature, check_signature, make_part
from polyturn.envs.search.styles import TAGS

OWN: dict[str, Callable[..., Dialect]] = {
    "hermes": HermesDialect,
    "json": JSONDialect,
    "pythonic": PythonDialect,
}
"""Those that write calls, by name; each takes `recovers`."""
_PARSE = Signature(
    what="dialect",
    arguments=("text",),
    text="def parse(self, text: str, *, in_thought: bool = False, tools: Sequence[ToolSpec] = ()) -> AssistantMessage",
)


def make_dialect(
    name: str, *, recovers: bool = True, directory: Path | None = None, template_file: Path | None = None
) -> Dialect:
    """The dialect of that name.

    Args:
        name: As `model.dialect`.
        recovers: Whether a malformed call is taken for what it plainly means, else the model is told of it.
        directory: The model's, which `auto` asks.
        template_file: A chat template in place of the model's own, which `auto` asks then.

    Raises:
        ValueError: there is none, it cannot be loaded, or `auto` cannot tell.
    """
    check_dialect(name)
    if name == AUTO:
        if directory is None:
            raise ValueError("model.dialect: auto needs a model's directory")
        name = dialect_of_model(directory, template_file)
    if name.startswith(SGLANG):
        return SGLangDialect(*split_sglang_name(name), recovers=recovers)
    if name in OWN:
        return OWN[name](recovers=recovers)
    if name in TAGS:
        return TagDialect(TAGS[name])
    made: Dialect = make_part({"parse": _PARSE}, name, options={})
    check_signature(_PARSE, made.parse, f"{name}.parse", {"in_thought": False, "tools": ()})
    return made
