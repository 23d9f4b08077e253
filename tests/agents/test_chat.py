"""Rendering by deltas gives the tokens of the whole conversation, and text never becomes special tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyturn.agents.chat import ChatRenderer, load_tokenizer
from polyturn.agents.dialects import HermesDialect
from polyturn.tools.search.retrieval import SEARCH_SPEC

HEAD = [
    {"role": "system", "content": "Answer with the town alone."},
    {"role": "user", "content": "In which town is the employer of Mara Lindqvist based?"},
]
CALLS = [
    {"id": f"call_{i}", "type": "function", "function": {"name": "search", "arguments": {"query": query}}}
    for i, query in enumerate(["Mara Lindqvist", "Holloway Mills"])
]
ROUNDS = [
    (
        {"role": "assistant", "content": "", "tool_calls": CALLS[:1]},
        (
            {
                "role": "tool",
                "tool_call_id": "call_0",
                "name": "search",
                "content": "Doc 1(Title: Mara) works for X.",
            },
        ),
    ),
    (
        {"role": "assistant", "content": "Let me see.", "tool_calls": CALLS},
        (
            {"role": "tool", "tool_call_id": "call_0", "name": "search", "content": "Doc 1(Title: A) a"},
            {
                "role": "tool",
                "tool_call_id": "call_1",
                "name": "search",
                "content": "Doc 1(Title: B) b\nDoc 2 c",
            },
        ),
    ),
    ({"role": "assistant", "content": "Ashford"}, ({"role": "user", "content": "Are you sure?"},)),
]


def whole(tokenizer, messages, *, generation=True):
    text = tokenizer.apply_chat_template(
        messages, tools=[SEARCH_SPEC.to_openai()], tokenize=False, add_generation_prompt=generation
    )
    return tokenizer.encode(text, add_special_tokens=False)


def sampled_tokens(tokenizer, history, reply):
    """What a policy would have to sample for the template's own rendering of `reply`."""
    before, after = whole(tokenizer, history), whole(tokenizer, [*history, reply], generation=False)
    assert after[: len(before)] == before
    end = max(i for i, token in enumerate(after) if token == tokenizer.eos_token_id)
    return after[len(before) : end + 1]


@pytest.mark.catalogue("B36")
@pytest.mark.catalogue("B37")
def test_deltas_give_the_tokens_of_the_whole_conversation(tokenizer):
    renderer = ChatRenderer(tokenizer)
    ledger, history = renderer.start(HEAD, [SEARCH_SPEC]), list(HEAD)
    assert ledger == whole(tokenizer, history)
    for reply, observation in ROUNDS:
        sampled = sampled_tokens(tokenizer, history, reply)
        ledger += sampled + renderer.extend(observation, last_token_id=sampled[-1])
        history += [reply, *observation]
        assert ledger == whole(tokenizer, history)


@pytest.mark.catalogue("B37")
def test_a_parsed_turn_renders_as_it_was_sampled(tokenizer):
    renderer = ChatRenderer(tokenizer)
    for reply, _ in ROUNDS:
        sampled = sampled_tokens(tokenizer, HEAD, reply)
        parsed = HermesDialect().parse(renderer.decode(sampled)).to_message()
        assert sampled_tokens(tokenizer, HEAD, parsed) == sampled


def test_a_turn_that_was_cut_is_closed(chatml):
    renderer = ChatRenderer(chatml)
    observation = ROUNDS[0][1]
    closed = renderer.extend(observation, last_token_id=chatml.eos_token_id)
    cut = renderer.extend(observation, last_token_id=chatml.encode("town")[-1])
    assert cut == [chatml.eos_token_id, *closed]
    other_end = chatml.convert_tokens_to_ids("<|endoftext|>")
    assert renderer.extend(observation, last_token_id=other_end) == cut, (
        "an end that the template does not know"
    )


def test_where_a_turn_ends_is_found_in_the_template(tokenizer, thinking):
    assert ChatRenderer(tokenizer).stop_token_ids == (tokenizer.eos_token_id,)
    ends = {thinking.convert_tokens_to_ids("<|im_end|>"), thinking.eos_token_id}
    assert set(ChatRenderer(thinking).stop_token_ids) == ends


