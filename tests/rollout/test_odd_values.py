"""Whatever a model writes and an environment hands over: an odd episode ends itself at most, and all is kept.

Through the real player, chat template, player, journal, store and resume.
"""

import asyncio
import json
import re
import tempfile
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyturn.agents.chat import ChatRenderer, load_tokenizer
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.dialects import HermesDialect
from polyturn.agents.episode import Outcome
from polyturn.agents.episode_loop import play_messages
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.agents.policy import Generation, SamplingParams
from polyturn.configs.models import resolve_model_path
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.collection import play_groups
from polyturn.rollout.factory import token_play
from polyturn.rollout.groups import Prompt
from polyturn.rollout.journal import decode_episode, encode_episode
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer
from polyturn.rollout.store import TrajectoryStore
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall
from tests.support.play import message_play

ODD = "odd"
GOOD = {
    "begin": [{"role": "user", "content": "Begin."}],
    "result": "fine",
    "turn_reward": 0.0,
    "metric": 1.0,
    "anchor": "",
    "follow_up": (),
    "grade": {"right": 1.0},
}


class Handing(ToolEnv):
    """Hands over what its task's label says, hook by hook."""

    @tool
    def multiply(self, a: int, b: int) -> int:
        """Multiply."""
        return a * b

    @tool
    def halve(self, x: float) -> float:
        """Halve."""
        return x / 2

    @tool
    def divide(self, a: int, b: int = 7) -> float:
        """Divide."""
        return a / b

    @tool
    def show(self, n: int) -> str:
        """Show the square."""
        return f"the square is {n * n}"

    @tool
    def power(self, n: int) -> int:
        """Ten to the power of n."""
        return 10 ** min(n, 5000)

    @tool
    def take(self, value: str | int | float | bool | list[str] | dict[str, int] | None = None) -> object:
        """Take anything."""
        self.turn_reward = self.task.label["turn_reward"]
        self.metrics["odd"] = self.task.label["metric"]
        self.anchor = self.task.label["anchor"]
        return self.task.label["result"]

    def begin(self, task):
        return task.label["begin"]

    def follow_up(self, message):
        return self.task.label["follow_up"] if message.content == "" else ()

    def grade(self, message):
        return self.task.label["grade"]


def task(name, **values):
    return Task(task_id=name, messages=(), label={**GOOD, **values})


@pytest.fixture(scope="module")
def renderer():
    return ChatRenderer(load_tokenizer(resolve_model_path("builtin:tiny-searcher")))


class Writing:
    """A token policy: in the first turn of the odd task the given text, in every other an answer."""

    def __init__(self, renderer, text):
        self._renderer, self._text = renderer, text

    async def generate(self, *, prompt_ids, sampling):
        await asyncio.sleep(0)
        first = self._renderer.decode(prompt_ids).count("assistant\n") == 1
        tokens = self._renderer._encode_text(self._text if first else "the end")
        tokens.append(self._renderer.stop_token_ids[-1])
        return Generation(
            token_ids=tuple(tokens),
            logprobs=(-0.5,) * len(tokens),
            policy_versions=(0,) * len(tokens),
            finish_reason="stop",
        )


def run(directory, play, policy, odd):
    """The odd task among good ones, journaled, written, read back, and taken up again. The odd episode."""
    tasks = ListTasks([task("good-0"), odd, task("good-1")])
    prompts = [Prompt(task_index=i, epoch=0, position=i, group_id=f"g{i:08d}") for i in range(3)]
    limits = RolloutLimits(max_concurrent_tools=4, max_retries=0, retry_delay_s=0)
    store, played = TrajectoryStore(Path(tempfile.mkdtemp(dir=directory))), []

    def keep(episode):
        played.append(episode)
        store.journal(1, episode)

    def collect(finished, on_episode):
        player = EpisodePlayer(make_env=Handing, tasks=tasks, play=play, limits=limits, seed=0)
        try:
            return asyncio.run(
                play_groups(
                    player,
                    prompts,
                    samples_per_prompt=1,
                    policy=policy,
                    finished=finished,
                    on_episode=on_episode,
                )
            )
        finally:
            player.close()

    groups = collect((), keep)
    by_task = {episode.task_id: episode for episode in played}
    assert by_task["good-0"].outcome is by_task["good-1"].outcome is Outcome.COMPLETED
    assert store.journaled(1) == played, "the journal gives back what it was given"
    again = collect(store.journaled(1), lambda episode: pytest.fail("played again"))
    assert [group.episodes for group in again] == [group.episodes for group in groups]
    store.write_step(1, played)
    assert store.read_step(1) == played
    store.close()
    return by_task[odd.task_id]


