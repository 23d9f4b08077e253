"""Remote rewards against a real server on the loopback interface: batches, deadlines, retries, breaker."""

import asyncio
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from polyturn.configs.schema.tasks import RemoteReward
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, EpisodeView, ListTasks, Task
from polyturn.envs.rewards.remote import RemoteGrader
from polyturn.envs.tool_env import ToolEnv


class Service:
    """Answers with `reply(episodes)`: a list of rewards, or a status, or a whole body."""

    def __init__(self):
        self.batches: list[list[dict]] = []
        self.reply = lambda episodes: [float(len(episode["answer"])) for episode in episodes]
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                episodes = json.loads(self.rfile.read(int(self.headers["content-length"])))["episodes"]
                service.batches.append(episodes)
                reply = service.reply(episodes)
                status = reply if isinstance(reply, int) else 200
                body = json.dumps({"rewards": reply} if isinstance(reply, list) else reply).encode()
                with contextlib.suppress(OSError):  # the client may have given up
                    self.send_response(status)
                    self.send_header("content-length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/grade"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def service():
    running = Service()
    yield running
    running.close()


@contextlib.contextmanager
def grader(url, **options):
    made = RemoteGrader(
        RemoteReward(kind="remote", url=url, **{"linger_s": 0.05, "max_retries": 2, **options})
    )
    try:
        yield made
    finally:
        made.close()


def view(answer, label="gold"):
    task = Task.from_prompt(f"task-{answer}", "p", label=label, metadata={"level": 1})
    return EpisodeView(
        task=task, message=AssistantMessage(content=answer), messages=task.messages, metrics={"turns": 2.0}
    )


async def test_episodes_share_requests_and_get_their_own_rewards(service):
    with grader(service.url, batch_size=8) as reward:
        values = await asyncio.gather(*(reward(view("x" * size)) for size in range(20)))
    assert values == [float(size) for size in range(20)]
    assert len(service.batches) < 10
    assert max(map(len, service.batches)) == 8
    sent = {episode["answer"]: episode for batch in service.batches for episode in batch}
    assert sent[""] == {
        "task_id": "task-",
        "answer": "",
        "label": "gold",
        "messages": [{"role": "user", "content": "p"}],
        "metadata": {"level": 1},
        "metrics": {"turns": 2.0},
    }


async def test_parts_come_back_by_name_and_one_failure_is_one_episodes_fault(service):
    service.reply = lambda episodes: [
        None if e["answer"] == "bad" else {"style": 1.0} if e["answer"] == "good" else "nonsense"
        for e in episodes
    ]
    with grader(service.url) as reward:
        good, bad, worse = await asyncio.gather(
            *(reward(view(answer)) for answer in ("good", "bad", "worse")), return_exceptions=True
        )
    assert good == {"style": 1.0}
    assert isinstance(bad, EnvironmentFault) and "could not grade task 'task-bad'" in str(bad)
    assert isinstance(worse, EnvironmentFault) and "finite number" in str(worse)


async def test_a_5xx_is_tried_again(service):
    answers = iter([503, 500, [1.0]])
    service.reply = lambda episodes: next(answers)
    with grader(service.url) as reward:
        assert await reward(view("a")) == 1.0
    assert len(service.batches) == 3


async def test_a_4xx_is_not_tried_again(service):
    service.reply = lambda episodes: 422
    with grader(service.url) as reward:
        with pytest.raises(EnvironmentFault, match="answered 422"):
            await reward(view("a"))
    assert len(service.batches) == 1


async def test_nobody_there_is_tried_again_and_then_a_fault():
    closed = Service()
    closed.close()
    with grader(closed.url) as reward:
        with pytest.raises(EnvironmentFault, match=r"cannot be reached: ConnectError.*; tried 3 times"):
            await reward(view("a"))


@pytest.mark.parametrize("reply", [[], [1.0, 2.0], {"reward": 1.0}, "text", [float("nan")]])
async def test_an_answer_of_another_form_is_a_fault_and_no_zero(service, reply):
    service.reply = lambda episodes: reply
    with grader(service.url) as reward:
        with pytest.raises(EnvironmentFault):
            await reward(view("a"))
    assert len(service.batches) == 1


async def test_the_deadline_is_total(service):
    released = threading.Event()
    service.reply = lambda episodes: released.wait(timeout=20) and [1.0]
    try:
        with grader(service.url, deadline_s=0.2) as reward:
            started = time.monotonic()
            with pytest.raises(EnvironmentFault, match=r"gave no reward within 0\.2 s"):
                await reward(view("a"))
            assert time.monotonic() - started < 10, "the service answers after 20 s"
    finally:
        released.set()


async def test_an_answer_that_comes_drop_by_drop_holds_no_thread_beyond_the_deadline():
    """A read timeout alone would begin anew with every byte, and go on for a minute here."""

    async def drip(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1200\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(1200):
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    reward = RemoteGrader(RemoteReward(kind="remote", url=url, deadline_s=0.3, max_concurrent_requests=1))
    with pytest.raises(EnvironmentFault, match=r"gave no reward within 0\.3 s"):
        await reward(view("a"))
    await asyncio.wait_for(asyncio.to_thread(reward.close), 20)
    server.close()


async def test_a_service_that_fails_again_and_again_is_left_alone(service):
    service.reply = lambda episodes: 500
    with grader(service.url, max_retries=0, breaker_failures=3, breaker_reset_s=60) as reward:
        faults = []
        for _ in range(6):
            with pytest.raises(EnvironmentFault) as caught:
                await reward(view("a"))
            faults.append(str(caught.value))
    assert len(service.batches) == 3
    assert ["left alone for 60 s" in fault for fault in faults] == [False] * 3 + [True] * 3


async def test_a_label_that_json_cannot_hold_is_its_own_episodes_fault(service):
    with grader(service.url) as reward:
        odd, good = await asyncio.gather(
            reward(view("a", object())), reward(view("bb")), return_exceptions=True
        )
    assert isinstance(odd, TypeError)
    assert good == 2.0


async def test_it_grades_an_environment_from_step_and_from_several_loops(service):
    """Each synchronous step runs an event loop of its own; all share one grader."""

    class Env(ToolEnv):
        pass

    with grader(service.url) as reward:

        def play(answer):
            env = Env(tasks=ListTasks([Task.from_prompt("t", "p", label="x")]))
            env.graded_by = reward
            env.reset()
            return env.step(AssistantMessage(content=answer))

        results = await asyncio.gather(*(asyncio.to_thread(play, "x" * size) for size in range(1, 5)))
        assert [result[1] for result in results] == [1.0, 2.0, 3.0, 4.0]
        assert results[0][4]["reward_parts"] == {"remote": 1.0}
        service.reply = lambda episodes: [None for _ in episodes]
        with pytest.raises(EnvironmentFault, match="could not grade"):
            await asyncio.to_thread(play, "x")


def test_a_wrong_url_is_refused():
    for url in ("localhost:80", "ftp://x/", "http://"):
        with pytest.raises(ValueError, match="is not an http"):
            RemoteGrader(RemoteReward(kind="remote", url=url))


def test_closing_ends_the_threads(service):
    before = set(threading.enumerate())

    def started():
        return [thread.name for thread in set(threading.enumerate()) - before]

    with grader(service.url, max_concurrent_requests=3) as reward:
        assert asyncio.run(asyncio.wait_for(_call(reward), 10)) == 1.0
        assert sum(name.startswith("reward-") for name in started()) == 3
    assert not any(name.startswith("reward-") for name in started())
    assert len(started()) <= 1  # the service's own for a connection that lives on


async def _call(reward):
    return await reward(view("a"))
