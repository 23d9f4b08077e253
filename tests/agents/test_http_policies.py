"""The policy of an engine, against a real server that answers as SGLang does."""

import asyncio
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.http import Retries
from polyturn.agents.policy import PolicyFault, SamplingParams
from polyturn.agents.sglang_policy import SGLangPolicy, read_generation

NO_WAIT = Retries(max_retries=2, first_wait_s=0.0)


@contextmanager
def serving(*answers):
    """A server that gives `answers`, (status, body) each, the last one for ever; yields its URL and the requests."""
    requests, remaining = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.path, json.loads(body), dict(self.headers)))
            status, answer = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            if status == 0:
                self.close_connection = True
                return
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if isinstance(answer, dict) and "retry_after" in answer:
                self.send_header("Retry-After", answer["retry_after"])
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(ids=(5, 6, 2), logprobs=(-0.5, -0.25, -1.0), reason="stop", **meta):
    entries = [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)]
    info = {"output_token_logprobs": entries, "finish_reason": {"type": reason}, "weight_version": "default"}
    return {"text": "x", "output_ids": list(ids), "meta_info": info | meta}


def generate(url, **sampling):
    async def run():
        async with httpx.AsyncClient(timeout=5) as client:
            policy = SGLangPolicy(client=client, url=url, stop_token_ids=[2], retries=NO_WAIT)
            return await policy.generate(prompt_ids=(1, 2, 3), sampling=SamplingParams(**sampling))

    return asyncio.run(run())


def test_the_request_is_tokens_and_the_answer_is_taken_as_it_is():
    with serving((200, answer())) as (url, requests):
        generation = generate(url + "/", temperature=0.5, max_tokens=7, seed=11)
    assert generation.token_ids.tolist() == [5, 6, 2]
    assert generation.logprobs.tolist() == [-0.5, -0.25, -1.0]
    assert generation.policy_versions.tolist() == [0, 0, 0]
    assert generation.finish_reason == "stop"
    path, payload, _ = requests[0]
    assert path == "/generate"
    assert payload == {
        "input_ids": [1, 2, 3],
        "return_logprob": True,
        "sampling_params": {
            "temperature": 0.5,
            "max_new_tokens": 7,
            "stop_token_ids": [2],
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "sampling_seed": 11,
        },
    }


MASK = {
    "output_token_sampling_mask": [[5, 9], [7, 6, 8], [2]],
    "output_token_sampling_logprobs": [-0.1, -0.2, 0.0],
}


@pytest.mark.catalogue("B24")
def test_what_was_left_out_is_asked_for_and_logprobs_are_over_the_rest():
    asked = {"top_p": 0.7, "top_k": 20, "min_p": 0.05}
    with serving((200, answer(**MASK))) as (url, requests):
        generation = generate(url, **asked, records_support=True)
        unrecorded = generate(url, **asked)
        generate(url)
    payloads = [payload for _, payload, _ in requests]
    assert [payload.get("return_sampling_mask") for payload in payloads] == [True, None, None]
    assert all(asked.items() <= payload["sampling_params"].items() for payload in payloads[:2])
    assert not asked.keys() & payloads[2]["sampling_params"].keys()
    assert generation.logprobs == pytest.approx([-0.1, -0.2, 0.0])
    assert generation.support is not None
    assert generation.support.sizes.tolist() == [2, 3, 1]
    assert generation.support.token_ids.tolist() == [5, 9, 7, 6, 8, 2]
    assert unrecorded.support is None and unrecorded.logprobs.tolist() == [-0.5, -0.25, -1.0]


@pytest.mark.catalogue("B24")
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"output_token_sampling_mask": None}, "a router in front of it may drop"),
        (
            {"output_token_sampling_mask": [[5, 9], [6]]},
            "is of 2 tokens and its logprobs of 3, but it sampled 3",
        ),
        ({"output_token_sampling_logprobs": [-0.1]}, "logprobs of 1"),
        (
            {"output_token_sampling_mask": [[5], [7, 8], [2]]},
            "token 6 at position 1, which is in its .* 0 times",
        ),
        (
            {"output_token_sampling_mask": [[5], [6, 6], [2]]},
            "token 6 at position 1, which is in its .* 2 times",
        ),
        ({"output_token_sampling_mask": [[5], [6, -1], [2]]}, "no vocabulary has"),
        ({"output_token_sampling_mask": [[5], [6, "x"], [2]]}, "cannot be read"),
        ({"output_token_sampling_mask": [5, 6, 2]}, "cannot be read"),
        ({"output_token_sampling_logprobs": [-0.1, float("nan"), 0.0]}, "not finite"),
    ],
)
def test_a_support_that_does_not_hold_together_is_a_fault(changes, problem):
    with serving((200, answer(**MASK | changes))) as (url, _), pytest.raises(PolicyFault, match=problem):
        generate(url, top_k=20, records_support=True)


@pytest.mark.catalogue("B24")
def test_what_was_aborted_before_its_first_token_has_an_empty_support():
    with serving((200, answer(ids=(), logprobs=(), reason="abort"))) as (url, _):
        generation = generate(url, top_k=20, records_support=True)
    assert generation.support is not None and len(generation.support) == 0


