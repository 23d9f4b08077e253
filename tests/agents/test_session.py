"""What a program asks of its session goes on from the tokens that were sampled, and each is recorded once."""

import asyncio
import contextlib
import json
import random

import numpy as np
import pytest

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeLimits, EpisodeTime
from polyturn.agents.dialects import HermesDialect
from polyturn.agents.policy import PolicyFault, SamplingParams
from polyturn.agents.sessions.matching import make_rule
from polyturn.agents.sessions.requests import CompletionRequest, RequestRefused
from polyturn.agents.sessions.session import Session
from polyturn.tools.types import ToolSpec
from tests.support.chat_families import FAMILIES
from tests.support.policies import CALL, Says

TOOL = ToolSpec(
    name="search",
    description="Look it up.",
    parameters={"type": "object", "properties": {"query": {"type": "string"}}},
)


def make_session(say, *, family="qwen3", rule="loose", max_turns=100, max_tokens=20_000, **limits):
    tokenizer = FAMILIES[family].tokenizer
    policy = Says(tokenizer, say)
    limits = EpisodeLimits(
        max_turns=max_turns, max_tokens_per_turn=500, max_tokens_per_episode=max_tokens, **limits
    )
    session = Session(
        session_id="e",
        policy=policy,
        renderer=ChatRenderer(tokenizer),
        dialect=HermesDialect(),
        limits=limits,
        sampling=SamplingParams(),
        clock=EpisodeTime.of(limits, None),
        seed=0,
        rule=make_rule(rule),
        on_answer=lambda message, conversation: None,
    )
    return session, policy


def user(text):
    return {"role": "user", "content": text}


def result(text, call_id="call_0"):
    return {"role": "tool", "content": text, "tool_call_id": call_id, "name": "search"}


def ask(*messages, tools=(TOOL,), **fields):
    return CompletionRequest(messages=messages, tools=tools, **fields)


def lines_of(session):
    """For each line its text of sampled tokens, by answer."""
    return [
        [segment.token_ids[segment.turns == turn][segment.sampled[segment.turns == turn]].tolist()
         for turn in np.unique(segment.turns[segment.sampled])]
        for segment in session.segments()
    ]  # fmt: skip


def check_recorded_once(session, policy, *, delivered=None):
    """Every delivered answer is sampled in one line, behind the tokens that its request had."""
    found = {}
    for segment in session.segments():
        assert segment.num_sampled, "a line without an answer"
        for turn in np.unique(segment.turns[segment.sampled]):
            places = np.flatnonzero(segment.sampled & (segment.turns == turn))
            assert (np.diff(places) == 1).all(), "the tokens of an answer lie apart"
            number = -int(segment.logprobs[places[0]]) - 1
            assert number not in found, "an answer is sampled in two lines"
            found[number] = segment.token_ids[: places[0]].tolist(), segment.token_ids[places].tolist()
    numbers = range(len(policy.written)) if delivered is None else delivered
    assert found == {number: policy.written[number] for number in numbers}


def test_a_conversation_is_one_line_of_the_tokens_that_were_sampled():
    session, policy = make_session(lambda number: CALL if number < 3 else "in Ashford")

    async def converse():
        messages = [user("Where is Mara?")]
        for number in range(4):
            completion = await session.complete(ask(*messages))
            messages += [completion.message.to_message(), result(f"found {number}", f"call_{number}")]
        return completion

    last = asyncio.run(converse())
    assert last.message.content == "in Ashford" and last.finish_reason == "stop"
    assert [len(line) for line in lines_of(session)] == [4]
    check_recorded_once(session, policy)
    counts = session.counts()
    assert (counts.num_conversations, counts.num_branches, counts.num_side_calls) == (1, 0, 0)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "kimi-k2"])
def test_no_two_calls_of_a_conversation_have_one_id(family):
    """Some frameworks take a call whose id they have seen for one that was answered, in whichever conversation."""
    session, _ = make_session(lambda number: CALL, family=family)

    async def converse():
        found, messages = [], [user("Where is Mara?")]
        for number in range(5):
            if number == 3:  # a sub-agent that is told what was said
                messages = [user("Help me."), *messages]
            completion = await session.complete(ask(*messages))
            (call,) = completion.message.tool_calls
            found.append(call.id)
            messages += [completion.message.to_message(), result(f"found {number}", call.id)]
        return found

    ids = asyncio.run(converse())
    assert len(set(ids)) == 5, ids


