"""A model behind an endpoint plays episodes: what it sends, what it is sent, and how its answers end an episode."""

import contextlib

import pytest

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import PROMPT_TOO_LONG, Outcome
from polyturn.agents.episode_loop import play_messages
from polyturn.agents.policies.openai import OpenAIPolicy
from polyturn.agents.policy import PolicyFault
from polyturn.configs.schema.endpoint import ChatEndpoint
from polyturn.envs.messages import Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.chat.client import ChatClient
from polyturn.tools.search.retrieval import SEARCH_SPEC
from polyturn.tools.tool import tool
from tests.support.chat_server import DONE, Answer, chat_server, delta, message


class Place(ToolEnv):
    """Pays for Ashford."""

    @tool
    def search(self, query: str) -> str:
        """Search.

        Args:
            query: Words.
        """
        return f"found {query}"

    def grade(self, message):
        return {"right": float(message.content == "Ashford")}


@contextlib.asynccontextmanager
async def policy_of(*answers, **options):
    async with chat_server(*answers) as server:
        endpoint = ChatEndpoint(url=server.url, model="m", max_retries=0, **options)
        async with contextlib.aclosing(ChatClient(endpoint)) as client:
            yield OpenAIPolicy(client), server


async def play(*answers, limits=EpisodeLimits(), **options):  # noqa: B008  a value that nobody changes
    async with policy_of(*answers, **options) as (policy, server):
        episode = await play_messages(
            env=Place(),
            policy=policy,
            task=Task.from_prompt("t", "Where?"),
            seed=0,
            limits=limits,
            episode_id="e",
            group_id="g",
        )
    return episode, server


def call(call_id="1", arguments='{"query": "x"}', **fields):
    function = {"name": "search", "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function, **fields}


USAGE = {"prompt_tokens": 10, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_episode_with_a_call_is_played_and_its_tokens_are_counted(stream):
    if stream:
        tail = [{"choices": [], "usage": USAGE}, DONE]
        answers = [
            Answer(events=[delta("tool_calls", tool_calls=[{"index": 0, **call()}]), *tail]),
            Answer(events=[delta(content="Ash"), delta("stop", content="ford"), *tail]),
        ]
    else:
        answers = [message(tool_calls=[call()], usage=USAGE), message("Ashford", usage=USAGE)]
    episode, server = await play(*answers, stream=stream)
    assert (episode.outcome, episode.reward, episode.num_turns) == (Outcome.COMPLETED, 1.0, 2)
    assert [each["role"] for each in episode.messages] == ["user", "assistant", "tool", "assistant"]
    assert episode.metrics == {
        "policy_prompt_tokens": 20.0,
        "policy_completion_tokens": 8.0,
        "policy_cached_tokens": 16.0,
        "policy_reasoning_tokens": 0.0,
    }
    assert server.requests[1]["messages"][1]["tool_calls"] == [call()]
    assert server.requests[1]["messages"][2]["content"] == "found x"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (message("Ashford", finish_reason="length"), "max_tokens_per_turn"),
        (message(tool_calls=[call(arguments='{"que')], finish_reason="length"), "max_tokens_per_turn"),
        (message(tool_calls=[call()], finish_reason="length"), "max_tokens_per_turn"),
        (message("Ashf", finish_reason="content_filter"), "content_filter"),
        (Answer(events=[delta("length", content="Ashford"), DONE]), "max_tokens_per_turn"),
    ],
)
async def test_an_answer_that_is_not_whole_is_a_truncation_and_is_not_graded(answer, reason):
    episode, server = await play(answer, stream=answer.events is not None)
    assert (episode.outcome, episode.stop_reason) == (Outcome.TRUNCATED, reason)
    assert (episode.reward, episode.num_turns, len(server.requests)) == (0.0, 1, 1)


