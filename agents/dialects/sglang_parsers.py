"""The parsers that SGLang ships, as dialects.

They are written for a server, which hands on what it cannot read. Here the model is told: of a call that was begun and
did not come out, of an argument that was lost, of a parser that raised. SGLang is loaded when a dialect is made, which
takes seconds and torch, and never before.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from polyturn.agents.dialects.calls import CallReader
from polyturn.agents.dialects.sglang_formats import FORMATS, CallFormat
from polyturn.agents.dialects.thoughts import leading_thoughts
from polyturn.envs.messages import AssistantMessage
from polyturn.tools.thoughts import THOUGHT_MARKS
from polyturn.tools.types import ToolCall, ToolSpec

MAX_MARKS = 128
"""A turn with more marks of calls is not given to a parser."""
MAX_WORK = 2_000_000
"""... nor one whose marks times its characters are more: most of the parsers look at all that follows a mark."""
_MARKUP = re.compile(r"[<>\s]")
_UNKNOWN_TOOLS = threading.Lock()
_STAND_IN = "polyturn_no_tool"


class SGLangDialect:
    """Calls as one of SGLang's parsers reads them, and thoughts as one of its reasoning parsers does.

    Without a reasoning parser thoughts at the beginning are told by the marks that `polyturn.tools.thoughts` knows.
    Calls of tools that were not offered are read as any other: the environment says that there is no such tool.
    """

    def __init__(self, parser: str, reasoning_parser: str | None = None, *, recovers: bool = True) -> None:
        """
        Args:
            parser: The name of a tool-call parser, such as `qwen3_coder`.
            reasoning_parser: The name of a reasoning parser, such as `gpt-oss`.
            recovers: Whether arguments that are broken JSON are taken for what they plainly mean.

        Raises:
            ValueError: SGLang is not installed, or has no such parser.
        """
        self._sglang = _SGLang()
        self._name, self._reasoning_name = parser, reasoning_parser
        detector = self._sglang.make_parser(self._sglang.tools_of(()), parser).detector
        self._format = FORMATS.get(parser) or _format_of(detector)
        example = self._format.example
        if parser in FORMATS:
            example += " to call the tool NAME with KEY set to VALUE"
        self._reader = CallReader(example=example, recovers=recovers)
        self._begins = _any_of(self._format.begins)
        self._marks = _any_of((*self._format.begins, *self._format.frames, *self._format.scanned))
        self._tools: tuple[Sequence[ToolSpec], list[Any]] = ((), self._sglang.tools_of(()))
        self._thought_marks: tuple[str, ...] = ()
        if reasoning_parser is not None:
            made = self._sglang.make_reasoning_parser(reasoning_parser, None).detector
            if made.think_start_token in THOUGHT_MARKS:
                self._thought_marks = (made.think_start_token, made.think_end_token)

    def parse(
        self, text: str, *, in_thought: bool = False, tools: Sequence[ToolSpec] = ()
    ) -> AssistantMessage:
        """As `Dialect.parse`."""
        num_marks = sum(1 for _ in self._marks.finditer(text))
        whole = self._completed(text)
        if num_marks > MAX_MARKS or num_marks * len(text) > MAX_WORK:
            lost = self._reader.unreadable(0, "there are too many marks of calls, or the turn is too long")
            return AssistantMessage(content="", tool_calls=(lost,), raw_text=text)
        try:
            reasoning, rest = self._split(whole, in_thought)
            # A reasoning parser may lose a call, too: it is looked for in all but the thought.
            outside = whole.replace(reasoning or "", "", 1) if self._reasoning_name else rest
            content, items = self._parse(rest, tools)
            calls = self._calls(items, outside)
        except Exception as error:  # noqa: BLE001 - the border to code that may raise anything on what a model wrote
            told = self._reader.unreadable(0, f"its parser failed with {type(error).__name__}")
            return AssistantMessage(
                content="" if num_marks else text, tool_calls=(told,) if num_marks else (), raw_text=text
            )
        if not items:
            # SGLang's content is all of the text, or none, where it lost a call.
            mark = self._marks.search(rest)
            content = (content or rest) if not calls else rest[: mark.start()] if mark else ""
        return AssistantMessage(
            content=content.strip(), reasoning=reasoning, tool_calls=tuple(calls), raw_text=text
        )

    def bare_parser(self, tools: Sequence[ToolSpec]) -> Callable[[str], tuple[str, list[Any]]]:
        """SGLang's parser without anything of ours: what it makes of a text, its errors included."""
        made = self._sglang_tools(tools)
        return lambda text: self._sglang.parse(text, made, self._name)

    def _completed(self, text: str) -> str:
        """The text as the parser knows it: with what the prompt wrote of the format, and the token that ended it."""
        head, tail = self._format.head, self._format.tail
        for pattern, known in self._format.spellings:
            text = re.sub(pattern, known, text)
        if head and not text.lstrip().startswith(head):
            text = head + text
        if tail and self._begins.search(text) is not None and not text.rstrip().endswith(tail):
            text += tail
        return text

    def _split(self, text: str, in_thought: bool) -> tuple[str | None, str]:
        if self._reasoning_name is None:
            first = self._begins.search(text)
            reasoning, start = leading_thoughts(
                text, in_thought=in_thought, first_call=-1 if first is None else first.start()
            )
            return reasoning, text[start:]
        if self._thought_marks and not in_thought and not any(mark in text for mark in self._thought_marks):
            # Nobody has opened a thought, whatever the parser takes for granted.
            return None, text
        parser = self._sglang.make_reasoning_parser(self._reasoning_name, True if in_thought else None)
        thought, rest = parser.parse_non_stream(text)
        if not thought and not rest:
            return None, text.removeprefix(self._format.head)
        return (thought.strip() if thought else None), rest or ""

    def _parse(self, rest: str, tools: Sequence[ToolSpec]) -> tuple[str, list[Any]]:
        """What SGLang makes of a text behind its thoughts: content, and calls of whatever tools."""
        known = self._sglang_tools(tools)
        content, items = self._sglang.parse(rest, known, self._name)
        if items or not self._format.names:
            return content, items
        names = set(re.findall(self._format.names, rest)) - {tool.function.name for tool in known}
        if not names:
            return content, items
        unknown = [ToolSpec(name=name, description="", parameters={}) for name in sorted(names)]
        return self._sglang.parse(rest, [*known, *self._sglang.tools_of(unknown)], self._name)

    def _calls(self, items: Sequence[Any], outside: str) -> list[ToolCall]:
        """The calls that came out of a text, and one with an error for those that did not."""
        written = [str(item.parameters) for item in items]
        calls = [
            self._call(item.name, one, number)
            for number, (item, one) in enumerate(zip(items, written, strict=True))
        ]
        num_begun = _count(self._begins, outside) - sum(_count(self._begins, one) for one in written)
        if not calls:
            if num_begun <= 0 and not any(frame in outside for frame in self._format.frames):
                return []
            return [self._reader.unreadable(0, "what was begun is no whole call")]
        if num_begun == len(calls) and self._arguments_are_lost(calls, outside, written):
            told = "an argument could not be read, or stands there twice"
            calls = [
                self._reader.unreadable(number, told, name=call.name) for number, call in enumerate(calls)
            ]
        ends = self._format.ends
        if ends and max(_net(end, outside, written) for end in ends) < num_begun:
            told = f"it was not closed by {ends[0]}"
            calls[-1] = self._reader.unreadable(len(calls) - 1, told, name=calls[-1].name)
        if num_begun > len(calls):
            told = f"{num_begun} calls were begun, and {len(calls)} could be read"
            calls.append(self._reader.unreadable(len(calls), told))
        return calls

    def _call(self, name: Any, written: str, number: int) -> ToolCall:
        name = name.strip() if isinstance(name, str) else ""
        if not name or _MARKUP.search(name) is not None:
            return self._reader.unreadable(
                number, f"{name!r} is no name of a tool" if name else "it has no name"
            )
        call = self._reader.call_of(name, written, number)
        if self._format.argument and any(_MARKUP.search(key) is not None for key in call.arguments):
            return self._reader.unreadable(number, "there are marks in the name of an argument", name=name)
        return call

    def _arguments_are_lost(self, calls: Sequence[ToolCall], text: str, written: Sequence[str]) -> bool:
        mark = self._format.argument
        if not mark:
            return False
        num_begun = _net(mark, text, written)
        return num_begun > sum(len(call.arguments) for call in calls) and all(
            call.error is None for call in calls
        )

    def _sglang_tools(self, tools: Sequence[ToolSpec]) -> list[Any]:
        given, made = self._tools
        if given is not tools and given != tools:
            made = self._sglang.tools_of(tools)
            self._tools = (tools, made)
        return made