@pytest.mark.catalogue("B38")
def test_a_template_that_rewrites_history_still_gives_deltas(thinking):
    renderer = ChatRenderer(thinking)
    delta = renderer.extend([{"role": "user", "content": "And?"}], last_token_id=renderer.stop_token_ids[-1])
    assert thinking.decode(delta) == "\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_drops_the_assistant_is_refused(chatml):
    template = chatml.chat_template
    try:
        chatml.chat_template = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
        with pytest.raises(ValueError, match="renders an assistant turn 0 times"):
            ChatRenderer(chatml)
    finally:
        chatml.chat_template = template


def test_decode_gives_the_turns_text_without_its_end(chatml):
    renderer = ChatRenderer(chatml)
    inner = chatml.encode("a <|im_start|> b")
    assert renderer.decode([*inner, chatml.eos_token_id]) == "a <|im_start|> b"
    assert renderer.decode(inner) == "a <|im_start|> b"
    assert renderer.decode([]) == ""
    assert "�" in renderer.decode(chatml.encode("é")[:1])


pieces = st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
        "<|im_",
        "end|>",
        "<",
        ">",
        "|>",
        "user\n",
        "standin0n",
        "0e",
        "é",
        "\x00",
    ]
)
hostile = st.lists(pieces | st.text(max_size=6), max_size=8).map("".join)


@pytest.mark.catalogue("B41")
@given(user=hostile, first=hostile, second=hostile, query=hostile)
def test_text_never_becomes_special_tokens(chatml, user, first, second, query):
    renderer = _renderer(chatml)
    start, end = chatml.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    call = {"id": "1", "type": "function", "function": {"name": "search", "arguments": {query: query}}}
    prompt = renderer.start(
        [
            {"role": "user", "content": user},
            {"role": "assistant", "content": first, "tool_calls": [call]},
            {"role": "tool", "content": second},
        ],
        [SEARCH_SPEC],
    )
    specials = [token for token in prompt if token in renderer.special_token_ids]
    assert specials == [start, end] * 4 + [start]
    observation = [{"role": "tool", "content": first}, {"role": "tool", "content": second}]
    delta = renderer.extend(observation, last_token_id=end)
    assert [token for token in delta if token in renderer.special_token_ids] == [start, end, start]
    text = chatml.decode(delta)
    assert f"<tool_response>\n{first}\n</tool_response>" in text, "the text itself is not changed"
    assert f"<tool_response>\n{second}\n</tool_response>" in text


_renderers = {}


def _renderer(tokenizer):
    return _renderers.setdefault(id(tokenizer), ChatRenderer(tokenizer))


@pytest.mark.catalogue("B41")
def test_text_does_not_grow_into_special_tokens_with_the_templates_own(chatml):
    template = chatml.chat_template
    try:
        chatml.chat_template = "{% for m in messages %}[{{ m.role }}: {{ m.content }}>{% endfor %}"
        renderer = ChatRenderer(chatml)
        tokens = renderer.start([{"role": "user", "content": "x <|im_end|"}])
    finally:
        chatml.chat_template = template
    assert chatml.decode(tokens) == "[user: x <|im_end|>"
    assert not renderer.special_token_ids & set(tokens)


def test_ordinary_text_is_encoded_in_one_go_with_the_template(chatml):
    observation = [{"role": "user", "content": "a < b, <tool_ call> and standin0n0e"}]
    delta = ChatRenderer(chatml).extend(observation, last_token_id=chatml.eos_token_id)
    text = f"\n<|im_start|>user\n{observation[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert delta == chatml.encode(text)


def test_load_tokenizer_reads_a_directory_and_says_what_is_missing(chatml, tmp_path):
    chatml.save_pretrained(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").encode("town") == chatml.encode("town")
    with pytest.raises(ValueError, match="no such model directory"):
        load_tokenizer(tmp_path / "none")
    template, chatml.chat_template = chatml.chat_template, None
    try:
        chatml.save_pretrained(tmp_path / "bare")
    finally:
        chatml.chat_template = template
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(tmp_path / "bare")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"a":',
        "[" * 100_000,
        '{"tokenizer_class": 7}',
        '{"chat_template": {"a": 1}}',
        "\x00",
    ],
)
def test_a_damaged_file_of_a_tokenizer_is_a_sentence(chatml, tmp_path, text):
    chatml.save_pretrained(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"its tokenizer cannot be read: |chat template"):
        load_tokenizer(tmp_path)
