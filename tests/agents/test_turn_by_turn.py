"""Whole random conversations in every family: turn by turn the tokens are the template's own, or a branch begins."""

import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deltas import searched_texts
from polyturn.tools.search.retrieval import SEARCH_SPEC
from tests.support.chat_families import FAMILIES, QWEN3, SMOLLM3, build

RENDERERS = {name: ChatRenderer(family.tokenizer) for name, family in FAMILIES.items()}
words = st.from_regex(r"[A-Z][a-z]{1,6}( [a-z]{1,6}){0,2}", fullmatch=True)


@dataclass(frozen=True)
class Turn:
    """What the policy does, and what is said to it behind that."""

    thought: str | None
    content: str
    queries: tuple[str, ...]
    answers: tuple[str, ...]


def texts_of(name):
    """What others say: words, what templates escape or cut, and what this one looks for in texts or has as tokens."""
    odd = ["\"q\" 's' {a: [b]}", "line\nline", "<b>&amp;\\n", " spaces ", "\u00e9\U0001f600"]
    marks = sorted(RENDERERS[name].mark_token_ids)
    known = [FAMILIES[name].tokenizer.convert_ids_to_tokens(mark) for mark in marks]
    sought = sorted(searched_texts(FAMILIES[name].template))
    pieces = st.sampled_from([*odd, *known, *sought, "/no_think", "<tool_response>", "</tool_response>"])
    return st.lists(words | words | pieces, min_size=1, max_size=3).map("".join)


@st.composite
def conversations(draw, name):
    """The messages before the first turn, and the turns. Every text of the policy is a word that nobody else says."""
    texts = texts_of(name)
    form = RENDERERS[name].form
    head = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    head.append({"role": "user", "content": draw(texts)})
    turns = []
    for number in range(draw(st.integers(1, 4))):
        num_calls = draw(st.integers(0, 1 if form.one_call else 2))
        speaks = num_calls == 0 or draw(st.booleans())
        turns.append(
            Turn(
                thought=f"Thought{number}x" if draw(st.booleans()) else None,
                content=f"Says{number}x" if speaks else "",
                queries=tuple(f"Asks{number}n{i}x" for i in range(num_calls)),
                answers=tuple(draw(texts) for _ in range(num_calls or 1)),
            )
        )
    return head, turns


def messages_of(turn, form, num_calls):
    """The assistant's message, and the observation behind it."""
    message = {"role": "assistant", "content": turn.content}
    if turn.thought is not None:
        message["reasoning"] = turn.thought
    if not turn.queries:
        return message, [{"role": "user", "content": turn.answers[0]}]
    message["tool_calls"] = [
        {
            "id": form.call_id("search", num_calls + number),
            "type": "function",
            "function": {"name": "search", "arguments": {"query": query}},
        }
        for number, query in enumerate(turn.queries)
    ]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "name": "search", "content": answer}
        for call, answer in zip(message["tool_calls"], turn.answers, strict=True)
    ]
    return message, results


def as_sampled(renderer, tokenizer, prompt, whole, turn):
    """The tokens with which a policy writes a turn as the template has it, up to an end of its own; None: it cannot."""
    if whole[: len(prompt)] != prompt:
        return None
    rest = whole[len(prompt) :]
    said = [word for word in (turn.thought, turn.content, *turn.queries) if word]
    for place, token in enumerate(rest):
        if token in renderer.stop_token_ids and all(word in tokenizer.decode(rest[:place]) for word in said):
            return rest[: place + 1]
    return None


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(sorted(FAMILIES)), data=st.data())
def test_turn_by_turn_is_the_template_on_the_whole_or_a_branch(name, data):
    """Never silently something else: where a history goes on, all that was rendered and sampled is the template's."""
    renderer, tokenizer = RENDERERS[name], FAMILIES[name].tokenizer
    tools = [SEARCH_SPEC] if data.draw(st.booleans(), label="tools") else []
    messages, turns = data.draw(conversations(name), label="conversation")
    history, tokens, num_calls = renderer.history(tools), None, 0
    for turn in turns:
        prompt = renderer.start(messages, tools)
        tokens = prompt if tokens is None else tokens
        assert tokens == prompt
        message, observation = messages_of(turn, renderer.form, num_calls)
        num_calls += len(turn.queries)
        messages = [*messages, message, *observation]
        whole = renderer.start(messages, tools)
        goes_on = history.continues(messages)
        sampled = as_sampled(renderer, tokenizer, prompt, whole, turn)
        if not goes_on:
            tokens = None
            continue
        assert sampled is not None, "the turn does not stand in the history as a policy writes it"
        tokens = prompt + sampled + renderer.extend(observation, last_token_id=sampled[-1], tools=tools)
        assert tokens == whole


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(FAMILIES)), data=st.data())
def test_the_whole_is_what_transformers_makes_of_it(name, data):
    """Of texts without marks, in the form that the family takes."""
    renderer, tokenizer = RENDERERS[name], FAMILIES[name].tokenizer
    tools = [SEARCH_SPEC.to_openai()] if data.draw(st.booleans(), label="tools") else []
    messages, turns = data.draw(conversations(name), label="conversation")
    num_calls = 0
    for turn in turns:
        message, observation = messages_of(turn, renderer.form, num_calls)
        num_calls += len(turn.queries)
        messages = [*messages, message, *observation]
    plain = json.loads(_without_marks(json.dumps(messages), renderer, tokenizer))
    taken, given_tools = renderer.form.prepare(plain, tools)
    if renderer.form.text_parts:
        taken = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in taken]
    told = tokenizer.apply_chat_template(
        taken,
        tools=list(given_tools) or ([] if renderer.form.tools_listed else None),
        tokenize=False,
        add_generation_prompt=True,
    )
    whole = renderer.start(plain, [SEARCH_SPEC] if tools else [])
    assert whole == tokenizer.encode(told, add_special_tokens=False)


