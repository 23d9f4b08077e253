"""What providers really answer, sent by a real server, whole and as streams."""

import asyncio
import contextlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from polyturn.configs.schema.endpoint import ChatEndpoint
from polyturn.tools.chat.answers import ChatAnswer, ChatFault, ChatUsage, PassingFault, read_answer
from polyturn.tools.chat.client import BlockingChat, ChatClient
from polyturn.tools.chat.streams import EventReader, StreamedAnswer
from polyturn.tools.search.retrieval import SEARCH_SPEC
from tests.support.chat_server import DONE, Answer, chat_server, delta, message

QUESTION = [{"role": "user", "content": "Where?"}]
KEY = "sk-test-4f9a8b7c6d5e"


async def ask(*answers, tools=(), key=None, num=1, **options):
    """The last of `num` answers, or the fault in its place, and the server."""
    async with chat_server(*answers) as server:
        options = {"url": server.url, "model": "m", "timeout_s": 5.0, "max_retries": 2, **options}
        if key is not None:
            options["api_key_file"] = key
        async with contextlib.aclosing(ChatClient(ChatEndpoint(**options))) as client:
            client._retries.jitter.random = lambda: -0.49  # waits of hundredths of a second
            found = None
            for _ in range(num):
                try:
                    found = await client.ask(QUESTION, tools)
                except ChatFault as fault:
                    found = fault
        return found, server


def call(call_id, name, arguments, **fields):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}, **fields}


FILTER = {"hate": {"filtered": False, "severity": "safe"}}
CALL_DELTA = {"index": 0, "id": "c1", "type": "function", "function": {"name": "search", "arguments": ""}}


def pieces(*texts):
    return [delta(tool_calls=[{"index": 0, "function": {"arguments": text}}]) for text in texts]


