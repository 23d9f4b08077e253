"""Simulated users keep to their script, hear what is said to them and nothing else, and alone end the talk."""

import asyncio
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import USER_FAULT, Outcome
from polyturn.agents.episode_loop import play_messages
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.envs.customer_service.customers import ScriptedUser, briefing_of
from polyturn.envs.customer_service.env import CustomerServiceEnv, base_shop
from polyturn.envs.faults import UserFault
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.users.model import LEAVES, ModelUser, open_chat, shared_chat, user_endpoint
from polyturn.envs.users.user import Briefing, load_user
from polyturn.envs.users.watch import FRAME, MAX_ASKED_AGAIN, NUM_WORDS, WatchedUser
from polyturn.rollout.player import offer_engines
from polyturn.tools.chat.answers import ChatAnswer, ChatFault
from polyturn.tools.types import ToolCall
from tests.support.chat_server import Answer, chat_server, message

BRIEFING = Briefing(
    role="a customer",
    requests=("I want to cancel order A1001.", "I need order A1002 elsewhere."),
    facts=("My email address is ada@mail.example.", "My postcode is 12345."),
    values=(re.compile(r"\S+@[\w.-]+"), re.compile(r"\bA\d{4}\b"), re.compile(r"\b\d{5}\b")),
    topics=(("A1001",), ("A1002",)),
)
LEAK = "Of course. Bring up what you want one at a time, in this order: nothing."


class Says:
    """Says what it is given, then leaves."""

    def __init__(self, *texts, instead=()):
        self.texts, self.instead, self.heard = list(texts), list(instead), []

    def opening(self):
        return self.texts.pop(0)

    def reply(self, message):
        self.heard.append(message)
        return self.texts.pop(0) if self.texts else None


class SaysAgain(Says):
    def again(self):
        return self.instead.pop(0)


def say(content, **fields):
    return AssistantMessage(content=content, **fields)


def test_a_user_hears_what_is_said_to_it_and_nothing_else():
    inner = Says("Hello A1001.", "a", "b", "c", "d")
    user = WatchedUser(inner, BRIEFING)
    user.opening()
    user.reply(say("Hi.", reasoning="the price is 3"))
    user.reply(say("<think>the price is 3</think>\nHi again."))
    user.reply(say('Wait. <tool_call>{"name": "cancel"}</tool_call> Done.'))
    user.reply(say('One moment <tool_call>{"name": "canc'))
    assert inner.heard == ["Hi.", "Hi again.", "Wait.  Done.", "One moment"]
    assert user.heard == tuple(inner.heard)


def test_what_leaks_is_not_said_and_is_asked_for_again():
    user = WatchedUser(
        SaysAgain("Hello.", LEAK, instead=["I am a language model.", "Cancel A1001."]), BRIEFING
    )
    user.opening()
    assert user.reply(say("Hi.")) == "Cancel A1001."
    assert (user.metrics["user_leaks"], user.metrics["user_broke_script"]) == (2.0, 0.0)


def test_a_user_that_goes_on_leaking_cannot_be_played():
    inner = SaysAgain(LEAK, instead=[LEAK] * 9)
    with pytest.raises(UserFault, match="what it was told to keep to itself"):
        WatchedUser(inner, BRIEFING).opening()
    assert len(inner.instead) == 9 - MAX_ASKED_AGAIN
    with pytest.raises(UserFault, match="what it was told to keep to itself"):
        WatchedUser(Says(LEAK), BRIEFING).opening()


@pytest.mark.parametrize("text", ["", "  ", 3])
def test_a_user_that_says_nothing_cannot_be_played(text):
    with pytest.raises(UserFault, match="says nothing, and does not leave"):
        WatchedUser(Says(text), BRIEFING).opening()
    with pytest.raises(UserFault, match="left before saying anything"):
        WatchedUser(Says(None), BRIEFING).opening()


