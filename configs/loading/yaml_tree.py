"""YAML as a tree that remembers, for every value, the file and line of its key.

Scalars follow YAML 1.2's core schema, where `1e-6` is a float and `yes` and `on` are text. (PyYAML's own YAML
1.1 reads `1e-6` as text and `on` as true.)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from polyturn.configs.errors import ConfigError

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_RADIX_INT = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_ANY_INT = re.compile(f"{_INT.pattern}|{_RADIX_INT.pattern}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"]),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
    **dict.fromkeys([".nan", ".NaN", ".NAN"], float("nan")),
}
_LINE_BREAKS = re.compile("[\r\x85\u2028\u2029]")
"""Read back as a plain newline unless they are escaped, which double quotes do."""
_TEXT_TAG = "tag:yaml.org,2002:str"
MAX_BYTES = 16 * 1024 * 1024
"""Of a file: no recipe has as many, and a file of weights that was named by mistake has more."""
MAX_DEPTH = 64
"""Sections and lists within one another."""
MAX_NODES = 200_000
"""Values of a file, counted as often as its aliases repeat them."""
_NO_VALUE = "#%@`*&!|>"
"""What begins a value in a file where it refers to something, names a type or goes on in the next lines, and means
itself in an override, which has none of these."""
_INTEGERS = range(-(2**63), 2**64)
"""What 64 bits can hold, with a sign or without; engines, journals and stores take no more."""


class _OutOfBounds(ConfigError):
    """A number that is readable and too large."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A value and where it was written. Mappings hold `dict[str, Tree]`, sequences `list[Tree]`."""

    value: Any
    origin: str
    """`path:line` of the key, or `command line`."""
    text: str | None = None
    """A plain scalar as it was written."""

    def plain(self) -> Any:
        """The value without its origins."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


class _Loader(yaml.SafeLoader):
    """Composes nodes without resolving plain scalars: `read_scalar` does that."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML version would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(f"^({_INT.pattern}|{_RADIX_INT.pattern})$"), None
)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^({_FLOAT.pattern})$"), None)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if _LINE_BREAKS.search(text) else None
    return dumper.represent_scalar(_TEXT_TAG, text, style=style)


_Dumper.add_representer(str, _represent_text)


def read_file(path: Path) -> Tree:
    """Parse a file. An empty one is an empty mapping; raises ConfigError with path and line."""
    shown = shown_path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"{shown}: larger than {MAX_BYTES >> 20} MiB, which no recipe is; is it another file?"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{shown}:{line}: not UTF-8 text") from error
    tree = read_document(text, shown)
    if tree is None or (tree.value is None and tree.text is not None):
        return Tree({}, shown)
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{tree.origin}: expected `key: value` lines, got {describe(tree.value)}")
    return tree


def read_value(text: str, origin: str, key: str) -> Tree:
    """Parse the right-hand side of an override, where nothing is a comment; `origin` takes the place of path and line.

    Raises:
        ConfigError: it is not readable YAML, or something stands behind the value.
    """
    stripped = text.strip()
    if not stripped:
        return Tree(None, origin, "")
    if stripped[0] in _NO_VALUE:
        return Tree(stripped, origin, stripped)
    try:
        node = _compose(stripped, None)
        if isinstance(node, yaml.ScalarNode) and node.style is None and node.tag == _TEXT_TAG:
            # Read whole: for YAML a comment would end it.
            return Tree(_read_scalar(stripped, f"{origin}: '{key}'"), origin, stripped)
        behind = stripped[node.end_mark.index :].strip() if node is not None else ""
        if behind:
            raise ConfigError(f"'{behind}' stands behind the value")
        tree = _Converter(None).convert(node, 1, [])
    except _OutOfBounds:
        raise
    except ConfigError as error:
        raise ConfigError(f"{origin}: the value of '{key}' is not readable YAML: {error}") from error
    return _with_origin(tree, origin)


def read_text(text: str, origin: str, key: str) -> Tree:
    """The right-hand side of an override that means text: as it is, without the quotes if it is quoted; or null.

    Raises:
        ConfigError: its quotes are not closed.
    """
    stripped = text.strip()
    if stripped[:1] in ("'", '"'):
        return read_value(text, origin, key)
    return Tree(None if _CONSTANTS.get(stripped, stripped) is None else stripped, origin, stripped)