@pytest.mark.parametrize(
    ("rule", "num_lines"), [("exact", 2), ("loose", 1), ("role_and_content", 1), ("plug-in", 1)]
)
def test_what_a_client_writes_anew_is_found_by_the_rule(rule, num_lines, tmp_path):
    """As langchain does: arguments written anew, reasoning dropped, another id."""
    if rule == "plug-in":
        (tmp_path / "rule.py").write_text("def key(message):\n    return message['role']\n")
        rule = f"{tmp_path}/rule.py:key"
    thought = "<think>\nwho is it\n</think>\n\nI look."
    session, policy = make_session(lambda number: f"{thought}\n{CALL}", rule=rule)

    async def converse():
        first = await session.complete(ask(user("Where is Mara?")))
        assert first.message.reasoning == "who is it"
        again = {
            "role": "assistant",
            "content": first.message.content + " ",
            "tool_calls": [
                {
                    "id": "xyz",
                    "type": "function",
                    "function": {"name": "search", "arguments": '{"query":  "Mara"}'},
                }
            ],
        }
        await session.complete(ask(user("Where is Mara?"), again, result("found", "xyz")))

    asyncio.run(converse())
    assert len(session.segments()) == num_lines
    check_recorded_once(session, policy)


def test_history_that_the_client_has_edited_begins_a_line():
    session, policy = make_session(lambda number: CALL)

    async def converse():
        await session.complete(ask(user("Where is Mara?")))
        edited = {"role": "assistant", "content": "Calling tools: [{'name': 'search'}]"}
        await session.complete(ask(user("Where is Mara?"), edited, user("Observation: found")))

    asyncio.run(converse())
    assert session.counts().num_conversations == 2
    check_recorded_once(session, policy)


def test_the_last_message_of_a_client_that_edits_all_history_is_its_newest():
    session, _ = make_session(lambda number: CALL if number < 2 else "in Ashford")

    async def converse():
        await session.complete(ask(user("A title?"), tools=()))
        await session.complete(ask(user("Where is Mara?")))
        edited = {"role": "assistant", "content": "Calling tools: search"}
        await session.complete(ask(user("Where is Mara?"), edited, user("Observation: found")))
        await session.complete(ask(user("A summary?"), tools=()))

    asyncio.run(converse())
    assert (session.last_message.content, session.main_conversation) == ("in Ashford", 2)
    assert session.counts().num_side_calls == 2


def test_a_fork_has_the_tokens_of_its_parent_as_unsampled_ones():
    session, policy = make_session(lambda number: f"answer {number}")

    async def converse():
        first = await session.complete(ask(user("one")))
        start = [user("one"), first.message.to_message()]
        await session.complete(ask(*start, user("two")))
        await session.complete(ask(*start, user("other")))

    asyncio.run(converse())
    assert [len(line) for line in lines_of(session)] == [2, 1]
    assert session.counts().num_branches == 1 and session.counts().num_conversations == 1
    check_recorded_once(session, policy)


def test_what_is_asked_at_once_of_one_answer_branches():
    session, policy = make_session(lambda number: f"answer {number}")

    async def converse():
        first = await session.complete(ask(user("one")))
        start = [user("one"), first.message.to_message()]
        await asyncio.gather(*(session.complete(ask(*start, user(f"part {i}"))) for i in range(5)))
        # Equal requests at once are samples of their own, too.
        answers = await asyncio.gather(*(session.complete(ask(*start, user("same"))) for _ in range(3)))
        assert len({answer.completion_id for answer in answers}) == 3

    asyncio.run(converse())
    assert len(session.segments()) == 8
    check_recorded_once(session, policy)


