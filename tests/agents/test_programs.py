"""Programs of anybody's play episodes: in which walls, by which address, and what their ends are worth."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from polyturn.agents.agent_play import AgentSettings, load_agent, play_agent
from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.dialects import HermesDialect
from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.sessions.server import SessionServer
from polyturn.envs.messages import Task
from polyturn.envs.tool_env import ToolEnv
from tests.support.chat_families import FAMILIES
from tests.support.harbor_tasks import write_task
from tests.support.policies import Says

TARGET = "polyturn.agents.programs:ProgramAgent"
ASK = """
import json, os, urllib.request
def ask(text):
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode(),
        {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]
"""


class Asked(ToolEnv):
    """Pays for an answer that holds the label."""

    def grade(self, message):
        return {"correct": float(self.task.label in message.content)}


def play(
    agent: Any,
    folder: Path,
    *,
    env: Any = None,
    task: Any = None,
    says: str = "It is Ashford.",
    settings: AgentSettings | None = None,
    timeout_s: float = 60.0,
) -> Episode:
    tokenizer = FAMILIES["qwen3"].tokenizer

    async def run() -> Episode:
        async with SessionServer(socket_path=folder / "s.sock") as endpoint:
            return await play_agent(
                env=env or Asked(),
                policy=Says(tokenizer, lambda number: says),
                agent=agent,
                endpoint=endpoint,
                renderer=ChatRenderer(tokenizer),
                dialect=HermesDialect(),
                task=task or Task.from_prompt("t", "Where is Mara?", label="Ashford"),
                seed=0,
                limits=EpisodeLimits(max_turns=9, max_tokens_per_episode=5000, timeout_s=timeout_s),
                episode_id="e",
                group_id="g",
                settings=settings,
            )

    return asyncio.run(run())


def program(code: str, **options: Any) -> Any:
    return load_agent(TARGET, {"command": ["python3", "-c", code], **options})


@pytest.fixture(params=["bubblewrap", "host"])
def place(request: pytest.FixtureRequest) -> str:
    if request.param == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    return request.param


def test_a_program_asks_by_its_variables_and_is_graded(place: str, tmp_path: Path) -> None:
    code = f"{ASK}\nimport sys\nprint(ask(sys.argv[1]))\nraise SystemExit(3)"
    episode = play(program(code, place=place), tmp_path)
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 1.0)
    assert episode.metrics["exit_code"] == 3.0
    assert episode.metrics["output_bytes"] == len("It is Ashford.\n")
    assert [message["content"] for message in episode.messages] == ["Where is Mara?", "It is Ashford."]
    assert len(episode.segments) == 1 and sum(episode.segments[0].sampled) > 0


@pytest.mark.parametrize("by", ["stdin", "file"])
def test_a_program_finds_its_instruction_and_leaves_its_answer(place: str, by: str, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(ASK)
    read = "sys.stdin.read()" if by == "stdin" else "open(sys.argv[1]).read()"
    code = f"import sys; sys.path.insert(0, 'lib')\nfrom helper import ask\nopen('out', 'w').write({read} + ask('x'))"
    command = ["python3", "-c", code, *(["{instruction_file}"] if by == "file" else [])]
    files = {"lib/helper.py": str(tmp_path / "helper.py")}
    options = {"instruction": by, "answer": "file", "answer_file": "out", "files": files}
    episode = play(load_agent(TARGET, {"command": command, "place": place, **options}), tmp_path)
    assert episode.reward == 1.0
    seen = [message["content"] for message in episode.messages if message["role"] == "user"]
    assert seen == ["x"]


def test_in_walls_nothing_but_the_session_is_in_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    monkeypatch.setenv("MY_SECRET", "hidden")
    here = Path(__file__).resolve()
    code = f"""{ASK}
import socket, subprocess
found = [name for name in ("MY_SECRET",) if name in os.environ]
for path in ({str(here)!r}, {str(tmp_path)!r}, "/root/.ssh", "/home", "/var/run/docker.sock", "/etc/shadow"):
    if os.path.exists(path): found.append(path)