STREAMS = {
    # openai: the role first, then text, the reason in a chunk of its own, usage behind it without a choice.
    "openai": (
        [
            delta(role="assistant", content="", refusal=None),
            delta(content="Ash"),
            delta(content="ford"),
            delta("stop"),
            {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}},
            DONE,
        ],
        {"content": "Ashford", "usage": ChatUsage(prompt_tokens=9, completion_tokens=2)},
    ),
    # Azure: the filter's findings first, without a choice; and a chunk without a delta.
    "azure": (
        [
            {"choices": [], "prompt_filter_results": [{"content_filter_results": FILTER}]},
            delta(content="Ashford"),
            {"choices": [{"index": 0, "content_filter_results": FILTER, "finish_reason": None}]},
            delta("stop"),
            DONE,
        ],
        {"content": "Ashford"},
    ),
    # OpenRouter: comments that keep the connection alive, thoughts under `reasoning`.
    "openrouter": (
        [
            b": OPENROUTER PROCESSING\n\n",
            delta(content="", reasoning="h"),
            b": OPENROUTER PROCESSING\n\n",
            delta(content="", reasoning="m"),
            delta("stop", content="Ashford"),
            DONE,
        ],
        {"content": "Ashford", "reasoning": "hm", "reasoning_key": "reasoning"},
    ),
    # DeepSeek and SGLang: thoughts under `reasoning_content`, null where there are none.
    "deepseek": (
        [
            delta(content=None, reasoning_content="hm"),
            delta(content="Ashford", reasoning_content=None),
            {"choices": [{"delta": {}, "finish_reason": "length"}], "usage": {"completion_tokens": 3}},
            DONE,
        ],
        {"content": "Ashford", "reasoning": "hm", "finish_reason": "length"},
    ),
    # vLLM: the name first, arguments in pieces; the reason is `stop` though there is a call.
    "vllm": (
        [delta(tool_calls=[CALL_DELTA]), *pieces('{"que', 'ry": "x"}'), delta("stop"), DONE],
        {"calls": [("c1", "search", {"query": "x"})]},
    ),
    # Ollama: an empty reason in every chunk, calls in one piece, arguments as an object from old versions.
    "ollama": (
        [
            delta("", content=""),
            delta("", tool_calls=[{"index": 0, **call("call_x", "search", {"query": "x"})}]),
            delta("stop", content=""),
            DONE,
        ],
        {"calls": [("call_x", "search", {"query": "x"})]},
    ),
    # Gemini: no index, a signature that it wants back, the reason `stop`, calls side by side.
    "gemini": (
        [
            delta(
                tool_calls=[
                    call(
                        "f1", "search", '{"query": "x"}', extra_content={"google": {"thought_signature": "S"}}
                    )
                ]
            ),
            delta("stop", tool_calls=[call("f2", "search", '{"query": "y"}')]),
            DONE,
        ],
        {
            "calls": [("f1", "search", {"query": "x"}), ("f2", "search", {"query": "y"})],
            "call_extras": {"f1": {"extra_content": {"google": {"thought_signature": "S"}}}},
        },
    ),
    # A proxy of Gemini: neither index nor id nor, with the arguments, a name.
    "gemini proxy": (
        [
            delta(tool_calls=[{"id": "", "type": "", "function": {"name": "search"}}]),
            delta(tool_calls=[{"id": "", "type": "", "function": {"arguments": '{"query": "x"}'}}]),
            delta("stop"),
            DONE,
        ],
        {"calls": [("call_0", "search", {"query": "x"})]},
    ),
    # A gateway that has two calls at one index, told apart by their ids.
    "one index": (
        [
            delta(tool_calls=[{"index": 0, **call("a", "search", "{}")}]),
            delta(tool_calls=[{"index": 0, **call("b", "search", '{"query": "y"}')}]),
            delta("tool_calls"),
            DONE,
        ],
        {"calls": [("a", "search", {}), ("b", "search", {"query": "y"})]},
    ),
    # llama.cpp: carriage returns, no space behind the colon, no end but that of the connection.
    "llama.cpp": (
        [b'data:{"choices": [{"delta": {"content": "Ashford"}, "finish_reason": "stop"}]}\r\n\r\n'],
        {"content": "Ashford"},
    ),
    # A server without empty lines between its events.
    "no empty lines": (
        [b"".join(b"data: " + json.dumps(delta(content=text)).encode() + b"\n" for text in "Ash"), DONE],
        {"content": "Ash"},
    ),
    # Mistral's thinking models: content in lists of parts.
    "mistral": (
        [
            delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]),
            delta("stop", content="Ashford"),
            DONE,
        ],
        {"content": "Ashford", "reasoning": "hm"},
    ),
    # A character that Python takes for the end of a line, and one cut in the middle of its bytes.
    "line separator": (
        [
            '\ufeffdata: {"choices": [{"delta": {"content": "a\u2028b'.encode() + b"\xc3",
            b'\xbc"}, "finish_reason": "stop"}]}\n\n',
        ],
        {"content": "a\u2028b\u00fc"},
    ),
    # OpenAI's models say in a field of its own that they do not answer.
    "refusal": (
        [delta(refusal="I "), delta(refusal="cannot."), delta("stop"), DONE],
        {"content": "I cannot.", "refusal": "I cannot."},
    ),
    "filtered": (
        [delta(content="Ash"), delta("content_filter"), DONE],
        {"content": "Ash", "finish_reason": "content_filter"},
    ),
}


@pytest.mark.parametrize("provider", STREAMS)
async def test_streams_of_providers_are_read(provider):
    events, expected = STREAMS[provider]
    found, server = await ask(Answer(events=events), tools=[SEARCH_SPEC], stream=True)
    assert isinstance(found, ChatAnswer), found
    calls = [(made.id, made.name, made.arguments) for made in found.tool_calls]
    assert calls == expected.get("calls", [])
    assert not any(made.error for made in found.tool_calls)
    for name, value in expected.items():
        assert name == "calls" or getattr(found, name) == value
    assert found.finish_reason == expected.get("finish_reason", "stop")
    assert len(server.requests) == 1
    assert server.requests[0]["stream_options"] == {"include_usage": True}


