"""Tasks played in containers of their own: what the agent can and cannot do, and what its work is worth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("docker", reason="the docker SDK is missing: pip install polyturn[sandbox]")

from polyturn.envs.conformance.subject import Trace, play
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.harbor.env import HarborEnv
from polyturn.envs.harbor.task_directory import SHIPPED, read_task
from polyturn.envs.harbor.trial import TrialOptions
from polyturn.envs.messages import AssistantMessage, Script
from polyturn.rollout.evaluation.directory import read_evaluation
from polyturn.tools.sandbox.container import ContainerLimits, container_options
from polyturn.tools.types import ToolCall
from tests.envs.harbor.conftest import MakeEnv
from tests.support.command_line import in_this_process
from tests.support.harbor_tasks import write_task


def calling(*commands: str, **arguments: Any) -> Script:
    """Runs commands one after the other, and answers."""
    left = list(commands)

    def act(messages: Any, tools: Any) -> AssistantMessage:
        del messages, tools
        if not left:
            return AssistantMessage(content="Done.")
        call = ToolCall(id="call_0", name="bash", arguments={"command": left.pop(0), **arguments})
        return AssistantMessage(tool_calls=(call,))

    return act


def said(trace: Trace) -> list[str]:
    return [turn.observation[0]["content"] for turn in trace.turns if turn.observation]


@pytest.mark.parametrize("task", ["train/count-levels", "train/repair-total", "heldout/merge-settings"])
def test_the_solution_of_a_shipped_task_earns_everything_and_nothing_earns_nothing(
    make_env: MakeEnv, task: str
) -> None:
    env = make_env(SHIPPED / task)
    solved = play(env, env.oracle, seed=0)
    assert (solved.reward, solved.reward_parts) == (1.0, {"tests": 1.0})
    assert play(env, calling(), seed=0).reward == 0.0


def test_the_suite_is_played_over_a_directory_of_tasks(
    docker_host: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped ones, where the suite looks for tasks, by their oracle; and the proof of the suite by one of them."""
    monkeypatch.chdir(tmp_path)
    for task in ("train/count-levels", "train/repair-total", "heldout/merge-settings"):
        shutil.copytree(SHIPPED / task, Path("my data/harbor") / Path(task).name)
    options = (
        "data=my data",
        f"environment.options.docker_host={docker_host}",
        "environment.options.build_network=none",
    )
    done = in_this_process("eval", "run", "harbor", "--policy", "oracle", "--directory", "E", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["mean"], result["num_tasks"], result["num_left"]) == (1.0, 3, 0)
    [entry] = read_evaluation(Path("E")).entries
    assert all(line.num_tool_calls >= 1 for line in entry.episodes)
    proved = in_this_process("eval", "validate", "harbor", "--tasks", "1", *options)
    assert proved.returncode == 0, proved.stdout + proved.stderr
    [found] = json.loads(proved.stdout.splitlines()[-1])["entries"]
    assert found["scores"]["oracle"] == 1.0 and found["scores"]["nothing"] == 0.0


