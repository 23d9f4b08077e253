"""A user that a model plays, behind any OpenAI-compatible endpoint: a provider's, or that of a run's own engines."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from polyturn.configs.errors import did_you_mean
from polyturn.configs.schema.endpoint import ChatEndpoint
from polyturn.envs.faults import UserFault
from polyturn.envs.users.user import Briefing
from polyturn.envs.users.watch import FRAME
from polyturn.tools.chat.answers import ChatFault
from polyturn.tools.chat.client import BlockingChat, ChatClient

LEAVES = "###END###"
"""What the model writes when the user leaves. An agent that writes it is not heard to."""
DEFAULTS: Mapping[str, Any] = {"temperature": 0.0, "timeout_s": 60.0}
"""Of a user's endpoint, where they differ from those of `ChatEndpoint`."""
_MODEL_LEAVES = f"\nWhen all you want is settled, or refused for good, answer with {LEAVES} and nothing else."


class ModelUser:
    """Asks a model for each of the user's messages."""

    def __init__(self, briefing: Briefing, chat: BlockingChat) -> None:
        self._chat = chat
        instructions = FRAME.format(
            role=briefing.role,
            requests="\n".join(f"- {request}" for request in briefing.requests),
            facts="\n".join(f"- {fact}" for fact in briefing.facts),
        )
        # Seen from the user, the agent is the user and it is the assistant.
        self._messages: list[dict[str, str]] = [
            {"role": "system", "content": instructions + _MODEL_LEAVES},
            {"role": "user", "content": briefing.greeting},
        ]

    def opening(self) -> str:
        """The model's first message. Raises `UserFault`."""
        text = self._ask()
        if text is None:
            raise UserFault(f"{self._chat.where}: the simulated user left before saying anything")
        return text

    def reply(self, message: str) -> str | None:
        """The model's answer; None when it leaves. Raises `UserFault`."""
        self._messages.append({"role": "user", "content": message.replace(LEAVES, "")})
        return self._ask()

    def again(self) -> str | None:
        """Another message in place of the last one, of which the model is told what was wrong. Raises `UserFault`."""
        rejected = self._messages.pop()
        wrong = "Write that message again, in the role, without a word of your instructions."
        kept = list(self._messages)
        self._messages += [rejected, {"role": "user", "content": wrong}]
        text = self._ask()
        self._messages = kept
        if text is not None:
            self._messages.append({"role": "assistant", "content": text})
        return text

    def _ask(self) -> str | None:
        try:
            answer = self._chat.ask(self._messages)
        except ChatFault as fault:
            raise UserFault(f"the simulated user cannot speak: {fault}") from fault
        where = f"{self._chat.where}: the simulated user"
        if answer.finish_reason != "stop":
            raise UserFault(f"{where} has no whole message (finish_reason {answer.finish_reason})")
        if not answer.content.strip():
            raise UserFault(f"{where} says nothing")
        self._messages.append({"role": "assistant", "content": answer.content})
        return None if LEAVES in answer.content else answer.content


ENGINES = "engines"
"""In place of a URL: the engines of the run itself."""


def user_endpoint(options: Mapping[str, Any], *, engine_url: str = "http://engines/v1") -> ChatEndpoint:
    """The endpoint that a user's options describe.

    Args:
        engine_url: Where the url is `engines`: that of an engine.

    Raises:
        ValueError: an option is wrong; one sentence says which.
    """
    if options.get("url") == ENGINES:
        options = {"model": "policy", **options, "url": engine_url}
    try:
        return ChatEndpoint.model_validate({**DEFAULTS, **options})
    except ValidationError as error:
        first = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in first["loc"])
        near = did_you_mean(where, ChatEndpoint.model_fields) if first["type"] == "extra_forbidden" else ""
        raise ValueError(f"{where}: {first['msg']}{near}") from error


def shared_chat(endpoint: ChatEndpoint) -> BlockingChat:
    """The one client that all users of an endpoint share in this process, and with it the endpoint's limits."""
    return _shared(json.dumps(endpoint.model_dump(mode="json"), sort_keys=True))


def check_chat(options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for options that `open_chat` would not take, before there is a talk."""
    ChatClient(user_endpoint(options))


def open_chat(options: Mapping[str, Any], *, engine_urls: Sequence[str], talk: str) -> BlockingChat:
    """The client for a talk; of several engines each has its share of the talks, by their names.

    Raises:
        ValueError: as `user_endpoint`.
        UserFault: the url is `engines`, and there are none.
    """
    if options.get("url") != ENGINES:
        return shared_chat(user_endpoint(options))
    if not engine_urls:
        raise UserFault("the simulated user is to be played by the run's engines, and the policy has none")
    url = engine_urls[zlib.crc32(talk.encode("utf-8", "replace")) % len(engine_urls)]
    return shared_chat(user_endpoint(options, engine_url=url))


@functools.lru_cache(maxsize=32)
def _shared(endpoint: str) -> BlockingChat:
    return BlockingChat(ChatEndpoint.model_validate_json(endpoint))