def write(data: Any, *, width: int | None = 110) -> str:
    """YAML that `read_file` reads back as the same data; with `width` None it folds no line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width or math.inf)


def read_scalar(text: str) -> Any:
    """A plain scalar by YAML 1.2's core schema; underscores may group digits."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _RADIX_INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _INFINITY.fullmatch(text):
        return float("-inf") if text.startswith("-") else float("inf")
    return text


def describe(value: Any) -> str:
    """A value in an error message, kept short."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def shown_path(path: Path) -> str:
    """The path relative to the working directory where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def read_document(text: str, shown: str | None) -> Tree | None:
    """Compose one document; `shown` None leaves file names out of the messages."""
    node = _compose(text, shown)
    return None if node is None else _Converter(shown).convert(node, node.start_mark.line + 1, [])


def _compose(text: str, shown: str | None) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = f"{shown}:{line}: " if shown else ""
        raise ConfigError(f"{where}character U+{error.character:04X} is not allowed in YAML") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{shown}:{mark.line + 1 if mark else 1}: not readable YAML: " if shown else ""
        raise ConfigError(f"{where}{error.problem or error.context}") from error
    except RecursionError as error:
        raise ConfigError(f"{f'{shown}: ' if shown else ''}{_TOO_DEEP}") from error


_TOO_DEEP = f"sections and lists stand within one another, more than {MAX_DEPTH} deep"


class _Converter:
    """From a document's nodes to a tree; aliases are written out."""

    def __init__(self, shown: str | None) -> None:
        self._shown = shown
        self._num_nodes = 0

    def convert(self, node: yaml.Node | None, line: int, parents: list[yaml.Node]) -> Tree:
        """One node; `line` is its key's, counted from 1. Anchors may be shared but not contain themselves."""
        assert node is not None
        origin = self._origin(line)
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise ConfigError(
                f"{origin}: more than {MAX_NODES:,} values, those that aliases repeat counted each time"
            )
        if any(parent is node for parent in parents):
            raise ConfigError(f"{origin}: an anchor contains itself")
        if len(parents) >= MAX_DEPTH:
            raise ConfigError(f"{origin}: {_TOO_DEEP}")
        inner = [*parents, node]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, origin)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            items = [self.convert(item, item.start_mark.line + 1, inner) for item in node.value]
            return Tree(items, origin)
        if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
            raise ConfigError(f"{origin}: the YAML tag '{node.tag}' is not supported")
        children: dict[str, Tree] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            where, key = self._origin(key_line), key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key == "":
                raise ConfigError(f"{where}: a key must be text")
            if key == "<<":
                raise ConfigError(
                    f"{where}: merge keys (`<<`) are not supported; layer files with `extends:`"
                )
            if key in children:
                raise ConfigError(f"{where}: duplicate key '{key}', first given at {children[key].origin}")
            children[key] = self.convert(value_node, key_line, inner)
        return Tree(children, origin)

    def _scalar(self, node: yaml.ScalarNode, origin: str) -> Tree:
        if node.style is None and node.tag == _TEXT_TAG:
            return Tree(_read_scalar(node.value, origin), origin, node.value)
        if node.tag != _TEXT_TAG:
            raise ConfigError(f"{origin}: the YAML tag '{node.tag}' is not supported")
        return Tree(node.value, origin)

    def _origin(self, line: int) -> str:
        return f"{self._shown}:{line}" if self._shown else f"line {line}"


def _read_scalar(text: str, origin: str) -> Any:
    """As `read_scalar`; raises ConfigError where an integer is out of all bounds."""
    # Python itself refuses to read integers of many thousand digits.
    value = None if len(text) > 100 and _ANY_INT.fullmatch(text) else read_scalar(text)
    if (value is None and text not in _CONSTANTS) or (type(value) is int and value not in _INTEGERS):
        raise _OutOfBounds(
            f"{origin}: the integer {describe(text)} has more than 64 bits; if it is text, put it in quotes"
        )
    return value


def _with_origin(tree: Tree, origin: str) -> Tree:
    if isinstance(tree.value, dict):
        return Tree({key: _with_origin(child, origin) for key, child in tree.value.items()}, origin)
    if isinstance(tree.value, list):
        return Tree([_with_origin(child, origin) for child in tree.value], origin)
    return Tree(tree.value, origin, tree.text)
