"""One rule for requests that failed: what is sent again, after how long, and until when."""

import email.utils
import errno
import random
import subprocess
import sys

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyturn.tools.retries import CircuitBreaker, Retries, Tries, asked_wait_s, may_pass, transport_problem


def test_what_says_later_is_sent_again_and_what_says_never_is_not():
    assert [status for status in range(400, 500) if may_pass(status)] == [408, 425, 429]
    assert all(map(may_pass, range(500, 600)))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        (email.utils.formatdate(1_000_010, usegmt=True), 10.0),
        (email.utils.formatdate(1_000_000 - 99, usegmt=True), 0.0),
        ("-7", 0.0),
        *[(text, None) for text in ("", "soon", "nan", "inf", "1e999", "Thu, 99 Foo 1970", "\ud800")],
    ],
)
def test_retry_after_names_seconds_or_a_date_and_anything_else_nothing(text, seconds):
    assert asked_wait_s({"retry-after": text}, now=1_000_000.0) == seconds
    assert asked_wait_s({}) is None
    assert asked_wait_s({"retry-after": text, "retry-after-ms": "250"}) == 0.25


@given(text=st.text(max_size=40))
def test_no_header_raises(text):
    asked = asked_wait_s({"retry-after": text})
    assert asked is None or asked >= 0


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@given(
    asked=st.lists(st.one_of(st.none(), st.floats(0, 50)), max_size=30),
    max_retries=st.integers(0, 5),
    deadline_s=st.floats(0.1, 100),
    seed=st.integers(0, 9),
)
def test_no_server_makes_a_request_outlast_its_deadline(asked, max_retries, deadline_s, seed):
    clock = Clock()
    retries = Retries(max_retries=max_retries, deadline_s=deadline_s, jitter=random.Random(seed))
    tries = Tries(retries, clock=clock)
    uninvited = 0
    for wanted in asked:
        wait_s = tries.next_wait_s(wanted)
        if wait_s is None:
            break
        uninvited += not wanted
        assert wait_s >= (wanted or 0.0), "never sooner than it asks for"
        clock.now += wait_s
    assert clock.now < deadline_s
    assert uninvited <= max_retries
    assert f"tried {tries.count} times" in tries.over("it failed")


def test_why_there_is_no_further_try_is_said():
    tries = Tries(Retries(deadline_s=10))
    assert tries.next_wait_s(60.0) is None
    assert tries.over("HTTP 429", 60.0) == (
        "HTTP 429; it asks to wait 60 s; tried 1 times, and the deadline of 10 s leaves no time"
    )


def test_out_of_file_descriptors_is_said_in_words():
    error = httpx.ConnectError("All connection attempts failed")
    error.__cause__ = ExceptionGroup("tried", [OSError("x"), OSError(errno.EMFILE, "Too many open files")])
    assert "no file descriptor left, its limit is" in transport_problem(error)
    assert transport_problem(httpx.ConnectError("refused")) == "ConnectError: refused"
    script = (
        "import asyncio, os, resource, httpx\n"
        "from polyturn.agents.http import post_json\n"
        "from polyturn.agents.policy import PolicyFault\n"
        "from polyturn.tools.retries import Retries\n"
        "async def main():\n"
        "    async with httpx.AsyncClient(trust_env=False) as client:\n"
        "        try: await client.get('http://127.0.0.1:9/')\n"
        "        except httpx.ConnectError: pass\n"
        "        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "        held = []\n"
        "        try:\n"
        "            while True: held.append(os.dup(0))\n"
        "        except OSError: pass\n"
        "        try: await post_json(client, 'http://127.0.0.1:9/', {}, retries=Retries(max_retries=0))\n"
        "        except PolicyFault as fault: print(fault)\n"
        "        finally: [os.close(one) for one in held]\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "no file descriptor left, its limit is 64" in done.stdout, done.stderr


def test_the_breaker_opens_after_failures_in_a_row_and_admits_one_trial_after_its_cooldown():
    now = 0.0
    breaker = CircuitBreaker(threshold=2, cooldown_s=10, clock=lambda: now)
    breaker.fail()
    breaker.succeed()
    breaker.fail()
    assert breaker.admit()
    breaker.fail()
    assert not breaker.admit()
    now = 10.0
    assert [breaker.admit(), breaker.admit()] == [True, False]
    breaker.fail()
    assert not breaker.admit()
    now = 20.0
    assert breaker.admit()
    breaker.succeed()
    assert [breaker.admit(), breaker.admit()] == [True, True]
