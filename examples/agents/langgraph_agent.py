"""An agent of a framework that knows nothing of Polyturn: LangGraph's, with the environment's tools as its own.

pip install langgraph langchain-openai
polyturn train quickstart agent.target=examples/agents/langgraph_agent.py:play
"""

from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI
from langgraph.errors import GraphRecursionError
from langgraph.prebuilt import create_react_agent
from pydantic import SecretStr

from polyturn.agents.agent_play import AgentEpisode
from polyturn.envs.messages import AssistantMessage
from polyturn.tools.types import ToolCall, ToolSpec


async def play(episode: AgentEpisode) -> str | None:
    """Have the framework's loop call the environment's tools until the model answers."""
    model = ChatOpenAI(model="policy", base_url=episode.base_url, api_key=SecretStr(episode.api_key))
    agent = create_react_agent(model, [_tool_of(episode, spec) for spec in episode.tools])
    try:
        state = await agent.ainvoke({"messages": list(episode.messages)})
    except GraphRecursionError:
        return None
    last = state["messages"][-1]
    return str(last.content) if isinstance(last, AIMessage) else None


def _tool_of(episode: AgentEpisode, spec: ToolSpec) -> StructuredTool:
    async def call(**arguments: Any) -> str:
        asked = AssistantMessage(
            tool_calls=(ToolCall(id=f"call_{spec.name}", name=spec.name, arguments=arguments),)
        )
        found = await episode.step(asked)
        return found[-1]["content"] if found else "The episode is over."

    return StructuredTool(
        name=spec.name, description=spec.description, args_schema=dict(spec.parameters), coroutine=call
    )