def test_a_retry_gets_what_was_sampled_for_the_try_before():
    session, policy = make_session(lambda number: f"answer {number}")

    async def converse():
        first = await session.complete(ask(user("one")))
        policy.may_answer.clear()
        request = ask(user("one"), first.message.to_message(), user("two"))
        left = asyncio.create_task(session.complete(request))
        await asyncio.sleep(0.01)
        left.cancel()  # the client's connection broke
        await asyncio.gather(left, return_exceptions=True)
        policy.may_answer.set()
        second = await session.complete(request)
        assert second.message.content == "answer 1"
        told = await session.complete(ask(*request.messages, is_retry=True))
        assert told.completion_id == second.completion_id
        another = await session.complete(request)
        assert another.completion_id != second.completion_id

    asyncio.run(converse())
    assert session.counts().num_retried == 2
    check_recorded_once(session, policy)


def test_what_nobody_came_back_for_is_counted_and_in_no_line():
    session, policy = make_session(lambda number: f"answer {number}")

    async def converse():
        first = await session.complete(ask(user("one")))
        left = asyncio.create_task(
            session.complete(ask(user("one"), first.message.to_message(), user("two")))
        )
        while len(policy.written) < 2:
            await asyncio.sleep(0)
        left.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        # Another request goes on from the same answer, whose line is kept for the one that was left.
        await session.complete(ask(user("one"), first.message.to_message(), user("three")))
        await session.close()

    asyncio.run(converse())
    check_recorded_once(session, policy, delivered=[0, 2])
    assert session.counts().num_lost_tokens == len(policy.written[1][1])


def test_a_template_that_drops_earlier_thoughts_begins_a_line_and_keeps_the_conversation():
    session, policy = make_session(lambda number: f"<think>\nthought {number}\n</think>\n\nanswer {number}")

    async def converse():
        messages = []
        for number in range(3):
            messages.append(user(f"question {number}"))
            messages.append((await session.complete(ask(*messages))).message.to_message())
            messages[-1].pop("reasoning")

    asyncio.run(converse())
    assert len(session.segments()) == 3
    assert session.counts().num_conversations == 1
    check_recorded_once(session, policy)


def test_tokens_are_counted_without_an_answer():
    session, policy = make_session(lambda number: "yes")

    async def converse():
        request = ask(user("one"))
        counted = await session.count_tokens(request)
        first = await session.complete(request)
        assert counted == len(first.prompt_ids)
        more = ask(user("one"), first.message.to_message(), user("two"))
        assert await session.count_tokens(more) == len((await session.complete(more)).prompt_ids)

    asyncio.run(converse())
    assert len(session.segments()) == 1 and len(policy.written) == 2


def test_limits_are_told_and_end_the_session():
    session, _ = make_session(lambda number: "yes", max_turns=2, max_tokens=200)

    async def converse():
        with pytest.raises(RequestRefused, match="context_length_exceeded") as refused:
            await session.complete(ask(user("word " * 500)))
        assert refused.value.status == 400 and session.limit is None
        with pytest.raises(RequestRefused, match="must end with"):
            await session.complete(ask(user("one"), {"role": "assistant", "content": "I"}))
        for _ in range(2):
            await session.complete(ask(user("one")))
        with pytest.raises(RequestRefused, match="max_turns=2"):
            await session.complete(ask(user("one")))
        assert session.limit == "max_turns"
        await session.close()
        with pytest.raises(RequestRefused) as refused:
            await session.complete(ask(user("one")))
        assert refused.value.status == 410

    asyncio.run(converse())
    assert session.counts().num_refused == 4


def test_an_engine_that_failed_leaves_the_line_free():
    session, policy = make_session(lambda number: f"answer {number}")

    async def converse():
        first = await session.complete(ask(user("one")))
        generate = policy.generate
        request = ask(user("one"), first.message.to_message(), user("two"))

        async def fail(**_):
            raise PolicyFault("it is gone")

        policy.generate = fail
        with pytest.raises(PolicyFault):
            await session.complete(request)
        assert isinstance(session.fault, PolicyFault)
        policy.generate = generate
        await session.complete(request)
        assert session.fault is None

    asyncio.run(converse())
    assert len(session.segments()) == 1
    check_recorded_once(session, policy)


