"""A customer played by a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import time
from typing import Any

import httpx

from polyturn.envs.customer_service.scenarios import Scenario
from polyturn.envs.faults import EnvironmentFault
from polyturn.tools.retries import Retries, Tries, asked_wait_s, may_pass
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

    def __init__(
        self, scenario: Scenario, *, client: httpx.Client, base_url: str, model: str, timeout_s: float = 60.0
    ) -> None:
        """`timeout_s` is for each of the model's messages, retries included."""
        self._client, self._timeout_s = client, timeout_s
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
            text = _content(self._answer().json())
        except (httpx.HTTPError, ValueError) as error:
            raise EnvironmentFault(
                f"{public_url(self._url)}: the customer cannot speak: {blank_credentials(str(error))}"
            ) from error
        self._messages.append({"role": "assistant", "content": text})
        return None if LEAVES in text else text

    def _answer(self) -> httpx.Response:
        """The endpoint's answer, within `timeout_s` with all retries. Raises `httpx.HTTPError`."""
        body = {"model": self._model, "messages": self._messages, "temperature": 0.0}
        tries = Tries(Retries(deadline_s=self._timeout_s))
        while True:
            try:
                response = self._client.post(self._url, json=body, timeout=max(0.001, tries.left_s))
            except httpx.ConnectError:
                wait_s = tries.next_wait_s()
                if wait_s is None:
                    raise
            else:
                wait_s = tries.next_wait_s(asked_wait_s(response.headers))
                if wait_s is None or not may_pass(response.status_code):
                    return response.raise_for_status()
            time.sleep(wait_s)


def _content(answer: Any) -> str:
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the answer holds no message: {str(answer)[:200]}") from error
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the answer is empty")
    return text
