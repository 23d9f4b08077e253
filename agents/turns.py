"""What a chat template does with turns: how it ends one, and what it makes of earlier ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from polyturn.agents.chat_template import (
    ANSWER,
    NAME,
    PROBE_TOOL,
    RESULT,
    USER,
    ChatTemplate,
    call_word,
)
from polyturn.agents.shielding import ShieldedEncoder, TextFinder
from polyturn.agents.template_form import TemplateForm, TemplateRefusal
from polyturn.configs.models import read_json
from polyturn.tools.thoughts import ANY_CLOSING, ANY_OPENING, is_open


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnEnd:
    """How the template goes on after a turn."""

    close: str | None
    """The token with which it ends the turn, or begins what comes after a turn that it does not end."""
    belongs_to_turn: bool
    """Whether that token only ends the turn. GLM's `<|observation|>` does not: it is the head of what follows."""
    stops: frozenset[str]
    """The tokens of the template that a policy ends such a turn with."""
    frame: frozenset[str]
    """All added tokens behind the turn: those that mark messages."""
    opens_thought: bool
    """Whether the head of the next turn opens a thought."""


def model_stop_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that end a turn by the model's files: the tokenizer's eos, and those of its two configs.

    `<|eom_id|>` is one for every model that has it, as it is for SGLang. Raises `ConfigError` for unreadable files.
    """
    ids = _as_ids(tokenizer.eos_token_id)
    directory = Path(str(getattr(tokenizer, "name_or_path", "") or ""))
    for name in ("config.json", "generation_config.json"):
        if directory.name and (directory / name).is_file():
            config = read_json(directory / name)
            ids |= _as_ids(config.get("eos_token_id"))
            if isinstance(inner := config.get("text_config"), Mapping):
                ids |= _as_ids(inner.get("eos_token_id"))
    message_end = tokenizer.get_added_vocab().get("<|eom_id|>")
    return frozenset(ids | _as_ids(message_end))


def find_turn_end(
    template: ChatTemplate, encoder: ShieldedEncoder, known_stops: frozenset[str], *, calls: bool
) -> TurnEnd:
    """How the template goes on after a turn that answers, or that calls a tool.

    Args:
        known_stops: The texts of tokens that are known to end turns.

    Raises:
        TemplateRefusal: the template does not show the turn, or not the observation behind it.
    """
    behind = _Behind.render(template, calls=calls)
    calls = calls and not template.form.calls_as_text
    of_call = _tokens_of_a_call(template, encoder) if calls else frozenset()
    last = [
        token
        for _, token in encoder.tokens_in(behind.nothing)
        if token in encoder.special | known_stops and token not in of_call
    ]
    tokens = [(at, token) for at, token in encoder.tokens_in(behind.region) if token not in of_call]
    close = next((token for _, token in tokens if token in known_stops), None)
    if close is None and calls and last and behind.region.startswith(behind.nothing):
        close = last[-1]
    if close is None:
        # What a call ends with stands there in any case; the turn's end, or the head of what follows, does not.
        same = _common_length(behind.region, behind.nothing) if calls and not last else 0
        close = next((token for at, token in tokens if at >= same and token in encoder.special), None)
    if close in last or not last:
        stops = {close} if close else set()
    else:
        # The last turn of a conversation ends otherwise than earlier ones, as in gpt-oss.
        stops = {next((token for token in last if token in known_stops), last[0])}
    texts = [token for _, token in tokens]
    ends_alone = bool(last) and close in [token for _, token in encoder.tokens_in(behind.head)]
    return TurnEnd(
        close=close,
        belongs_to_turn=ends_alone and not (calls and close and _opens_results(template, close)),
        stops=frozenset(stops),
        frame=frozenset(texts[texts.index(close) :] if close in texts else texts)
        | {token for _, token in encoder.tokens_in(behind.generation)},
        opens_thought=is_open(behind.generation),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Behind:
    """What the template puts behind a turn when the conversation goes on in three ways."""

    region: str
    """Between the turn's text and an observation's."""
    generation: str
    """Between the observation's text and the next turn."""
    nothing: str
    """Where the turn is the last; empty where the template refuses that."""
    head: str
    """Where only the head of the next turn follows; `nothing` where the template refuses that."""

    @classmethod
    def render(cls, template: ChatTemplate, *, calls: bool) -> _Behind:
        turn, observation, word = _probe(template, calls=calls)
        messages = [{"role": "user", "content": USER}, turn]
        tools = [PROBE_TOOL] if template.needs_tools and calls else []
        region, shown, generation = tail(template.render([*messages, *observation], tools), word).partition(
            RESULT
        )
        if not shown:
            raise TemplateRefusal(
                "the chat template leaves what follows an assistant's turn out of the conversation"
            )
        nothing = _tail_or_none(template, messages, tools, word, generation=False) or ""
        head = _tail_or_none(template, messages, tools, word, generation=True)
        return cls(
            region=region, generation=generation, nothing=nothing, head=nothing if head is None else head
        )


