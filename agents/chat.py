"""Conversations as tokens: the prompt once, and after that only what the chat template adds.

A dialect of tags has its conversations in one assistant turn: what is found goes on where the policy stopped, as text.

The module is long because all that a renderer knows of its template serves each of its few questions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polyturn.agents.chat_template import (
    PROBE_TOOL,
    TODAY,
    USER,
    ChatTemplate,
    ToolPrompt,
)
from polyturn.agents.deltas import Deltas, searched_texts
from polyturn.agents.dialects import Dialect, TagDialect
from polyturn.agents.shielding import Shield, ShieldedEncoder, TextFinder
from polyturn.agents.template_form import TemplateForm, TemplateRefusal
from polyturn.agents.turns import (
    Block,
    History,
    Outline,
    Shape,
    Sought,
    TurnEnd,
    find_turn_end,
    keeps_turn,
    messages_of,
    model_stop_ids,
    shape_of,
    tail,
    words_in,
)
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.envs.search.styles import Tags, write_turn
from polyturn.tools.thoughts import THOUGHT_MARKS
from polyturn.tools.types import ToolCall, ToolSpec

MAX_SHAPES = 4096
"""Of conversations whose history was looked at are kept; the next one clears them."""

HistoryRule = Literal["template", "sampled"]
"""What becomes of earlier turns: what the template makes of them, or what they were when they were sampled."""


def load_tokenizer(path: str | Path, *, template: Path | None = None) -> Any:
    """The `transformers` tokenizer of a model directory.

    Args:
        template: The file of a chat template in place of the directory's own.

    Raises:
        ValueError: the directory is missing, a file of its tokenizer is damaged, or there is no chat template.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path}: no such model directory")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file gives an error of any kind, out of Rust a plain Exception
        told = " ".join(str(error).split())[:600]
        raise ValueError(f"{path}: its tokenizer cannot be read: {type(error).__name__}: {told}") from error
    if template is not None:
        tokenizer.chat_template = read_template(template)
        return tokenizer
    found = tokenizer.chat_template
    if not found:
        raise ValueError(f"{path}: the tokenizer has no chat template")
    if not all(isinstance(one, str) for one in (found.values() if isinstance(found, dict) else (found,))):
        raise ValueError(f"{path}: the tokenizer's chat template is no text")
    return tokenizer