@given(
    start=st.integers(0, 60), num_words=st.integers(1, 30), before=st.text(max_size=20), shout=st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_six_words_of_the_instructions_leak_wherever_they_stand(start, num_words, before, shout):
    hidden = FRAME.format(role=BRIEFING.role, requests="", facts="")
    words = re.findall(r"\w+", hidden)[start : start + num_words]
    text = f"{before} {', '.join(words).upper() if shout else ' '.join(words)}"
    assert WatchedUser(Says(), BRIEFING).leaks(text) == (len(words) >= NUM_WORDS)


@pytest.mark.parametrize(
    "text", [*BRIEFING.requests, *BRIEFING.facts, "Yes, please go ahead.", "I play chess."]
)
def test_what_a_user_is_there_to_say_does_not_leak(text):
    assert not WatchedUser(Says(), BRIEFING).leaks(text)


def test_values_that_nobody_told_the_user_are_inventions_and_those_that_the_agent_said_are_not():
    user = WatchedUser(Says("A1001, ada@mail.example!", "Is it A1002 or A9999?", "A9999, 54321."), BRIEFING)
    user.opening()
    user.reply(say("Is it A9998?"))
    assert user.metrics["user_contradictions"] == 1.0
    user.reply(say("It is A9999."))
    assert (user.metrics["user_contradictions"], user.metrics["user_broke_script"]) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("opening", "last", "early"),
    [
        ("About A1001 and A1002.", "All is done.", False),
        ("About A1001.", "All is done, and A1002 too.", False),
        ("About A1001.", "All is done.", True),
        ("About A1001 and A1002.", "I will cancel it. Shall I go ahead?", True),
        ("About A1001 and A1002.", "Is there anything else?", False),
    ],
)
def test_a_user_leaves_when_all_was_talked_about_and_nothing_is_to_be_confirmed(opening, last, early):
    for kind, expected in ((Says, early), (type("Impatient", (Says,), {"may_lose_patience": True}), False)):
        user = WatchedUser(kind(opening), BRIEFING)
        user.opening()
        assert user.reply(say(last)) is None
        assert user.metrics["user_left_early"] == user.metrics["user_broke_script"] == float(expected)


# Random talks in the shop, with agents that say and do anything.

ENV = CustomerServiceEnv(max_turns=12)
TASKS = list(ENV.tasks("train"))[:40]
TEXTS = (
    "What is your email address?",
    "Which order number, and why?",
    "Shall I go ahead?",
    "That is done. Is there anything else?",
    "",
    LEAVES,
    f"Goodbye. {LEAVES}",
    "<think>SECRET</think>I see.",
    '<tool_call>{"name": "SECRET"}</tool_call>',
    "The talk is over.",
    "###END### stop terminate done",
)


def random_action(rng, scenario):
    if rng.random() < 0.5:
        return say(rng.choice(TEXTS), reasoning=rng.choice([None, "SECRET"]))
    wanted = [action for request in scenario.requests for action in request.actions]
    calls = [
        ("find_customer_by_email", {"email": scenario.customer.email}),
        ("list_orders", {}),
        ("change_email", {"email": f"x{rng.randrange(9)}@y.example"}),
        *((action.tool.replace("cancel", "cancel_order"), dict(action.arguments)) for action in wanted),
    ]
    made = [rng.choice(calls) for _ in range(rng.randint(1, 3))]
    return AssistantMessage(
        content=rng.choice(["", "SECRET aside"]),
        tool_calls=tuple(ToolCall(id=str(i), name=name, arguments=a) for i, (name, a) in enumerate(made)),
    )


class Recorder:
    """A customer that notes what it hears and when it leaves."""

    def __init__(self, inner):
        self.inner, self.heard, self.has_left = inner, [], False
        self.may_lose_patience = getattr(inner, "may_lose_patience", False)
        if hasattr(inner, "again"):
            self.again = lambda: self.noted(inner.again())

    def opening(self):
        return self.inner.opening()

    def reply(self, message):
        assert not self.has_left, "nobody is asked who has left"
        self.heard.append(message)
        return self.noted(self.inner.reply(message))

    def noted(self, text):
        self.has_left = text is None
        return text


class RandomModel:
    """A model that plays a customer and says anything: its script, its instructions, inventions, that it leaves."""

    where = "http://model"

    def __init__(self, rng, scenario):
        briefing = briefing_of(scenario)
        self.rng = rng
        self.texts = [
            *briefing.requests,
            *briefing.facts,
            "Yes.",
            LEAVES,
            f"Thanks! {LEAVES}",
            "You play a customer in a chat with a shop's agent.",
            "As an AI I cannot say.",
            "My order is A9999.",
        ]

    def ask(self, messages):
        assert not any("SECRET" in each["content"] for each in messages)
        assert LEAVES in messages[0]["content"]
        assert not any(LEAVES in each["content"] for each in messages if each["role"] == "user")
        if self.rng.random() < 0.03:
            raise ChatFault("gone")
        return ChatAnswer(content=self.rng.choice(self.texts))