@given(
    provider=st.sampled_from(sorted(STREAMS)),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20),
)
@settings(max_examples=60, deadline=None)
def test_where_a_stream_is_cut_into_packets_changes_nothing(provider, sizes):
    def read(chunks):
        reader, streamed = EventReader(), StreamedAnswer()
        for chunk in chunks:
            for data in reader.read(chunk):
                streamed.add(data)
        for data in reader.finish():
            streamed.add(data)
        return streamed.answer()

    events = STREAMS[provider][0]
    sent = b"".join(
        event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n"
        for event in events
    )
    cut, start = [], 0
    while start < len(sent):
        size = sizes[len(cut) % len(sizes)]
        cut.append(sent[start : start + size])
        start += size
    assert read(cut) == read([sent])


BROKEN = {
    "cut in the middle": Answer(events=[delta(content="Ash")], breaks_off=True),
    "ended without a reason": Answer(events=[delta(content="Ash")]),
    "OpenRouter's error in the middle": Answer(
        events=[
            delta(content="Ash"),
            {
                "error": {"code": 502, "message": "Worker local total request limit reached (33/32)"},
                "choices": [{"delta": {"content": ""}, "finish_reason": "error"}],
            },
            DONE,
        ]
    ),
    "an error that is a text": Answer(events=[delta(content="Ash"), {"error": "the backend is gone"}]),
    "an error event": Answer(
        events=[b'event: error\ndata: {"error": {"type": "overloaded_error", "message": "x"}}\n\n']
    ),
    "the reason error": Answer(events=[delta(content="Ash"), delta("error"), DONE]),
    "SGLang's abort": Answer(events=[delta(content="Ash"), delta("abort"), DONE]),
    "damaged": Answer(events=[delta(content="Ash"), b'data: {"choices": [{"del\n\n', DONE]),
    "no chunk at all": Answer(events=[DONE]),
}


@pytest.mark.parametrize("how", BROKEN)
async def test_a_stream_that_breaks_off_is_asked_for_again_as_a_whole(how):
    whole = Answer(events=[delta(content="Ash"), delta("stop", content="ford"), DONE])
    found, server = await ask(BROKEN[how], whole, stream=True)
    assert isinstance(found, ChatAnswer) and found.content == "Ashford"
    assert len(server.requests) == 2 and server.requests[0] == server.requests[1]
    fault, server = await ask(BROKEN[how], stream=True)
    assert isinstance(fault, ChatFault) and "tried 3 times" in str(fault)
    assert len(server.requests) == 3


async def test_a_stream_in_which_nothing_comes_has_broken_off_and_comments_keep_it_alive():
    silent = Answer(events=[delta(content="Ash"), 2.0, delta("stop"), DONE])
    alive = Answer(events=[*[b": ping\n\n", 0.06] * 6, delta("stop", content="Ashford"), DONE])
    found, server = await ask(silent, alive, stream=True, idle_timeout_s=0.25)
    assert isinstance(found, ChatAnswer) and found.content == "Ashford"
    assert len(server.requests) == 2


async def test_comments_alone_keep_nobody_waiting_beyond_the_deadline():
    forever = Answer(events=[b": ping\n\n", 0.05] * 200)
    fault, server = await ask(forever, stream=True, timeout_s=0.4)
    assert "no answer within 0.4 s" in str(fault) and len(server.requests) == 1


async def test_an_endpoint_that_knows_no_streams_answers_all_the_same():
    found, _ = await ask(message("Ashford"), stream=True)
    assert found.content == "Ashford"


