"""What a chat template puts around the messages behind a turn, learnt once where their texts change nothing else.

A template is code, and to run it costs as much as all else that a turn needs, while what it writes around a tool's
result is nearly always the same. So it is run with words in place of the texts, and then with texts that hold what
templates escape or cut: where each text stands there as it was given, the next one is put there without the template.
Texts that a template may look for something in go through it as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from polyturn.agents.template_form import TemplateRefusal
from polyturn.envs.messages import Message

End = TypeVar("End")
Key = tuple[tuple[str, str | None, bool], ...]
Delta = tuple[list[str], Any]
"""What stands before, between and behind the texts, and how the turn before ends."""
_UNKNOWN: Delta = ([], None)
PROBES = (
    "\"double\" 'single' {curly: [square]} (round) <angle> & % # \\n \\u0041",
    "line\nline\r\n\n   indented\ttab  spaces \u00e9\u2028\U0001f600 - end",
)
"""Texts with what a template may escape, cut or fold."""
MAX_KNOWN = 4096
_KEYS = frozenset(("role", "content", "name", "tool_call_id"))


class Deltas:
    """What is known of a template by the roles and names of the messages behind a turn."""

    def __init__(
        self,
        template: str | None,
        render: Callable[[Sequence[Mapping[str, Any]]], tuple[str, End]],
        is_hidden: Callable[[str], bool],
    ) -> None:
        """
        Args:
            template: Its source; None: nothing is learnt of it.
            render: What it writes behind a turn for these messages, and how that turn ends.
            is_hidden: Whether something in a text must be hidden from the template.
        """
        self._render = render
        self._is_hidden = is_hidden
        self._sought = None if template is None else sought_texts(template)
        self._known: dict[Key, Delta | None] = {}

    def text(self, messages: Sequence[Message]) -> tuple[str, Any] | None:
        """What the template writes for these messages, and how the turn before ends; None: it has to be asked."""
        if self._sought is None:
            return None
        for message in messages:
            content = message["content"]
            if (
                not content
                or content[0].isspace()
                or content[-1].isspace()
                or self._is_hidden(content)
                or not message.keys() <= _KEYS
            ):
                return None
            for sought in self._sought:
                if sought in content:
                    return None
        key = tuple([(m["role"], m.get("name"), "tool_call_id" in m) for m in messages])
        known = self._known.get(key, _UNKNOWN)
        if known is _UNKNOWN:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            known = self._known[key] = self._learn(messages)
        if known is None:
            return None
        pieces, end = known
        return _joined(pieces, [message["content"] for message in messages]), end

    def _learn(self, messages: Sequence[Message]) -> Delta | None:
        words = [f"W{number}content" for number in range(len(messages))]
        try:
            rest, end = self._written(messages, words)
            pieces = []
            for word in words:
                piece, found, rest = rest.partition(word)
                if not found:
                    return None
                pieces.append(piece)
            pieces.append(rest)
            for probe in PROBES:
                texts = [f"{probe} {number}" for number in range(len(messages))]
                if self._written(messages, texts)[0] != _joined(pieces, texts):
                    return None
            if self._written(_with_other_ids(messages), words) != self._written(messages, words):
                return None
        except TemplateRefusal:
            return None
        return pieces, end

    def _written(self, messages: Sequence[Message], texts: Sequence[str]) -> tuple[str, Any]:
        return self._render(
            [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
        )


def _with_other_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages as answers of other calls: a template that shows the ids has to be asked."""
    return [
        {**message, "tool_call_id": f"other_{number}"} if "tool_call_id" in message else message
        for number, message in enumerate(messages)
    ]


def _joined(pieces: Sequence[str], texts: Sequence[str]) -> str:
    parts = [pieces[0]]
    for text, piece in zip(texts, pieces[1:], strict=True):
        parts += (text, piece)
    return "".join(parts)


def sought_texts(template: str) -> frozenset[str] | None:
    """The texts that a template compares with others, or hands to methods, filters and tests: what it may branch on.

    Names of roles that it compares a message's role with are left out. None for a template that cannot be read.
    """
    tree = _tree(template)
    return None if tree is None else frozenset(filter(None, _sought(tree)))


def searched_texts(template: str) -> frozenset[str]:
    """Of those the texts that it looks for within others, by `in` or a method such as `split`: `</think>`, `/no_think`.

    Names, single characters and white space are left out: nothing tells them from the keys of mappings, and they stand
    in nearly every text.
    """
    tree = _tree(template)
    found = () if tree is None else _searched(tree)
    return frozenset(text for text in found if len(text) > 1 and text.strip() and not text.isidentifier())


def _tree(template: str) -> nodes.Template | None:
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _GenerationTag])
    try:
        return environment.parse(template)
    except jinja2.TemplateError:
        return None


SEARCHES = frozenset(
    ("count", "endswith", "find", "index", "partition", "removeprefix", "removesuffix", "replace", "rfind")
) | {"rpartition", "rsplit", "split", "startswith"}
"""Methods and filters that look for their argument in a text."""


def _searched(tree: nodes.Template) -> Iterator[str]:
    named: dict[str, list[str]] = {}
    for assigned in tree.find_all(nodes.Assign):
        if isinstance(assigned.target, nodes.Name):
            named.setdefault(assigned.target.name, []).extend(_texts_in(assigned.node))
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter)):
        operands: list[nodes.Expr] = []
        if isinstance(node, nodes.Compare) and any(each.op in ("in", "notin") for each in node.ops):
            operands = [node.expr]
        elif isinstance(node, nodes.Call | nodes.Filter):
            called = node.name if isinstance(node, nodes.Filter) else _name(node.node)
            operands = list(node.args) if called in SEARCHES else []
        for operand in operands:
            yield from _texts_in(operand)
            if isinstance(operand, nodes.Name):
                yield from named.get(operand.name, ())


def _texts_in(node: nodes.Node) -> list[str]:
    """The texts that are written in an expression."""
    constants = (node, *node.find_all(nodes.Const))
    return [one.value for one in constants if isinstance(one, nodes.Const) and isinstance(one.value, str)]


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which templates for training put around what the model writes."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """What stands in it, as if the tag were not there."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _sought(tree: nodes.Node) -> Iterator[str]:
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test)):
        if isinstance(node, nodes.Compare):
            operands = () if _is_of_role(node) else (node.expr, *node.ops)
        elif isinstance(node, nodes.Call) and _name(node.node) == "raise_exception":
            operands = ()
        else:
            operands = tuple(node.iter_child_nodes(exclude=("node",)))
        texts = [text for operand in operands for text in _texts_in(operand)]
        # What begins or ends with white space is not put in by us at all.
        strips = isinstance(node, nodes.Call) and _name(node.node) in ("strip", "lstrip", "rstrip")
        yield from (text for text in texts if not (strips and text.isspace()))


def _name(called: nodes.Node) -> str:
    """What a function or method is called."""
    return str(getattr(called, "attr", getattr(called, "name", "")))


def _is_of_role(compared: nodes.Compare) -> bool:
    """Whether a comparison is `message.role == ...` or `message['role'] != ...`."""
    if any(operand.op not in ("eq", "ne", "in", "notin") for operand in compared.ops):
        return False
    one = compared.expr
    if isinstance(one, nodes.Getattr):
        return one.attr == "role"
    return isinstance(one, nodes.Getitem) and isinstance(one.arg, nodes.Const) and one.arg.value == "role"
