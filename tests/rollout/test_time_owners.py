"""Only what the policy takes truncates its episode; whatever it waits for fails, and what never returns is counted."""

import asyncio
import contextlib
import threading

import gymnasium
import pytest

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import Outcome
from polyturn.agents.policies.openai import OpenAIPolicy
from polyturn.configs.schema.endpoint import ChatEndpoint
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.rewards.rubric import Criterion
from polyturn.envs.tool_env import ToolEnv
from polyturn.envs.wrappers import WrappedEnv
from polyturn.rollout.collection import play_groups
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer, RolloutError
from polyturn.tools.chat.client import ChatClient
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall
from tests.support.play import message_play

LONG_S = 30.0
"""Far beyond every limit here."""


@pytest.fixture
def release():
    """Lets whatever hangs in a thread go at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


class Odd(ToolEnv):
    """Hangs or dawdles where it is told to. A task's label says in which of its hooks."""

    def __init__(self, release, *, where="", seconds=LONG_S):
        super().__init__()
        self.release, self.where, self.seconds = release, where, seconds
        self.notes = []

    def hang(self, where):
        if where in (self.where, self.task.label):
            self.release.wait(self.seconds)

    def begin(self, task):
        self.hang("begin")
        self.notes.clear()
        return task.messages

    def follow_up(self, message):
        self.hang("follow_up")
        return ()

    def grade(self, message):
        self.hang("grade")
        return {"correct": 1.0}

    @tool
    def note(self) -> str:
        """Take a note."""
        self.hang("tool")
        self.notes.append(self.task.task_id)
        return ",".join(self.notes)


class Answers:
    """Calls the tool, if it is to, and answers; each request takes `seconds`."""

    def __init__(self, *, calls=0, seconds=0.0):
        self.calls, self.seconds = calls, seconds

    async def reply(self, *, messages, tools):
        await asyncio.sleep(self.seconds)
        num_made = sum(message["role"] == "tool" for message in messages)
        if num_made < self.calls:
            return AssistantMessage(tool_calls=(ToolCall(id=str(num_made), name="note"),))
        return AssistantMessage(content=messages[-1]["content"])


async def attempts_of(
    make_env, policy, *, labels=("",) * 4, samples=1, limits=None, group_rewards=(), **episode_limits
):
    """All attempts of one collection, and its groups."""
    tasks = ListTasks([Task.from_prompt(f"t{i}", f"q{i}", label=label) for i, label in enumerate(labels)])
    attempts = []
    player = EpisodePlayer(
        make_env=make_env,
        tasks=tasks,
        play=message_play(limits=EpisodeLimits(**episode_limits)),
        limits=limits or RolloutLimits(max_retries=0),
        seed=0,
        group_rewards=group_rewards,
    )
    try:
        groups = await play_groups(
            player,
            PromptCursor(len(tasks), seed=0).take(len(tasks)),
            samples_per_prompt=samples,
            policy=policy,
            on_episode=attempts.append,
        )
    finally:
        player.close()
    return attempts, groups


async def test_waiting_for_a_request_slot_is_nobodys_time(release):
    limits = RolloutLimits(max_concurrent_requests=1, max_retries=0)
    attempts, _ = await attempts_of(
        lambda: Odd(release), Answers(seconds=0.1), labels=[""] * 24, limits=limits, timeout_s=1.5
    )
    assert [episode.reward for episode in attempts] == [1.0] * 24
    assert max(episode.timings.queue_s for episode in attempts) > 1.5


async def test_a_cancellation_that_leaks_from_a_client_ends_its_own_episode_and_no_other(release):
    """As from a time-out scope of somebody's library: nobody cancelled the episode."""

    class Leaks(Answers):
        async def reply(self, *, messages, tools):
            if messages[0]["content"] == "q1":
                raise asyncio.CancelledError
            return await super().reply(messages=messages, tools=tools)

    attempts, groups = await attempts_of(lambda: Odd(release), Leaks())
    by_task = {episode.task_id: episode for episode in attempts}
    assert by_task["t1"].error.startswith("CancelledError")
    assert [by_task[f"t{i}"].reward for i in range(4)] == [1.0, None, 1.0, 1.0]
    assert sum(group.num_dropped for group in groups) == 1