WHOLE = {
    "a cut answer": (message("Ash", finish_reason="length"), {"finish_reason": "length"}),
    "Gemini's name for it": (message("Ash", finish_reason="MAX_TOKENS"), {"finish_reason": "length"}),
    "a filtered answer": (message(None, finish_reason="content_filter"), {"finish_reason": "content_filter"}),
    "a filtered question": (
        Answer(
            body={
                "choices": [],
                "prompt_filter_results": [{"content_filter_results": {"hate": {"filtered": True}}}],
            }
        ),
        {"finish_reason": "content_filter"},
    ),
    "Azure's filter": (
        Answer(
            status=400,
            body={
                "error": {
                    "code": "content_filter",
                    "message": "The response was filtered",
                    "innererror": {"code": "ResponsibleAIPolicyViolation"},
                }
            },
        ),
        {"finish_reason": "content_filter", "problem": "The response was filtered"},
    ),
    "OpenAI's full context": (
        Answer(status=400, body={"error": {"code": "context_length_exceeded", "message": "too many"}}),
        {"finish_reason": "context"},
    ),
    "vLLM's full context": (
        Answer(
            status=400,
            body={
                "object": "error",
                "message": "This model's maximum context length is 512 tokens.",
                "code": 400,
            },
        ),
        {"finish_reason": "context"},
    ),
    "SGLang's full context": (
        Answer(
            status=400,
            body={
                "error": {
                    "message": "The input (900 tokens) is longer than the model's context length (512)."
                }
            },
        ),
        {"finish_reason": "context"},
    ),
    "llama.cpp's full context, with 500": (
        Answer(
            status=500,
            body={
                "error": {
                    "code": 500,
                    "message": "the request exceeds the available context size",
                    "type": "exceed_context_size_error",
                }
            },
        ),
        {"finish_reason": "context"},
    ),
    "a refusal": (message(None, refusal="No."), {"content": "No.", "refusal": "No."}),
    "a refusal in parts": (
        message([{"type": "refusal", "refusal": "No."}]),
        {"content": "No.", "refusal": "No."},
    ),
    "usage with details": (
        message(
            "x",
            usage={
                "prompt_tokens": 9,
                "completion_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 4},
                "completion_tokens_details": {"reasoning_tokens": 5},
            },
        ),
        {"usage": ChatUsage(prompt_tokens=9, completion_tokens=7, cached_tokens=4, reasoning_tokens=5)},
    ),
    "usage that is none": (message("x", usage={"prompt_tokens": None}), {"usage": ChatUsage()}),
    "thoughts in the text": (message("<think>hm</think>\n\nAsh"), {"content": "Ash", "reasoning": "hm"}),
    "no thoughts, said with an empty text": (
        message("Ash", reasoning_content=""),
        {"content": "Ash", "reasoning": None},
    ),
    "an answer without anything": (message(None), {"content": "", "tool_calls": ()}),
}


@pytest.mark.parametrize("what", WHOLE)
async def test_whole_answers_of_providers_are_read(what):
    given, expected = WHOLE[what]
    found, server = await ask(given)
    assert isinstance(found, ChatAnswer), found
    assert {name: getattr(found, name) for name in expected} == expected
    assert len(server.requests) == 1, "what says never is asked once"


LATER = {
    "a rate limit": (Answer(status=429, body={"error": {"message": "slow down"}}), 1),
    "a rate limit that says when": (Answer(status=429, body={}, headers={"Retry-After": "0.01"}), 6),
    "Gemini's rate limit": (
        Answer(
            status=429,
            body=[{"error": {"code": 429, "message": "x", "details": [{"retryDelay": "0.01s"}]}}],
        ),
        6,
    ),
    "a gateway": (Answer(status=503, body=b"<html>upstream</html>"), 2),
    "OpenRouter's error with status 200": (
        Answer(body={"error": {"code": 502, "message": "Provider returned error"}}),
        2,
    ),
    "an error in the choice": (
        Answer(body={"choices": [{"error": {"code": 503, "message": "x"}, "finish_reason": "error"}]}),
        2,
    ),
    "the reason error": (message("", finish_reason="error"), 2),
    "no choice": (Answer(body={"choices": []}), 2),
}


