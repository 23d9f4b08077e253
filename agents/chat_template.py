"""A chat template, and what it makes of messages: found out by trying, once, at the start."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, time
from itertools import product
from typing import Any, Literal

from polyturn.agents.template_form import TemplateForm, TemplateRefusal

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

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


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