LONG = 10**2_999 + 7
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, 2**64, -(2**64), 10**400, LONG, 10**4_200])
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
    | st.sampled_from(["\ud800", "a\udfff", "<|im_end|>", "</tool_call>", "\x00\x1b[31m", "x" * 5_000])
)


def nested(leaves):
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=4) | st.just("\ud800"), inner, max_size=3)
        ),
        max_leaves=6,
    )


JSON = nested(SCALARS)
NAMES = st.sampled_from(
    ["multiply", "halve", "divide", "show", "power", "take", "none", "x" * 3_000, "\udc00"]
)
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b", "x", "n", "value", "\ud800"]), JSON, max_size=3)


def write(value):
    """As a model may write it: also what Python refuses to print."""
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, list):
            return f"[{', '.join(map(write, value))}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)}: {write(item)}" for key, item in value.items()) + "}"
        return json.dumps(value)
    return f"{'-' if value < 0 else ''}1{'0' * 4_400}" if abs(value) >= 10**4_199 else str(value)


property_settings = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@property_settings
@given(name=NAMES, arguments=ARGUMENTS, around=st.text(max_size=6))
def test_what_a_model_writes_is_answered_and_never_a_fault(tmp_path, renderer, name, arguments, around):
    """In tokens: the text of a call is encoded, decoded, parsed and answered as in training."""
    text = f'{around}<tool_call>{{"name": {json.dumps(name)}, "arguments": {write(arguments)}}}</tool_call>'
    limits = EpisodeLimits(max_turns=4, max_tokens_per_turn=100_000, max_tokens_per_episode=1_000_000)
    play = token_play(renderer=renderer, dialect=HermesDialect(), limits=limits, sampling=SamplingParams())
    episode = run(tmp_path, play, Writing(renderer, text), task(ODD))
    assert episode.outcome is Outcome.COMPLETED, episode.error
    assert episode.reward == 1.0


@property_settings
@given(name=NAMES, arguments=ARGUMENTS | st.dictionaries(st.text(max_size=3), JSON, max_size=2))
def test_what_an_endpoint_calls_is_answered_and_never_a_fault(tmp_path, name, arguments):
    """In messages: values that no dialect looked at."""
    call = AssistantMessage(tool_calls=(ToolCall(id="call_0", name=name, arguments=arguments),))
    episode = run(tmp_path, message_play(limits=EpisodeLimits(max_turns=4)), calling(call), task(ODD))
    assert episode.outcome is Outcome.COMPLETED, episode.error
    assert [message["role"] for message in episode.messages] == ["user", "assistant", "tool", "assistant"]
    assert len(episode.messages[2]["content"]) < 8_000


def calling(call):
    def script(messages, tools):
        return call if messages[-1]["role"] == "user" else AssistantMessage(content="the end")

    return ScriptedPolicy(script)


FOREIGN = st.sampled_from(
    [
        np.float32(0.5),
        np.int64(3),
        np.float64("nan"),
        np.bool_(True),
        np.array([1.0, 2.0]),
        Decimal("0.1"),
        Fraction(1, 3),
        b"bytes",
        object(),
        {1, 2},
        1e300,
        float("inf"),
        10**400,
        "0.5",
    ]
)
ANYTHING = nested(SCALARS | FOREIGN)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "tool", "robot", None]), "content": ANYTHING},
        optional={"name": ANYTHING, "tool_calls": ANYTHING, "extra": ANYTHING},
    ),
    max_size=2,
)


