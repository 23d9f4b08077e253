"""A customer played by a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import Any

import httpx

from polyturn.envs.customer_service.scenarios import Scenario
from polyturn.envs.faults import EnvironmentFault
from polyturn.tools.secrets import blank_credentials, public_url

LEAVES = "###END###"
"""What the model writes when the customer leaves."""

_INSTRUCTIONS = """You play a customer in a chat with a shop's agent. Stay in the role; write short messages.
Bring up your requests one at a time, in this order:
{requests}
What you know and tell only when asked:
{facts}
Invent nothing that is not written here. Say yes when the agent proposes what you asked for.
When all requests are settled or refused for good, answer with {leaves} and nothing else."""


class LLMUser:
    """Asks the model for each of the customer's messages.

    An endpoint that fails is an `EnvironmentFault`: a customer that could not speak is no failure of the agent.
    """

    def __init__(self, scenario: Scenario, *, client: httpx.Client, base_url: str, model: str) -> None:
        self._client = client
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._model = model
        facts = [*scenario.identity.values()]
        for request in scenario.requests:
            facts += request.facts.values()
        instructions = _INSTRUCTIONS.format(
            requests="\n".join(f"- {request.opening}" for request in scenario.requests),
            facts="\n".join(f"- {fact}" for fact in dict.fromkeys(facts)),
            leaves=LEAVES,
        )
        # Seen from the customer, the agent is the user and the customer the assistant.
        self._messages: list[dict[str, str]] = [
            {"role": "system", "content": instructions},
            {"role": "user", "content": "Hello, how can I help you?"},
        ]

    def opening(self) -> str:
        """The model's first message."""
        text = self._ask()
        if text is None:
            raise EnvironmentFault(f"{public_url(self._url)}: the customer left before saying anything")
        return text

    def reply(self, message: str) -> str | None:
        """The model's answer; None when it leaves."""
        self._messages.append({"role": "user", "content": message})
        return self._ask()

    def _ask(self) -> str | None:
        try:
            response = self._client.post(
                self._url, json={"model": self._model, "messages": self._messages, "temperature": 0.0}
            )
            response.raise_for_status()
            text = _content(response.json())
        except (httpx.HTTPError, ValueError) as error:
            raise EnvironmentFault(
                f"{public_url(self._url)}: the customer cannot speak: {blank_credentials(str(error))}"
            ) from error
        self._messages.append({"role": "assistant", "content": text})
        return None if LEAVES in text else text


def _content(answer: Any) -> str:
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the answer holds no message: {str(answer)[:200]}") from error
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the answer is empty")
    return text
