"""The endpoint itself: addresses and keys, what goes wrong, and clients that leave."""

import asyncio
import json
import logging

import aiohttp
import openai
import pytest

from polyturn.agents.policy import PolicyFault
from polyturn.agents.sessions.requests import RequestRefused
from polyturn.agents.sessions.server import SessionServer
from polyturn.envs.messages import AssistantMessage
from tests.support.completers import ScriptedCompleter, WaitingCompleter

ANSWER = AssistantMessage(content="Ashford")
BODY = {"model": "m", "messages": [{"role": "user", "content": "Where?"}]}


@pytest.fixture
async def server():
    async with SessionServer(keep_alive_s=0.02, max_body_bytes=100_000) as server:
        yield server


@pytest.fixture
async def http():
    async with aiohttp.ClientSession() as session:
        yield session


def headers(address):
    return {"Authorization": f"Bearer {address.api_key}"}


async def asked(http, address, body=BODY, **options):
    options.setdefault("headers", headers(address))
    async with http.post(f"{address.base_url}/chat/completions", json=body, **options) as response:
        return response.status, await response.json()


async def test_a_key_of_its_own_for_every_attempt(server, http):
    first = await server.open("same/id ü", ScriptedCompleter([ANSWER]))
    assert (await asked(http, first))[0] == 200
    await server.close("same/id ü")
    status, answer = await asked(http, first)
    assert (status, answer["error"]["code"]) == (410, "session_ended")
    second = await server.open("same/id ü", ScriptedCompleter([ANSWER]))
    assert first.base_url == second.base_url and first.api_key != second.api_key
    assert (await asked(http, first))[0] == 401
    assert (await asked(http, second))[0] == 200
    assert (await asked(http, second, headers={"x-api-key": second.api_key}))[0] == 200
    assert (await asked(http, second, headers={}))[0] == 401
    assert first.api_key not in repr(first)


async def test_a_unix_socket_beside_the_port(tmp_path):
    path = tmp_path / "endpoint.sock"
    async with SessionServer(socket_path=path) as server:
        address = await server.open("e", ScriptedCompleter([ANSWER]))
        assert address.socket_path == path
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as http:
            assert (await asked(http, address))[1]["choices"][0]["message"]["content"] == "Ashford"
    assert not path.exists()
    with pytest.raises(ValueError, match="at most 107 bytes"):
        SessionServer(socket_path=tmp_path / ("long" * 30))


async def test_bodies_that_are_none(server, http):
    address = await server.open("e", ScriptedCompleter([ANSWER]))
    for body, status, says in [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[1]", 400, "must be a JSON object, not a list"),
        (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "not JSON"),
        (b'"' + b"x" * 200_000 + b'"', 413, "larger"),
    ]:
        async with http.post(
            f"{address.base_url}/chat/completions", data=body, headers=headers(address)
        ) as response:
            answer = await response.json()
        assert response.status == status and says in answer["error"]["message"], answer
    gzip = {**headers(address), "Content-Encoding": "gzip"}
    async with http.post(f"{address.base_url}/chat/completions", data=b"no gzip", headers=gzip) as response:
        assert response.status == 415
    deep = {"type": "object"}
    for _ in range(100):
        deep = {"properties": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    assert (await asked(http, address, {**BODY, "tools": [tool]}))[0] == 400
    half = '{"messages": [{"role": "user", "content": "\\ud83d"}]}'
    async with http.post(
        f"{address.base_url}/chat/completions", data=half, headers=headers(address)
    ) as response:
        assert response.status == 200


async def test_paths_and_methods_that_are_none(server, http):
    address = await server.open("e", ScriptedCompleter([ANSWER]))
    async with http.get(f"{address.base_url}/chat/completions", headers=headers(address)) as response:
        assert response.status == 405 and "Method Not Allowed" in (await response.json())["error"]["message"]
    async with http.post(f"{address.base_url}/embeddings", headers=headers(address)) as response:
        assert response.status == 404 and (await response.json())["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (RequestRefused("the episode is over"), 400, {}),
        (
            RequestRefused("later", status=429, retry_after_s=0.01),
            429,
            {"Retry-After": "1", "retry-after-ms": "10"},
        ),
        (PolicyFault("http://10.0.0.1:30000 broke"), 503, {}),
        (KeyError("sk-secret-0123456789abcdef"), 500, {"x-should-retry": "false"}),
    ],
)
async def test_what_a_session_refuses(server, http, error, status, headers, caplog):
    address = await server.open("e", ScriptedCompleter([error]))
    async with http.post(
        f"{address.base_url}/chat/completions",
        json=BODY,
        headers={"Authorization": f"bearer {address.api_key}"},
    ) as response:
        text = (await response.json())["error"]["message"]
    assert response.status == status
    assert {name: response.headers.get(name) for name in headers} == headers
    assert "10.0.0.1" not in text and "secret" not in text and "secret" not in caplog.text
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(logged) == (status == 500)
    if status == 500:
        assert "KeyError" in text and "completers.py" in logged[0].getMessage()