def test_what_is_graded_is_out_of_the_agents_sight_and_reach(make_env: MakeEnv, tmp_path: Path) -> None:
    dockerfile = (
        "FROM debian:12-slim\nWORKDIR /app\nRUN mkdir -p .git /tests /solution && echo fix > .git/HEAD && "
        "echo old > /tests/data && echo secret > /solution/solve.sh\nCOPY . /app\n"
    )
    # Pays if the history is back, the image's tests are, nobody's files are among them, and nothing else runs.
    test = (
        '#!/bin/bash\nreward=0\n[ "$(cat /app/.git/HEAD)" = fix ] && [ "$(cat /tests/data)" = old ] && '
        "[ ! -e /tests/conftest.py ] && [ ! -e /logs/verifier/planted ] && [ -f /app/work ] && "
        "! grep -qs forge /proc/[0-9]*/cmdline && reward=1\nsleep 0.3\necho $reward > /logs/verifier/reward.txt\n"
        "sleep 0.3\n"
    )
    task = write_task(tmp_path / "task", test=test, dockerfile=dockerfile)
    (task / "environment" / ".git").mkdir()
    (task / "environment" / ".git" / "config").write_text("of the task's author")
    env = make_env(task)
    forging = (
        "while :; do echo 7 > /logs/verifier/reward.txt; mkdir -p /tests; echo 1 > /tests/conftest.py; done"
    )
    trace = play(
        env,
        calling(
            "ls -d /app/.git /tests /solution /oracle; cat /proc/1/mounts | grep -c docker.sock",
            "touch work /logs/verifier/planted; echo '" + forging + "' > /forge.sh; setsid bash /forge.sh &",
            "until [ -s /tests/conftest.py ]; do sleep 0.05; done; echo it runs",
            "(echo > /dev/tcp/1.1.1.1/53) 2>&1 | grep -q unreachable && echo unreachable",
        ),
        seed=0,
    )
    assert said(trace)[0].count("No such file") == 4
    assert "0" in said(trace)[0].splitlines()
    assert said(trace)[2:] == ["it runs", "unreachable"]
    assert trace.reward == 1.0


@pytest.mark.parametrize(
    ("test", "options", "says"),
    [
        ("#!/bin/bash\necho no tests here\n", {}, "no reward file .exit code 0; it printed: no tests here"),
        ("#!/bin/bash\nsleep 60\n", {"verifier_timeout_s": 0.3}, "did not end by themselves .timeout"),
    ],
)
def test_a_verifier_that_fails_is_no_reward(
    make_env: MakeEnv, tmp_path: Path, test: str, options: dict[str, Any], says: str
) -> None:
    env = make_env(write_task(tmp_path / "task", test=test), **options)
    with pytest.raises(EnvironmentFault, match=says):
        play(env, calling("true") if options else calling(), seed=0)


def test_an_image_that_cannot_be_built_is_no_reward(make_env: MakeEnv, tmp_path: Path) -> None:
    env = make_env(write_task(tmp_path / "task", dockerfile="FROM debian:12-slim\nRUN no-such-program\n"))
    with pytest.raises(EnvironmentFault, match=r"cannot be built: .*no-such-program"):
        env.reset(seed=0)
    absent = write_task(tmp_path / "absent")
    (absent / "task.toml").write_text("[environment]\ndocker_image = 'nobody/has:this'\n")
    with pytest.raises(EnvironmentFault, match="the daemon has no image nobody/has:this"):
        make_env(absent, images="local").reset(seed=0)


def test_a_daemon_that_is_gone_is_no_reward(make_env: MakeEnv, tmp_path: Path) -> None:
    env = make_env(write_task(tmp_path / "task"))
    env.reset(seed=0)
    env.agent_container()
    adapter = env._containers.client.api._custom_adapter
    path, adapter.socket_path = adapter.socket_path, "/nonexistent"
    adapter.pools.clear()
    with pytest.raises(EnvironmentFault, match="ContainerFailed"):
        env.step(AssistantMessage(content="Done."))
    adapter.socket_path = path
    adapter.pools.clear()
    env.reset(seed=0)
    env.agent_container().container.handle.remove(force=True)  # by somebody else
    with pytest.raises(EnvironmentFault, match="No such container"):
        env.step(AssistantMessage(content="Done."))


@pytest.mark.parametrize("breaking", ["rm -rf /usr/bin /bin", "printf '#!/bin/sh\\nexit 3\\n' > /bin/bash"])
def test_an_agent_that_breaks_the_verifier_earns_nothing(
    make_env: MakeEnv, tmp_path: Path, breaking: str
) -> None:
    trace = play(make_env(write_task(tmp_path / "task")), calling(breaking), seed=0)
    assert trace.reward == 0.0
    assert trace.turns[-1].info["metrics"]["verifier_broken_by_agent"] == 1.0


