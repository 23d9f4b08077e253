"""Responses over the real endpoint, with OpenAI's own client."""

import anyio.to_thread
import openai
import pytest

from polyturn.agents.sessions.openai_responses import MAX_KEPT, KeptResponses, read_response
from polyturn.agents.sessions.requests import RequestRefused
from polyturn.agents.sessions.server import SessionServer
from tests.support.completers import ScriptedCompleter, WaitingCompleter, completion_of
from tests.support.session_dialogues import ALL, ANSWER, CALLING

TOOLS = [
    {"type": "function", "name": name, "parameters": {"type": "object"}, "strict": True}
    for name in ("search", "read")
]
USER = {"role": "user", "content": "Where?"}


@pytest.fixture
async def server():
    async with SessionServer(keep_alive_s=0.02) as server:
        yield server


def client_of(address):
    return openai.AsyncOpenAI(base_url=address.base_url, api_key=address.api_key)


def outputs(answer):
    return [
        {
            "type": "function_call_output",
            "call_id": call.id,
            "output": [{"type": "input_text", "text": "found"}],
        }
        for call in answer.tool_calls
    ]


@pytest.mark.parametrize("answer", ALL)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [[], ["reasoning.encrypted_content"]])
async def test_what_was_answered_comes_back_as_it_was_recorded(server, answer, stream, include):
    completer = ScriptedCompleter([answer])
    address = await server.open("e", completer)
    options = {
        "model": "any",
        "tools": TOOLS,
        "instructions": "Be brief.",
        "store": False,
        "include": include,
    }
    async with client_of(address) as client:
        if stream:
            async with client.responses.stream(input=[USER], **options) as events:
                got = await events.get_final_response()
        else:
            got = await client.responses.create(input=[USER], **options)
        items = [item.model_dump(exclude_unset=True) for item in got.output]
        if include:  # as clients do that keep nothing but the cipher
            for item in items:
                if item["type"] == "reasoning" and item["content"][0]["text"]:
                    del item["content"]
        await client.responses.create(input=[USER, *items, *outputs(answer)], **options)
    assert completer.requests[0].messages == ({"role": "system", "content": "Be brief."}, USER)
    sent_back = completer.requests[1].messages
    assert sent_back[2] == answer.to_message()
    assert [(message["name"], message["content"]) for message in sent_back[3:]] == [
        (call.name, "found") for call in answer.tool_calls
    ]


async def test_going_on_from_what_was_stored(server):
    completer = ScriptedCompleter([CALLING, ANSWER, ANSWER])
    address = await server.open("e", completer)
    async with client_of(address) as client:
        first = await client.responses.create(
            model="m", input="Where?", instructions="A", max_output_tokens=9
        )
        second = await client.responses.create(
            model="m", input=outputs(CALLING), instructions="B", previous_response_id=first.id
        )
        third = await client.responses.create(
            model="m",
            input=[{"type": "item_reference", "id": second.output[0].id}, USER],
            previous_response_id=first.id,
            store=False,
        )
        for unknown in (third.id, "resp_nobody"):
            with pytest.raises(openai.BadRequestError, match="no response that was stored"):
                await client.responses.create(model="m", input="x", previous_response_id=unknown)
    assert completer.requests[0].max_tokens == 9
    results = tuple(
        {"role": "tool", "content": "found", "tool_call_id": call.id, "name": call.name}
        for call in CALLING.tool_calls
    )
    said = (USER, CALLING.to_message())
    assert completer.requests[1].messages == ({"role": "system", "content": "B"}, *said, *results)
    assert completer.requests[2].messages == (*said, ANSWER.to_message(), USER)


def test_the_oldest_stored_response_is_dropped():
    kept = KeptResponses()
    for number in range(MAX_KEPT + 1):
        kept.keep(f"r{number}", (USER,), [{"id": f"i{number}"}])
    assert kept.messages("r1") == (USER,) and kept.item(f"i{MAX_KEPT}")
    with pytest.raises(RequestRefused):
        kept.messages("r0")
    with pytest.raises(RequestRefused):
        kept.item("i0")


async def test_the_sync_client_and_what_is_said_of_the_answer(server):
    address = await server.open("e", ScriptedCompleter([ANSWER, completion_of(ANSWER, 1, is_cut=True)]))

    def play():
        with openai.OpenAI(base_url=address.base_url, api_key=address.api_key) as client:
            with client.responses.stream(model="m", input="Where?") as events:
                kinds = [event.type for event in events]
                whole = events.get_final_response()
            return kinds, whole, client.responses.create(model="m", input="Where?")

    kinds, whole, cut = await anyio.to_thread.run_sync(play)
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert whole.output_text == "Ashford" and whole.status == "completed"
    assert (whole.usage.input_tokens, whole.usage.output_tokens, whole.usage.total_tokens) == (4, 3, 7)
    assert whole.usage.input_tokens_details.cached_tokens == 2
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


async def test_a_stream_that_fails(server):
    address = await server.open("e", WaitingCompleter(ANSWER))
    async with client_of(address) as client:
        stream = await client.responses.create(model="m", input="Where?", stream=True)
        await server.close("e")
        with pytest.raises(openai.APIError, match="ended"):
            async for _ in stream:
                pass


def read(given, **fields):
    return read_response({"input": given, **fields}, KeptResponses()).request.messages


def test_items_are_put_together_to_messages():
    def call(number):
        return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": '{"a":1}'}

    def said(text):
        return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}

    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": "of somebody else"}
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    messages = read(
        [USER, thought, said("A"), call(0), call(1), said("B"), sealed, said("C"), refused, sealed]
    )
    record = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert messages[1:] == (
        {
            "role": "assistant",
            "content": "A",
            "reasoning": "Hm.",
            "tool_calls": [{"id": "c0", **record}, {"id": "c1", **record}],
        },
        {"role": "assistant", "content": "B"},
        {"role": "assistant", "content": "C"},
        {"role": "assistant", "content": "No."},
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"input": []}, "at least one message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "no images"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "are read"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "no item 'x'"),
        ({"tools": [{"type": "web_search"}]}, "functions that the program itself calls"),
        (
            {"tools": [{"type": "code_interpreter", "container": "x"}]},
            "functions that the program itself calls",
        ),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "functions that the program itself calls"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}, "never constrained"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "chat completions"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_a_sentence(fields, says):
    with pytest.raises(RequestRefused, match=says) as refused:
        read_response({"input": [USER], **fields}, KeptResponses())
    assert refused.value.status == 400