def test_versions_come_from_the_spans_where_weights_changed_on_the_way():
    assert read_generation(answer(weight_version="7")).policy_versions.tolist() == [7, 7, 7]
    spans = [{"version": "default", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 3}]
    assert read_generation(answer(weight_version="3", weight_versions=spans)).policy_versions.tolist() == [
        0,
        3,
        3,
    ]
    with pytest.raises(PolicyFault, match="cover 2 of 3"):
        read_generation(answer(weight_versions=[{"version": "1", "start": 0, "end": 2}]))
    with pytest.raises(PolicyFault, match="'v2', not a number"):
        read_generation(answer(weight_version="v2"))


@pytest.mark.catalogue("B31")
@pytest.mark.parametrize("logprob", [float("nan"), float("-inf"), float("inf")])
def test_a_logprob_that_is_not_finite_is_a_fault(logprob):
    with pytest.raises(PolicyFault, match="for token 6 at position 1"):
        read_generation(answer(logprobs=(-0.5, logprob, -1.0)))


def test_an_answer_that_does_not_hold_together_is_a_fault():
    with pytest.raises(PolicyFault, match="logprobs are of 3 other tokens"):
        read_generation(answer() | {"output_ids": [5, 6]})
    with pytest.raises(PolicyFault, match="lacks 'meta_info'"):
        read_generation({"output_ids": [5]})
    with pytest.raises(PolicyFault, match="unknown reason 'whim'"):
        read_generation(answer(reason="whim"))
    assert read_generation(answer((), (), reason="abort")).finish_reason == "abort"


@pytest.mark.catalogue("B43")
def test_what_may_pass_is_tried_again_and_what_is_refused_is_not():
    with serving((503, {"e": "busy"}), (0, None), (200, answer())) as (url, requests):
        assert generate(url).token_ids.tolist() == [5, 6, 2]
    assert len(requests) == 3
    with serving((500, {"error": "boom"})) as (url, requests):
        with pytest.raises(PolicyFault, match=r"HTTP 500.*boom.*tried 3 times"):
            generate(url)
    assert len(requests) == 3
    with serving((400, {"error": "too long"}), (200, answer())) as (url, requests):
        with pytest.raises(PolicyFault, match=r"HTTP 400.*too long"):
            generate(url)
    assert len(requests) == 1
    with pytest.raises(PolicyFault, match="tried 3 times"):
        generate(url)
    with serving((200, b"<html>")) as (url, requests):
        with pytest.raises(PolicyFault, match="not JSON"):
            generate(url)


@pytest.mark.parametrize("status", [408, 425, 429, 503])
def test_who_is_asked_to_come_later_does_so_as_often_as_the_deadline_allows(status):
    later = (status, {"retry_after": "0.01"})
    with serving(*[later] * 6, (200, answer())) as (url, requests):
        assert generate(url).token_ids.tolist() == [5, 6, 2]
    assert len(requests) == 7, "more than the tries that nobody asked for"
    with serving((status, {"retry_after": "3600"})) as (url, requests):
        with pytest.raises(PolicyFault, match=rf"HTTP {status}.*asks to wait 3600 s; tried 1 times"):
            generate(url)
    assert len(requests) == 1
    with serving((status, {})) as (url, requests):
        with pytest.raises(PolicyFault, match=rf"HTTP {status}.*tried 3 times"):
            generate(url)


def test_one_deadline_holds_for_a_request_with_all_its_tries():
    async def run(url):
        async with httpx.AsyncClient(timeout=60) as client:
            policy = SGLangPolicy(
                client=client,
                url=url,
                stop_token_ids=[2],
                retries=Retries(deadline_s=2.0, first_wait_s=3.0, max_retries=99),
            )
            return await policy.generate(prompt_ids=(1,), sampling=SamplingParams())

    with (
        serving((500, {})) as (url, _),
        pytest.raises(PolicyFault, match=r"the deadline of 2 s leaves no time"),
    ):
        asyncio.run(run(url))


def test_waits_between_tries_double_and_vary():
    retries = Retries(first_wait_s=1.0)
    for attempt in range(4):
        waits = [retries.wait_s(attempt) for _ in range(50)]
        assert all(0.5 * 2**attempt <= wait < 1.5 * 2**attempt for wait in waits)
        assert len(set(waits)) > 1


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([2**31, 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "version", "end", "id", "name"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    ids=ANY | st.lists(st.integers(-1, 2**32), max_size=3),
    entries=ANY | st.lists(st.tuples(st.floats(), st.integers(-1, 2**32)).map(list), max_size=3),
    meta=st.fixed_dictionaries(
        {}, optional={"weight_version": ANY, "weight_versions": ANY, "finish_reason": ANY}
    ),
)
def test_whatever_an_engine_answers_is_a_generation_that_can_be_kept_or_a_fault(ids, entries, meta):
    meta = {
        "finish_reason": {"type": "stop"},
        "weight_version": "3",
        "output_token_logprobs": entries,
        **meta,
    }
    try:
        found = read_generation({"output_ids": ids, "meta_info": meta})
    except PolicyFault:
        return
    assert all(0 <= token < 2**31 for token in found.token_ids)
    assert all(abs(logprob) < 1e30 for logprob in found.logprobs)
    assert all(0 <= version < 2**31 for version in found.policy_versions)


def test_a_span_of_versions_beyond_the_tokens_takes_no_memory():
    spans = [{"version": "1", "end": 10**12}]
    with pytest.raises(PolicyFault, match="cover 4 of 3 tokens"):
        read_generation(answer(weight_versions=spans))
