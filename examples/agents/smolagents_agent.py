"""An agent of a framework that knows nothing of Polyturn: smolagents', with the environment's tools as its own.

It is no `async` code: it runs in a thread, and writes its calls back as text, so that each of its requests begins
another line of tokens.

pip install "smolagents[openai]"
polyturn train quickstart agent.target=examples/agents/smolagents_agent.py:play \\
    agent.policy_errors=[smolagents.utils:AgentError]
"""

import asyncio
from typing import Any

import anyio
import anyio.to_thread
from smolagents import LogLevel, OpenAIModel, Tool, ToolCallingAgent
from smolagents.agents import EMPTY_PROMPT_TEMPLATES

from polyturn.agents.agent_play import AgentEpisode
from polyturn.envs.messages import AssistantMessage
from polyturn.tools.types import ToolCall, ToolSpec

MAX_STEPS = 3


async def play(episode: AgentEpisode) -> str:
    """Have the framework's loop call the environment's tools until the model gives its final answer."""
    loop = asyncio.get_running_loop()
    texts = {message["role"]: message["content"] for message in episode.messages}
    agent = ToolCallingAgent(
        tools=[_tool_of(episode, spec, loop) for spec in episode.tools],
        model=OpenAIModel(model_id="policy", api_base=episode.base_url, api_key=episode.api_key),
        # Its own prompt has some thousand words, which is more than small models take.
        prompt_templates={**EMPTY_PROMPT_TEMPLATES, "system_prompt": texts.get("system", "")},
        max_steps=MAX_STEPS,
        verbosity_level=LogLevel.OFF,
    )
    # A thread of its own, which is left to itself when the episode is over: its next request is refused.
    answer = await anyio.to_thread.run_sync(
        agent.run, texts["user"], limiter=anyio.CapacityLimiter(1), abandon_on_cancel=True
    )
    return str(answer)


def _tool_of(episode: AgentEpisode, spec: ToolSpec, loop: asyncio.AbstractEventLoop) -> Tool:
    class EnvironmentTool(Tool):
        name, description, output_type = spec.name, spec.description, "string"
        inputs = {  # noqa: RUF012  the framework's own form
            name: {"type": field.get("type", "any"), "description": field.get("description", name)}
            for name, field in spec.parameters.get("properties", {}).items()
        }
        skip_forward_signature_validation = True

        def forward(self, **arguments: Any) -> str:
            call = ToolCall(id=f"call_{spec.name}", name=spec.name, arguments=arguments)
            step = episode.step(AssistantMessage(tool_calls=(call,)))
            found = asyncio.run_coroutine_threadsafe(step, loop).result()
            return found[-1]["content"] if found else "The episode is over."

    return EnvironmentTool()