for address in (("1.1.1.1", 53), ("10.0.0.1", 80)):
    try: socket.create_connection(address, 1); found.append(address)
    except OSError: pass
if len([name for name in os.listdir("/proc") if name.isdigit()]) > 4: found.append("processes")
try: import numpy; found.append("packages")
except ImportError: pass
try: open("/usr/x", "w"); found.append("/usr")
except OSError: pass
open("out", "w").write(ask("q") + repr(found))
"""
    agent = program(code, place="bubblewrap", answer="file", answer_file="out")
    episode = play(agent, tmp_path, task=Task.from_prompt("t", "Go.", label="It is Ashford.[]"))
    assert episode.reward == 1.0, episode.messages


@pytest.mark.parametrize(
    ("code", "outcome", "says"),
    [
        ("raise SystemExit(0)", Outcome.COMPLETED, ""),
        ("import no_such_module", Outcome.FAILED, "ended with 1 before it had asked the policy anything"),
        ("import os; os.kill(os.getpid(), 9)", Outcome.FAILED, "ended with 137 before"),
    ],
)
def test_a_program_that_never_asks_is_an_episode_and_one_that_crashes_before_is_not(
    code: str, outcome: Outcome, says: str, tmp_path: Path
) -> None:
    episode = play(program(code, place="host"), tmp_path)
    assert (episode.outcome, episode.reward) == (outcome, 0.0 if outcome is Outcome.COMPLETED else None)
    assert says in (episode.error or "")


def test_a_program_that_is_not_there_is_told(place: str, tmp_path: Path) -> None:
    episode = play(load_agent(TARGET, {"command": ["no-such-program"], "place": place}), tmp_path)
    assert episode.outcome is Outcome.FAILED
    assert "no-such-program could not be started before it had asked" in str(episode.error)


def alive(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                if mark in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(entry.name)
            except OSError:
                pass
    return found


SPREADS = """{ask}
import subprocess, sys, time, signal
signal.signal(signal.SIGTERM, lambda *_: (open("asked_to_end", "w").write("Ashford"), sys.exit(0)))
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)  # {mark}"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
ask("q")
{then}
"""


@pytest.mark.parametrize(("then", "options"), [
    ("time.sleep(60)", {"timeout_s": 1.5}),
    ("while True: print('y' * 1000)", {"max_written_mb": 1}),
    ("sys.exit(0)", {}),
])  # fmt: skip
def test_nothing_outlives_an_episode(place: str, then: str, options: dict[str, Any], tmp_path: Path) -> None:
    mark = f"mark-{tmp_path.name}-{place}"
    by_file = {"answer": "file", "answer_file": "asked_to_end"} if options else {}
    code = SPREADS.format(ask=ASK, mark=mark, then=then)
    episode = play(program(code, place=place, **options, **by_file), tmp_path)
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 1.0)
    assert episode.metrics["program_ended"] == float(not options)
    assert alive(mark) == []


def test_an_episode_that_is_over_ends_its_program(place: str, tmp_path: Path) -> None:
    mark = f"mark-{tmp_path.name}-{place}"
    code = SPREADS.format(ask=ASK, mark=mark, then="time.sleep(60)")
    episode = play(program(code, place=place), tmp_path, timeout_s=2.0)
    assert (episode.outcome, episode.stop_reason) == (Outcome.TRUNCATED, "timeout_s")
    assert alive(mark) == []
    assert list(Path("/tmp").glob("polyturn-program-*")) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"command": "my agent"}, "command must be a list"),
        (
            {"command": ["a"], "place": "moon"},
            "place must be one of auto, environment, docker, bubblewrap, host",
        ),
        (
            {"command": ["a"], "variables": {"KEY": "secret"}},
            "variables.KEY must be one of anthropic_base_url",
        ),
        ({"command": ["a"], "files": {"a": "/no/such"}}, "/no/such: there is no such file"),
        ({"command": ["a"], "timeout_s": 0}, "timeout_s must be above 0"),
        ({"command": ["a"], "comand": 1}, "has no option 'comand'; did you mean 'command'?"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_agent(TARGET, options)


def test_a_program_plays_in_the_container_of_its_task(docker_host: str, tmp_path: Path) -> None:
    """In bash alone: the image has no Python and no client. The policy says what to do, the tests grade it."""
    import docker

    from polyturn.envs.harbor.env import HarborEnv
    from tests.support.task_images import import_base

    client = docker.DockerClient(base_url=docker_host)
    import_base(client)
    client.close()
    script = tmp_path / "agent.sh"
    script.write_text(
        """
