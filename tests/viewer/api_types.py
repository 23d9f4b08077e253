"""Answers held against the types of `viewer/web/src/api.ts`, so that page and server cannot drift apart.

Reads as much of TypeScript as that file is written in: interfaces, type aliases, unions, arrays, records, literals.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

API = Path(__file__).parents[2] / "viewer" / "web" / "src" / "api.ts"
_TOKEN = re.compile(r'"[^"]*"|[A-Za-z_]\w*|-?\d+|[{}\[\]()<>|;:,?=&]')
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_DECLARATION = re.compile(r"export (?:interface (\w+)|type (\w+) =)")


class ApiTypes:
    """The declared types, by name."""

    def __init__(self, source: str) -> None:
        source = _COMMENT.sub("", source)
        self._types: dict[str, Any] = {}
        for found in _DECLARATION.finditer(source):
            self._tokens = _TOKEN.findall(source[found.end() :])
            self._at = 0
            self._types[found[1] or found[2]] = self._object() if found[1] else self._union()
        self.answers = {
            path: shape[1]["answer"][0] for path, (shape, _) in self._types["Requests"][1].items()
        }

    def problems(self, value: Any, kind: Any, where: str = "answer") -> list[str]:
        """Where a value is not of the kind; kinds are names of types, or what was parsed."""
        match kind:
            case ("union", options):
                every = [self.problems(value, option, where) for option in options]
                return min(every, key=len) if all(every) else []
            case ("array", inner):
                if not isinstance(value, list):
                    return [f"{where} is no array"]
                return [
                    p for i, item in enumerate(value) for p in self.problems(item, inner, f"{where}[{i}]")
                ]
            case ("record", inner):
                if not isinstance(value, dict):
                    return [f"{where} is no record"]
                return [p for k, item in value.items() for p in self.problems(item, inner, f"{where}.{k}")]
            case ("object", members):
                if not isinstance(value, dict):
                    return [f"{where} is no object"]
                extra = [f"{where}.{name} is not declared" for name in value.keys() - members.keys()]
                missing = [
                    f"{where}.{name} is missing"
                    for name, (_, optional) in members.items()
                    if name not in value and not optional
                ]
                inside = [
                    p
                    for name, (inner, _) in members.items()
                    if name in value
                    for p in self.problems(value[name], inner, f"{where}.{name}")
                ]
                return extra + missing + inside
            case ("literal", text):
                return [] if value == text else [f"{where} is {value!r}, not {text!r}"]
            case "unknown":
                return []
            case "null":
                return [] if value is None else [f"{where} is not null"]
            case "string":
                return [] if isinstance(value, str) else [f"{where} is no string"]
            case "boolean":
                return [] if isinstance(value, bool) else [f"{where} is no boolean"]
            case "number":
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                return [] if is_number else [f"{where} is no number"]
            case _:
                return self.problems(value, self._types[kind], where)

    def _take(self, expected: str | None = None) -> str:
        token = self._tokens[self._at]
        assert expected is None or token == expected, f"{token} in place of {expected}"
        self._at += 1
        return token

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _object(self) -> Any:
        self._take("{")
        members: dict[str, Any] = {}
        while self._peek() != "}":
            name = self._take().strip('"')
            optional = self._peek() == "?"
            if optional:
                self._take("?")
            self._take(":")
            members[name] = (self._union(), optional)
            if self._peek() in (";", ","):
                self._take()
        self._take("}")
        return ("object", members)

    def _union(self) -> Any:
        if self._peek() == "|":
            self._take("|")
        options = [self._postfix()]
        while self._peek() in ("|", "&"):
            self._take()
            options.append(self._postfix())
        return options[0] if len(options) == 1 else ("union", options)

    def _postfix(self) -> Any:
        kind = self._primary()
        while self._peek() == "[":
            self._take("[")
            self._take("]")
            kind = ("array", kind)
        return kind

    def _primary(self) -> Any:
        token = self._peek()
        if token == "{":
            return self._object()
        self._take()
        if token == "(":
            kind = self._union()
            self._take(")")
            return kind
        if token.startswith('"'):
            return ("literal", token.strip('"'))
        if token.isdigit():
            return ("literal", int(token))
        if token in ("Record", "Partial"):
            self._take("<")
            kind = self._union()
            if token == "Record":
                self._take(",")
                kind = ("record", self._union())
            self._take(">")
            # What may be missing of a record is nothing that an answer has to have.
            return ("record", kind[1]) if token == "Partial" and kind[0] == "record" else kind
        return token


def read_api_types() -> ApiTypes:
    """Those of the file."""
    return ApiTypes(API.read_text(encoding="utf-8"))