async def test_waiting_for_a_slot_has_a_deadline_of_its_own(release):
    limits = RolloutLimits(max_concurrent_requests=1, max_retries=0, queue_timeout_s=0.15)
    attempts, _ = await attempts_of(lambda: Odd(release), Answers(seconds=0.1), limits=limits)
    outcomes = [episode.outcome for episode in attempts]
    assert set(outcomes) == {Outcome.COMPLETED, Outcome.FAILED}
    late = next(episode for episode in attempts if episode.outcome is Outcome.FAILED)
    assert late.error.startswith("no slot for a generation request became free within 0.15 s")


async def test_an_engine_that_accepts_and_never_answers_fails_its_episodes(release):
    """With the same deadline for the request as for the episode."""
    server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(LONG_S), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    endpoint = ChatEndpoint(url=f"http://127.0.0.1:{port}/v1", model="m", timeout_s=0.3)
    async with contextlib.aclosing(ChatClient(endpoint)) as client:
        with pytest.raises(RolloutError, match="4 policy_fault"):
            await attempts_of(lambda: Odd(release), OpenAIPolicy(client), timeout_s=0.3)
    server.close()


async def test_a_policy_without_a_deadline_of_its_own_gets_one(release):
    with pytest.raises(RolloutError, match=r"no answer within 0\.2 s"):
        await attempts_of(lambda: Odd(release), Answers(seconds=LONG_S), timeout_s=0.2)


@pytest.mark.parametrize("where", ["begin", "follow_up", "grade"])
async def test_a_hook_that_hangs_fails_its_own_episode_and_no_other(release, where):
    labels = [where, "", "", where, "", "", "", ""]
    limits = RolloutLimits(max_concurrent_tools=2, max_retries=0)
    attempts, _ = await attempts_of(
        lambda: Odd(release), Answers(), labels=labels, limits=limits, timeout_s=60, hook_timeout_s=1.0
    )
    by_task = {episode.task_id: episode for episode in attempts}
    assert [by_task[f"t{i}"].reward for i in range(8)] == [None if label else 1.0 for label in labels]
    assert f"Odd: {where} did not end within 1 s" in by_task["t0"].error


async def test_an_asynchronous_judge_that_hangs_is_a_failure(release):
    class Judged(Odd):
        async def grade(self, message):
            try:
                await asyncio.sleep(LONG_S)
            except asyncio.CancelledError:
                return {"correct": 0.0}  # holds on to its cancellation, as careless code does

    with pytest.raises(RolloutError, match=r"grade did not end within 0\.2 s"):
        await attempts_of(lambda: Judged(release), Answers(), timeout_s=60, hook_timeout_s=0.2)


async def test_a_judge_that_never_lets_go_is_a_stall_with_the_name_of_its_episode(release, monkeypatch):
    monkeypatch.setattr("polyturn.rollout.collection.CANCEL_S", 0.1)

    class Clings(Odd):
        async def grade(self, message):
            while not self.release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.05)
            return {"correct": 0.0}

    limits = RolloutLimits(max_retries=0, stall_timeout_s=0.5)
    with pytest.raises(
        RolloutError, match=r"no episode ended for 0\.5 s, 1 are .*, the first of them g\d+\.0\.0"
    ):
        await attempts_of(
            lambda: Clings(release), Answers(), labels=[""], limits=limits, timeout_s=60, hook_timeout_s=0.1
        )
    release.set()


async def test_making_an_environment_reading_a_task_and_group_rewards_have_deadlines(release):
    def make_env():
        release.wait(LONG_S)

    limits = RolloutLimits(max_retries=0, environment_timeout_s=0.3)
    with pytest.raises(RolloutError, match=r"making an environment did not end within 0\.3 s"):
        await attempts_of(make_env, Answers(), limits=limits)

    def judge(episodes):
        release.wait(LONG_S)

    part = Criterion(name="judge", weight=1.0, reward=judge)
    with pytest.raises(RolloutError, match=r"group reward 'judge' did not end within 0\.3 s"):
        await attempts_of(lambda: Odd(release), Answers(), limits=limits, group_rewards=[part])