@pytest.mark.parametrize("what", LATER)
async def test_what_may_pass_is_asked_again_and_who_asks_for_time_gets_it(what):
    given, times = LATER[what]
    found, server = await ask(*[given] * times, message("Ashford"))
    assert isinstance(found, ChatAnswer) and found.content == "Ashford"
    assert len(server.requests) == times + 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Answer(status=401, body={"error": {"message": "Incorrect API key"}}), "HTTP 401: Incorrect API key"),
        (Answer(status=404, body={"detail": "Not Found"}), "HTTP 404: Not Found"),
        (
            Answer(body={"error": {"code": 400, "message": "no endpoint", "type": "invalid_request_error"}}),
            r"no endpoint \(400, invalid_request_error\)",
        ),
        (Answer(body={"error": {"message": "x", "type": "invalid_request_error"}}), "invalid_request_error"),
        (Answer(body=b"<html>"), "not JSON: <html>"),
        (Answer(body=[]), "holds no message"),
        (Answer(body={"id": "x"}), "holds no message"),
        (Answer(body={"choices": [{}]}), "holds no message"),
        (Answer(status=302, body={}, headers={"Location": "/elsewhere"}), "HTTP 302"),
    ],
)
async def test_what_is_refused_is_asked_once(given, words):
    fault, server = await ask(given)
    assert isinstance(fault, ChatFault)
    assert re.search(words, str(fault)), fault
    assert len(server.requests) == 1


async def test_a_wait_beyond_the_deadline_is_not_waited_for():
    fault, server = await ask(Answer(status=429, body={}, headers={"Retry-After": "3600"}))
    assert "asks to wait 3600 s" in str(fault) and len(server.requests) == 1


async def test_nobody_there_is_a_fault():
    async with chat_server(message("x")) as server:
        url = server.url
    endpoint = ChatEndpoint(url=url, model="m", max_retries=0)
    async with contextlib.aclosing(ChatClient(endpoint)) as client:
        with pytest.raises(ChatFault, match="ConnectError"):
            await client.ask(QUESTION)


async def test_what_is_sent_is_what_the_config_says(tmp_path):
    key = tmp_path / "key"
    key.write_text(f"{KEY}\n")
    _, server = await ask(
        message("x"),
        key=key,
        temperature=None,
        max_tokens=7,
        headers={"X-Title": "gym"},
        request={"max_tokens": None, "max_completion_tokens": 9, "chat_template_kwargs": {"a": 1}},
    )
    assert server.requests[0] == {
        "model": "m",
        "messages": QUESTION,
        "max_completion_tokens": 9,
        "chat_template_kwargs": {"a": 1},
    }
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert server.headers[0]["X-Title"] == "gym"
    assert server.paths[0] == "/v1/chat/completions"


async def test_azures_address_and_key(tmp_path):
    key = tmp_path / "key"
    key.write_text(KEY)
    async with chat_server(message("x")) as server:
        url = server.url.replace("/v1", "/openai/deployments/d?api-version=2024-06-01")
        endpoint = ChatEndpoint(url=url, model="d", api_key_file=key, api_key_header="api-key")
        async with contextlib.aclosing(ChatClient(endpoint)) as client:
            await client.ask(QUESTION)
            assert "api-version" not in client.where
    assert server.paths == ["/openai/deployments/d/chat/completions?api-version=2024-06-01"]
    assert server.headers[0]["api-key"] == KEY and "Authorization" not in server.headers[0]


async def test_a_key_that_an_endpoint_says_back_is_not_said(tmp_path, caplog):
    key = tmp_path / "key"
    key.write_text(KEY)
    caplog.set_level("DEBUG")
    says = {"error": {"message": f"Incorrect API key provided: {KEY}. Bearer {KEY}"}}
    for answer in (Answer(status=401, body=says), Answer(status=500, body=says), Answer(body=says)):
        fault, server = await ask(answer, key=key, max_retries=0)
        assert KEY not in str(fault) and "Incorrect API key" in str(fault)
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in caplog.text
    assert KEY not in repr(ChatEndpoint(url="http://x/v1", model="m", api_key_file=key))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headers": {"Authorization": f"Bearer {KEY}"}}, "'Authorization' looks like a secret"),
        ({"url": f"http://x/v1?key={KEY}"}, "url: 'key' looks like a secret"),
        ({"url": "http://me:pass1234@x/v1"}, "url: 'password' looks like a secret"),
        ({"api_key_file": "/nowhere/key"}, "/nowhere/key cannot be read"),
    ],
)
def test_secrets_are_in_files(options, words):
    with pytest.raises(ValueError, match=words):
        ChatClient(ChatEndpoint(**{"url": "http://x/v1", "model": "m", **options}))


