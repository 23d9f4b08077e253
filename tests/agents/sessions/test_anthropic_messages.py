"""Messages over the real endpoint, with Anthropic's own client."""

import anthropic
import anyio.to_thread
import pytest

from polyturn.agents.sessions.anthropic_messages import KeptThreads, read_messages
from polyturn.agents.sessions.requests import RequestRefused
from polyturn.agents.sessions.server import SessionServer
from tests.support.completers import ScriptedCompleter, WaitingCompleter, completion_of
from tests.support.session_dialogues import ALL, ANSWER, CALLING

TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name in ("search", "read")]
USER = {"role": "user", "content": "Where?"}
OPTIONS = {"model": "any", "max_tokens": 99, "tools": TOOLS, "system": "Be brief."}


@pytest.fixture
async def server():
    async with SessionServer(keep_alive_s=0.02) as server:
        yield server


def client_of(address):
    return anthropic.AsyncAnthropic(base_url=address.anthropic_base_url, api_key=address.api_key)


@pytest.mark.parametrize("answer", ALL)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_answered_comes_back_as_it_was_recorded(server, answer, stream):
    completer = ScriptedCompleter([answer])
    address = await server.open("episode/1", completer)
    async with client_of(address) as client:
        if stream:
            async with client.messages.stream(messages=[USER], **OPTIONS) as events:
                got = await events.get_final_message()
        else:
            got = await client.messages.create(messages=[USER], **OPTIONS)
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "found"}]}
            for call in answer.tool_calls
        ]
        back = {"role": "user", "content": [*results, {"type": "text", "text": "Go on."}]}
        await client.messages.create(
            messages=[USER, {"role": "assistant", "content": got.content}, back], **OPTIONS
        )
    assert completer.requests[0].messages == ({"role": "system", "content": "Be brief."}, USER)
    sent_back = completer.requests[1].messages
    assert sent_back[2] == answer.to_message()
    assert sent_back[3:] == (
        *(
            {"role": "tool", "content": "found", "tool_call_id": call.id, "name": call.name}
            for call in answer.tool_calls
        ),
        {"role": "user", "content": "Go on."},
    )
    assert completer.requests[0].max_tokens == 99


@pytest.mark.parametrize("stream", [False, True])
async def test_a_thread_goes_on_from_what_was_said_in_it(server, stream):
    """Newer clients send what is new alone, and system message and tools with the first request of a thread."""
    completer = ScriptedCompleter([CALLING, ANSWER])
    address = await server.open("episode/1", completer)
    results = [
        {"type": "tool_result", "tool_use_id": call.id, "content": "found"} for call in CALLING.tool_calls
    ]
    async with client_of(address) as client:

        async def ask(messages, thread, **fields):
            fields = {"model": "any", "max_tokens": 99, **fields, "extra_body": {"thread": thread}}
            if not stream:
                return await client.messages.create(messages=messages, **fields)
            async with client.messages.stream(messages=messages, **fields) as events:
                return await events.get_final_message()

        first = await ask([USER], {"type": "create"}, tools=TOOLS, system="Be brief.")
        thread = {"type": "continue", "previous_message_id": first.id}
        await ask([{"role": "user", "content": results}], thread)
        with pytest.raises(anthropic.BadRequestError, match="names no message of a thread"):
            await ask([USER], {"type": "continue", "previous_message_id": "msg_other"})
    one, two = completer.requests
    assert two.tools == one.tools and two.messages[:3] == (*one.messages, CALLING.to_message())
    assert [(message["role"], message["content"]) for message in two.messages[3:]] == [("tool", "found")] * 2
    assert [message["name"] for message in two.messages[3:]] == ["search", "read"]


async def test_the_sync_client_and_why_an_answer_ended(server):
    answers = [
        ANSWER,
        CALLING,
        completion_of(ANSWER, 2, is_cut=True),
        completion_of(ANSWER, 3, stop="END"),
    ]
    completer = ScriptedCompleter(answers)
    address = await server.open("e", completer)

    def play():
        with anthropic.Anthropic(base_url=address.anthropic_base_url, auth_token=address.api_key) as client:
            return [
                client.messages.create(messages=[USER], stop_sequences=["END"], **OPTIONS) for _ in answers
            ]

    first, *others = await anyio.to_thread.run_sync(play)
    assert first.stop_reason == "end_turn" and first.content[0].text == "Ashford"
    assert (first.usage.input_tokens, first.usage.cache_read_input_tokens, first.usage.output_tokens) == (
        2,
        2,
        3,
    )
    assert [answer.stop_reason for answer in others] == ["tool_use", "max_tokens", "stop_sequence"]
    assert others[-1].stop_sequence == "END" and completer.requests[0].stop == ("END",)


async def test_a_stream_is_kept_alive_and_ends_in_an_error_of_its_form(server):
    completer = WaitingCompleter(ANSWER)
    address = await server.open("e", completer)
    async with client_of(address) as client:
        async with client.messages.stream(messages=[USER], **OPTIONS) as events:
            completer.go.set()
            assert await events.get_final_text() == "Ashford"
        completer.go.clear()
        stream = await client.messages.create(messages=[USER], stream=True, **OPTIONS)
        await server.close("e")
        with pytest.raises(anthropic.APIStatusError, match="not_found_error"):
            async for _ in stream:
                pass


async def test_errors_have_the_form_that_the_client_reads(server):
    address = await server.open("e", ScriptedCompleter([RequestRefused("the episode is over")]))
    async with client_of(address) as client:
        with pytest.raises(anthropic.BadRequestError, match="the episode is over"):
            await client.messages.create(messages=[USER], **OPTIONS)
        with pytest.raises(anthropic.BadRequestError, match="at least one message"):
            await client.messages.create(messages=[], **OPTIONS)
        with pytest.raises(anthropic.NotFoundError, match="does not count tokens"):
            await client.messages.count_tokens(model="m", messages=[USER])
        assert [model.id async for model in client.models.list()] == ["policy"]
        client.api_key = "wrong"
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(messages=[USER], **OPTIONS)


class CountingCompleter(ScriptedCompleter):
    async def count_tokens(self, request):
        return 10 * len(request.messages)


async def test_counting_tokens_where_the_session_does(server):
    address = await server.open("e", CountingCompleter([ANSWER]))
    async with client_of(address) as client:
        counted = await client.messages.count_tokens(model="m", messages=[USER, USER])
    assert counted.input_tokens == 20


def test_blocks_of_other_models_and_mixed_order():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "C"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "is_error": True}]},
        {"role": "system", "content": "Mind the time."},
    ]
    record = {"id": "t", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert read_messages({"messages": messages}, KeptThreads()).request.messages == (
        {"role": "user", "content": "A\nB"},
        {"role": "assistant", "content": "C", "tool_calls": [record]},
        {"role": "tool", "content": "", "tool_call_id": "t", "name": "f"},
        {"role": "system", "content": "Mind the time."},
    )


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "The"}]}, "continues none"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "no images"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}],
                    }
                ]
            },
            "no images",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "with an input_schema"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "with an input_schema"),
        ({"mcp_servers": [{"type": "url", "url": "x", "name": "y"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}}}}, "never constrained"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice.type"),
        ({"max_tokens": 0}, "from 1 on"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_a_sentence(fields, says):
    with pytest.raises(RequestRefused, match=says) as refused:
        read_messages({"messages": [USER], **fields}, KeptThreads())
    assert refused.value.status == 400