async def test_time_that_the_policy_took_is_an_outcome_that_trains(release):
    """Its tools and its generation add up; a grade that is as slow does not."""
    dawdling = {"where": "tool", "seconds": 0.15}
    attempts, _ = await attempts_of(
        lambda: Odd(release, **dawdling), Answers(calls=4), timeout_s=0.4, hook_timeout_s=60, max_turns=8
    )
    assert {(episode.outcome, episode.stop_reason, episode.reward) for episode in attempts} == {
        (Outcome.TRUNCATED, "timeout_s", 0.0)
    }
    assert all(episode.num_turns for episode in attempts)
    attempts, _ = await attempts_of(lambda: Odd(release), Answers(calls=2, seconds=0.15), timeout_s=0.4)
    assert {episode.stop_reason for episode in attempts} == {"timeout_s"}
    attempts, _ = await attempts_of(
        lambda: Odd(release, where="grade", seconds=1.5), Answers(calls=1), timeout_s=1.2, hook_timeout_s=60
    )
    assert [episode.reward for episode in attempts] == [1.0] * 4


async def test_a_tool_that_never_returns_costs_its_own_episode_and_no_thread_of_another(release):
    """Step after step: no silent zeros, and never an episode without a turn."""
    labels = ["tool", *[""] * 7]
    limits = RolloutLimits(max_concurrent_tools=2, max_concurrent_episodes=8, max_retries=0)
    for _ in range(3):
        attempts, _ = await attempts_of(
            lambda: Odd(release),
            Answers(calls=1),
            labels=labels,
            limits=limits,
            timeout_s=0.3,
            hook_timeout_s=60,
        )
        by_task = {episode.task_id: episode for episode in attempts}
        assert (by_task["t0"].outcome, by_task["t0"].stop_reason) == (Outcome.TRUNCATED, "timeout_s")
        assert [by_task[f"t{i}"].reward for i in range(1, 8)] == [1.0] * 7
        assert all(episode.num_turns for episode in attempts)


async def test_too_many_threads_that_never_return_end_the_run_with_their_name(release):
    limits = RolloutLimits(max_retries=0, max_lost_threads=2)
    with pytest.raises(
        RolloutError, match=r"3 calls never returned .*max_lost_threads=2; 3 of them are: tool 'note' of Odd"
    ):
        await attempts_of(
            lambda: Odd(release, where="tool"),
            Answers(calls=1),
            labels=[""] * 8,
            limits=limits,
            timeout_s=0.1,
        )
    with pytest.raises(RolloutError, match="3 of them are: grade of Odd"):
        await attempts_of(
            lambda: Odd(release, where="grade"), Answers(), labels=[""] * 8, limits=limits, timeout_s=0.1
        )


async def test_a_close_that_never_returns_is_counted_too_and_holds_up_no_end(release, monkeypatch):
    monkeypatch.setattr("polyturn.rollout.environment_pool.CLOSE_S", 0.05)

    class Stays(Odd):
        def grade(self, message):
            raise OSError("gone")

        def close(self):
            self.release.wait(LONG_S)

    limits = RolloutLimits(
        max_retries=0, max_lost_threads=2, max_concurrent_episodes=1, max_failure_share=1.0
    )
    with pytest.raises(RolloutError, match="3 of them are: close of Stays"):
        await attempts_of(
            lambda: Stays(release), Answers(seconds=0.1), labels=[""] * 8, limits=limits, timeout_s=60
        )


async def test_what_returns_late_is_not_counted(release):
    limits = RolloutLimits(
        max_retries=0, max_lost_threads=2, max_concurrent_episodes=1, max_failure_share=1.0
    )
    attempts, _ = await attempts_of(
        lambda: Odd(release, where="tool", seconds=0.15),
        Answers(calls=1),
        labels=[""] * 8,
        limits=limits,
        timeout_s=0.1,
    )
    assert len(attempts) == 8


@pytest.mark.parametrize("wrapped", [False, True])
async def test_an_environment_is_not_used_again_while_something_of_it_runs(release, wrapped):
    """The tool of the first episode writes its note whenever it likes; no other episode finds it."""
    made = []

    def make_env():
        made.append(Odd(release, seconds=4.0))
        env = made[-1]
        return WrappedEnv(gymnasium.wrappers.TimeLimit(env, 100)) if wrapped else env

    limits = RolloutLimits(max_concurrent_episodes=1, max_retries=0)
    attempts, _ = await attempts_of(
        make_env,
        Answers(calls=1),
        labels=["tool", "", "", ""],
        limits=limits,
        timeout_s=0.2,
        hook_timeout_s=60,
    )
    notes = {episode.task_id: episode.messages[-1]["content"] for episode in attempts[1:]}
    late = next(i for i, episode in enumerate(attempts) if episode.outcome is Outcome.TRUNCATED)
    assert len(made) == (2 if late < 3 else 1)
    assert all(note == task_id for task_id, note in notes.items() if task_id != "t0")


