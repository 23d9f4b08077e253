"""A chat template, and the form in which it takes messages: found out by trying, once, at the start."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from itertools import product
from typing import Any, Literal

ToolPrompt = Literal["auto", "template", "text"]
"""Who writes tool specs, calls and results: the template, or Polyturn as text; auto: the template where it can."""

TODAY = "strftime_now"
"""What templates call to be told the date, in the format that they give; what it tells is pinned."""
OWNED_OPTIONS = (
    TODAY,
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "chat_template",
    "conversation",
    "return_dict",
)
"""What is no option of a template, because rendering sets it."""

USER, SYSTEM, ANSWER, THOUGHT, RESULT, NAME = (
    "Wuser",
    "Wsystem",
    "Wanswer",
    "Wthought",
    "Wresult",
    "wname",
)
"""Words that stand for texts in probes: no template changes them or takes them for anything."""

_TOOLS_TEXT = """# Tools

You can call functions. These are their specifications:
<tools>
{specs}
</tools>

To call one, write its name and its arguments as JSON:
<tool_call>
{{"name": ..., "arguments": {{...}}}}
</tool_call>"""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_PARTS = ("text", "input_text", "output_text")


class TemplateRefusal(ValueError):
    """The template raised, or left out what it was to show."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateForm:
    """What is done to messages before a template sees them."""

    folds_system: bool = False
    """The system message stands before the first user message: the template has no such role."""
    merges_users: bool = False
    """User messages that follow each other are one: the template wants user and assistant to alternate."""
    reasoning_key: str | None = None
    """Under which name an assistant message holds its reasoning; None: as `<think>...</think>` in its content."""
    calls_as_text: bool = False
    """Calls stand in the assistant's content: the template does not show them."""
    results_as_text: bool = False
    """Results stand in user messages and specs in the system message, too: the template has no tools."""
    call_ids: Literal["any", "nine", "names"] = "any"
    """`nine` letters and digits (Mistral), or `names` of functions with numbers (Kimi)."""
    without_content: bool = False
    """A message of calls alone has None for content, not an empty text (DeepSeek)."""
    arguments_as_text: bool = False
    """A call's arguments are JSON text, not an object."""
    one_call: bool = False
    """The template knows one call per message; results of several can follow it all the same."""
    one_text: bool = False
    """Beside a call it knows a thought or a text, not both: the text stands behind the thought (gpt-oss)."""
    text_parts: bool = False
    """A content is a list of one part with the text (models that see images)."""
    tools_listed: bool = False
    """Where there are no tools it wants an empty list of them."""

    def joins(self, message: Mapping[str, Any]) -> bool:
        """Whether a message has a text that is put behind its thought, because of `one_text`."""
        return self.one_text and all(message.get(key) for key in ("reasoning", "content", "tool_calls"))

    def call_id(self, name: str, number: int) -> str:
        """The id of an episode's call of that number, counted from 0."""
        if self.call_ids == "nine":
            return f"call{number:05d}"
        return f"functions.{name}:{number}" if self.call_ids == "names" else f"call_{number}"

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
        """Messages and tools as the template takes them.

        Raises:
            TemplateRefusal: a message holds something other than text.
        """
        taken = [self._prepare(message) for message in messages]
        if self.calls_as_text:
            taken = [_with_calls_as_text(message) for message in taken]
        if self.results_as_text:
            taken = _with_specs_as_text(_with_results_as_text(taken), tools)
            tools = ()
        if self.folds_system:
            taken = _with_folded_system(taken)
        if self.merges_users:
            taken = _with_merged_users(taken)
        return taken, list(tools)

    def _prepare(self, message: Mapping[str, Any]) -> dict[str, Any]:
        taken = {**message, "content": _text_of(message.get("content"))}
        reasoning = taken.pop("reasoning", None)
        if self.joins(message):
            reasoning, taken["content"] = f"{reasoning}\n\n{taken['content']}", ""
        if reasoning and self.reasoning_key:
            taken[self.reasoning_key] = reasoning
        elif reasoning:
            taken["content"] = f"<think>\n{reasoning}\n</think>\n\n{taken['content'] or ''}"
        if calls := taken.get("tool_calls"):
            taken["tool_calls"] = [self._prepare_call(call) for call in calls]
            if self.without_content and not self.calls_as_text:
                taken["content"] = taken["content"] or None
        if taken.get("tool_call_id") is not None:
            taken["tool_call_id"] = self._taken_id(taken["tool_call_id"])
        return taken

    def _prepare_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call.get("function") or {})
        arguments = function.get("arguments", {})
        if self.arguments_as_text and not isinstance(arguments, str):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        elif not self.arguments_as_text and isinstance(arguments, str):
            function["arguments"] = _object_of(arguments)
        taken = {**call, "type": call.get("type", "function"), "function": function}
        if "id" in call:
            taken["id"] = self._taken_id(call["id"])
        return taken

    def _taken_id(self, call_id: str) -> str:
        if self.call_ids != "nine" or re.fullmatch(r"[A-Za-z0-9]{9}", call_id):
            return call_id
        numbered = re.fullmatch(r"call_(\d{1,5})", call_id)
        return (
            self.call_id("", int(numbered[1]))
            if numbered
            else hashlib.sha256(call_id.encode()).hexdigest()[:9]
        )