class _SGLang:
    """What is used of SGLang, loaded. Raises `ValueError` where it is not installed."""

    def __init__(self) -> None:
        if importlib.util.find_spec("sglang") is None:
            raise ValueError(
                "model.dialect: sglang:... needs SGLang, which is not installed: pip install 'polyturn[train]', or "
                "choose a dialect of Polyturn's own"
            )
        self._functions = importlib.import_module("sglang.srt.function_call.function_call_parser")
        self._reasoning = importlib.import_module("sglang.srt.parser.reasoning_parser")
        self._tool = importlib.import_module("sglang.srt.entrypoints.openai.protocol").Tool
        self._forward_unknown = importlib.import_module(
            "sglang.srt.environ"
        ).envs.SGLANG_FORWARD_UNKNOWN_TOOLS
        # What the parsers log of a turn, the model is told.
        for package in ("sglang.srt.function_call", "sglang.srt.parser"):
            logging.getLogger(package).setLevel(logging.CRITICAL)

    def tools_of(self, tools: Sequence[ToolSpec]) -> list[Any]:
        """The tools as SGLang takes them. Without any it would look for no call: then one that nobody calls."""
        specs = tools or [ToolSpec(name=_STAND_IN, description="", parameters={})]
        return [self._tool.model_validate(spec.to_openai()) for spec in specs]

    def make_parser(self, tools: list[Any], name: str) -> Any:
        """A tool-call parser for one text. Raises `ValueError` for a name that there is not."""
        return self._functions.FunctionCallParser(tools, name)

    def make_reasoning_parser(self, name: str, force: bool | None) -> Any:
        """A reasoning parser for one text. Raises `ValueError` for a name that there is not."""
        return self._reasoning.ReasoningParser(name, stream_reasoning=False, force_reasoning=force)

    def parse(self, text: str, tools: list[Any], name: str) -> tuple[str, list[Any]]:
        """What a parser makes of a text, calls of unknown tools included. Raises whatever the parser does."""
        # The only way to have them is a variable of the environment, which is read at every call. What is raised is
        # caught within: SGLang's own context manager puts the variable back only where nothing is.
        variable = self._forward_unknown
        with _UNKNOWN_TOOLS:
            with variable.override(True):
                try:
                    content, items = self.make_parser(tools, name).parse_non_stream(text)
                    failed: Exception | None = None
                except Exception as error:  # noqa: BLE001 - raised again below
                    content, items, failed = "", [], error
        if failed is not None:
            raise failed
        return content, items


def _format_of(detector: Any) -> CallFormat:
    """What a parser that is not in the table says of its own format."""
    names = ("bot_token", "tool_call_start_token", "bot")
    begins = tuple(
        mark.strip()
        for name in names
        if isinstance(mark := getattr(detector, name, None), str) and mark.strip()
    )
    return CallFormat(begins=begins or ("<tool_call>",), example="calls as the chat template does")


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _net(mark: str, text: str, written: Sequence[str]) -> int:
    """How often a mark stands in a text beside the arguments that were read."""
    return text.count(mark) - sum(one.count(mark) for one in written)


def _count(pattern: re.Pattern[str], text: str) -> int:
    return sum(1 for _ in pattern.finditer(text))