@given(seed=st.integers(0, 2**32), played_by_model=st.booleans())
@settings(max_examples=120, deadline=None)
def test_random_talks_keep_every_promise(seed, played_by_model):
    rng = random.Random(seed)
    task = rng.choice(TASKS)
    scenario = task.label
    inner = (
        ModelUser(briefing_of(scenario), RandomModel(rng, scenario))
        if played_by_model
        else ScriptedUser(scenario)
    )
    recorder, env = Recorder(inner), ENV
    env._make_user = lambda task: recorder
    watch, replayed, said, done = WatchedUser(Says(), briefing_of(scenario)), base_shop(1).copy(), [], False
    try:
        observation, _ = env.reset(options={"task": task})
        said += [m["content"] for m in observation if m["role"] == "user"]
        while not done:
            action = random_action(rng, scenario)
            observation, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            assert terminated == recorder.has_left, "the user alone ends the talk"
            said += [m["content"] for m in observation if m["role"] == "user"]
            for call, result in zip(action.tool_calls, info["tool_results"], strict=True):
                if result.ok and call.name not in ("find_customer_by_email", "list_orders"):
                    arguments = dict(call.arguments)
                    if call.name == "change_email":
                        arguments["customer_id"] = scenario.customer.customer_id
                    getattr(replayed, call.name.removesuffix("_order"))(**arguments)
    except UserFault:
        assert played_by_model, "a script does not fail"
        return
    assert not any("SECRET" in text for text in recorder.heard)
    assert not any(watch.leaks(text) or LEAVES in text for text in said), "the agent never reads the script"
    metrics = info["metrics"]
    if terminated:
        right = replayed == scenario.expected(base_shop(1))
        assert metrics["records_right"] == float(right), "all writes come before the grade"
    if not played_by_model:
        assert metrics["user_broke_script"] == metrics["user_leaks"] == 0.0
    assert metrics["user_broke_script"] == float(
        metrics["user_contradictions"] > 0 or metrics["user_left_early"] > 0
    )
    assert ("A9999" in "".join(said)) <= (metrics["user_contradictions"] > 0)


# A model behind an endpoint plays the user.


def model_user(url, **options):
    return ModelUser(
        BRIEFING, shared_chat(user_endpoint({"url": url, "model": "m", "max_retries": 0, **options}))
    )


async def test_a_model_is_told_its_script_hears_the_agent_and_is_asked_again():
    answers = ["<think>what do I want</think>Cancel A1001.", LEAK, "And A1002.", f"Bye. {LEAVES}"]
    async with chat_server(*map(message, answers)) as server:
        user = WatchedUser(model_user(server.url), BRIEFING)
        assert await asyncio.to_thread(user.opening) == "Cancel A1001."
        assert await asyncio.to_thread(user.reply, say(f"Done. {LEAVES}")) == "And A1002."
        assert await asyncio.to_thread(user.reply, say("Done.")) is None
    first, again, last = (server.requests[i]["messages"] for i in (0, 2, 3))
    assert all(fact in first[0]["content"] for fact in (*BRIEFING.requests, *BRIEFING.facts))
    assert [m["role"] for m in first] == ["system", "user"]
    assert again[-2]["content"] == LEAK and "Write that message again" in again[-1]["content"]
    assert [m["content"] for m in last[2:]] == ["Cancel A1001.", "Done. ", "And A1002.", "Done."], (
        "what was not said is not part of the talk"
    )
    assert server.requests[0]["temperature"] == 0.0
    assert user.metrics["user_leaks"] == 1.0 and user.metrics["user_broke_script"] == 0.0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(status=500, body={"error": "x"}), "the simulated user cannot speak: .*HTTP 500"),
        (message("Cancel A10", finish_reason="length"), "has no whole message .finish_reason length"),
        (message("x", finish_reason="content_filter"), "finish_reason content_filter"),
        (message("  "), "says nothing"),
        (message("<think>only thoughts</think>"), "says nothing"),
        (message(LEAVES), "left before saying anything"),
    ],
)
async def test_a_model_that_fails_is_infrastructure_and_never_a_reward(answer, words):
    """With the episode that is played: failed, by the user's fault, to be played again."""
    async with chat_server(answer) as server:
        options = {"url": server.url, "model": "m", "max_retries": 0}
        env = CustomerServiceEnv(user="model", user_options=options)
        episode = await play_messages(
            env=env,
            policy=ScriptedPolicy(env.oracle),
            task=TASKS[0],
            seed=0,
            limits=EpisodeLimits(),
            episode_id="e",
            group_id="g",
        )
        env.close()
    assert (episode.outcome, episode.stop_reason, episode.reward) == (Outcome.FAILED, USER_FAULT, None)
    assert re.search(words, episode.error), episode.error