def _without_marks(text, renderer, tokenizer):
    for mark in renderer.mark_token_ids:
        text = text.replace(json.dumps(tokenizer.convert_ids_to_tokens(mark))[1:-1], "mark")
    return text


def rendered_by(name, num_turns):
    """Characters that a template writes in a conversation of so many turns, each of which it has to be asked about."""
    tokenizer = build(FAMILIES[name])
    renderer, written = ChatRenderer(tokenizer), []
    apply = tokenizer.apply_chat_template

    def counted(*arguments, **options):
        text = apply(*arguments, **options)
        written.append(len(text))
        return text

    tokenizer.apply_chat_template = counted
    messages, history = [{"role": "user", "content": "q"}], renderer.history()
    renderer.start(messages)
    for number in range(num_turns):
        turn = Turn(thought=None, content="", queries=("b",), answers=(f" {'word ' * 40}{number} ",))
        message, observation = messages_of(turn, renderer.form, number)
        messages += [message, *observation]
        assert history.continues(messages)
        renderer.extend(observation, last_token_id=renderer.stop_token_ids[-1])
    return sum(written)


@pytest.mark.parametrize("name", ["qwen2.5", "mistral", "gemma-4", "kimi-k2"])
def test_a_conversation_costs_as_much_as_it_is_long(name):
    """What a turn costs does not grow with the turns before it."""
    few, more, most = (rendered_by(name, num_turns) for num_turns in (10, 20, 40))
    assert most - more == pytest.approx(2 * (more - few), rel=0.05)


def test_what_a_template_looks_for_in_a_system_message_is_heeded():
    """SmolLM3 puts an empty thought before each turn where the system message says `/no_think`."""
    renderer = RENDERERS["smollm3"]
    asked, answered = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    for content, goes_on in (("Be brief.", True), ("Be brief. /no_think", False)):
        system = {"role": "system", "content": content}
        assert renderer.continues([system, asked, answered, asked]) is goes_on
        assert ("<think>" in SMOLLM3.tokenizer.decode(renderer.start([system, asked]))) is not goes_on
    off = ChatRenderer(SMOLLM3.tokenizer, template_options={"enable_thinking": False})
    assert off.continues([asked, answered, asked]), "the option is in every rendering"


def test_what_a_template_looks_for_counts_where_its_marks_are_no_tokens():
    """Qwen3 on a tokenizer of Qwen2.5: a text of the user that looks like a tool's result is no question then."""
    family = type(QWEN3)(
        name="qwen3-on-2.5",
        special=QWEN3.special,
        eos=QWEN3.eos,
        template=QWEN3.template.replace(
            "{%- if message.role == 'user' %}{% set ns.last_user",
            "{%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}"
            "{% set ns.last_user",
        ),
    )
    renderer = ChatRenderer(build(family))
    thinks = {"role": "assistant", "content": "a", "reasoning": "r"}
    head = [{"role": "user", "content": "q"}, thinks]
    assert not renderer.continues([*head, {"role": "user", "content": "And?"}])
    assert renderer.continues([*head, {"role": "user", "content": "<tool_response>x</tool_response>"}])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if '</think>' in m.content %}{% endif %}", {"</think>"}),
        ("{{ m.content.split('<a>')[0] | replace('/no', '') }}", {"<a>", "/no"}),
        ("{% set mark = '<x>' %}{% if mark in m.content %}{% endif %}", {"<x>"}),
        ("{{ parts | join(', ') }}{{ m | tojson(indent=2) }}{% if 'image' in m %}{% endif %}", set()),
        ("{% if m.role in ['user', 'tool'] %}{{ m.content.strip('\\n') }}{% endif %}", set()),
        ("{% generation %}{{ m.content.split('<a>') }}{% endgeneration %}", {"<a>"}),
        ("{% broken", set()),
    ],
)
def test_what_a_template_looks_for_within_texts(template, expected):
    assert searched_texts(template) == expected