def read_template(path: Path) -> str:
    """The chat template in a file of its own. Raises `ValueError` where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the chat template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the chat template {path} is not UTF-8 text") from error
    if not text.strip():
        raise ValueError(f"the chat template {path} is empty")
    return text


def asks_for_date(path: Path, *, template: Path | None = None) -> bool:
    """Whether the chat template of a model directory, or of that file, asks what day it is."""
    own = (path / "chat_template.jinja", path / "tokenizer_config.json")
    files = [template] if template is not None else [*own, *(path / "additional_chat_templates").glob("*")]
    return any(file.is_file() and TODAY.encode() in file.read_bytes() for file in files)


class ChatRenderer:
    """Renders messages with a tokenizer's chat template.

    The template is tried at the start: with a user's message, a tool's result and two results behind a turn, what it
    writes there must hold their texts, and what cannot be written in any form is refused. Texts of others never turn
    into tokens that mark something: `<|im_end|>` or `</tool_response>` in a message is encoded as plain text.

    Raises:
        ValueError: the template cannot be used turn by turn, or nothing tells where a turn ends.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template_options: Mapping[str, Any] | None = None,
        tool_prompt: ToolPrompt = "auto",
        history: HistoryRule = "template",
        day: date | None = None,
    ) -> None:
        """
        Args:
            tokenizer: A `transformers` tokenizer with a chat template.
            template_options: Further variables of the template, such as `enable_thinking`.
            tool_prompt: Who writes tool specs, calls and results.
            history: Whether `continues` heeds what the template makes of earlier turns.
            day: What a template is told that asks for the date; None: today.
        """
        self._tokenizer = tokenizer
        self._history = history
        self._encoder = ShieldedEncoder(tokenizer)
        self._template = ChatTemplate(tokenizer, options=template_options, tool_prompt=tool_prompt, day=day)
        known = model_stop_ids(tokenizer)
        self._plain = self._turn_end(known, calls=False)
        stops = {*known, *self._ids_of(self._plain.stops)}
        self._calling = self._plain
        if not self._template.form.results_as_text:
            self._calling = self._turn_end(
                frozenset({*stops, *self._ids_of({self._plain.close} if self._plain.close else ())}),
                calls=True,
            )
        self._stop_token_ids = tuple(sorted(stops | self._ids_of(self._calling.stops)))
        if not self._stop_token_ids:
            raise ValueError(
                "the chat template ends a turn with no special token, and the tokenizer has no eos token"
            )
        frame = (self._plain.frame | self._calling.frame) & self._encoder.marks
        thoughts = {*THOUGHT_MARKS, *THOUGHT_MARKS.values()}
        self._own = TextFinder((frame | (self._encoder.special & self._encoder.marks)) - thoughts)
        source = tokenizer.chat_template
        searched = (
            searched_texts(each) for each in (source.values() if isinstance(source, Mapping) else (source,))
        )
        self._sought = Sought(
            frozenset(itertools.chain(*searched)), foreign=self._encoder.foreign, own=self._own
        )
        self._outlines: dict[bool, Outline] = {}
        self._num_outlines = 0
        self._shown: set[tuple[Shape, bool]] = set()
        self._deltas = Deltas(
            # One with another template where there are tools is asked every time.
            source if isinstance(source, str) and not self._template.needs_tools else None,
            lambda messages: self._behind_turn(messages, (), "Wreply"),
            self._encoder.foreign.may_find,
        )

    @property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer."""
        return self._tokenizer

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a turn: the tokenizer's eos, those of the model's two configs, and the template's own."""
        return self._stop_token_ids

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end a turn too; they belong to it."""
        return ()

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The tokens that the tokenizer itself flags as special. No message text can turn into one."""
        return frozenset(self._tokenizer.all_special_ids) | self._ids_of(
            self._encoder.special & self._encoder.ids.keys()
        )

    @property
    def mark_token_ids(self) -> frozenset[int]:
        """The added tokens that mark something, flagged as special or not. No text of others can turn into one."""
        return frozenset(self._ids_of(self._encoder.marks))

    @property
    def form(self) -> TemplateForm:
        """What is done to messages for this template."""
        return self._template.form

    @property
    def template(self) -> ChatTemplate:
        """The template, and what was found out of it."""
        return self._template

    @property
    def beginning(self) -> tuple[int | None, bool]:
        """The tokenizer's token for the beginning of a text, and whether it adds that to what it is given."""
        token = self._tokenizer.bos_token_id
        return token, token is not None and token in self._tokenizer("a")["input_ids"][:1]

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, those that mark something included."""
        return self._encoder.decode(list(token_ids))

    def plain_ids(self, text: str) -> list[int]:
        """The tokens of a text by itself, none of which marks something."""
        return self._encode_text(text)

    def warm_up(self) -> None:
        """Do at once what the first text with a mark in it would have to wait for: seconds with a large vocabulary."""
        self._encode_text(next(iter(self._encoder.marks), ""))

    def start(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        """The tokens of the conversation so far and of the head of the assistant's turn.

        Raises:
            ValueError: the template refuses the conversation.
        """
        self._check_shown(shape_of(messages, with_tools=bool(tools), sought=self._sought))
        shield = self._shield(messages, tools)
        return self._encoder.encode(self._template.render(shield.messages, shield.tools), shield)

    def extend(
        self, observation: Sequence[Message], *, last_token_id: int, tools: Sequence[ToolSpec] = ()
    ) -> list[int]:
        """The tokens that follow a sampled turn: the end of that turn, `observation`, the head of the next turn.

        A turn that was ended by any of `stop_token_ids` is not ended again; one that was cut is ended first.

        Args:
            observation: The new messages.
            last_token_id: The last sampled token.
            tools: Those of `start`; they matter to tokenizers that have another template where there are tools.

        Raises:
            ValueError: the template refuses the observation.
        """
        shield = None
        if (known := self._deltas.text(observation)) is not None:
            text, end = known
        else:
            self._check_shown(shape_of(observation, with_tools=False, sought=self._sought), behind_turn=True)
            shield = self._shield(observation, tools if self._template.needs_tools else ())
            text, end = self._behind_turn(shield.messages, shield.tools, shield.fresh_word())
        start = text.find(end.close) if end.close else -1
        if last_token_id in self._stop_token_ids:
            if start < 0 or end.close is None:
                return self._encoder.encode(text, shield, behind=self._added_text(last_token_id))
            if end.belongs_to_turn or last_token_id == self._encoder.ids[end.close]:
                return self._encoder.encode(text[start + len(end.close) :], shield, behind=end.close)
            return self._encoder.encode(text[start:], shield, behind=self._added_text(last_token_id))
        # What closes a call has been sampled with it, or was cut off with the turn.
        if end is not self._plain and start >= 0:
            text = text[start:]
        return self._encoder.encode(text, shield, behind=self._encoder.anchor)

    def continues(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> bool:
        """Whether the template, given the whole conversation, leaves what is before its last observation as it was.

        Where it does not (earlier thoughts are dropped, tools move to the last message), the conversation begins anew
        with `start`. Always true with `history="sampled"`. A conversation that the template refuses goes on as it is.

        Args:
            messages: All of them, the new observation included.
        """
        return self.history(tools).continues(messages)

    def history(self, tools: Sequence[ToolSpec] = ()) -> History:
        """What answers `continues` for one conversation again and again as it grows, looking at new messages alone."""
        with_tools = bool(tools)
        empty = self._outlines.setdefault(with_tools, Outline(with_tools=with_tools))
        return History(empty, self._keeps_before, self._sought)

    def continues_shape(self, shape: Shape) -> bool:
        """As `continues`, of conversations of a shape."""
        return self._history == "sampled" or self._keeps(shape)

    def _keeps_before(self, outline: Outline, block: Block) -> bool:
        """Whether the template leaves what is before a block as it was; asked of it once for each outline and block."""
        if self._history == "sampled":
            return True
        if block not in outline.keeps:
            self._num_outlines += 1
            if self._num_outlines > MAX_SHAPES:
                self._outlines, self._num_outlines = {}, 0
            outline.keeps[block] = self._keeps(outline.behind(block))
        return outline.keeps[block]

    def written_turn(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        """The tokens of the last message, an assistant's, as the template writes it and a policy would sample it behind
        `start` or `extend`, with the token that ends it.

        Raises:
            ValueError: the template refuses it, or writes another head before it than before a turn to be sampled.
        """
        shield = self._shield(messages, tools)
        head = self._template.render(shield.messages[:-1], shield.tools)
        whole = self._template.render(shield.messages, shield.tools, generation=False)
        if not whole.startswith(head):
            raise TemplateRefusal(
                "the chat template does not write this turn behind the head that it gives a turn to be sampled, as "
                "where the head opens a thought and the turn has none, or histories have no thoughts"
            )
        text = whole[len(head) :]
        end = self._calling if messages[-1].get("tool_calls") else self._plain
        ends = [(text.rfind(stop), stop) for stop in (*end.stops, end.close) if stop and stop in text]
        if ends:
            at, stop = max(ends)
            return self._encoder.encode(text[: at + len(stop)], shield, behind=self._encoder.anchor)
        token_ids = self._encoder.encode(text.rstrip(), shield, behind=self._encoder.anchor)
        return [*token_ids, self._stop_token_ids[0]]

    def shows_tools(self, tools: Sequence[ToolSpec]) -> bool:
        """Whether the template tells the model of all these tools."""
        text = self._template.render(
            [{"role": "user", "content": USER}], [tool.to_openai() for tool in tools]
        )
        return all(tool.name in text for tool in tools)

    def written_call(self) -> str | None:
        """A turn with a call as the template writes it, without its end; None where the template refuses to say."""
        result = {"role": "tool", "name": "search", "tool_call_id": self.form.call_id("search", 0)}
        turn = {"role": "assistant", "content": "", "tool_calls": self._template.stand_in_calls([result])}
        head = [{"role": "user", "content": USER}]
        try:
            befores = [self._template.render(head, generation=generation) for generation in (True, False)]
            text = self._template.render([*head, turn], generation=False)
        except TemplateRefusal:
            return None
        # A head that opens a thought is not that of a turn in a history.
        before = next((before for before in befores if text.startswith(before)), "")
        close = self._calling.close
        return text.removeprefix(before).partition(close)[0] if close else text.removeprefix(before)

    def opens_thought(self, observation: Sequence[Message], *, is_first: bool) -> bool:
        """Whether the head of the turn behind an observation opens a thought, with which the sampled text goes on."""
        if is_first or not observation or observation[-1]["role"] != "tool":
            return self._plain.opens_thought
        return self._calling.opens_thought

    def with_call_ids(self, message: AssistantMessage, num_before: int) -> AssistantMessage:
        """The message with ids of the form that the template wants, the first call's that of this number."""
        if not message.tool_calls:
            return message
        calls = tuple(
            replace(call, id=self.form.call_id(call.name or "unknown", num_before + number))
            for number, call in enumerate(message.tool_calls)
        )
        return replace(message, tool_calls=calls)

    def decode(self, token_ids: npt.ArrayLike) -> str:
        """The text of a sampled turn without the token that ended it. Bytes that are not UTF-8 become U+FFFD."""
        sampled = np.asarray(token_ids, dtype=np.int64).tolist()
        if sampled and sampled[-1] in self._stop_token_ids:
            sampled.pop()
        return self._encoder.decode(sampled)

    def _behind_turn(
        self, observation: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], reply: str
    ) -> tuple[str, TurnEnd]:
        """All text that the template puts behind that of an assistant turn when `observation` follows it.

        A stand-in conversation of one short turn serves for any history: its text is found again, and what stands
        behind it is the delta. Whether the history lets it is a question for `continues`.
        """
        results = list(itertools.takewhile(lambda message: message["role"] == "tool", observation))
        if results and self._template.needs_tools:
            tools = tools or [PROBE_TOOL]
        head: list[Mapping[str, Any]] = [{"role": "user", "content": USER}]
        if not results or self.form.calls_as_text:
            turn: Mapping[str, Any] = {"role": "assistant", "content": reply}
            end = self._calling if results else self._plain
            return tail(self._template.render([*head, turn, *observation], tools), reply), end
        calls = self._template.stand_in_calls(results)
        answers = [
            {**result, "tool_call_id": calls[min(number, len(calls) - 1)]["id"]}
            for number, result in enumerate(results)
        ]
        turn = {"role": "assistant", "content": "", "tool_calls": calls}
        calls[-1]["function"]["arguments"] = {"query": reply}
        rendered = self._template.render([*head, turn, *answers, *observation[len(results) :]], tools)
        return tail(rendered, reply), self._calling

    def _keeps(self, shape: Shape) -> bool:
        messages, last = messages_of(shape, self.form)
        if last is None:
            return True
        tools = [PROBE_TOOL] if shape.with_tools else []
        observation = messages[last + 1 :]
        calls = bool(observation) and observation[0]["role"] == "tool"
        end = self._calling if calls else self._plain
        if end.close not in end.stops or self.form.joins(messages[last]):
            # The policy's own end of a turn, or its thought beside a text and a call, stands there in no history.
            return False
        try:
            before = self._template.render(messages[:last], tools)
            whole = self._template.render(messages, tools)
            delta, _ = self._behind_turn(observation, tools if self._template.needs_tools else [], "Wreply")
        except TemplateRefusal:
            return True
        return whole.startswith(before) and keeps_turn(
            whole[len(before) :], messages[last], delta, calls_as_text=self.form.calls_as_text
        )

    def _check_shown(self, shape: Shape, *, behind_turn: bool = False) -> None:
        """Raise `TemplateRefusal` where the template leaves out what somebody else than the assistant says."""
        if (shape, behind_turn) in self._shown:
            return
        messages, _ = messages_of(shape, self.form)
        tools = [PROBE_TOOL] if shape.with_tools else []
        text = (
            self._behind_turn(messages, tools, "Wreply")[0]
            if behind_turn
            else self._template.render(messages, tools)
        )
        for message in messages:
            if message["role"] != "assistant" and any(w not in text for w in words_in(message["content"])):
                raise TemplateRefusal(
                    f"the chat template leaves a message of the role {message['role']!r} out of a conversation of "
                    f"{', '.join(each.role for each in shape.messages)}"
                )
        if len(self._shown) >= MAX_SHAPES:
            self._shown.clear()
        self._shown.add((shape, behind_turn))

    def _turn_end(self, stops: frozenset[int], *, calls: bool) -> TurnEnd:
        texts = frozenset(text for text, token_id in self._encoder.ids.items() if token_id in stops)
        return find_turn_end(self._template, self._encoder, texts, calls=calls)

    def _ids_of(self, texts: Iterable[str]) -> set[int]:
        return {self._encoder.ids[text] for text in texts}

    def _added_text(self, token_id: int) -> str | None:
        """The text of a stop token, if it is one of the added ones."""
        return self._encoder.texts.get(token_id, self._encoder.anchor)

    def _shield(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Shield:
        return Shield(
            messages, [tool.to_openai() for tool in tools], foreign=self._encoder.foreign, own=self._own
        )

    def _encode_text(self, text: str) -> list[int]:
        """A text by itself, none of it as tokens that mark something."""
        shield = Shield([{"role": "user", "content": text}], foreign=self._encoder.foreign, own=self._own)
        return self._encoder.encode(shield.messages[0]["content"], shield, behind=self._encoder.anchor)


def make_renderer(
    tokenizer: Any,
    dialect: Dialect,
    *,
    template_options: Mapping[str, Any] | None = None,
    tool_prompt: ToolPrompt = "auto",
    history: HistoryRule = "template",
    day: date | None = None,
) -> ChatRenderer:
    """The renderer that a dialect's conversations need. Raises `ValueError` as `ChatRenderer` does."""
    if isinstance(dialect, TagDialect):
        return ContinuationRenderer(tokenizer, tags=dialect.tags, template_options=template_options, day=day)
    return ChatRenderer(
        tokenizer, template_options=template_options, tool_prompt=tool_prompt, history=history, day=day
    )


class ContinuationRenderer(ChatRenderer):
    """Renders the prompt with the chat template, without tools, and all that follows as text of the assistant's turn.

    Sampling stops at the closing tag of an action, which stays. Results stand in the tags of the style, cut there to
    its limit; any other message is put as it is. A policy that ends its turn itself, with the template's end token, is
    given the head of a new assistant turn first, since sampled tokens are never taken back.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tags: Tags,
        template_options: Mapping[str, Any] | None = None,
        day: date | None = None,
    ) -> None:
        super().__init__(tokenizer, template_options=template_options, history="sampled", day=day)
        self._tags = tags

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self._tags.stop_strings

    def start(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        """The tokens of the prompt and of the head of the assistant's turn; the tags stand in for the tools."""
        del tools
        return super().start(messages) + self._encode_text(self._tags.opening)

    def extend(
        self, observation: Sequence[Message], *, last_token_id: int, tools: Sequence[ToolSpec] = ()
    ) -> list[int]:
        """The tokens that go on after a sampled text: `observation` as text."""
        del tools
        closed = last_token_id in self.stop_token_ids
        token_ids = super().extend((), last_token_id=last_token_id) if closed else []
        for message in observation:
            found = message["role"] == "tool" and message.get("name")
            token_ids += self._result(message["content"]) if found else self._encode_text(message["content"])
        return token_ids + self._encode_text(self._tags.opening)

    def written_turn(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        """The tokens of the last message, an assistant's, in tags, up to where sampling stops.

        Raises:
            ValueError: it does not end in an action's tag.
        """
        del tools
        message = messages[-1]
        calls = tuple(
            ToolCall(id="", name=call["function"]["name"], arguments=call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        )
        text = write_turn(AssistantMessage(content=message["content"], tool_calls=calls), self._tags)
        if not text.rstrip().endswith(self.stop_strings):
            raise ValueError(
                f"a turn in tags ends in one of {', '.join(self.stop_strings)}, and this one has none: {text[-80:]!r}"
            )
        return self._encode_text(text.rstrip())

    def _result(self, content: str) -> list[int]:
        opening, closing = self._tags.results
        token_ids = self._encode_text(f"{opening}{content.strip()}{closing}")
        limit = self._tags.max_result_tokens
        if limit is None or len(token_ids) <= limit:
            return token_ids
        head, tail = self._encode_text(opening), self._encode_text(closing)
        room = max(0, limit - len(head) - len(tail))
        return head + self._encode_text(content.strip())[:room] + tail
