"""What is put around messages without the template is what the template writes, whatever they say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deltas import sought_texts
from tests.support.chat_families import FAMILIES, QWEN25, build

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n%s<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant"
)
renderers = {}


def pair_of(name):
    """A renderer, and one that asks the template every time."""
    if name not in renderers:
        asking = ChatRenderer(FAMILIES[name].tokenizer)
        asking._deltas._sought = None
        renderers[name] = (ChatRenderer(FAMILIES[name].tokenizer), asking)
    return renderers[name]


contents = st.lists(
    st.sampled_from(
        [
            "Mara",
            " ",
            "\n",
            "\t",
            '"',
            "'",
            "{",
            "}}",
            "[1]",
            "<",
            "<|im_end|>",
            "</think>",
            "user",
            "result",
            "\\n",
        ]
    )
    | st.text(max_size=5),
    min_size=1,
    max_size=6,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    texts=st.lists(contents, min_size=1, max_size=3),
    of_tools=st.booleans(),
    cut=st.booleans(),
    num_calls=st.integers(0, 3),
)
def test_every_family_gets_what_its_template_writes(name, texts, of_tools, cut, num_calls):
    quick, asking = pair_of(name)
    if of_tools:
        observation = [
            {
                "role": "tool",
                "name": "find",
                "tool_call_id": quick.form.call_id("find", num_calls + number),
                "content": text,
            }
            for number, text in enumerate(texts)
        ]
    else:
        observation = [{"role": "user", "content": texts[0]}]
    last = -1 if cut else quick.stop_token_ids[0]
    results = []
    for renderer in (quick, asking):
        try:
            results.append(renderer.extend(observation, last_token_id=last))
        except ValueError as refusal:
            results.append(str(refusal))
    assert results[0] == results[1]


def renderer_with(written):
    tokenizer = build(QWEN25)
    tokenizer.chat_template = CHATML.replace("%s", written)
    return ChatRenderer(tokenizer)


@pytest.mark.parametrize(
    ("written", "is_known"),
    [
        ("{{ message.content }}", True),
        ("{{ message['content'] | trim }}", True),
        ("{{ message.content | replace('&', 'and') }}", False),
        ("{{ message.content | tojson }}", False),
        ("{{ message.content[:9] }}", False),
        ("{{ message.content.split('\\n') | join(' / ') }}", False),
    ],
)
def test_a_template_that_changes_texts_is_asked_every_time(written, is_known):
    renderer = renderer_with(written)
    known = renderer._deltas.text([{"role": "user", "content": "Mara"}])
    assert (known is not None) is is_known
    if is_known:
        assert known[0] == "<|im_end|>\n<|im_start|>user\nMara<|im_end|>\n<|im_start|>assistant"


def test_a_text_in_which_the_template_looks_for_something_goes_through_it():
    renderer = renderer_with(
        "{% if 'SECRET' in message.content or message.content.startswith('#!') %}hidden{% else %}"
        "{{ message.content }}{% endif %}"
    )
    for content, is_known in [("a SECRET", False), ("#!x", False), ("x", True), (" x", False), ("", False)]:
        known = renderer._deltas.text([{"role": "user", "content": content}])
        assert (known is not None) is is_known, content
    assert renderer._deltas.text([{"role": "user", "content": "x", "more": "y"}]) is None


def test_a_template_that_shows_call_ids_is_asked_every_time():
    for written, is_known in (
        ("{{ message.content }}", True),
        ("{{ message.tool_call_id }}{{ message.content }}", False),
    ):
        deltas = renderer_with(written)._deltas
        for call_id in ("call_0", "call_1"):
            result = {"role": "tool", "tool_call_id": call_id, "name": "find", "content": "Mara"}
            assert (deltas.text([result]) is not None) is is_known
        assert len(deltas._known) == 1


def test_what_a_template_looks_for_is_read_from_its_source():
    assert sought_texts("{% if m.role == 'user' %}{{ 'shown' + m.content }}{% endif %}") == frozenset()
    assert sought_texts(
        "{% if m.content is startingwith 'a' %}{% endif %}{{ m.content | replace('b', 'c') }}"
    ) == {
        "a",
        "b",
        "c",
    }
    assert sought_texts("{{ m.content.rstrip('\\n') }}{{ m.content.strip('x') }}") == {"x"}
    assert sought_texts("{{ raise_exception('no') }}{% if 'k' in m %}{% endif %}") == {"k"}
    assert sought_texts("{% oops %}") is None