async def test_no_thread_and_no_environment_is_left_behind(release):
    before = threading.active_count()
    for _ in range(3):
        await attempts_of(lambda: Odd(release), Answers(calls=1), labels=[""] * 8)
    for _ in range(100):
        if threading.active_count() <= before:
            break
        await asyncio.sleep(0.05)
    assert threading.active_count() <= before


def test_a_process_ends_although_a_call_never_does(tmp_path):
    import subprocess
    import sys

    script = tmp_path / "hangs.py"
    script.write_text(
        "import threading\nfrom polyturn.tools.threads import GivenUp, PinnedThread\n"
        "try:\n    PinnedThread().call(threading.Event().wait, timeout_s=0.05)\n"
        "except GivenUp:\n    print('given up')\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("given up\n", 0)


async def test_a_huge_result_is_shortened_before_anything_is_made_of_it(release):
    class Flood(Odd):
        @tool
        def note(self) -> str:
            """Flood."""
            return "x" * 5_000_000

        @tool(max_output_chars=50_000)
        def chosen(self) -> str:
            """As long as its author likes."""
            return "y" * 100_000

    attempts, _ = await attempts_of(lambda: Flood(release), Answers(calls=1))
    texts = [episode.messages[2]["content"] for episode in attempts]
    assert all(len(text) < 33_000 for text in texts)
    assert all("[truncated: 32,768 of 5,000,000 characters shown]" in text for text in texts)
    attempts, _ = await attempts_of(lambda: Flood(release), Answers(calls=1), max_tool_result_chars=100)
    assert all(len(episode.messages[2]["content"]) < 200 for episode in attempts)
    env = Flood(release)
    env.reset(options={"task": Task.from_prompt("t", "q")})
    observation, *_ = env.step(AssistantMessage(tool_calls=(ToolCall(id="c", name="chosen"),)))
    assert 50_000 < len(observation[0]["content"]) < 51_000


async def test_tool_calls_are_capped_by_turn_and_by_episode_and_the_model_is_told(release):
    class ManyCalls:
        async def reply(self, *, messages, tools):
            if sum(message["role"] == "assistant" for message in messages) == 3:
                return AssistantMessage(content="done")
            calls = tuple(ToolCall(id=str(i), name="note") for i in range(300))
            return AssistantMessage(tool_calls=calls)

    (episode, *_), _ = await attempts_of(
        lambda: Odd(release), ManyCalls(), max_tool_calls_per_turn=5, max_tool_calls_per_episode=8
    )
    results = [message["content"] for message in episode.messages if message["role"] == "tool"]
    assert len(results) == 900, "every call is answered"
    turns = [results[start : start + 300] for start in (0, 300, 600)]
    made = [[text for text in turn if not text.startswith("This call was not made")] for turn in turns]
    assert [len(turn) for turn in made] == [5, 3, 0]
    assert turns[0][5] == "This call was not made: no more than 5 can be made in this turn."
    assert turns[2][0] == "This call was not made: the tool calls of this episode are used up."
    assert (episode.outcome, episode.num_tool_calls) == (Outcome.COMPLETED, 900)
    (insists, *_), _ = await attempts_of(
        lambda: Odd(release), Answers(calls=9), max_turns=9, max_tool_calls_per_episode=2
    )
    assert (insists.outcome, insists.stop_reason) == (Outcome.TRUNCATED, "max_tool_calls_per_episode")
    assert (insists.num_tool_calls, insists.num_turns, insists.messages[-1]["role"]) == (4, 4, "assistant")
    assert (
        insists.messages[-2]["content"]
        == "This call was not made: the tool calls of this episode are used up."
    )
    unlimited, _ = await attempts_of(
        lambda: Odd(release), ManyCalls(), max_tool_calls_per_turn=None, max_tool_calls_per_episode=None
    )
    assert not any("not made" in message["content"] for message in unlimited[0].messages)
