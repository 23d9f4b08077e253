"""YAML as a tree that remembers, for every value, the file and line of its key.

Scalars follow YAML 1.2's core schema, where `1e-6` is a float and `yes` and `on` are text. (PyYAML's own YAML
1.1 reads `1e-6` as text and `on` as true.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from polyturn.configs.errors import ConfigError

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_RADIX_INT = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
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
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{shown}:{line}: not UTF-8 text") from error
    tree = _parse(text, shown)
    if tree is None or (tree.value is None and tree.text is not None):
        return Tree({}, shown)
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{tree.origin}: expected `key: value` lines, got {describe(tree.value)}")
    return tree


def read_value(text: str, origin: str, key: str) -> Tree:
    """Parse the right-hand side of an override; `origin` takes the place of path and line."""
    try:
        tree = _parse(text, None)
    except ConfigError as error:
        raise ConfigError(f"{origin}: the value of '{key}' is not readable YAML: {error}") from error
    if tree is None:
        return Tree(None, origin, "")
    return _with_origin(tree, origin)


def write(data: Any) -> str:
    """YAML that `read_file` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


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


def _parse(text: str, shown: str | None) -> Tree | None:
    """Compose one document; `shown` None leaves file names out of the messages."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = f"{shown}:{line}: " if shown else ""
        raise ConfigError(f"{where}character U+{error.character:04X} is not allowed in YAML") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{shown}:{mark.line + 1 if mark else 1}: not readable YAML: " if shown else ""
        raise ConfigError(f"{where}{error.problem or error.context}") from error
    if node is None:
        return None
    return _convert(node, shown, node.start_mark.line + 1, [])


def _convert(node: yaml.Node, shown: str | None, line: int, parents: list[yaml.Node]) -> Tree:
    """One node; `line` is its key's, counted from 1. Anchors may be shared but not contain themselves."""
    origin = f"{shown}:{line}" if shown else f"line {line}"
    if any(parent is node for parent in parents):
        raise ConfigError(f"{origin}: an anchor contains itself")
    inner = [*parents, node]
    if isinstance(node, yaml.ScalarNode):
        return _convert_scalar(node, origin)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        items = [_convert(item, shown, item.start_mark.line + 1, inner) for item in node.value]
        return Tree(items, origin)
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        raise ConfigError(f"{origin}: the YAML tag '{node.tag}' is not supported")
    children: dict[str, Tree] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        where = f"{shown}:{key_line}" if shown else f"line {key_line}"
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key == "":
            raise ConfigError(f"{where}: a key must be text")
        if key == "<<":
            raise ConfigError(f"{where}: merge keys (`<<`) are not supported; layer files with `extends:`")
        if key in children:
            raise ConfigError(f"{where}: duplicate key '{key}', first given at {children[key].origin}")
        children[key] = _convert(value_node, shown, key_line, inner)
    return Tree(children, origin)


def _convert_scalar(node: yaml.ScalarNode, origin: str) -> Tree:
    if node.style is None and node.tag == _TEXT_TAG:
        return Tree(read_scalar(node.value), origin, node.value)
    if node.tag != _TEXT_TAG:
        raise ConfigError(f"{origin}: the YAML tag '{node.tag}' is not supported")
    return Tree(node.value, origin)


def _with_origin(tree: Tree, origin: str) -> Tree:
    if isinstance(tree.value, dict):
        return Tree({key: _with_origin(child, origin) for key, child in tree.value.items()}, origin)
    if isinstance(tree.value, list):
        return Tree([_with_origin(child, origin) for child in tree.value], origin)
    return Tree(tree.value, origin, tree.text)