@property_settings
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "begin": MESSAGES | ANYTHING,
            "result": ANYTHING,
            "turn_reward": SCALARS | FOREIGN,
            "metric": SCALARS | FOREIGN,
            "anchor": SCALARS | FOREIGN,
            "follow_up": MESSAGES | ANYTHING,
            "grade": ANYTHING | st.dictionaries(st.text(max_size=3), SCALARS | FOREIGN, max_size=2),
        },
    )
)
def test_what_an_environment_hands_over_is_kept_or_a_fault_that_names_it(tmp_path, values):
    def script(messages, tools):
        if messages[-1]["role"] == "tool":
            return AssistantMessage(content="the end")
        said = any(message["role"] == "assistant" for message in messages)
        call = ToolCall(id="call_0", name="take")
        return AssistantMessage(tool_calls=(call,)) if said else AssistantMessage()

    play = message_play(limits=EpisodeLimits(max_turns=6))
    episode = run(tmp_path, play, ScriptedPolicy(script), task(ODD, **values))
    if episode.outcome is Outcome.FAILED:
        assert episode.stop_reason == "environment_fault", episode.error
        assert "Handing" in episode.error and ODD in episode.error
    else:
        assert np.isfinite(episode.reward)
        numbers = [*episode.metrics.values(), *episode.reward_parts.values()]
        assert all(type(number) is float and np.isfinite(number) for number in numbers)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("multiply", {"a": LONG, "b": LONG}, "argument 'a' is a number of about 3,000 digits"),
        ("halve", {"x": 10**400}, "too large"),
        ("divide", {"a": 10**400}, "numbers are too large"),
        ("power", {"n": 5000}, "numbers are too large"),
        ("take", {"value": "\ud800"}, "argument 'value' holds half a surrogate pair"),
        ("take", {"value": float("nan")}, "argument 'value' is nan"),
        ("take", {"value": [b"x"]}, "argument 'value[0]' is a bytes"),
        ("x" * 100_000, {}, "There is no tool"),
        ("take", {"y" * 100_000: 1}, "unknown argument"),
        ("take", {f"y{i}": 1 for i in range(1_000)}, "and 992 more"),
    ],
)
def test_the_model_reads_what_was_odd(tmp_path, name, arguments, words):
    call = AssistantMessage(tool_calls=(ToolCall(id="c", name=name, arguments=arguments),))
    episode = run(tmp_path, message_play(limits=EpisodeLimits(max_turns=4)), calling(call), task(ODD))
    assert episode.outcome is Outcome.COMPLETED, episode.error
    told = episode.messages[2]["content"]
    assert words in told and len(told) < 4_000
    assert episode.num_tool_errors == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"begin": [{"role": "user", "content": None}]},
            r"begin\(\) failed on task 'odd': message 0: 'content'",
        ),
        ({"begin": "text"}, r"begin\(\) failed on task 'odd': it must be a list of messages"),
        ({"follow_up": None}, r"follow_up\(\) failed on task 'odd': it must be a list of messages"),
        ({"follow_up": [{"role": "assistant", "content": "x"}]}, "must have a role of system, tool, user"),
        ({"metric": "many"}, "metrics failed on task 'odd': 'odd': it must be a number"),
        ({"metric": float("nan")}, "metrics failed on task 'odd': 'odd': it must be a finite number"),
        ({"metric": np.ma.masked}, "metrics failed on task 'odd': 'odd': it must be a number, not masked"),
        ({"turn_reward": np.float64("inf")}, "turn_reward failed on task 'odd': it must be a finite number"),
        (
            {"turn_reward": 1e200},
            "turn_reward failed on task 'odd': it must be a finite number of at most 1e",
        ),
        ({"grade": {"right": 10**400}}, "grade failed on task 'odd': it must return a finite number"),
        ({"grade": {"a": 1.0, "b": float("nan")}}, "grade failed on task 'odd'"),
        ({"grade": {"a": float("nan"), "b": 1.0}}, "grade failed on task 'odd'"),
        ({"grade": 1.0}, "it must return finite numbers by name"),
        ({"result": b"bytes"}, "tool 'take' failed on task 'odd': TypeError: a tool's result must be"),
        ({"result": object()}, "tool 'take' failed on task 'odd': TypeError: a tool's result must be"),
    ],
)
def test_a_fault_names_environment_task_and_field(tmp_path, values, words):
    def script(messages, tools):
        if messages[-1]["role"] == "tool" or "follow_up" in values:
            return AssistantMessage()
        return AssistantMessage(tool_calls=(ToolCall(id="c", name="take"),))

    play = message_play(limits=EpisodeLimits(max_turns=4))
    episode = run(tmp_path, play, ScriptedPolicy(script), task(ODD, **values))
    assert episode.outcome is Outcome.FAILED
    assert re.match(f"Handing: .*{words}", episode.error), episode.error


class Foreign(gymnasium.Env):
    """An environment of nobody we know: it hands over what it was given, past all that a `ToolEnv` checks."""

    observation_space = action_space = None
    spec = None

    def __init__(self, **values):
        self.values = {
            "first": ({"role": "user", "content": "Begin."},),
            "observation": (),
            "reward": 1.0,
            "info": {},
            **values,
        }

    def reset(self, *, seed=None, options=None):
        return self.values["first"], {"task_id": "t"}

    def step(self, action):
        return self.values["observation"], self.values["reward"], True, False, self.values["info"]


