"""The names that `model.dialect` takes: our own, the parsers of the installed SGLang, and plug-ins."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

from polyturn.configs.errors import did_you_mean

DIALECTS = ("hermes", "json", "pythonic", "search_r1", "asearcher", "r1_searcher", "research")
"""Those of our own."""
AUTO = "auto"
SGLANG = "sglang:"
NOT_SERVED = {
    "response_template": "it is made of a tokenizer's own description; name the parser of the model's family",
    "pythonic": "it takes time exponential in the arguments of a call; use model.dialect: pythonic",
}
"""Parsers of SGLang that are no dialects, and why."""


def sglang_names(what: str) -> tuple[str, ...] | None:
    """The names of the installed SGLang's parsers; None where SGLang is not installed.

    They are read as source: importing any module of SGLang takes seconds and torch.

    Args:
        what: `function_call` or `reasoning`.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = {
        "function_call": "srt/function_call/parser_names.py",
        "reasoning": "srt/parser/reasoning_parser_names.py",
    }[what]
    return _names_in(Path(spec.submodule_search_locations[0]) / file)


@functools.cache
def _names_in(path: Path) -> tuple[str, ...]:
    """The texts of the one list in a module. Raises `ValueError` where there is no such list."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the installed SGLang does not name its parsers in {path}") from error
    lists = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    ]
    names = [name for node in lists for name in ast.literal_eval(node)]
    if not names:
        raise ValueError(f"the installed SGLang does not name its parsers in {path}")
    return tuple(names)


def split_sglang_name(dialect: str) -> tuple[str, str | None]:
    """The tool-call parser and the reasoning parser, if any, of `sglang:TOOLS` or `sglang:TOOLS/REASONING`."""
    tools, slash, reasoning = dialect.removeprefix(SGLANG).partition("/")
    return tools, reasoning if slash else None


def check_dialect(dialect: str) -> None:
    """Raise `ValueError`, with the nearest name, for a dialect that there is not.

    Where SGLang is not installed its names cannot be checked; a plug-in is looked at where it is loaded.
    """
    if dialect in DIALECTS or dialect == AUTO:
        return
    if dialect.startswith(SGLANG):
        tools, reasoning = split_sglang_name(dialect)
        _check_name(tools, "function_call", "tool-call parser")
        if reasoning is not None:
            _check_name(reasoning, "reasoning", "reasoning parser", f"{SGLANG}{tools}/")
        return
    if ":" in dialect:
        return
    near = did_you_mean(dialect, (*DIALECTS, AUTO))
    near = near or did_you_mean(dialect, sglang_names("function_call") or (), SGLANG)
    raise ValueError(
        f"unknown dialect '{dialect}'"
        + (
            near
            or f"; the dialects are {', '.join(DIALECTS)}, auto, sglang:PARSER, or module:Class of your own"
        )
    )


def _check_name(name: str, what: str, words: str, before: str = SGLANG) -> None:
    if name in NOT_SERVED:
        raise ValueError(f"SGLang's parser '{name}' cannot be a dialect: {NOT_SERVED[name]}")
    known = sglang_names(what)
    if known is not None and name not in known:
        near = did_you_mean(name, known, before) or f"; they are {', '.join(known)}"
        raise ValueError(f"the installed SGLang has no {words} '{name}'{near}")