host=${OPENAI_BASE_URL#http://}; path=/${host#*/}; host=${host%%/*}
body='{"model": "m", "messages": [{"role": "user", "content": "'"$(cat "$1" | tr -d '\\n')"'"}]}'
exec 3<>"/dev/tcp/${host%:*}/${host#*:}"
printf 'POST %s/chat/completions HTTP/1.0\\r\\nAuthorization: Bearer %s\\r\\nContent-Type: application/json\\r\\n' \
    "$path" "$OPENAI_API_KEY" >&3
printf 'Content-Length: %d\\r\\n\\r\\n%s' "${#body}" "$body" >&3
answer=$(cat <&3)
case "$answer" in *"Ashford"*) echo Ashford > /answer ;; esac
echo "$answer" | head -1
setsid sleep 600 &
exit 5
"""
    )
    # Pays for what the program did, once what it left running has ended.
    test = '#!/bin/bash\n[ "$(cat /answer)" = Ashford ] && ! grep -qs sleep.600 /proc/[0-9]*/cmdline\n'
    test += "echo $((1 - $?)) > /logs/verifier/reward.txt\n"
    env = HarborEnv(
        path=write_task(tmp_path / "task", test=test), docker_host=docker_host, build_network="none"
    )
    try:
        agent = load_agent(
            TARGET,
            {
                "command": ["bash", "/agent.sh", "{instruction_file}"],
                "files": {"/agent.sh": str(script)},
                "grace_s": 0.5,
            },
        )
        task = env.tasks("train")[0]
        episode = play(agent, tmp_path, env=env, task=task)
        assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 1.0), episode.error
        assert episode.metrics["exit_code"] == 5.0
        assert episode.messages[0]["content"] == "Do it."
        script.write_text("setsid sleep 600 & trap '' TERM; sleep 601; sleep 602")
        episode = play(agent, tmp_path, env=env, task=task, timeout_s=2.5)
        assert (episode.outcome, episode.stop_reason) == (Outcome.TRUNCATED, "timeout_s")
        left = env.agent_container().container.run(["grep", "-as", "sleep", "/proc/1/cmdline"], timeout_s=5)
        assert "sleep 3600" in left.output  # process 1
        left = env.agent_container().container.run(
            ["sh", "-c", "grep -las 'sleep.60[012]' /proc/[0-9]*/cmdline"], timeout_s=5
        )
        assert left.output == ""
    finally:
        env.close()


def test_a_program_plays_in_a_container_of_its_own(docker_host: str, tmp_path: Path) -> None:
    code = f"""{ASK}
import socket
reached = []
for address in (("1.1.1.1", 53),):
    try: socket.create_connection(address, 1); reached.append(address)
    except OSError: pass
reached += [path for path in ({str(tmp_path)!r}, "/run/session.sock", "/var/run/docker.sock") if os.path.exists(path)]
open("out", "w").write(ask("q") + repr(reached))
"""
    agent = program(code, place="docker", docker_host=docker_host, answer="file", answer_file="out")
    try:
        episode = play(agent, tmp_path, task=Task.from_prompt("t", "Go.", label="It is Ashford.[]"))
        assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 1.0), (
            episode.error,
            episode.messages,
        )
        left = agent._containers.client.containers.list(
            all=True, filters={"label": f"polyturn.sandbox={agent._containers._id}"}
        )
        assert left == []
    finally:
        if agent._containers is not None:
            agent._containers.close()
