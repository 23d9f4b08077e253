"""Programs with the real clients play an episode over the real endpoint: the session goes on from sampled tokens."""

import asyncio
import json
from pathlib import Path

import anthropic
import openai
import pytest

from polyturn.agents.agent_play import load_agent, play_agent
from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.dialects import HermesDialect
from polyturn.agents.episode import Outcome
from polyturn.agents.sessions.server import SessionServer
from polyturn.envs.messages import Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import tool
from tests.support.chat_families import FAMILIES
from tests.support.policies import CALL, Says

THINKING_CALL = f"<think>\nMara it is.\n</think>\n\n{CALL}"
FINAL = '<tool_call>\n{"name": "final_answer", "arguments": {"answer": "Ashford"}}\n</tool_call>'


class Towns(ToolEnv):
    @tool
    def search(self, query: str) -> str:
        """Look it up."""
        return f"{query} is in Ashford"

    def grade(self, message):
        return {"correct": float(message.content.endswith(self.task.label))}


async def chat_agent(episode):
    functions = [spec.to_openai()["function"] for spec in episode.tools]
    tools = [{"type": "function", "function": {**function, "strict": True}} for function in functions]
    messages = list(episode.messages)
    async with openai.AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key) as client:
        while True:
            async with client.chat.completions.stream(model="m", messages=messages, tools=tools) as events:
                reply = (await events.get_final_completion()).choices[0].message
            if not reply.tool_calls:
                return reply.content
            messages.append(reply)
            for call in reply.tool_calls:
                result = episode.env.search(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


async def responses_agent(episode):
    tools = [{"type": "function", **spec.to_openai()["function"], "strict": True} for spec in episode.tools]
    async with openai.AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key) as client:
        given, previous = list(episode.messages), None
        while True:
            response = await client.responses.create(
                model="m", input=given, tools=tools, previous_response_id=previous
            )
            calls = [item for item in response.output if item.type == "function_call"]
            if not calls:
                return response.output_text
            previous = response.id
            given = [
                {
                    "type": "function_call_output",
                    "call_id": call.call_id,
                    "output": episode.env.search("Mara"),
                }
                for call in calls
            ]


async def messages_agent(episode):
    tools = [
        {"name": spec.name, "description": spec.description, "input_schema": spec.parameters}
        for spec in episode.tools
    ]
    client = anthropic.AsyncAnthropic(base_url=episode.anthropic_base_url, api_key=episode.api_key)
    messages = list(episode.messages)
    async with client:
        while True:
            reply = await client.messages.create(model="m", max_tokens=50, messages=messages, tools=tools)
            messages.append({"role": "assistant", "content": reply.content})
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": episode.env.search(**block.input)}
                for block in reply.content
                if block.type == "tool_use"
            ]
            if not results:
                return reply.content[-1].text
            messages.append({"role": "user", "content": results})


def played(agent, *texts):
    tokenizer = FAMILIES["qwen3"].tokenizer
    policy = Says(tokenizer, lambda number: texts[min(number, len(texts) - 1)])

    async def play():
        async with SessionServer() as endpoint:
            return await play_agent(
                env=Towns(),
                policy=policy,
                agent=agent,
                endpoint=endpoint,
                renderer=ChatRenderer(tokenizer),
                dialect=HermesDialect(),
                task=Task.from_prompt("t", "Where is Mara?", label="Ashford"),
                seed=0,
                limits=EpisodeLimits(max_turns=9, max_tokens_per_turn=500, max_tokens_per_episode=9000),
                episode_id="run/e",
                group_id="g",
            )

    return asyncio.run(play()), policy


@pytest.mark.parametrize("agent", [chat_agent, responses_agent, messages_agent])
def test_a_conversation_over_http_is_one_line_of_sampled_tokens(agent):
    episode, policy = played(agent, THINKING_CALL, CALL, "It is Ashford")
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 1.0), episode.error
    [segment] = episode.segments
    assert segment.num_sampled == sum(len(ids) for _, ids in policy.written)
    assert episode.metrics["num_branches"] == episode.metrics["num_refused"] == 0
    assert segment.token_ids.tolist() == [*policy.written[-1][0], *policy.written[-1][1]]


def test_a_framework_that_writes_its_calls_as_text_has_a_line_for_each_of_its_conversations():
    example = Path(__file__).parents[3] / "examples" / "agents" / "smolagents_agent.py"
    episode, policy = played(load_agent(f"{example}:play"), THINKING_CALL, FINAL)
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 1.0), episode.error
    assert len(episode.segments) == 2
    assert sum(segment.num_sampled for segment in episode.segments) == sum(
        len(ids) for _, ids in policy.written
    )
