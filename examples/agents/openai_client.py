"""An agent that knows nothing of Polyturn but an address: the `openai` client asks, as it would ask any endpoint."""

import json

from openai import AsyncOpenAI

from polyturn.agents.agent_play import AgentEpisode
from polyturn.envs.messages import AssistantMessage
from polyturn.tools.types import ToolCall


async def play(episode: AgentEpisode) -> str | None:
    """Call the environment's tools until the model answers."""
    messages = list(episode.messages)
    tools = [tool.to_openai() for tool in episode.tools]
    async with AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key) as client:
        while True:
            answer = await client.chat.completions.create(model="policy", messages=messages, tools=tools)
            message = answer.choices[0].message
            if not message.tool_calls:
                return message.content
            messages.append(message.model_dump(exclude_none=True))
            calls = [
                ToolCall(id=call.id, name=call.function.name, arguments=json.loads(call.function.arguments))
                for call in message.tool_calls
            ]
            found = await episode.step(AssistantMessage(tool_calls=tuple(calls)))
            if found is None:
                return None
            messages += found
