"""ToolEnv is a Gymnasium environment: checked by Gymnasium's own checker, seeded, and honest about failures."""

import asyncio
import random
import sqlite3
import threading
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import polyturn.envs  # noqa: F401  registers the built-in environments
from polyturn.agents.dialects import HermesDialect
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.registry import list_environments, make, register
from polyturn.envs.rewards import exact_match
from polyturn.envs.spaces import ChatSpace, ReplySpace
from polyturn.envs.tool_env import ToolEnv
from polyturn.envs.wrappers import RawTextAction, WrappedEnv
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall, ToolError


class Guess(ToolEnv):
    """Find a number that the seed draws."""

    def begin(self, task):
        self.number = int(self.np_random.integers(1, 100))
        return [*task.messages, {"role": "user", "content": "Use the tool."}]

    @tool
    def compare(self, x: int) -> str:
        """Compare a number with the hidden one."""
        if not 1 <= x < 100:
            raise ToolError("x must lie between 1 and 99")
        self.metrics["comparisons"] = self.metrics.get("comparisons", 0.0) + 1.0
        return "low" if x < self.number else "high" if x > self.number else "equal"

    def grade(self, message):
        return {
            "correct": exact_match(message.content, str(self.number)),
            "brief": 0.5 * (len(message.content) < 3),
        }

    def tasks(self, split):
        if split != "train":
            raise ValueError(f"no split {split!r}")
        return ListTasks([Task.from_prompt(f"g{i}", f"Game {i}: find my number, 1 to 99.") for i in range(5)])


class Failing(Guess):
    """The same with a tool whose backend is gone."""

    @tool
    def fail(self) -> str:
        """Fail."""
        raise ConnectionError("the backend is gone")


class AsyncGuess(ToolEnv):
    """The same with everything asynchronous."""

    async def begin(self, task):
        await asyncio.sleep(0)
        return task.messages

    @tool
    async def ask(self) -> str:
        """Ask."""
        await asyncio.sleep(0)
        return "42"

    async def grade(self, message):
        await asyncio.sleep(0)
        return {"correct": exact_match(message.content, "42")}

    def tasks(self, split):
        return ListTasks([Task.from_prompt("a", "Ask.")])


register("tests/Guess-v0", Guess, description="A game.")
register("tests/AsyncGuess-v0", AsyncGuess)


def calling(name, **arguments):
    return AssistantMessage(tool_calls=(ToolCall(id="c0", name=name, arguments=arguments),))


