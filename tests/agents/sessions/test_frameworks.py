"""Agent frameworks that nobody here wrote, unmodified, against the real endpoint; and what they send back."""

import anyio.to_thread
import pytest
from smolagents import CodeAgent, OpenAIModel, Tool, ToolCallingAgent

from polyturn.agents.sessions.server import SessionServer
from polyturn.envs.messages import AssistantMessage
from polyturn.tools.types import ToolCall
from tests.support.completers import ScriptedCompleter, completion_of


class Search(Tool):
    name = "search"
    description = "Search the knowledge base."
    inputs = {"query": {"type": "string", "description": "What to look for."}}  # noqa: RUF012  its own form
    output_type = "string"

    def forward(self, query: str) -> str:
        return f"{query} works for Holloway Mills."


def calling(name, **arguments):
    return AssistantMessage(
        reasoning="I search first.", tool_calls=(ToolCall(id="call_0", name=name, arguments=arguments),)
    )


async def played(agent_class, answers, **options):
    """What the agent answers, and the requests that it made."""
    completer = ScriptedCompleter(answers)
    async with SessionServer() as server:
        address = await server.open("e", completer)

        def play():
            model = OpenAIModel(model_id="policy", api_base=address.base_url, api_key=address.api_key)
            agent = agent_class(tools=[Search()], model=model, verbosity_level=0, **options)
            return agent.run("Where does Mara work?")

        return await anyio.to_thread.run_sync(play), completer.requests


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_calling_agent_sends_its_calls_back_as_text(stream):
    answers = [calling("search", query="Mara"), calling("final_answer", answer="Holloway Mills")]
    answer, requests = await played(ToolCallingAgent, answers, stream_outputs=stream)
    assert answer == "Holloway Mills"
    first, second = requests
    assert {tool.name for tool in first.tools} == {"search", "final_answer"}
    assert first.stop == ("Observation:", "Calling tools:")
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant", "user"]
    assert second.messages[:2] == first.messages
    assert second.messages[2]["content"].lstrip().startswith("Calling tools:\n[{'id': 'call_0'")
    assert "tool_calls" not in second.messages[2] and "reasoning" not in second.messages[2]
    assert second.messages[3]["content"] == "Observation:\nMara works for Holloway Mills."


async def test_a_code_agent_sends_its_texts_back_with_a_call_behind_them():
    first = AssistantMessage(content='Thought: look.\n<code>\nprint(search("Mara"))\n')
    last = AssistantMessage(content='Thought: done.\n<code>\nfinal_answer("Holloway Mills")\n')
    answers = [completion_of(first, 0, stop="</code>"), completion_of(last, 1, stop="</code>")]
    answer, requests = await played(CodeAgent, answers)
    assert answer == "Holloway Mills"
    assert requests[0].tools == () and "</code>" in requests[0].stop
    assert [message["role"] for message in requests[1].messages] == ["system", "user", "assistant", "user"]
    assert requests[1].messages[2]["content"].startswith(f"{first.content}</code>\nCalling tools:\n[{{'id'")
    assert "Mara works for Holloway Mills." in requests[1].messages[3]["content"]