def tail(rendered: str, word: str) -> str:
    """What stands behind the only occurrence of a word."""
    if (times := rendered.count(word)) != 1:
        raise TemplateRefusal(
            f"the chat template renders an assistant turn {times} times, so turns cannot be appended"
        )
    return rendered.partition(word)[2]


def _probe(template: ChatTemplate, *, calls: bool) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """A turn, what follows it, and the last word of the turn's own text."""
    answer = {"role": "assistant", "content": ANSWER}
    if not calls:
        return answer, [{"role": "user", "content": RESULT}], ANSWER
    result = {
        "role": "tool",
        "name": NAME,
        "tool_call_id": template.form.call_id(NAME, 0),
        "content": RESULT,
    }
    if template.form.calls_as_text:
        return answer, [result], ANSWER
    turn = {"role": "assistant", "content": "", "tool_calls": template.stand_in_calls([result])}
    return turn, [result], call_word(0)


def _tokens_of_a_call(template: ChatTemplate, encoder: ShieldedEncoder) -> frozenset[str]:
    """The added tokens that end each call, not the turn: those behind both of two calls."""
    results = [{"name": NAME, "tool_call_id": template.form.call_id(NAME, i)} for i in range(2)]
    calls = template.stand_in_calls(results)
    if len(calls) < 2:
        return frozenset()
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    tools = [PROBE_TOOL] if template.needs_tools else []
    try:
        text = template.render([{"role": "user", "content": USER}, turn], tools, generation=False)
    except TemplateRefusal:
        return frozenset()
    first, _, second = text.partition(call_word(0))[2].partition(call_word(1))
    return frozenset(token for _, token in encoder.tokens_in(first)) & {
        token for _, token in encoder.tokens_in(second)
    }


def _tail_or_none(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    word: str,
    *,
    generation: bool,
) -> str | None:
    """What stands behind the turn where nothing follows; None where the template refuses that."""
    try:
        return tail(template.render(messages, tools, generation=generation), word)
    except TemplateRefusal:
        return None


def _opens_results(template: ChatTemplate, token: str) -> bool:
    """Whether a token stands before each of two results and behind none of them, as Gemma 4's `<|tool_response>`."""
    results = [
        {
            "role": "tool",
            "name": NAME,
            "tool_call_id": template.form.call_id(NAME, i),
            "content": f"{RESULT}{i}",
        }
        for i in range(2)
    ]
    turn = {"role": "assistant", "content": "", "tool_calls": template.stand_in_calls(results)}
    tools = [PROBE_TOOL] if template.needs_tools else []
    text = template.render([{"role": "user", "content": USER}, turn, *results], tools)
    between, _, behind = text.partition(f"{RESULT}0")[2].partition(f"{RESULT}1")
    return token in between and token not in behind