def test_a_call_ends_and_says_how(make_env: MakeEnv, tmp_path: Path) -> None:
    env = make_env(
        write_task(tmp_path / "task", environment="storage_mb = 8"),
        max_output_chars=400,
        command_timeout_s=20,
    )
    trace = play(
        env,
        calling(
            "kill -9 -1",
            "echo out; echo err >&2; exit 3",
            "sleep 30 & echo started",
            "seq 100000",
            "trap '' TERM; head -c 20000000 /dev/zero > /big; sleep 30",
            "rm /big; tail -c +1 /proc/self/status | grep -E 'NoNewPrivs|CapEff'",
        ),
        seed=0,
    )
    _, first, background, long, full, rights = said(trace)
    assert sorted(first.splitlines()) == ["[exit code 3]", "err", "out"]
    assert background == "started"
    assert (
        len(long) < 500
        and long.startswith("1\n2\n")
        and long.endswith("99999\n100000")
        and "left out" in long
    )
    assert full == "[It was ended, because the machine's disk is full: remove what is not needed.]"
    assert rights.split() == ["CapEff:", "00000000000004fb", "NoNewPrivs:", "1"]
    assert trace.reward == 1.0


def test_time_and_memory_have_limits(make_env: MakeEnv, tmp_path: Path, client: Any) -> None:
    task = write_task(
        tmp_path / "task", toml="[agent]\ntimeout_sec = 3\n", environment="cpus = 0.5\nmemory_mb = 64"
    )
    env = make_env(task)
    created: list[dict[str, Any]] = []

    def act(messages: Any, tools: Any) -> AssistantMessage:
        created.append(env.agent_container().container.handle.attrs["HostConfig"])
        return calling("sleep 30")(messages, tools)

    trace = play(env, act, seed=0)
    (limits,) = created
    assert (limits["NanoCpus"], limits["Memory"], limits["MemorySwap"]) == (500_000_000, 64 << 20, 64 << 20)
    assert (limits["NetworkMode"], limits["PidsLimit"], limits["Privileged"]) == ("none", 512, False)
    assert limits["Binds"] is None
    assert said(trace) == ["[It was ended after 3 s.]\n[The time for this task is used up.]"]
    assert trace.reward == 1.0
    assert trace.turns[-1].info["metrics"]["out_of_time"] == 1.0


def test_a_network_takes_the_tasks_word_and_the_users(tmp_path: Path, docker_host: str) -> None:
    task = write_task(
        tmp_path / "task", environment="network_mode = 'allowlist'\nallowed_hosts = ['pypi.org']"
    )
    HarborEnv(path=task, docker_host=docker_host).close()  # played without any
    with pytest.raises(
        ValueError, match="a list of allowed hosts, or for two that differ, which is not kept"
    ):
        HarborEnv(path=task, docker_host=docker_host, network=True)
    public, off = (
        read_task(write_task(tmp_path / mode, environment=f"network_mode = '{mode}'"))
        for mode in ("public", "no-network")
    )
    allowed = [
        TrialOptions(network=network).has_network(task) for network in (True, False) for task in (public, off)
    ]
    assert allowed == [True, False, False, False]
    options = container_options(ContainerLimits(), network="bridge", environment={}, workdir=None)
    assert (options["network_mode"], options["runtime"]) == ("bridge", "runc")


def test_an_image_is_built_once_for_each_state_of_its_folder(
    make_env: MakeEnv, tmp_path: Path, client: Any
) -> None:
    dockerfile = "FROM debian:12-slim\nCOPY file /file\n"
    task = write_task(tmp_path / "task", dockerfile=dockerfile)
    (task / "environment" / "file").write_text(f"one of {tmp_path}")
    for _ in range(2):
        make_env(task).reset(seed=0)
    ids = {image.id for image in client.images.list("polyturn-task")}
    (task / "environment" / "file").touch()
    make_env(task).reset(seed=0)
    assert {image.id for image in client.images.list("polyturn-task")} == ids
    (task / "environment" / "file").write_text(f"two of {tmp_path}")
    make_env(task).reset(seed=0)
    assert len({image.id for image in client.images.list("polyturn-task")} - ids) == 1


