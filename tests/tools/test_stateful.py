"""Tools with a state for each episode: made at reset, closed at the next one, never shared."""

import asyncio
import re
from pathlib import Path

import pytest

from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import StatefulTool, tool
from polyturn.tools.toolset import Toolset
from polyturn.tools.types import ToolCall, ToolError

log = []


class Notebook(StatefulTool):
    def __init__(self, size: int = 2) -> None:
        self.size, self.pages, self.title = size, [], ""

    def setup(self, task, rng):
        self.title = f"{task.task_id}-{int(rng.integers(10**9))}"
        log.append(("setup", self))
        if task.task_id == "bad":
            raise OSError("no paper")

    def close(self):
        log.append(("close", self))

    @tool(max_output_chars=40)
    def write(self, text: str) -> str:
        """Write a page."""
        if len(self.pages) == self.size:
            raise ToolError("the notebook is full")
        self.pages.append(text)
        return f"{self.title}: {' '.join(self.pages)}"


class Writing(ToolEnv):
    def __init__(self, *extra, size=2):
        tasks = ListTasks([Task.from_prompt(name, "Write.") for name in ("good", "bad")])
        super().__init__(tools=[Notebook.using(size=size), *extra], tasks=tasks)

    def grade(self, message):
        return {"pages": float(len(self.state_of(Notebook).pages))}


WRITE = AssistantMessage(tool_calls=(ToolCall(id="c", name="write", arguments={"text": "hello"}),))


@pytest.fixture(autouse=True)
def fresh_log():
    log.clear()


def test_every_episode_has_its_own_and_frees_it():
    env = Writing(size=1)
    assert [spec.name for spec in env.tools] == ["write"], "known before the first reset"
    env.reset(seed=1, options={"task": "good"})
    first = env.step(WRITE)[0][0]["content"]
    assert first.startswith("good-")
    assert env.step(WRITE)[0][0]["content"] == "the notebook is full"
    assert env.step(AssistantMessage(content="done"))[1] == 1.0
    env.reset(seed=1, options={"task": "good"})
    assert env.step(WRITE)[0][0]["content"] == first, "seeded by the episode, and empty again"
    (one, two) = (state for what, state in log if what == "setup")
    assert log == [("setup", one), ("close", one), ("setup", two)]
    env.close()
    env.close()
    assert log[-1] == ("close", two)
    assert log.count(("close", two)) == 1


def test_two_environments_at_once_share_nothing():
    async def play(env, seed):
        await env.reset_async(seed=seed, options={"task": "good"})
        for _ in range(2):
            observation, *_ = await env.step_async(WRITE)
        return observation[0]["content"]

    async def play_all():
        return await asyncio.gather(*(play(Writing(), seed) for seed in range(20)))

    contents = asyncio.run(play_all())
    assert len(set(contents)) == 20
    assert all(content.endswith(": hello hello") for content in contents)


def test_a_failed_setup_is_a_fault_and_is_closed_too():
    env = Writing()
    with pytest.raises(
        EnvironmentFault, match="setting up the tools failed on task 'bad': OSError: no paper"
    ):
        env.reset(options={"task": "bad"})
    env.close()
    assert [what for what, _ in log] == ["setup", "close"]


def test_one_that_fails_to_close_does_not_keep_the_others_open():
    class Stuck(StatefulTool):
        def close(self):
            raise OSError("stuck")

    env = Writing(Stuck)
    env.reset(options={"task": "good"})
    with pytest.raises(OSError, match="stuck"):
        env.close()
    assert log[-1][0] == "close"
    env.close()


def test_nothing_is_open_before_reset():
    tools = Toolset([Notebook])
    with pytest.raises(RuntimeError, match="open_state"):
        tools.call(WRITE.tool_calls[0])
    with pytest.raises(LookupError, match="no Notebook is open"):
        Writing().state_of(Notebook)
    with pytest.raises(ValueError, match=r"Notebook cannot be made with these options: .*'sice'"):
        Notebook.using(sice=3)
    with pytest.raises(ValueError, match="two tools are called 'write'"):
        Toolset([Notebook, Notebook])


def test_an_environment_is_not_reused_while_a_call_that_was_given_up_may_touch_it():
    import threading

    release = threading.Event()

    class Hanging(ToolEnv):
        @tool(timeout_s=0.05)
        def hang(self) -> str:
            """Hang."""
            release.wait()
            return ""

    env = Hanging(tasks=ListTasks([Task.from_prompt("t", "p")]))
    env.reset()
    assert env.is_reusable
    call = AssistantMessage(tool_calls=(ToolCall(id="c", name="hang"),))
    observation, _, terminated, truncated, info = env.step(call)
    assert "took longer than 0.05 s" in observation[0]["content"]
    assert (terminated, truncated, info["tool_results"][0].timed_out) == (False, False, True)
    assert not env.is_reusable
    release.set()


def test_the_tools_of_the_docs_work():
    document = Path(__file__).parents[2] / "docs" / "tools.md"
    names: dict = {"__name__": "documented_example"}
    for source in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(source, str(document), "exec"), names)
    tools = Toolset([names["forecast"], names["Notebook"]])
    call = ToolCall(id="c", name="forecast", arguments={"place": {"town": "Bergen"}, "unit": "F", "days": 2})
    result = asyncio.run(tools.call_async(call))
    assert (result.content, result.cost) == ('{"highs": [20, 20]}', 0.002)
    too_far = ToolCall(id="c", name="forecast", arguments={"place": {"town": "Atlantis"}, "days": 15})
    assert "15 is greater than the maximum of 14" in asyncio.run(tools.call_async(too_far)).content
    tools.open_state(Task.from_prompt("t", "p"), None)
    assert tools.call(WRITE.tool_calls[0]).content == "page 2"
    tools.close_state()
