"""What holds for a model's chat template: what was found out of it, and conversations turn by turn against the whole.

The conversations hold what templates have no say in (quotes, line breaks, marks in the texts of others) beside what
they treat differently: thoughts, texts beside calls, several calls, a system message or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.chat_template import TODAY
from polyturn.agents.template_form import TemplateRefusal
from polyturn.agents.turns import shape_of
from polyturn.envs.messages import Message
from polyturn.tools.types import ToolSpec

USER: Message = {"role": "user", "content": "Wquestion"}
SNIPPET_CHARS = 160
PROBE_SPEC = ToolSpec(
    name="search",
    description="Look it up.",
    parameters={
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to look up."}},
        "required": ["query"],
    },
)
"""The tool of the conversations where no others are given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The first place where a conversation as the run has it and the template's rendering of the whole part."""

    before: str
    """The end of what is the same in both."""
    turn_by_turn: str
    template: str

    @classmethod
    def between(cls, turn_by_turn: str, template: str) -> Difference:
        """The first difference of two texts."""
        pairs = zip(turn_by_turn, template, strict=False)
        shorter = min(len(turn_by_turn), len(template))
        at = next((place for place, (left, right) in enumerate(pairs) if left != right), shorter)
        return cls(
            before=turn_by_turn[max(0, at - SNIPPET_CHARS // 2) : at],
            turn_by_turn=turn_by_turn[at : at + SNIPPET_CHARS],
            template=template[at : at + SNIPPET_CHARS],
        )

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"behind        {self.before!r}",
            f"turn by turn  {self.turn_by_turn!r}",
            f"the template  {self.template!r}",
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What the template makes of the history when something follows a turn."""

    what: str
    difference: Difference | None = None
    """Why a new segment begins there; None where the conversation goes on, or the template refuses it."""
    refusal: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateReport:
    """What `check_template` found."""

    facts: tuple[tuple[str, str], ...]
    """A name and a sentence each."""
    cases: tuple[Case, ...]
    num_conversations: int
    """How many were compared turn by turn."""
    fault: Difference | None
    """Where one of them silently differed from the template; None: nowhere."""


def check_template(renderer: ChatRenderer, tools: Sequence[ToolSpec] = (PROBE_SPEC,)) -> TemplateReport:
    """Say what holds for the template of a renderer. Raises `ValueError` where it refuses the tools."""
    return TemplateReport(
        facts=tuple(_facts(renderer, tools)),
        cases=tuple(_case(renderer, *case, tools) for case in _cases(renderer)),
        num_conversations=len(list(_conversations(renderer))),
        fault=first_fault(renderer, tools),
    )


def first_fault(renderer: ChatRenderer, tools: Sequence[ToolSpec] = (PROBE_SPEC,)) -> Difference | None:
    """Where one of a dozen conversations silently differs from the template's rendering of the whole; None: nowhere."""
    found = (find_difference(renderer, *each, tools) for each in _conversations(renderer))
    return next((fault for fault in found if fault is not None), None)


Turns = Sequence[tuple[Message, Sequence[Message]]]
"""Assistant messages, each with the observation behind it."""


def find_difference(
    renderer: ChatRenderer, head: Sequence[Message], turns: Turns, tools: Sequence[ToolSpec]
) -> Difference | None:
    """Play a conversation as a run does, its turns written as the template writes them.

    Returns:
        The first place where a history that went on is not what the template makes of the whole; None: there is none.
        A template that refuses the conversation ends it.
    """
    messages, history = list(head), renderer.history(tools)
    try:
        for turn, observation in turns:
            prompt = renderer.start(messages, tools)
            messages += [turn, *observation]
            whole = renderer.start(messages, tools)
            if not history.continues(messages):
                continue
            sampled = _as_sampled(renderer, prompt, whole, turn)
            if sampled is None:
                return _difference(renderer, prompt, whole)
            delta = renderer.extend(observation, last_token_id=sampled[-1], tools=tools)
            if [*prompt, *sampled, *delta] != whole:
                return _difference(renderer, [*prompt, *sampled, *delta], whole)
    except TemplateRefusal:
        return None
    return None


def _difference(renderer: ChatRenderer, turn_by_turn: Sequence[int], whole: Sequence[int]) -> Difference:
    return Difference.between(renderer.text_of(turn_by_turn), renderer.text_of(whole))


def _as_sampled(
    renderer: ChatRenderer, prompt: list[int], whole: list[int], turn: Message
) -> list[int] | None:
    """The tokens of a turn as the template has it, up to an end that a policy samples; None: it does not have it so."""
    if whole[: len(prompt)] != prompt:
        return None
    rest = whole[len(prompt) :]
    words = _words(turn)
    for place, token in enumerate(rest):
        if token in renderer.stop_token_ids:
            text = renderer.text_of(rest[:place])
            if all(word in text for word in words):
                return rest[: place + 1]
    return None


def _words(turn: Mapping[str, Any]) -> list[str]:
    calls = [call["function"]["arguments"]["query"] for call in turn.get("tool_calls", ())]
    return [word for word in (turn.get("reasoning"), turn["content"], *calls) if word]


def _turn(
    renderer: ChatRenderer,
    number: int,
    *,
    thinks: bool,
    speaks: bool,
    num_calls: int,
    before: int = 0,
    said: str = "",
) -> tuple[Message, list[Message]]:
    """A turn of words of its own, and what answers it, with `said` in each answer."""
    turn: Message = {"role": "assistant", "content": f"Wanswer{number}x" if speaks or not num_calls else ""}
    if thinks:
        turn["reasoning"] = f"Wthought{number}x"
    if not num_calls:
        return turn, [{"role": "user", "content": f"Wfollow{number}x{said}"}]
    ids = [renderer.form.call_id(PROBE_SPEC.name, before + place) for place in range(num_calls)]
    turn["tool_calls"] = [
        {
            "id": call_id,
            "type": "function",
            "function": {"name": PROBE_SPEC.name, "arguments": {"query": f"Wquery{number}n{place}x"}},
        }
        for place, call_id in enumerate(ids)
    ]
    return turn, [
        {
            "role": "tool",
            "tool_call_id": call_id,
            "name": PROBE_SPEC.name,
            "content": f"Wresult{number}n{place}x{said}",
        }
        for place, call_id in enumerate(ids)
    ]


def _conversations(renderer: ChatRenderer) -> Iterator[tuple[list[Message], Turns]]:
    """Each kind of turn twice in a row, then another; with and without a system message, with and without odd texts."""
    kinds = [
        (thinks, speaks, num_calls)
        for thinks, speaks, num_calls in product((False, True), (False, True), (0, 1, 2))
        if (num_calls or speaks) and not (renderer.form.one_call and num_calls > 1)
    ]
    marks = renderer.text_of(sorted(renderer.mark_token_ids)[:4])
    odd = f" \"q\" 'a' {{b: [c]}}\n<d>&amp;\\n {marks} \u00e9\U0001f600."
    for place, kind in enumerate(kinds):
        said = odd if place % 2 else ""
        system: list[Message] = [{"role": "system", "content": f"Wsystem{said}"}] if place % 3 else []
        turns, before = [], 0
        for number, (thinks, speaks, num_calls) in enumerate((kind, kind, kinds[place - 1])):
            turns.append(
                _turn(
                    renderer,
                    number,
                    thinks=thinks,
                    speaks=speaks,
                    num_calls=num_calls,
                    before=before,
                    said=said,
                )
            )
            before += num_calls
        yield [*system, USER], turns


def _cases(renderer: ChatRenderer) -> Iterator[tuple[str, Turns]]:
    """What a run comes to most often, by what follows what."""

    def one(*, thinks: bool = False, speaks: bool = False, num_calls: int = 0) -> Turns:
        return [_turn(renderer, 0, thinks=thinks, speaks=speaks, num_calls=num_calls)]

    yield "a user's message behind an answer", one()
    yield "a user's message behind a thought and an answer", one(thinks=True)
    yield "a result behind a call", one(num_calls=1)
    yield "a result behind a thought and a call", one(thinks=True, num_calls=1)
    yield "a result behind a text and a call", one(speaks=True, num_calls=1)
    yield "two results behind two calls", one(num_calls=1 if renderer.form.one_call else 2)
    yield "a user's message behind a call, its result and an answer", [*one(num_calls=1), *one()]


def _case(renderer: ChatRenderer, what: str, turns: Turns, tools: Sequence[ToolSpec]) -> Case:
    messages = [USER]
    for turn, observation in turns[:-1]:
        messages += [turn, *observation]
    turn, observation = turns[-1]
    whole = [*messages, turn, *observation]
    try:
        prompt, then = renderer.start(messages, tools), renderer.start(whole, tools)
        if renderer.continues_shape(shape_of(whole, with_tools=bool(tools))):
            return Case(what=what)
        if then[: len(prompt)] != prompt:
            return Case(what=what, difference=_difference(renderer, prompt, then))
        sampled = _as_sampled(renderer, prompt, then, turn)
        last = sampled[-1] if sampled is not None else renderer.stop_token_ids[0]
        written = sampled or [*renderer.plain_ids(" ".join(_words(turn))), last]
        delta = renderer.extend(observation, last_token_id=last, tools=tools)
    except TemplateRefusal as refusal:
        return Case(what=what, refusal=str(refusal))
    return Case(what=what, difference=_difference(renderer, [*prompt, *written, *delta], then))


def _facts(renderer: ChatRenderer, tools: Sequence[ToolSpec]) -> Iterator[tuple[str, str]]:
    form, template = renderer.form, renderer.template
    yield "contents", "lists of parts" if form.text_parts else "text"
    yield "system message", _about_system(renderer)
    yield (
        "user messages",
        "that follow each other are one" if form.merges_users else "may follow each other",
    )
    yield "tools", _about_tools(renderer, tools)
    if (written := renderer.written_call()) is not None and not form.calls_as_text:
        yield "a call", f"is written as {written.strip()!r}{_about_calls(renderer)}"
    key = (
        f"{form.reasoning_key!r}"
        if form.reasoning_key
        else "none: in the content, between <think> and </think>"
    )
    opens = renderer.opens_thought((), is_first=True)
    yield (
        "thoughts",
        f"the template's name for them is {key}"
        + ("; the prompt opens one" if opens else "")
        + ("; beside a call a text is put behind the thought" if form.one_text else ""),
    )
    yield (
        "a turn ends with",
        ", ".join(f"{renderer.text_of([token])!r} ({token})" for token in renderer.stop_token_ids),
    )
    yield "beginning of text", _about_beginning(renderer)
    if TODAY in template.source:
        yield (
            "date",
            "the template asks what day it is: model.template_date, or the day on which the run began",
        )


def _about_system(renderer: ChatRenderer) -> str:
    if renderer.form.folds_system:
        return "none, or it gets lost: what it says stands before the first user message"
    text = renderer.text_of(renderer.start([USER]))
    default = text.partition(USER["content"])[0]
    words = len(default.split())
    return "has a place" + (
        f"; without one the template begins with {default[-SNIPPET_CHARS:]!r}" if words > 3 else ""
    )


def _about_tools(renderer: ChatRenderer, tools: Sequence[ToolSpec]) -> str:
    form, fault = renderer.form, renderer.template.tool_fault
    because = f" ({fault})" if fault else ""
    if form.results_as_text:
        return f"written as text by Polyturn, with calls and results{because}"
    shown = "shown by the template" if renderer.shows_tools(tools) else "not shown to the model"
    return f"{shown}; calls are text of the turn{because}" if form.calls_as_text else shown


def _about_calls(renderer: ChatRenderer) -> str:
    form = renderer.form
    ids = {"nine": "ids have nine letters or digits", "names": "ids are functions.NAME:NUMBER", "any": ""}
    told = [
        ids[form.call_ids],
        "arguments are given as JSON text" if form.arguments_as_text else "",
        "one per message" if form.one_call else "",
    ]
    return "".join(f"; {each}" for each in told if each)


def _about_beginning(renderer: ChatRenderer) -> str:
    token, adds = renderer.beginning
    ids = renderer.start([USER])
    if token is None:
        return "the tokenizer has no such token"
    name = repr(renderer.text_of([token]))
    if ids[:2] == [token, token]:
        return f"the template writes {name} TWICE; give it a template that does so once (model.template)"
    if ids[0] == token:
        also = "; the tokenizer would add another, and is not let" if adds else ""
        return f"the template writes {name}, once{also}"
    return f"the template writes no {name}" + ("; the tokenizer would, and is not let" if adds else "")