def test_texts_that_end_the_answer_are_sampled_and_not_shown():
    session, policy = make_session(lambda number: "I think.Observation: it")

    async def converse():
        completion = await session.complete(ask(user("one"), stop=("Observation:", "</code>")))
        assert (completion.message.content, completion.stop) == ("I think.", "Observation:")
        assert policy.sampling[0].stop == ("Observation:", "</code>")

    asyncio.run(converse())
    check_recorded_once(session, policy)


def test_a_call_that_cannot_be_read_is_shown_as_it_was_written():
    broken = '<tool_call>\n{"name": "search", "arguments": [}\n</tool_call>'
    session, policy = make_session(lambda number: broken if not number else "sorry")

    async def converse():
        first = await session.complete(ask(user("one")))
        assert (first.message.content, first.finish_reason) == (broken, "stop")
        again = {"role": "assistant", "content": first.message.content}
        await session.complete(ask(user("one"), again, user("That was no call.")))

    asyncio.run(converse())
    assert len(session.segments()) == 1
    check_recorded_once(session, policy)


@pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])
@pytest.mark.parametrize("seed", range(20))
def test_random_programs(family, seed):
    """Programs that fork, edit, compact, ask at once, go away and come back: each answer is recorded once."""
    draw = random.Random(f"{family} {seed}")
    texts = [
        "yes",
        CALL,
        f"{CALL}\n{CALL}",
        "<think>\nhm\n</think>\n\nit is",
        f"<think>\nhm\n</think>\n{CALL}",
        "<think>open",
    ]
    said = [draw.choice(texts) + str(number) for number in range(200)]
    session, policy = make_session(lambda number: said[number], family=family)
    known = [()]
    lost = []

    def next_request():
        messages = list(draw.choice(known))
        if messages and draw.random() < 0.15:
            del messages[draw.randrange(len(messages)) :]
        if messages and draw.random() < 0.15:
            place = draw.randrange(len(messages))
            messages[place] = {"role": messages[place]["role"], "content": "edited"}
        for call in messages[-1].get("tool_calls", ()) if messages else ():
            messages.append(result(draw.choice(["found", "<|im_end|>", ""]), call["id"]))
        if not messages or messages[-1]["role"] != "tool" or draw.random() < 0.3:
            messages.append(user(draw.choice(["and?", "go on", "<tool_call>"])))
        return ask(*messages, tools=(TOOL,) if draw.random() < 0.8 else ())

    def learn(request, completion):
        message = completion.message.to_message()
        if draw.random() < 0.5:
            message.pop("reasoning", None)
        known.append((*request.messages, message))

    async def one(request):
        with contextlib.suppress(RequestRefused):
            learn(request, await session.complete(request))

    async def run():
        for _ in range(25):
            kind = draw.random()
            if kind < 0.6:
                await one(next_request())
            elif kind < 0.8:
                await asyncio.gather(*(one(next_request()) for _ in range(3)))
            else:
                request, number = next_request(), len(policy.written)
                task = asyncio.create_task(session.complete(request))
                for _ in range(draw.randrange(4)):
                    await asyncio.sleep(0)
                task.cancel()
                (answer,) = await asyncio.gather(task, return_exceptions=True)
                for _ in range(5):
                    await asyncio.sleep(0)
                if isinstance(answer, BaseException) and len(policy.written) > number:
                    if draw.random() < 0.5:
                        await one(request)
                    else:
                        lost.append(number)
        await session.close()

    asyncio.run(run())
    written = list(range(len(policy.written)))
    recorded = {
        -int(value) - 1 for segment in session.segments() for value in segment.logprobs[segment.sampled]
    }
    assert set(written) - recorded <= set(lost), "an answer was lost that was delivered"
    check_recorded_once(session, policy, delivered=sorted(recorded))
    sampled = sum(len(policy.written[number][1]) for number in written)
    assert sampled == session.counts().num_lost_tokens + sum(s.num_sampled for s in session.segments())


def test_arguments_are_compared_as_values():
    rule = make_rule("exact")
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": [2]}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    written = json.dumps({"a": [2], "b": 1})
    other = {**message, "tool_calls": [{**call, "function": {"name": "f", "arguments": written}}]}
    assert rule(message) == rule(other)
    assert rule(message) != rule({**message, "tool_calls": []})
    with pytest.raises(ValueError, match="exact, loose, role_and_content"):
        make_rule("fuzzy")
