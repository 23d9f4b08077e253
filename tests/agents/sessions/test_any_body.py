"""Whatever a client sends is answered, or refused in its protocol's form."""

import copy
import json
import random

import aiohttp
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.sessions.anthropic_messages import KeptThreads, read_messages
from polyturn.agents.sessions.openai_chat import read_chat
from polyturn.agents.sessions.openai_responses import KeptResponses, read_response
from polyturn.agents.sessions.requests import RequestRefused
from polyturn.agents.sessions.server import SessionServer
from tests.support.completers import ScriptedCompleter, completion_of
from tests.support.session_dialogues import CALLING

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, {}]}'}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "array"}}}
CHAT = {
    "model": "m",
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}], "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [CALL],
            "reasoning_content": "Hm.",
            "refusal": None,
        },
        {"role": "tool", "content": "found", "tool_call_id": "c"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}],
    "tool_choice": "auto",
    "stream_options": {"include_usage": True},
    "response_format": {"type": "text"},
    "stop": ["END"],
    "max_tokens": 5,
    "logprobs": True,
    "return_token_ids": True,
    "n": 1,
}
RESPONSES = {
    "model": "m",
    "instructions": "Be brief.",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "Where?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "reasoning", "summary": [{"text": "Hm."}], "encrypted_content": "polyturn:SG0u"},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "fc"},
        {"type": "function_call_output", "call_id": "c", "output": "found"},
        {"type": "item_reference", "id": "i"},
    ],
    "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
    "text": {"format": {"type": "text"}},
    "include": ["reasoning.encrypted_content"],
    "previous_response_id": "r",
    "store": True,
}
MESSAGES = {
    "model": "m",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [
        {"role": "user", "content": "Where?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "text", "text": "So:"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": []}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}]}
            ],
        },
    ],
    "tools": [{"name": "f", "input_schema": SCHEMA}],
    "tool_choice": {"type": "any"},
    "stop_sequences": ["END"],
    "output_config": {"effort": "low"},
    "thread": {"type": "create"},
}


def read_kept(body):
    kept = KeptResponses()
    kept.keep(
        "r",
        ({"role": "user", "content": "Earlier"},),
        [{"id": "i", "type": "message", "role": "user", "content": "x"}],
    )
    return read_response(body, kept)


PROTOCOLS = {
    "chat": (read_chat, CHAT),
    "responses": (read_kept, RESPONSES),
    "messages": (lambda body: read_messages(body, KeptThreads()), MESSAGES),
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=5)
    | st.sampled_from(
        ["text", "function", "assistant", "tool", "system", "image_url", "none", "auto", "message"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """The paths of all that is in a body."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(body, path, value, *, drop):
    body = copy.deepcopy(body)
    inside = body
    for key in path[:-1]:
        inside = inside[key]
    if drop:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return body


def played(read, body):
    """Read a body and say an answer to it, in both ways, as the server does. False where it is refused."""
    try:
        exchange = read(body)
    except RequestRefused as refused:
        assert refused.status == 400 and str(refused)
        str(refused).encode()
        return False
    orjson.dumps(exchange.answer(completion_of(CALLING), created_s=1))
    assert list(exchange.events(completion_of(CALLING), created_s=1))
    json.dumps(exchange.request.messages, allow_nan=False).encode()
    json.dumps(exchange.request.messages, ensure_ascii=False).encode()
    for tool in exchange.request.tools:
        json.dumps(tool.to_openai(), allow_nan=False, ensure_ascii=False).encode()
    return True


@pytest.mark.parametrize("name", PROTOCOLS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_body_with_anything_in_any_place(name, data):
    read, body = PROTOCOLS[name]
    assert played(read, body)
    for _ in range(data.draw(st.integers(1, 3))):
        body = changed(
            body,
            data.draw(st.sampled_from(list(places(body)) or [("x",)])),
            data.draw(VALUES),
            drop=bool(body) and data.draw(st.booleans()),
        )
    played(read, body)


async def test_the_endpoint_answers_any_body_in_its_protocols_form():
    chance = random.Random(0)
    odd = [None, True, 0, -1.5, 10**40, "", "x", [], [[]], {}, {"type": "image_url"}, float("nan")]
    seen = set()
    async with SessionServer() as server, aiohttp.ClientSession() as http:
        address = await server.open("e", ScriptedCompleter([CALLING]))
        for path, body in [("chat/completions", CHAT), ("responses", RESPONSES), ("messages", MESSAGES)]:
            if path == "responses":
                body = {**body, "input": body["input"][:-1], "previous_response_id": None}
            for number in range(60):
                sent = (
                    body
                    if number < 2
                    else changed(body, chance.choice(list(places(body))), chance.choice(odd), drop=False)
                )
                if number % 2:
                    sent = {**sent, "stream": True}
                async with http.post(
                    f"{address.base_url}/{path}",
                    data=json.dumps(sent),
                    headers={"x-api-key": address.api_key},
                ) as response:
                    answer = await response.read()
                seen.add(response.status)
                assert response.status in (200, 400), answer
                if response.status == 400:
                    error = json.loads(answer)["error"]
                    assert error["type"] == "invalid_request_error" and error["message"]
                elif number % 2:
                    assert b'"call_1"' in answer and response.content_type == "text/event-stream"
    assert seen == {200, 400}
