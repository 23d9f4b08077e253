"""How an environment's messages are shown: typed blocks, never markup.

A renderer is chosen by the episode's environment. It is given one message, as it was stored, and what it does not
understand it leaves alone: the text of the message is shown in any case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from polyturn.viewer.plain_json import Json, cut, text_of

MAX_BLOCK_CHARS = 20_000
MAX_CELLS = 64 * 64
MAX_PASSAGES = 50


class Renderer(Protocol):
    """Shows the messages of an environment."""

    def __call__(self, message: Mapping[str, Any], /) -> list[Json]:
        """Blocks as `Block` of api.ts has them; none for a message that has nothing special."""
        ...


_PASSAGE = re.compile(r"^\s*(?:\[(\d+)\]|Doc (\d+)\s*\(Title:|(\d+)[.)])\s*", re.MULTILINE)
_FENCE = re.compile(r"^```([\w+-]{0,20})\n(.*?)^```", re.MULTILINE | re.DOTALL)
_DIFF = re.compile(r"^(?:diff --git |--- .+\n\+\+\+ )", re.MULTILINE)
_DIFF_PATH = re.compile(r"^\+\+\+ (?:b/)?(\S+)", re.MULTILINE)


def search_results(message: Mapping[str, Any]) -> list[Json]:
    """The passages of a search tool's result: `[1] title`, `Doc 1(Title: "title")` or `1. title`, then the text."""
    if message.get("role") not in ("tool", "user"):
        return []
    text = text_of(message.get("content"))[: 20 * MAX_BLOCK_CHARS]
    starts = list(_PASSAGE.finditer(text))
    if not starts or (message.get("role") == "user" and "information>" not in text):
        return []
    ends = [found.start() for found in starts[1:]] + [len(text)]
    passages = []
    for found, end in list(zip(starts, ends, strict=True))[:MAX_PASSAGES]:
        passage = text[found.end() : end].strip()
        title, body = _titled(passage) if found.group(2) else passage.partition("\n")[::2]
        rank = next(group for group in found.groups() if group)
        passages.append(
            {
                "title": title.strip().strip('"')[:300],
                "text": cut(body.strip(), MAX_BLOCK_CHARS)[0],
                "rank": int(rank) if len(rank) < 10 else None,
                "score": None,
            }
        )
    return [{"kind": "passages", "title": None, "passages": passages}]


def _titled(passage: str) -> tuple[str, str]:
    """What follows `(Title:`, which may have parentheses of its own, and what follows its closing one."""
    depth = 1
    for place, character in enumerate(passage[:1_000]):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return passage[:place], passage[place + 1 :]
    title, _, body = passage.partition("\n")
    return title, body


def board(message: Mapping[str, Any]) -> list[Json]:
    """A board of characters in what an environment says: three or more lines of equally many single characters."""
    if message.get("role") not in ("tool", "user"):
        return []
    best: list[list[str]] = []
    rows: list[list[str]] = []
    for line in [*text_of(message.get("content"))[:MAX_BLOCK_CHARS].splitlines(), ""]:
        cells = _cells(line)
        if cells and (not rows or len(cells) == len(rows[0])):
            rows.append(cells)
            continue
        if len(rows) > len(best):
            best = rows
        rows = [cells] if cells else []
    if len(best) < 3 or len(best) * len(best[0]) > MAX_CELLS:
        return []
    return [{"kind": "board", "title": None, "cells": best, "marks": []}]


def _cells(line: str) -> list[str]:
    """The cells of a line of a board; none where it is no such line."""
    text = line.strip().strip("|").strip()
    parts = [part.strip() for part in text.split("|")] if "|" in text else text.split()
    if len(parts) == 1 and 3 <= len(text) <= 64 and not any(letter.isalnum() for letter in text[3:]):
        parts = list(text)
    is_board = len(parts) >= 3 and all(len(part) <= 2 for part in parts)
    return parts if is_board else []


def files_and_code(message: Mapping[str, Any]) -> list[Json]:
    """Code that is fenced off, diffs, and the code that a tool is called with."""
    text = text_of(message.get("content"))[: 10 * MAX_BLOCK_CHARS]
    blocks: list[Json] = []
    if _DIFF.search(text):
        path = _DIFF_PATH.search(text)
        blocks.append(
            {
                "kind": "diff",
                "title": None,
                "path": path.group(1)[:300] if path else None,
                "text": cut(text, MAX_BLOCK_CHARS)[0],
            }
        )
    for found in list(_FENCE.finditer(text))[:10]:
        blocks.append(_file(found.group(2), language=found.group(1) or None))
    for arguments in _arguments_of(message):
        for name in ("code", "content", "file_text", "command", "script"):
            value = arguments.get(name)
            if isinstance(value, str) and "\n" in value:
                path = arguments.get("path") or arguments.get("file")
                blocks.append(_file(value, path=path if isinstance(path, str) else None))
    return blocks


def _file(text: str, *, path: str | None = None, language: str | None = None) -> Json:
    return {
        "kind": "file",
        "title": None,
        "path": None if path is None else path[:300],
        "language": language,
        "text": cut(text, MAX_BLOCK_CHARS)[0],
    }


def records(message: Mapping[str, Any]) -> list[Json]:
    """A tool's result that is JSON: an object, or a list of objects, as a table."""
    if message.get("role") != "tool":
        return []
    text = text_of(message.get("content"))
    if len(text) > MAX_BLOCK_CHARS or not text.lstrip().startswith(("{", "[")):
        return []
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if isinstance(found, dict) and found:
        rows = [[str(key)[:300], text_of(value)[:2_000]] for key, value in list(found.items())[:100]]
        return [{"kind": "table", "title": None, "columns": ["name", "value"], "rows": rows}]
    if isinstance(found, list) and found and all(isinstance(row, dict) for row in found):
        columns = list(dict.fromkeys(str(key)[:300] for row in found[:100] for key in row))[:20]
        rows = [[text_of(row.get(name))[:2_000] for name in columns] for row in found[:100]]
        return [{"kind": "table", "title": None, "columns": columns, "rows": rows}]
    return []


RENDERERS: Mapping[str, Renderer] = {
    "TwoHopSearch": search_results,
    "Search": search_results,
    "SearchR1": search_results,
    "CodeBreaker": board,
    "TreasureHunt": board,
    "Python": files_and_code,
    "Code": files_and_code,
    "Harbor": files_and_code,
    "CustomerService": records,
}
"""By the name of an environment, without what stands before `/` and its version."""


def renderer_of(env_id: str, own: Mapping[str, Renderer]) -> Renderer:
    """The one for an environment; `own` ones, by its whole id, come first. Others try all shipped ones."""
    if env_id in own:
        return own[env_id]
    return RENDERERS.get(env_id.rpartition("/")[2].partition("-v")[0], any_of_them)


def any_of_them(message: Mapping[str, Any]) -> list[Json]:
    """The blocks of the first shipped renderer that has any."""
    if message.get("role") != "tool":
        return files_and_code(message)
    return next((found for show in (records, files_and_code) if (found := show(message))), [])


def _arguments_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    found: list[Mapping[str, Any]] = []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, dict):
            found.append(arguments)
    return found