def play_foreign(**values):
    episode = play_messages(
        env=Foreign(**values),
        policy=ScriptedPolicy(lambda messages, tools: AssistantMessage(content="x")),
        task=None,
        seed=0,
        limits=EpisodeLimits(max_turns=2),
        episode_id="g00000000.0.0",
        group_id="g00000000",
    )
    return asyncio.run(episode)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"first": "text"}, "the observation: it must be a list of messages"),
        ({"first": ({"role": "user", "content": None},)}, "the observation: message 0: 'content' must be"),
        ({"observation": None}, "the observation: it must be a list of messages"),
        ({"reward": "1"}, "the reward: it must be a number, not '1'"),
        ({"reward": float("nan")}, "the reward: it must be a finite number"),
        ({"reward": None}, "the reward: it must be a number, not None"),
        ({"info": None}, "info must be a mapping"),
        (
            {"info": {"reward_parts": {"a": 1.0, "b": float("nan")}}},
            r"info\['reward_parts'\]: 'b': it must be",
        ),
        (
            {"info": {"reward_parts": {"a": float("nan"), "b": 1.0}}},
            r"info\['reward_parts'\]: 'a': it must be",
        ),
        ({"info": {"metrics": {"a": "many"}}}, r"info\['metrics'\]: 'a': it must be a number"),
        ({"info": {"role_rewards": [1.0]}}, r"info\['role_rewards'\]: it must be numbers by name"),
        ({"info": {"tool_results": ["fine"]}}, r"info\['tool_results'\] must hold ToolResults"),
        ({"info": {"tool_results": None}}, r"info\['tool_results'\] must hold ToolResults, not be None"),
        ({"info": {"tools": 3}}, r"info\['tools'\] must hold ToolSpecs, not be 3"),
    ],
)
def test_any_gymnasium_environment_is_checked_as_it_enters(values, words):
    episode = play_foreign(**values)
    assert (episode.outcome, episode.stop_reason) == (Outcome.FAILED, "environment_fault")
    assert re.match(f"Foreign: task 't?': {words}", episode.error), episode.error


def test_scalars_of_any_gymnasium_environment_are_numbers():
    info = {"reward_parts": {"a": np.float32(0.5)}, "metrics": {"n": np.int64(2)}, "anchor": 3}
    episode = play_foreign(reward=np.float32(0.5), info=info, observation=[])
    assert (episode.reward, episode.reward_parts, episode.metrics) == (0.5, {"a": 0.5}, {"n": 2.0})
    assert decode_episode(encode_episode(episode)) == episode


class Text(str):
    """A text of a library's own kind, such as an enum's."""


def test_keys_of_messages_are_plain_texts():
    episode = play_foreign(first=({Text("role"): "user", Text("content"): "Begin."},))
    assert episode.outcome is Outcome.COMPLETED
    assert decode_episode(encode_episode(episode)) == episode


def test_a_name_that_is_none_is_no_name():
    info = {"role": None, "anchor": None, "stop_reason": None, "task_id": None}
    episode = play_foreign(info=info)
    assert episode.outcome is Outcome.COMPLETED
    assert (episode.task_id, episode.turn_records[0].role) == ("t", "")
    assert episode.turn_records == play_foreign().turn_records


@pytest.mark.parametrize("wrong", [{"task_id": 3}, {"task_id": ""}, {"messages": "text"}, {"messages": None}])
def test_a_task_that_is_none_is_refused_where_it_is_made(wrong):
    with pytest.raises(ValueError, match=r"a task's id must be a text|its messages must be a list"):
        Task(**{"task_id": "t", "messages": (), **wrong})


@pytest.mark.parametrize(
    ("values", "field", "kept"),
    [
        ({"result": "half \ud83d of it"}, "content", "half \ufffd of it"),
        ({"result": "\ud83d\ude00"}, "content", "\U0001f600"),
        (
            {"result": {"n": np.int64(3), "x": np.float32(0.5), "a": np.arange(2)}},
            "content",
            '{"n": 3, "x": 0.5, "a": [0, 1]}',
        ),
        ({"result": 2**70}, "content", str(2**70)),
        ({"result": None}, "content", "null"),
        ({"metric": np.int64(3)}, "metrics", {"odd": 3.0}),
        ({"metric": Decimal("0.5")}, "metrics", {"odd": 0.5}),
        ({"turn_reward": np.float32(0.5)}, "reward", 1.5),
        ({"grade": {"right": np.float64(0.25), "m\ud800": True}}, "reward", 1.25),
        ({"grade": {"right": Fraction(1, 4)}}, "reward", 0.25),
    ],
)
def test_what_can_be_meant_in_one_way_only_is_coerced(tmp_path, values, field, kept):
    call = AssistantMessage(tool_calls=(ToolCall(id="c", name="take"),))
    episode = run(
        tmp_path, message_play(limits=EpisodeLimits(max_turns=4)), calling(call), task(ODD, **values)
    )
    assert episode.outcome is Outcome.COMPLETED, episode.error
    found = {"content": episode.messages[2]["content"], "metrics": episode.metrics, "reward": episode.reward}
    assert found[field] == kept
