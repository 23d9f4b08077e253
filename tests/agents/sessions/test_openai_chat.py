"""Chat completions over the real endpoint, with OpenAI's own client."""

import json

import anyio.to_thread
import openai
import pytest

from polyturn.agents.sessions.openai_chat import read_chat
from polyturn.agents.sessions.requests import RequestRefused
from polyturn.agents.sessions.server import SessionServer
from tests.support.completers import ScriptedCompleter
from tests.support.session_dialogues import ALL, ANSWER, CALLING

TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": "d", "parameters": {"type": "object"}, "strict": True},
    }
    for name in ("search", "read")
]
USER = {"role": "user", "content": "Where?"}


@pytest.fixture
async def server():
    async with SessionServer() as server:
        yield server


async def replied(client, sent, **options):
    return await client.chat.completions.create(model="any", messages=sent, tools=TOOLS, **options)


@pytest.mark.parametrize("answer", ALL)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_answered_comes_back_as_it_was_recorded(server, answer, stream):
    completer = ScriptedCompleter([answer])
    address = await server.open("episode/1", completer)
    async with openai.AsyncOpenAI(base_url=address.base_url, api_key=address.api_key) as client:
        if stream:
            async with client.chat.completions.stream(model="any", messages=[USER], tools=TOOLS) as events:
                got = (await events.get_final_completion()).choices[0].message
        else:
            got = (await replied(client, [USER])).choices[0].message
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "found"}]}
            for call in got.tool_calls or []
        ]
        await replied(client, [USER, got, *results])
    sent_back = completer.requests[1].messages
    assert sent_back[1] == answer.to_message()
    assert [message["name"] for message in sent_back[2:]] == [call.name for call in answer.tool_calls]
    assert all(message["content"] == "found" for message in sent_back[2:])
    assert [tool.name for tool in completer.requests[0].tools] == ["search", "read"]


async def test_the_sync_client_in_a_thread(server):
    completer = ScriptedCompleter([CALLING, ANSWER])
    address = await server.open("e", completer)

    def play():
        with openai.OpenAI(base_url=address.base_url, api_key=address.api_key) as client:
            first = client.chat.completions.create(model="m", messages=[USER], max_tokens=5, stop="END")
            chunks = list(
                client.chat.completions.create(
                    model="m", messages=[USER], stream=True, stream_options={"include_usage": True}
                )
            )
        return first, chunks

    first, chunks = await anyio.to_thread.run_sync(play)
    assert first.model == "m" and first.choices[0].finish_reason == "tool_calls"
    assert json.loads(first.choices[0].message.tool_calls[0].function.arguments)["topk"] == 3
    assert first.choices[0].message.reasoning_content == CALLING.reasoning
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (4, 3)
    assert first.usage.prompt_tokens_details.cached_tokens == 2
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Ashford"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens == 7 and not chunks[-1].choices
    assert (completer.requests[0].max_tokens, completer.requests[0].stop) == (5, ("END",))


async def test_exact_tokens_for_those_that_ask(server):
    address = await server.open("e", ScriptedCompleter([ANSWER]))
    async with openai.AsyncOpenAI(base_url=address.base_url, api_key=address.api_key) as client:
        options = {"logprobs": True, "top_logprobs": 0, "extra_body": {"return_token_ids": True}}
        whole = await client.chat.completions.create(model="m", messages=[USER], **options)
        stream = await client.chat.completions.create(model="m", messages=[USER], stream=True, **options)
        chunks = [chunk async for chunk in stream]
    assert whole.prompt_token_ids == chunks[0].prompt_token_ids == [0, 1, 2, 3]
    for choice in (whole.choices[0], chunks[-1].choices[0]):
        assert choice.token_ids == [7, 8, 9]
        assert [(one.token, one.logprob) for one in choice.logprobs.content] == [
            ("token_id:7", -0.5),
            ("token_id:8", -0.25),
            ("token_id:9", -1.0),
        ]


def test_messages_are_read_in_all_their_spellings():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 2,  "b":3}'}}
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
        },
        {"role": "user", "content": "Hi", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "c", "content": None},
        {"role": "assistant", "tool_calls": [{**call, "function": {"name": "f", "arguments": "a=2"}}]},
        {"role": "assistant", "content": None, "refusal": "No."},
    ]
    body = {
        "messages": messages,
        "temperature": 7,
        "an_unknown_field": {},
        "max_tokens": 9,
        "max_completion_tokens": 5,
    }
    request = read_chat(body).request
    record = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 2, "b": 3}}}
    assert request.messages == (
        {"role": "system", "content": "Be\nbrief."},
        {"role": "user", "content": "Hi", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [record]},
        {"role": "tool", "tool_call_id": "c", "content": "", "name": "f"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**record, "function": {"name": "f", "arguments": "a=2"}}],
        },
        {"role": "assistant", "content": "No."},
    )
    assert request.max_tokens == 5


@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "read"}}, None]
)
def test_a_choice_of_tools_leaves_the_model_its_choice(choice):
    assert len(read_chat({"messages": [USER], "tools": TOOLS, "tool_choice": choice}).request.tools) == 2
    assert read_chat({"messages": [USER], "tools": TOOLS, "tool_choice": "none"}).request.tools == ()


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "no images"),
        ({"messages": [{"role": "narrator", "content": ""}]}, r"messages\[0\].role must be one of"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].tool_call_id must be a text"),
        ({"n": 2}, "n must be 1"),
        ({"response_format": {"type": "json_object"}}, "never constrained"),
        ({"guided_json": {"type": "object"}}, "never constrained"),
        ({"logit_bias": {"1": 5}}, "never constrained"),
        ({"top_logprobs": 2}, "sampled tokens alone"),
        ({"modalities": ["audio"]}, "texts alone"),
        ({"web_search_options": {"search_context_size": "low"}}, "tools of its own"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "functions that the program itself calls"),
        ({"tools": TOOLS[:1] * 2}, "two tools have the name 'search'"),
        ({"max_tokens": 0}, "from 1 on"),
        ({"max_completion_tokens": 2.5}, "from 1 on"),
        ({"stop": [""]}, "stop must be"),
        ({"stream": "yes"}, "stream must be true or false"),
        ({"tool_choice": "maybe"}, "tool_choice must be"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_a_sentence(fields, says):
    with pytest.raises(RequestRefused, match=says) as refused:
        read_chat({"messages": [USER], **fields})
    assert refused.value.status == 400