def test_a_file_of_two_keys_is_none(tmp_path):
    path = tmp_path / "key"
    path.write_text("one two")
    with pytest.raises(ValueError, match="must hold one key and nothing else"):
        ChatClient(ChatEndpoint(url="http://x/v1", model="m", api_key_file=path))


def test_an_address_that_is_none_is_refused():
    with pytest.raises(ValidationError, match="url"):
        ChatEndpoint(url="localhost:8000", model="m")


async def test_no_more_are_under_way_than_there_may_be():
    under_way, most = 0, 0
    async with chat_server(message("x")) as server:
        endpoint = ChatEndpoint(url=server.url, model="m", max_concurrent_requests=3)
        async with contextlib.aclosing(ChatClient(endpoint)) as client:
            inner = client._try

            async def counted(body, left_s):
                nonlocal under_way, most
                under_way += 1
                most = max(most, under_way)
                try:
                    return await inner(body, left_s)
                finally:
                    under_way -= 1

            client._try = counted
            await asyncio.gather(*(client.ask(QUESTION) for _ in range(12)))
    assert most == 3 and len(server.requests) == 12


async def test_threads_share_one_client_of_an_endpoint():
    async with chat_server(message("Ashford")) as server:
        chat = BlockingChat(ChatEndpoint(url=server.url, model="m"))
        found = await asyncio.gather(*(asyncio.to_thread(chat.ask, QUESTION) for _ in range(8)))
        assert {answer.content for answer in found} == {"Ashford"}
        await asyncio.to_thread(chat.close)
    assert not chat._thread.is_alive()


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "id", "name", "function", "arguments", "index"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
FIELDS = ("content", "tool_calls", "reasoning", "reasoning_content", "refusal")


@settings(max_examples=80, deadline=None)
@given(given_message=st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, ANY)) | ANY, rest=ANY)
def test_whatever_an_endpoint_answers_is_read_or_a_fault(given_message, rest):
    choice = {"message": given_message, "finish_reason": rest, "error": None}
    with contextlib.suppress(ChatFault):
        assert isinstance(read_answer({"choices": [choice], "usage": rest}), ChatAnswer)
    streamed = StreamedAnswer()
    with contextlib.suppress(ChatFault):
        streamed.add(json.dumps({"choices": [{"delta": given_message}], "usage": rest, "error": rest}))
        streamed.add("[DONE]")
        assert isinstance(streamed.answer(), ChatAnswer)


def test_a_call_that_cannot_be_read_is_told():
    texts = ["{", "[]", None, {"a": 1}]
    calls = [{"id": str(i), "function": {"name": "search", "arguments": t}} for i, t in enumerate(texts)]
    calls.append({"id": None, "function": {"name": 3}})
    made = read_answer({"choices": [{"message": {"tool_calls": calls}}]}).tool_calls
    assert [one.arguments for one in made] == [{}, {}, {}, {"a": 1}, {}]
    assert "not valid JSON" in made[0].error and "must be a JSON object" in made[1].error
    assert made[2].error is None and made[3].error is None
    assert "its name must be a string" in made[4].error and made[4].id == "call_4"


def test_a_stream_that_goes_on_after_its_end_is_not_read_on():
    streamed = StreamedAnswer()
    streamed.add(json.dumps(delta("stop", content="x")))
    assert streamed.answer().content == "x"
    with pytest.raises(PassingFault, match="broke off"):
        StreamedAnswer().answer()