class ChatTemplate:
    """The chat template of a tokenizer, with what it makes of messages known."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        options: Mapping[str, Any] | None = None,
        tool_prompt: ToolPrompt = "auto",
        day: date | None = None,
    ) -> None:
        """
        Args:
            day: That is told as the present one; None: today, and that day from now on.

        Raises:
            ValueError: an option that the template does not read, or it renders no conversation.
        """
        self._tokenizer = tokenizer
        self._options = dict(options or {})
        self._check_options()
        midnight = datetime.combine(day or date.today(), time())
        self._options[TODAY] = midnight.strftime
        self.needs_tools = (
            isinstance(tokenizer.chat_template, Mapping) and "tool_use" in tokenizer.chat_template
        )
        """Whether it is another template with tools than without, or shows calls only where there are tools."""
        self.tool_fault = ""
        """Why calls and results are no matter of the template's."""
        self.form = TemplateForm()
        self._learn_contents()
        self._learn_roles()
        self._learn_tools(tool_prompt)
        self._learn_thoughts_of_calls()
        if not self.form.folds_system and self._loses_system():
            self.form = replace(self.form, folds_system=True)

    @property
    def source(self) -> str:
        """The text of the template; of several, one behind the other."""
        template = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, Mapping) else str(template)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation: bool = True,
    ) -> str:
        """The conversation as text, with the head of the assistant's turn behind it if `generation`.

        Raises:
            TemplateRefusal: the template raised.
        """
        taken, tools = self.form.prepare(messages, tools)
        return self._render(taken, tools, generation=generation)

    def stand_in_calls(self, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Calls that these tool messages can answer; the argument of each is a word of its own (`call_word`)."""
        calls = [
            {
                "id": result.get("tool_call_id") or self.form.call_id(result.get("name") or NAME, number),
                "type": "function",
                "function": {"name": result.get("name") or NAME, "arguments": {"query": call_word(number)}},
            }
            for number, result in enumerate(results)
        ]
        return calls[:1] if self.form.one_call else calls

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, generation: bool
    ) -> str:
        if self.form.text_parts:
            messages = [_with_parts(message) for message in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or ([] if self.form.tools_listed else None),
                    tokenize=False,
                    add_generation_prompt=generation,
                    **self._options,
                )
            )
        except Exception as error:  # a template is code of the model's: what it raises is its refusal
            raise TemplateRefusal(
                f"the chat template refuses a conversation of {_outline(messages)}: {error or type(error).__name__}"
            ) from error

    def _check_options(self) -> None:
        text = self.source
        for name in self._options:
            if name in OWNED_OPTIONS:
                raise ValueError(f"template option {name!r} is set by rendering and cannot be given")
            if not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text):
                near = difflib.get_close_matches(
                    name, set(re.findall(r"[A-Za-z_]\w*", text)), n=1, cutoff=0.8
                )
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"the chat template reads no option {name!r}{hint}")

    def _learn_contents(self) -> None:
        """Whether a content is text, and what stands for no tools; as in most templates where nothing shows a text."""
        for parts, listed in product((False, True), (False, True)):
            self.form = TemplateForm(text_parts=parts, tools_listed=listed)
            if self._shows([USER], [{"role": "user", "content": USER}]):
                return
        self.form = TemplateForm()

    def _learn_roles(self) -> None:
        user = {"role": "user", "content": USER}
        system = {"role": "system", "content": SYSTEM}
        if not self._shows([SYSTEM, USER], [system, user]):
            self.form = replace(self.form, folds_system=True)
        if not self._shows([ANSWER, USER], [{"role": "user", "content": ANSWER}, user]):
            self.form = replace(self.form, merges_users=True)
        for key in REASONING_KEYS:
            reply = {"role": "assistant", "content": ANSWER, key: THOUGHT}
            if self._shows([THOUGHT, ANSWER], [user, reply], generation=False):
                self.form = replace(self.form, reasoning_key=key)
                return

    def _learn_thoughts_of_calls(self) -> None:
        """Under which name a thought is shown that stands beside a call, and whether a text may stand there, too."""
        if self.form.calls_as_text:
            return
        keys = (self.form.reasoning_key,) if self.form.reasoning_key else REASONING_KEYS
        for key in keys:
            self.form = replace(self.form, reasoning_key=key)
            if self._shows_call(reasoning=THOUGHT, content=""):
                joined = not self._shows_call(reasoning=THOUGHT, content=ANSWER, words=())
                self.form = replace(self.form, one_text=joined)
                return
        if len(keys) > 1:
            self.form = replace(self.form, reasoning_key=None)

    def _shows_call(self, *, reasoning: str, content: str, words: Sequence[str] = (THOUGHT,)) -> bool:
        """Whether these words are shown of a turn that calls a tool and its result."""
        messages, tools = self._called({"content": content, "reasoning": reasoning})
        try:
            text = self.render(messages, tools)
        except TemplateRefusal:
            return False
        return all(word in text for word in words)

    def _called(self, turn: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        """A question, a turn that calls a tool, and the result; with the tools that they need."""
        result = {"role": "tool", "name": NAME, "tool_call_id": self.form.call_id(NAME, 0), "content": RESULT}
        called = {"role": "assistant", **turn, "tool_calls": self.stand_in_calls([result])}
        return [{"role": "user", "content": USER}, called, result], [PROBE_TOOL] if self.needs_tools else ()

    def _loses_system(self) -> bool:
        """Whether the system message is shown at first, and not any more once a turn is behind it (Mistral Nemo)."""
        system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}
        answered = [user, {"role": "assistant", "content": ANSWER}, user]
        for messages, tools in ((answered, ()), self._called({"content": ""})):
            try:
                if SYSTEM not in self.render([system, *messages], tools):
                    return True
            except TemplateRefusal:
                continue
        return False

    def _learn_tools(self, tool_prompt: ToolPrompt) -> None:
        """Find the form in which the template writes a call and its result; else they are text."""
        roles, faults = self.form, []
        ids: tuple[Literal["any", "nine"], ...] = ("any", "nine")
        needs = (True,) if self.needs_tools else (False, True)
        trials = product(needs, ids, (False, True), (False, True)) if tool_prompt != "text" else ()
        for needs_tools, call_ids, without_content, as_text in trials:
            self.needs_tools = needs_tools
            self.form = replace(
                roles, call_ids=call_ids, without_content=without_content, arguments_as_text=as_text
            )
            try:
                self.render([{"role": "user", "content": USER}], [PROBE_TOOL])
                self._try_tools(1)
                self._learn_parallel()
                return
            except TemplateRefusal as error:
                faults.append(str(error))
        self.needs_tools = needs[0]
        self.tool_fault = next(iter(faults), "")
        if tool_prompt == "template":
            raise ValueError(
                f"{faults[0]}; model.tool_prompt: text has tools written as text in system and user messages"
            )
        shows_results = tool_prompt == "auto" and self._takes_tools() and self._shows_results_alone()
        self.form = replace(roles, calls_as_text=True, results_as_text=not shows_results)

    def _takes_tools(self) -> bool:
        try:
            self.render([{"role": "user", "content": USER}], [PROBE_TOOL])
        except TemplateRefusal as error:
            self.tool_fault = str(error)
            return False
        return True

    def _shows_results_alone(self) -> bool:
        """Whether one result and two are shown behind a turn in which no call is."""
        head = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
        results = [
            {"role": "tool", "name": NAME, "tool_call_id": f"call_{i}", "content": f"{RESULT}{i}"}
            for i in range(2)
        ]
        return all(
            self._shows([result["content"] for result in results[:count]], [*head, *results[:count]])
            for count in (1, 2)
        )

    def _try_tools(self, num_results: int) -> None:
        # Another name than the call's: what is found in the text is the call's own.
        results = [
            {
                "role": "tool",
                "name": "other",
                "tool_call_id": self.form.call_id(NAME, i),
                "content": f"{RESULT}{i}",
            }
            for i in range(num_results)
        ]
        calls = self.stand_in_calls([{**result, "name": NAME} for result in results])
        text = self.render(
            [
                {"role": "user", "content": USER},
                {"role": "assistant", "content": "", "tool_calls": calls},
                *results,
            ],
            [PROBE_TOOL] if self.needs_tools else (),
        )
        if not all(result["content"] in text for result in results):
            raise TemplateRefusal("the chat template leaves tool results out of the conversation")
        if any(text.count(call_word(i)) != 1 for i in range(len(calls))):
            raise TemplateRefusal(
                "the chat template leaves the arguments of tool calls out of the conversation"
            )
        if "'query'" in text or '\\"query\\"' in text:
            raise TemplateRefusal("the chat template does not write the arguments of tool calls as JSON")
        if NAME not in text and self.form.call_ids == "any" and calls[0]["id"] in text:
            self.form = replace(self.form, call_ids="names")

    def _learn_parallel(self) -> None:
        """Whether two results are shown behind two calls, or behind one at least."""
        try:
            self._try_tools(2)
        except TemplateRefusal:
            self.form = replace(self.form, one_call=True)
            self._try_tools(2)

    def _shows(
        self, words: Sequence[str], messages: Sequence[Mapping[str, Any]], *, generation: bool = True
    ) -> bool:
        try:
            text = self._render(messages, (), generation=generation)
        except TemplateRefusal:
            return False
        return all(word in text for word in words)


PROBE_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Look it up.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "What to look up."}},
            "required": ["query"],
        },
    },
}


def call_word(number: int) -> str:
    """The argument of a stand-in call."""
    return f"Wargument{number}w"


def _with_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {
        **message,
        "content": [{"type": "text", "text": content}] if isinstance(content, str) else content,
    }


def _with_results_as_text(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content'] or ''}\n</tool_response>"
            if taken and taken[-1].get("results"):
                taken[-1] = {**taken[-1], "content": f"{taken[-1]['content']}\n{result}"}
            else:
                taken.append({"role": "user", "content": result, "results": True})
        else:
            taken.append(message)
    return [{key: value for key, value in message.items() if key != "results"} for message in taken]


def _with_calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [message["content"]] if message["content"] else []
    for call in calls:
        function = {
            "name": call["function"].get("name", ""),
            "arguments": call["function"].get("arguments", {}),
        }
        texts.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
    return {key: value for key, value in message.items() if key != "tool_calls"} | {
        "content": "\n".join(texts)
    }


def _with_specs_as_text(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    if not tools:
        return messages
    specs = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    told = _TOOLS_TEXT.format(specs=specs)
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def _with_folded_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    heads = [message["content"] for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    if not heads:
        return rest
    head = "\n\n".join(heads)
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": f"{head}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": head}, *rest]


def _with_merged_users(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = []
    for message in messages:
        if taken and message["role"] == taken[-1]["role"] == "user":
            taken[-1] = {**taken[-1], "content": f"{taken[-1]['content']}\n\n{message['content']}"}
        else:
            taken.append(message)
    return taken


def _text_of(content: Any) -> Any:
    """The text of OpenAI content parts; any other content as it is."""
    if not isinstance(content, (list, tuple)):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in _PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise TemplateRefusal(f"a message holds a part of type {kind!r}, and only text can be rendered")
    return "".join(texts)


def _object_of(text: str) -> Any:
    """The object that JSON text says; the text itself where it says none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _outline(messages: Sequence[Mapping[str, Any]]) -> str:
    """The roles in order, for a sentence."""
    return ", ".join(_roles(messages)) or "no messages"


def _roles(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages[-6:]:
        yield (
            f"{message.get('role')} with {len(message['tool_calls'])} tool calls"
            if message.get("tool_calls")
            else str(message.get("role"))
        )