def test_users_of_one_endpoint_share_its_client_and_its_limits():
    one, same, other = (
        shared_chat(user_endpoint({"url": "http://127.0.0.1:1/v1", "model": model})) for model in "mmn"
    )
    assert one is same and one is not other


PLUGIN = """
class Echo:
    def __init__(self, briefing, *, shout=False):
        self.briefing, self.shout = briefing, shout
    def opening(self):
        return self.briefing.requests[0]
    def reply(self, message):
        return None if "bye" in message else message.upper() if self.shout else message

class Deaf:
    def __init__(self, briefing):
        pass
    def opening(self):
        return "x"
    def reply(self):
        return None
"""


def test_a_user_of_ones_own_is_named_by_its_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    env = CustomerServiceEnv(user=f"{path}:Echo", user_options={"shout": True})
    observation, _ = env.reset(options={"task": TASKS[0]})
    assert observation[-1]["content"] == TASKS[0].label.requests[0].opening
    assert env.step(say("well"))[0][0]["content"] == "WELL"
    assert env.step(say("bye"))[2]
    with pytest.raises(ValueError, match=r"cannot be made as Echo\(..., \*\*options\)"):
        CustomerServiceEnv(user=f"{path}:Echo", user_options={"loud": True})
    with pytest.raises(
        ValueError, match=r"cannot be called as a reply of a user: .*def reply\(self, message"
    ):
        load_user(f"{path}:Deaf", BRIEFING, {})


def test_what_an_agent_writes_is_looked_at_in_linear_time():
    """A hundred thousand characters that each of the patterns begins to match again and again."""
    env = CustomerServiceEnv()
    for hard in ("a.b-c" * 20_000, "shall I " * 12_000, "<tool_call>" * 9_000, "A100" * 25_000):
        env.reset(options={"task": TASKS[0]})
        env.step(say(hard))
        env.step(say(hard + "@"))


def test_the_documented_user_plays(tmp_path):
    text = (Path(__file__).parents[3] / "docs/users.md").read_text()
    path = tmp_path / "terse.py"
    path.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    env = CustomerServiceEnv(user=f"{path}:Terse")
    task = next(task for task in TASKS if len(task.label.requests) == 2)
    observation, _ = env.reset(options={"task": task})
    observation = (*observation, *env.step(say("I see."))[0])
    assert [m["content"] for m in observation[1:]] == [request.opening for request in task.label.requests]
    assert env.step(say("I see."))[2]


async def test_the_runs_own_engines_play_the_user():
    """The player tells the environment where they are; a policy without engines has none, which is a fault."""
    task = TASKS[0]

    class Engines(ScriptedPolicy):
        def __init__(self, chat_urls):
            super().__init__(ENV.oracle)
            self.chat_urls = chat_urls

    env = CustomerServiceEnv(user="model", user_options={"url": "engines", "max_retries": 0})
    async with chat_server(message("Cancel it."), message(LEAVES)) as server:
        offer_engines(env, Engines((server.url,)))
        observation, _ = await env.reset_async(options={"task": task})
        assert observation[-1]["content"] == "Cancel it."
        assert (await env.step_async(say("Done.")))[2]
        offer_engines(env, ScriptedPolicy(ENV.oracle))
        with pytest.raises(UserFault, match="by the run's engines, and the policy has none"):
            await env.reset_async(options={"task": task})
    assert [asked["model"] for asked in server.requests] == ["policy", "policy"]
    env.close()
    urls = ("http://a/v1", "http://b/v1")
    used = {open_chat({"url": "engines"}, engine_urls=urls, talk=str(i)).where for i in range(20)}
    assert used == {f"{url}/chat/completions" for url in urls}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "engines", "temprature": 1}, "user_options: temprature: .*, did you mean 'temperature'"),
        ({"url": "engine", "model": "m"}, "user_options: url: "),
        ({"url": "http://x/v1", "model": "m", "api_key_file": "/nowhere"}, "/nowhere cannot be read"),
    ],
)
def test_what_is_wrong_with_a_users_endpoint_is_said_when_the_environment_is_made(options, words):
    with pytest.raises(ValueError, match=words):
        CustomerServiceEnv(user="model", user_options=options)