async def test_clients_ask_again_where_that_helps_and_say_so(server):
    completer = ScriptedCompleter([RequestRefused("later", status=429, retry_after_s=0.01), ANSWER])
    address = await server.open("e", completer)
    async with openai.AsyncOpenAI(base_url=address.base_url, api_key=address.api_key) as client:
        answer = await client.chat.completions.create(**BODY)
        assert answer.choices[0].message.content == "Ashford"
        assert [request.is_retry for request in completer.requests] == [False, True]
        await server.close("e")
        with pytest.raises(openai.APIStatusError, match="ended"):
            await client.chat.completions.create(**BODY)
        failing = ScriptedCompleter([ValueError("ours")])
        client.api_key = (await server.open("e", failing)).api_key
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(**BODY)
        assert len(failing.requests) == 1
        assert [model.id async for model in client.models.list()] == ["policy"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_request(server, http, stream):
    completer = WaitingCompleter(ANSWER)
    address = await server.open("e", completer)
    asking = asyncio.create_task(asked(http, address, {**BODY, "stream": stream}))
    await completer.asked.wait()
    await asyncio.sleep(0.05)  # a stream has begun by then
    asking.cancel()
    await asyncio.wait_for(completer.cancelled.wait(), 10)


async def test_a_session_that_ends_answers_those_that_wait(server, http):
    completer = WaitingCompleter(ANSWER)
    address = await server.open("e", completer)
    asking = asyncio.create_task(asked(http, address))
    await completer.asked.wait()
    await server.close("e")
    assert (await asking)[0] == 410 and completer.cancelled.is_set()


async def test_a_stream_is_kept_alive_until_it_is_answered(server, http):
    completer = WaitingCompleter(ANSWER)
    address = await server.open("e", completer)
    async with http.post(
        f"{address.base_url}/chat/completions", json={**BODY, "stream": True}, headers=headers(address)
    ) as response:
        assert await response.content.readline() == b": keep-alive\n"
        completer.go.set()
        events = (await response.read()).decode()
    assert events.rstrip().endswith("data: [DONE]") and "Ashford" in events


async def test_what_goes_wrong_within_a_stream_is_an_event_of_it(server):
    completer = WaitingCompleter(ANSWER)
    address = await server.open("e", completer)
    async with openai.AsyncOpenAI(base_url=address.base_url, api_key=address.api_key) as client:
        stream = await client.chat.completions.create(**BODY, stream=True)
        await server.close("e")
        with pytest.raises(openai.APIError, match="ended"):
            async for _ in stream:
                pass


async def test_curl(server):
    address = await server.open("e", ScriptedCompleter([ANSWER]))
    process = await asyncio.create_subprocess_exec(
        *("curl", "-s", f"{address.base_url}/chat/completions", "-H", f"x-api-key: {address.api_key}"),
        *("-d", json.dumps(BODY)),
        stdout=asyncio.subprocess.PIPE,
    )
    answered, _ = await process.communicate()
    assert json.loads(answered)["choices"][0]["message"]["content"] == "Ashford"