async def test_a_conversation_that_outgrows_the_model_is_truncated_and_a_prompt_that_does_fails():
    full = Answer(
        status=400, body={"error": {"code": "context_length_exceeded", "message": "900 of 512 tokens"}}
    )
    episode, _ = await play(message(tool_calls=[call()]), full)
    assert (episode.outcome, episode.stop_reason) == (Outcome.TRUNCATED, "engine_context")
    assert (episode.num_turns, episode.messages[-1]["role"]) == (1, "tool")
    episode, _ = await play(full)
    assert (episode.outcome, episode.stop_reason) == (Outcome.FAILED, PROMPT_TOO_LONG)
    assert episode.error == "900 of 512 tokens"


async def test_a_wait_that_an_endpoint_asks_for_is_not_the_policys_time():
    later = Answer(status=429, body={}, headers={"Retry-After": "1.1"})
    episode, server = await play(
        later, message("Ashford"), limits=EpisodeLimits(timeout_s=1.0, request_timeout_s=60)
    )
    assert (episode.outcome, episode.reward, len(server.requests)) == (Outcome.COMPLETED, 1.0, 2)
    assert episode.timings.queue_s > 1.1


async def test_a_refusal_is_an_answer_and_is_counted():
    episode, _ = await play(message(None, refusal="I cannot."))
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 0.0)
    assert episode.messages[-1]["content"] == "I cannot."
    assert episode.metrics["policy_refusals"] == 1.0


async def test_an_endpoint_that_fails_fails_the_episode_and_is_no_reward():
    episode, _ = await play(Answer(status=500, body={"error": "x"}))
    assert (episode.outcome, episode.stop_reason, episode.reward) == (Outcome.FAILED, "policy_fault", None)
    async with policy_of(Answer(body={"choices": []})) as (policy, _):
        with pytest.raises(PolicyFault, match="holds no choice"):
            await policy.reply(messages=[{"role": "user", "content": "Where?"}], tools=[SEARCH_SPEC])


async def test_reasoning_goes_back_with_calls_to_an_endpoint_that_gave_it():
    first = message(None, reasoning_content="hm", tool_calls=[call()])
    question = {"role": "user", "content": "Where?"}
    async with policy_of(first, message("x")) as (policy, server):
        answer = (await policy.reply(messages=[question], tools=[SEARCH_SPEC])).message
        said = {"role": "assistant", "content": "a", "reasoning": "earlier"}
        await policy.reply(messages=[question, said, question, answer.to_message()], tools=[SEARCH_SPEC])
    sent = server.requests[1]["messages"]
    assert sent[1] == {"role": "assistant", "content": "a"}
    assert sent[3]["reasoning_content"] == "hm"
    assert "reasoning" not in sent[3]


async def test_what_an_endpoint_wants_back_with_a_call_goes_back():
    """As Gemini its signatures, which it refuses to go on without."""
    signature = {"google": {"thought_signature": "S"}}
    episode, server = await play(
        message(tool_calls=[call("a", extra_content=signature), call("b")]), message("Ashford")
    )
    assert episode.reward == 1.0
    assert server.requests[1]["messages"][1]["tool_calls"] == [call("a", extra_content=signature), call("b")]


async def test_an_endpoint_is_asked_in_its_own_format():
    function = {"name": "search", "arguments": {"query": "x"}}
    messages = [
        {"role": "user", "content": "Where?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "Here.", "tool_call_id": "1", "name": "search"},
    ]
    async with policy_of(message(tool_calls=[call("9", '{"query": "y"}')])) as (policy, server):
        answer = (await policy.reply(messages=messages, tools=[SEARCH_SPEC])).message
    assert (answer.content, answer.tool_calls[0].id, answer.tool_calls[0].arguments) == (
        "",
        "9",
        {"query": "y"},
    )
    payload = server.requests[0]
    assert payload["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"query": "x"}'
    assert payload["tools"] == [SEARCH_SPEC.to_openai()]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"query": "x"}, (
        "the transcript is not touched"
    )