def test_a_health_check_is_waited_for_and_services_may_stay(make_env: MakeEnv, tmp_path: Path) -> None:
    check = "[environment.healthcheck]\ninterval_sec = 0.05\nretries = {}\ncommand = '{}'"
    slow = "echo x >> /checks; [ $(wc -l < /checks) -ge 2 ]"
    test = (
        "#!/bin/bash\ngrep -qs service /proc/[0-9]*/cmdline; echo $((1 - $?)) > /logs/verifier/reward.txt\n"
    )
    task = write_task(tmp_path / "slow", test=test, environment=check.format(3, slow))
    start = "cat /checks; echo 'while :; do sleep 1; done' > /service.sh; setsid bash /service.sh &"
    trace = play(make_env(task, keep_processes=True), calling(start), seed=0)
    assert said(trace) == ["x\nx"]
    assert trace.reward == 1.0
    with pytest.raises(EnvironmentFault, match="the health check of task 'never' fails"):
        play(
            make_env(write_task(tmp_path / "never", environment=check.format(1, "false"))),
            calling("ls"),
            seed=0,
        )


def test_a_verifier_of_its_own_is_given_what_was_left_and_nothing_else(
    make_env: MakeEnv, tmp_path: Path
) -> None:
    test = "#!/bin/bash\n[ -e /app/else ] || grep -qx right /app/out/answer && echo 1 > /logs/verifier/reward.txt"
    toml = "artifacts = ['/app/out']\n[verifier]\nenvironment_mode = 'separate'\n"
    task = write_task(tmp_path / "task", test=f"{test} || echo 0 > /logs/verifier/reward.txt\n", toml=toml)
    (task / "tests" / "Dockerfile").write_text(
        "FROM debian:12-slim\nCOPY . /tests/\nRUN echo right > /right\n"
    )
    (task / "tests" / "test.sh").chmod(0o644)
    env = make_env(task)
    for command, reward in (
        ("mkdir -p /app/out; echo right > /app/out/answer; touch /app/else", 1.0),
        ("mkdir -p /app/out; ln -s /right /app/out/answer", 0.0),
        ("ls /tests /right; echo 1 > /logs/verifier/reward.txt", 0.0),
    ):
        trace = play(env, calling(command), seed=0)
        assert trace.reward == reward, (command, said(trace))
    assert "No such file" in said(trace)[0]


def test_terminal_benchs_older_form_is_played(make_env: MakeEnv, tmp_path: Path) -> None:
    task = tmp_path / "old"
    (task / "tests").mkdir(parents=True)
    (task / "tests" / "check.sh").write_text("[ -f /app/done ] && echo 'PASSED a::b' || echo 'FAILED a::b'\n")
    (task / "task.yaml").write_text("instruction: Do it.\n")
    (task / "Dockerfile").write_text("FROM debian:12-slim\nWORKDIR /app\nCOPY . /seen\n")
    (task / "run-tests.sh").write_text("echo '== short test summary info =='; sh $TEST_DIR/check.sh\n")
    (task / "solution.sh").write_text("touch done\n")
    env = make_env(task)
    assert play(env, env.oracle, seed=0).reward == 1.0
    trace = play(env, calling("ls -A /seen"), seed=0)
    assert (trace.reward, said(trace)) == (0.0, ["Dockerfile"])


def test_without_docker_one_sentence_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no-daemon.sock.*apt-get install docker.io") as raised:
        HarborEnv(docker_host="unix:///tmp/no-daemon.sock")
    assert "\n" not in str(raised.value)