def _common_length(left: str, right: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _as_ids(value: Any) -> set[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return {int(item) for item in values if isinstance(item, int) and not isinstance(item, bool)}


MAX_PIECES = 8


class Sought:
    """Texts that a template looks for within others, as `/no_think`: what it makes of a message may hang on them."""

    def __init__(self, texts: Iterable[str] = (), *, foreign: TextFinder, own: TextFinder) -> None:
        """
        Args:
            foreign: What the template never sees in the messages of others.
            own: What it never sees in the assistant's.
        """
        texts = tuple(texts)
        self._of_others = TextFinder(text for text in texts if not any(foreign.find(text)))
        self._of_assistant = TextFinder(text for text in texts if not any(own.find(text)))

    def pieces(self, role: str, content: Any) -> Pieces:
        """What is found in a message's content, in order, with None for what is around; of many the first and last."""
        finder = self._of_assistant if role == "assistant" else self._of_others
        if not isinstance(content, str) or not finder.may_find(content):
            return ()
        pieces: list[str | None] = []
        position = 0
        for start, end in finder.find(content):
            pieces += [None, content[start:end]] if start > position else [content[start:end]]
            position = end
        if pieces and position < len(content):
            pieces.append(None)
        half = MAX_PIECES // 2
        return tuple(pieces if len(pieces) <= MAX_PIECES else [*pieces[:half], *pieces[-half:]])


Pieces = tuple[str | None, ...]
NOTHING_SOUGHT = Sought(foreign=TextFinder(()), own=TextFinder(()))


class MessageShape(NamedTuple):
    """A message without its texts."""

    role: str
    has_content: bool
    reasoning: bool | None = None
    """Whether it thought something; None: it did not think at all."""
    num_calls: int = 0
    pieces: Pieces = ()
    """As `Sought.pieces`; empty where nothing is found."""

    @classmethod
    def of(cls, message: Mapping[str, Any], sought: Sought = NOTHING_SOUGHT) -> MessageShape:
        """The shape of a message."""
        reasoning, content = message.get("reasoning"), message.get("content")
        return cls(
            message["role"],
            bool(content),
            None if reasoning is None else bool(reasoning),
            len(message.get("tool_calls") or ()),
            sought.pieces(message["role"], content),
        )

    def content(self, number: int) -> str:
        """A content of this shape, of words of its own."""
        if not self.pieces:
            return f"W{number}content" if self.has_content else ""
        return "".join(piece or f"W{number}content{place}w" for place, piece in enumerate(self.pieces))


class Shape(NamedTuple):
    """A conversation without its texts. A template treats conversations of one shape alike."""

    messages: tuple[MessageShape, ...]
    with_tools: bool = False


def shape_of(
    messages: Sequence[Mapping[str, Any]], *, with_tools: bool, sought: Sought = NOTHING_SOUGHT
) -> Shape:
    """The shape of a conversation."""
    return Shape(tuple(MessageShape.of(message, sought) for message in messages), with_tools)


def words_in(content: str) -> list[str]:
    """The words of a `MessageShape.content`, without what a template looks for."""
    return re.findall(r"W\d+content(?:\d+w)?", content)


Block = tuple[MessageShape, ...]
"""An assistant's message and what is behind it up to the next one; of a conversation's beginning, what is before."""
LATEST_OF_A_KIND = 2


@dataclass(eq=False, slots=True)
class Outline:
    """The blocks of conversations that a template treats alike. Each outline is made once, and found after that.

    Of equal blocks the first and the two latest stand for all. So there are few outlines however long conversations
    get, and what makes a template treat a message differently, its place before or behind the last message of some
    kind, is in them as it is in the conversation.
    """

    blocks: tuple[Block, ...] = ()
    with_tools: bool = False
    keeps: dict[Block, bool] = field(default_factory=dict)
    """Whether all before a block is left as it was when that block comes behind these."""
    following: dict[Block, Outline] = field(default_factory=dict)
    known: dict[tuple[Block, ...], Outline] = field(default_factory=dict)
    """All that came of the same empty one, by their blocks."""

    def behind(self, block: Block) -> Shape:
        """The shape of a conversation of these blocks and one more."""
        return Shape(tuple(message for each in (*self.blocks, block) for message in each), self.with_tools)

    def followed_by(self, block: Block) -> Outline:
        """The outline with one more block."""
        if block not in self.following:
            blocks = [*self.blocks, block]
            places = [place for place, each in enumerate(blocks) if each == block]
            if len(places) > 1 + LATEST_OF_A_KIND:
                del blocks[places[1]]
            new = Outline(tuple(blocks), self.with_tools, known=self.known)
            self.following[block] = self.known.setdefault(new.blocks, new)
        return self.following[block]


class History:
    """One conversation as a template sees it, read message by message as it grows."""

    def __init__(
        self, outline: Outline, keeps: Callable[[Outline, Block], bool], sought: Sought = NOTHING_SOUGHT
    ) -> None:
        """`outline` is the empty one, `keeps` says whether a template leaves what is before a block as it was."""
        self._outline = outline
        self._keeps = keeps
        self._sought = sought
        self._block: Block = ()
        self._num_read = 0

    @property
    def shape(self) -> Shape:
        """What the template is asked of in place of the conversation so far."""
        return self._outline.behind(self._block)

    def continues(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """As `ChatRenderer.continues`.

        Args:
            messages: The whole conversation. Those that were there at the last call are not looked at again.
        """
        for place in range(self._num_read, len(messages)):
            shape = MessageShape.of(messages[place], self._sought)
            if shape.role == "assistant" and self._block:
                self._outline = self._outline.followed_by(self._block)
                self._block = ()
            self._block += (shape,)
        self._num_read = len(messages)
        return self._keeps(self._outline, self._block)


def messages_of(shape: Shape, form: TemplateForm) -> tuple[list[dict[str, Any]], int | None]:
    """Messages of that shape whose texts are words of their own, and the place of the last assistant's among them.

    None in place of it where the conversation ends with that message or has none.
    """
    messages: list[dict[str, Any]] = []
    last, num_calls, unanswered = None, 0, [form.call_id(NAME, 0)]
    for index, each in enumerate(shape.messages):
        message: dict[str, Any] = {"role": each.role, "content": each.content(index)}
        if each.role == "assistant":
            last = index
            if each.reasoning is not None:
                message["reasoning"] = f"W{index}thought" if each.reasoning else ""
            if each.num_calls:
                ids = [form.call_id(NAME, num_calls + number) for number in range(each.num_calls)]
                message["tool_calls"] = [
                    {
                        "id": call_id,
                        "type": "function",
                        "function": {"name": NAME, "arguments": {"query": f"W{index}a{number}w"}},
                    }
                    for number, call_id in enumerate(ids)
                ]
                num_calls, unanswered = num_calls + each.num_calls, ids
        elif each.role == "tool":
            call_id = unanswered.pop(0) if len(unanswered) > 1 else unanswered[0]
            message |= {"name": NAME, "tool_call_id": call_id}
        messages.append(message)
    return messages, None if last == len(messages) - 1 else last


def keeps_turn(rest: str, turn: Mapping[str, Any], delta: str, *, calls_as_text: bool) -> bool:
    """Whether a turn stands as it was sampled in what follows its prompt: thought, content and calls, then `delta`.

    Args:
        rest: All that the template puts behind the prompt of the turn.
        turn: The message, its texts words that occur nowhere else.
        delta: What the template puts behind such a turn.
        calls_as_text: Whether calls are part of the content, whose end then stands before `delta`.
    """
    calls = [call["function"]["arguments"]["query"] for call in turn.get("tool_calls", ())]
    words = [word for word in (turn.get("reasoning"), turn["content"], *calls) if word]
    end = 0
    for word in words:
        found = rest.find(word, end)
        if found < 0:
            return False
        end = found + len(word)
    lead = rest[: rest.find(words[0])] if words else rest.removesuffix(delta)
    if turn.get("reasoning") is None and ANY_OPENING.search(lead):
        return False
    if turn.get("reasoning") == "" and not ANY_CLOSING.search(lead):
        return False
    return rest[end:] == delta if words and not calls_as_text else rest[end:].endswith(delta)