@pytest.mark.parametrize("env_id", ["tests/Guess-v0", "tests/AsyncGuess-v0"])
def test_gymnasiums_checker_has_no_complaint_and_no_warning(env_id):
    options = {"max_turns": 4} | ({} if env_id == "tests/AsyncGuess-v0" else {"tools": [tool(_free_tool)]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(env_id, disable_env_checker=True, **options).unwrapped)


def _free_tool(kind: str, count: int | None = None) -> str:
    """A tool from outside the class."""
    return f"{kind} {count}"


def test_gymnasium_makes_it_with_its_passive_checker_and_wrappers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("tests/Guess-v0", max_episode_steps=2)
        observation, _ = env.reset(seed=1)
        assert observation in env.observation_space
        env.step(calling("compare", x=50))
        assert env.step(calling("compare", x=50))[3] is True


def test_an_episode_as_a_player_sees_it():
    env = Guess()
    observation, info = env.reset(seed=3, options={"task": "g2"})
    assert observation[0] == {"role": "user", "content": "Game 2: find my number, 1 to 99."}
    assert info["task_id"] == "g2"
    assert [spec.name for spec in info["tools"]] == ["compare"]
    observation, reward, terminated, truncated, info = env.step(calling("compare", x=env.number))
    assert observation == ({"role": "tool", "tool_call_id": "c0", "name": "compare", "content": "equal"},)
    assert (reward, terminated, truncated, info["reward_parts"]) == (0.0, False, False, {})
    assert info["tool_results"][0].ok
    observation, reward, terminated, truncated, info = env.step(AssistantMessage(content=str(env.number)))
    assert (observation, reward, terminated, truncated) == ((), 1.5, True, False)
    assert info["reward_parts"] == {"correct": 1.0, "brief": 0.5}
    assert info["stop_reason"] == "terminated"
    assert info["metrics"] == {"comparisons": 1.0}
    env.reset(seed=3)
    assert "metrics" not in env.step(AssistantMessage(content="0"))[4]


def test_mistakes_of_the_model_are_observations_one_for_each_call():
    env = Guess()
    env.reset(seed=1)
    calls = (
        ToolCall(id="1", name="compare", arguments={"x": "50"}),
        ToolCall(id="2", name="compair", arguments={"x": 50}),
        ToolCall(id="3", name="", error="The tool call could not be read: not valid JSON."),
        ToolCall(id="4", name="compare", arguments={"x": 1000}),
        ToolCall(id="5", name="compare", arguments={"x": 50}),
    )
    observation, reward, terminated, _, info = env.step(AssistantMessage(tool_calls=calls))
    assert [m["tool_call_id"] for m in observation] == ["1", "2", "3", "4", "5"]
    assert [result.ok for result in info["tool_results"]] == [False, False, False, False, True]
    assert "must be integer" in observation[0]["content"]
    assert "did you mean 'compare'" in observation[1]["content"]
    assert "not valid JSON" in observation[2]["content"]
    assert observation[3]["content"] == "x must lie between 1 and 99"
    assert (reward, terminated) == (0.0, False)


@pytest.mark.catalogue("B43")
def test_infrastructure_that_fails_is_a_fault_and_never_a_reward():
    env = Failing()
    env.reset(seed=1, options={"task": "g1"})
    with pytest.raises(
        EnvironmentFault, match="tool 'fail' failed on task 'g1': ConnectionError: the backend is gone"
    ):
        env.step(calling("fail"))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(AssistantMessage(content="1"))


@pytest.mark.catalogue("B43")
@pytest.mark.parametrize("parts", [{"x": float("nan")}, {"x": "1"}, {"x": None}, 3])
def test_a_grader_that_gives_no_numbers_is_a_fault(parts):
    class Odd(ToolEnv):
        def grade(self, message):
            return parts

    env = Odd(tasks=ListTasks([Task.from_prompt("t", "p")]))
    env.reset(seed=1)
    with pytest.raises(EnvironmentFault, match="grade failed on task 't'"):
        env.step(AssistantMessage(content="x"))


def test_stepping_outside_an_episode_is_refused():
    env = Guess()
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(AssistantMessage(content="1"))
    env.reset(seed=1)
    env.step(AssistantMessage(content="1"))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(AssistantMessage(content="1"))
    env.reset(seed=1)
    with pytest.raises(ValueError, match="an action is an AssistantMessage, not str"):
        env.step("1")


def test_the_environments_own_limit_truncates():
    env = Guess(max_turns=2)
    env.reset(seed=1)
    assert env.step(calling("compare", x=1))[2:4] == (False, False)
    *_, terminated, truncated, info = env.step(calling("compare", x=1))
    assert (terminated, truncated, info["stop_reason"]) == (False, True, "max_turns")
    env.reset(seed=1)
    env.step(calling("compare", x=1))
    assert env.step(AssistantMessage(content="1"))[2:4] == (True, False), "an answer at the last turn counts"


def test_seeds_reproduce_and_global_generators_are_left_alone():
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tobytes()
    env, other = Guess(), Guess()
    first = [(env.reset(seed=s)[1]["task_id"], env.number) for s in range(30)]
    assert first == [(other.reset(seed=s)[1]["task_id"], other.number) for s in range(30)]
    assert len(set(first)) > 20
    assert env.reset()[1]["task_id"] in {f"g{i}" for i in range(5)}
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before


def test_tasks_are_chosen_by_value_by_id_or_by_seed():
    env = Guess()
    own = Task.from_prompt("mine", "Mine.", label="x")
    assert env.reset(options={"task": own})[1]["task_id"] == "mine"
    assert env.task is own
    with pytest.raises(ValueError, match="no task 'g9'"):
        env.reset(options={"task": "g9"})
    with pytest.raises(ValueError, match="no split 'tests'"):
        env.reset(options={"split": "tests"})
    with pytest.raises(ValueError, match="unknown option 'tsak'"):
        env.reset(options={"tsak": own})
    assert Guess(tasks=ListTasks([own])).reset(seed=5)[1]["task_id"] == "mine"
    with pytest.raises(ValueError, match="define `tasks`"):
        ToolEnv().reset(seed=1)


def test_an_observation_belongs_to_whoever_got_it():
    task = Task.from_prompt("t", "Find it.")
    env = Guess()
    observation, _ = env.reset(options={"task": task})
    observation[0]["content"] = "changed"
    assert task.messages[0]["content"] == "Find it."


def test_a_user_may_go_on():
    class Talk(ToolEnv):
        def follow_up(self, message):
            return [] if message.content == "bye" else [{"role": "user", "content": f"{message.content}?"}]

        def grade(self, message):
            return {"polite": 1.0}

    env = Talk(tasks=ListTasks([Task.from_prompt("t", "Hello.")]))
    env.reset(seed=1)
    observation, reward, terminated, *_ = env.step(AssistantMessage(content="yes"))
    assert (observation, reward, terminated) == (({"role": "user", "content": "yes?"},), 0.0, False)
    assert env.step(AssistantMessage(content="bye"))[1:3] == (1.0, True)


async def test_the_async_form_gives_what_the_sync_form_gives_and_runs_sync_tools_in_threads():
    threads = []

    class Where(Guess):
        @tool
        def where(self) -> str:
            """Say where it runs."""
            threads.append(threading.current_thread().name)
            return "here"

    one, two = Where(), Where()
    assert one.reset(seed=7) == await two.reset_async(seed=7)
    for action in (calling("where"), calling("compare", x=5), AssistantMessage(content="5")):
        assert one.step(action) == await two.step_async(action)
    assert threads == [threading.current_thread().name, "environment"]


async def test_an_async_environment_refuses_to_block_a_running_loop():
    env = AsyncGuess()
    with pytest.raises(RuntimeError, match="await reset_async"):
        env.reset(seed=1)
    await env.reset_async(seed=1)
    assert (await env.step_async(calling("ask")))[0][0]["content"] == "42"
    assert (await env.step_async(AssistantMessage(content="42")))[1] == 1.0


def test_raw_text_actions_through_a_dialect():
    env = RawTextAction(Guess(), HermesDialect().parse)
    env.reset(seed=1)
    assert env.action_space.contains("any text \N{SNOWMAN}")
    observation, *_ = env.step('<tool_call>{"name": "compare", "arguments": {"x": 1}}</tool_call>')
    assert observation[0]["content"] in ("low", "equal")
    observation, *_ = env.step("<tool_call>{oops</tool_call>")
    assert "not valid JSON" in observation[0]["content"]
    assert env.step("50")[2]


def test_render_gives_the_transcript():
    env = Guess(render_mode="ansi")
    env.reset(seed=1, options={"task": "g0"})
    env.step(calling("compare", x=0))
    assert env.render().splitlines() == [
        "user: Game 0: find my number, 1 to 99.",
        "user: Use the tool.",
        "assistant:  -> compare({'x': 0})",
        "tool: x must lie between 1 and 99",
    ]
    with pytest.raises(ValueError, match="render_mode"):
        Guess(render_mode="human")


def test_spaces_hold_what_they_sample_and_refuse_the_rest():
    chat, reply = ChatSpace(seed=1), ReplySpace(Guess().tools, seed=1)
    assert all(chat.sample() in chat for _ in range(20))
    samples = [reply.sample() for _ in range(40)]
    assert all(sample in reply for sample in samples)
    assert {bool(sample.tool_calls) for sample in samples} == {True, False}
    assert [{"role": "user", "content": "x"}] not in chat
    assert ({"role": "assistant", "content": "x"},) not in chat
    assert ({"role": "user", "content": None},) not in chat
    assert "text" not in reply
    assert ChatSpace() == ChatSpace() != ChatSpace(("user",))
    with pytest.raises(ValueError, match="unknown roles"):
        ChatSpace(("robot",))


def test_registration_is_listed_and_names_are_helped():
    infos = {info.env_id: info for info in list_environments()}
    assert infos["tests/Guess-v0"].description == "A game."
    assert infos["polyturn/TwoHopSearch-v0"].entry_point.startswith("polyturn.envs.two_hop")
    assert "polyturn/TwoHopSearch-v0" in gymnasium.registry
    env = make("tests/Guess-v0", max_turns=3)
    assert type(env) is Guess
    assert env.env_id == "tests/Guess-v0"
    with pytest.raises(ValueError, match="no environment 'tests/Gess-v0'; did you mean 'tests/Guess-v0'"):
        make("tests/Gess-v0")
    with pytest.raises(ValueError, match=r"cannot make 'tests/Guess-v0'.*max_turn"):
        make("tests/Guess-v0", max_turn=3)
    register("tests/Guess-v0", Guess, description="A game.")
    with pytest.raises(ValueError, match="already registered"):
        register("tests/Guess-v0", AsyncGuess)
    with pytest.raises(ValueError, match="cannot register"):
        register("not an id", Guess)


# Whatever a hook raises.

EXITS = (
    StopIteration,
    StopAsyncIteration,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    asyncio.CancelledError,
)


class Exits(ToolEnv):
    """Raises what it is told to where it is told to."""

    def __init__(self, where, error, *, is_async=False):
        super().__init__()
        self.where, self.error = where, error
        if is_async:
            for name in ("begin", "follow_up", "grade"):
                setattr(self, name, as_async(getattr(self, name)))

    def maybe(self, where):
        if where == self.where:
            raise self.error("planted")

    def begin(self, task):
        self.maybe("begin")
        return task.messages

    def follow_up(self, message):
        self.maybe("follow_up")
        return ()

    def grade(self, message):
        self.maybe("grade")
        return {"correct": 1.0}

    @tool
    def act(self) -> str:
        """Act."""
        self.maybe("tool")
        return "done"

    @tool
    async def act_async(self) -> str:
        """Act."""
        self.maybe("async tool")
        return "done"

    @tool(timeout_s=30)
    def act_in_time(self) -> str:
        """Act."""
        self.maybe("timed tool")
        return "done"


def as_async(hook):
    async def awaited(*args):
        await asyncio.sleep(0)
        return hook(*args)

    return awaited


PLAYED = (calling("act"), calling("act_async"), calling("act_in_time"), AssistantMessage(content="x"))
TASK = Task.from_prompt("t", "q")


@pytest.mark.parametrize("error", EXITS)
@pytest.mark.parametrize("where", ["begin", "follow_up", "grade", "tool", "async tool", "timed tool"])
@pytest.mark.parametrize("is_async", [False, True])
async def test_whatever_a_hook_raises_is_a_fault_of_its_own_episode(where, error, is_async):
    """Awaited as training does: nothing hangs, and neither the event loop nor the process ends."""
    env = Exits(where, error, is_async=is_async)
    with pytest.raises(EnvironmentFault) as caught:
        async with asyncio.timeout(20):
            await env.reset_async(options={"task": TASK})
            for action in PLAYED:
                await env.step_async(action)
    said = str(caught.value)
    assert "on task 't'" in said
    assert "planted" in said or "coroutine raised Stop" in said, (
        "Python itself renames what a coroutine may not raise"
    )
    env.where = ""
    await env.reset_async(options={"task": TASK})
    assert [(await env.step_async(action))[1] for action in PLAYED] == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("error", [each for each in EXITS if each is not KeyboardInterrupt])
@pytest.mark.parametrize("where", ["begin", "follow_up", "grade", "tool", "timed tool"])
def test_the_same_holds_for_synchronous_steps(where, error):
    env = Exits(where, error)
    with pytest.raises(EnvironmentFault, match="planted"):
        env.reset(options={"task": TASK})
        for action in PLAYED:
            env.step(action)


async def test_a_cancellation_from_outside_is_none_of_the_environments():
    class Slow(Exits):
        async def grade(self, message):
            await asyncio.sleep(60)

    env = Slow("", ValueError)
    await env.reset_async(options={"task": TASK})
    step = asyncio.create_task(env.step_async(AssistantMessage(content="x")))
    await asyncio.sleep(0.01)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step


# Where hooks run.


class Pinned(ToolEnv):
    """What it makes in `begin` works in the thread and the event loop that made it only."""

    def __init__(self):
        super().__init__()
        self.places = []

    def begin(self, task):
        self.database = sqlite3.connect(":memory:")
        self.database.execute("create table notes (text)")
        return task.messages

    @tool
    def write(self, text: str) -> str:
        """Write."""
        self.database.execute("insert into notes values (?)", (text,))
        return str(self.database.execute("select count(*) from notes").fetchone()[0])

    @tool(timeout_s=30)
    def write_in_time(self, text: str) -> str:
        """Write."""
        return self.write(text)

    def grade(self, message):
        return {"notes": float(self.database.execute("select count(*) from notes").fetchone()[0])}

    def close(self):
        self.database.close()
        super().close()


WRITES = (calling("write", text="a"), calling("write_in_time", text="b"), AssistantMessage(content="x"))


def test_what_is_bound_to_a_thread_works_in_all_synchronous_steps():
    for env in (Pinned(), WrappedEnv(gymnasium.wrappers.TimeLimit(Pinned(), 10))):
        for _ in range(2):
            env.reset(options={"task": TASK})
            assert [env.step(action)[1] for action in WRITES] == [0.0, 0.0, 2.0]
        env.close()


async def test_what_is_bound_to_a_thread_works_in_all_asynchronous_steps():
    async def play(env):
        for _ in range(3):
            await env.reset_async(options={"task": TASK})
            rewards = [(await env.step_async(action))[1] for action in WRITES]
        env.close()
        return rewards

    envs = [Pinned() for _ in range(16)] + [WrappedEnv(gymnasium.wrappers.TimeLimit(Pinned(), 10))]
    assert await asyncio.gather(*map(play, envs)) == [[0.0, 0.0, 2.0]] * 17


class OneLoop(ToolEnv):
    """Keeps what is bound to an event loop, as a client with open connections is."""

    async def begin(self, task):
        self.loop = asyncio.get_running_loop()
        self.lock = asyncio.Lock()
        await self.lock.acquire()
        return task.messages

    @tool
    async def same(self) -> bool:
        """Whether it is the same loop."""
        return asyncio.get_running_loop() is self.loop

    async def grade(self, message):
        waiting = asyncio.create_task(self.lock.acquire())
        await asyncio.sleep(0)
        self.lock.release()
        return {"same": float(await waiting and asyncio.get_running_loop() is self.loop)}


def test_an_asynchronous_environment_lives_in_one_event_loop():
    for env in (OneLoop(), WrappedEnv(gymnasium.wrappers.TimeLimit(OneLoop(), 10))):
        for _ in range(2):
            env.reset(options={"task": TASK})
            assert env.step(calling("same"))[0][0]["content"] == "true"
            assert env.step(AssistantMessage(content="x"))[1] == 1.0
        env.close()


def test_closing_again_does_not_reach_what_another_thread_holds():
    """sqlite3 refuses a second close from the thread that replaced the first."""

    class Kept(Guess):
        closed_in = ()

        @tool(timeout_s=30)
        def slow(self) -> int:
            """A tool with a deadline, so that hooks have a thread of their own."""
            return 1

        def close(self):
            self.closed_in += (threading.get_ident(),)
            super().close()

    env = Kept()
    env.reset(seed=0)
    env.close()
    env.close()
    assert len(env.closed_in) == 1 and env.closed_in[0] != threading.get_ident()
    env.reset(seed=0)
    env.close()
    assert len(env.closed_in) == 2


class Placed(ToolEnv):
    """Says in which thread each of its functions runs."""

    def begin(self, task):
        self.ran_in = [threading.current_thread().name]
        return task.messages

    @tool
    def plain(self) -> str:
        """A plain function."""
        return threading.current_thread().name

    @tool(timeout_s=30)
    def with_deadline(self) -> str:
        """A plain function that may take long."""
        return threading.current_thread().name

    @tool
    async def awaited(self) -> str:
        """An asynchronous one."""
        return threading.current_thread().name

    def follow_up(self, message):
        self.ran_in.append(threading.current_thread().name)
        if message.content == "exit":
            raise SystemExit(3)
        return ()

    def grade(self, message):
        self.ran_in.append(threading.current_thread().name)
        return {"graded": 1.0}


class OnLoop(Placed):
    hooks_run = "event_loop"


@pytest.mark.parametrize(
    ("kind", "hooks", "with_deadline"),
    [(Placed, "environment", "environment"), (OnLoop, "MainThread", "tool with a deadline")],
)
async def test_an_environment_says_where_its_functions_run(kind, hooks, with_deadline):
    env = kind()
    await env.reset_async(seed=0, options={"task": TASK})
    results = [
        (await env.step_async(calling(name)))[0][0]["content"]
        for name in ("plain", "with_deadline", "awaited")
    ]
    assert results == [hooks, with_deadline, "MainThread"]
    assert (await env.step_async(AssistantMessage(content="x")))[1] == 1.0
    assert env.ran_in == [hooks] * 3
    await env.reset_async(seed=0, options={"task": TASK})
    with pytest.raises(EnvironmentFault, match="follow_up failed on task 't': SystemExit: 3"):
        await env.step_async(AssistantMessage(content="exit"))
    env.close()


def test_a_subclass_says_for_itself_where_its_hooks_run():
    class Adds(OnLoop):
        def grade(self, message):
            return {"graded": 0.0}

    assert (OnLoop.hooks_run, Adds.hooks_run, Adds().needs_thread) == ("event_loop", "own_thread", True)


def test_where_hooks_run_is_one_of_three_words():
    with pytest.raises(
        ValueError, match="hooks_run must be one of own_thread, event_loop, own_process, not 'thread'"
    ):
        type("Wrong", (ToolEnv,), {"hooks_run": "thread"})


def test_only_what_is_not_asynchronous_needs_a_thread():
    async def reward(episode):
        return 1.0

    class Closes(AsyncGuess):
        def close(self):
            super().close()

    class Nothing(ToolEnv):
        """All defaults."""

    asynchronous = AsyncGuess()
    assert not asynchronous.needs_thread
    asynchronous.graded_by = reward
    assert not asynchronous.needs_thread
    asynchronous.graded_by = lambda episode: 1.0
    assert asynchronous.needs_thread
    assert [kind().needs_thread for kind in (Placed, OnLoop, Closes, Nothing)] == [True, False, True, False]
    assert WrappedEnv(gymnasium.wrappers.TimeLimit(AsyncGuess(), 10)).needs_thread
