"""A resolved config as YAML in which a comment behind each value says where it was written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from polyturn.configs.loading import yaml_tree
from polyturn.configs.loading.yaml_tree import Tree

DEFAULT = "default"
"""Of what nobody wrote: the schema's."""
GAP = 2
WIDEST = 60
"""Comments stand below one another as far as this many columns go."""


def annotated(values: Any, tree: Tree) -> str:
    """YAML of a config's values that reads back as them.

    Args:
        values: all of them, as JSON has them.
        tree: what was written, with its places.
    """
    text = yaml_tree.write(values, width=None)
    comments = dict(_comments(yaml.compose(text, Loader=yaml.SafeLoader), tree))
    lines = text.splitlines()
    column = min(WIDEST, max((len(lines[number]) for number in comments), default=0))
    return "".join(
        f"{line.ljust(column)}{' ' * GAP}# {comments[number]}\n" if number in comments else f"{line}\n"
        for number, line in enumerate(lines)
    )


def _comments(node: yaml.Node | None, tree: Tree | None) -> Iterator[tuple[int, str]]:
    """The line of each value, from 0, and where it was written; of a list of plain values the line of its key."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            written = _inside(tree, key.value)
            if _has_values_of_its_own(value):
                yield from _comments(value, written)
            else:
                yield key.start_mark.line, DEFAULT if written is None else written.origin
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _comments(item, _inside(tree, number))


def _has_values_of_its_own(node: yaml.Node) -> bool:
    if isinstance(node, yaml.SequenceNode):
        return any(_has_values_of_its_own(item) for item in node.value)
    return isinstance(node, yaml.MappingNode) and bool(node.value)


def _inside(tree: Tree | None, key: str | int) -> Tree | None:
    """What was written below a key. One value that stands for a list of one is its first."""
    if tree is None:
        return None
    if isinstance(key, int):
        if not isinstance(tree.value, list):
            return tree if key == 0 else None
        return tree.value[key] if key < len(tree.value) else None
    return tree.value.get(key) if isinstance(tree.value, dict) else None
