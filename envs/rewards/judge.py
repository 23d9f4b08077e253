"""Rewards from a model that grades by a prompt, behind OpenAI-compatible addresses or in engines of the run.

One request an episode, with the deadline, retries and breaker of other services. A reply in which no grade is found is
asked for again; after that, as for any failure, the episode has no reward and its attempt is a fault.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import orjson

from polyturn.configs.schema.tasks import JudgeReward, RemoteReward
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import EpisodeView, Message, RewardValue
from polyturn.envs.rewards.remote import RemoteGrader, Waiting, settle
from polyturn.tools.secrets import read_secret

PLACES = ("question", "conversation", "answer", "label", "low", "high")
"""What a prompt may name in braces."""
MAX_SHOWN = 200
THOUGHT_END = "</think>"


class JudgeGrader(RemoteGrader):
    """A reward that a model gives. Any number of environments, threads and event loops may share one.

    Every failure is an `EnvironmentFault`, as of any `RemoteGrader`: no grade by the deadline, no connection, a
    refusal, a reply without a grade however often it was asked for.
    """

    name = "judge"

    def __init__(self, config: JudgeReward) -> None:
        """Raises `ValueError` for a url that is none, or a key that cannot be read. Sends nothing yet."""
        self._judge = config
        urls = [f"{url.rstrip('/')}/chat/completions" for url in config.urls]
        super().__init__(
            RemoteReward(
                kind="remote",
                # Before the run serves it there is nothing to ask.
                url=urls[0] if urls else "http://unserved.invalid",
                batch_size=1,
                linger_s=0.0,
                deadline_s=config.deadline_s,
                max_retries=config.max_retries,
                max_concurrent_requests=config.max_concurrent_requests,
                breaker_failures=config.breaker_failures,
                breaker_reset_s=config.breaker_reset_s,
            )
        )
        # A pair of next calls at once may give two requests the same address, which does no harm.
        self._urls = itertools.cycle(urls)
        if config.api_key_file is not None:
            key = read_secret(config.api_key_file, option="api_key_file")
            self._headers = {"authorization": f"Bearer {key}"}

    async def __call__(self, episode: EpisodeView) -> RewardValue:
        if not self._judge.urls:
            raise EnvironmentFault(
                f"the judge {self._judge.judge!r} is served nowhere: it grades within a run"
            )
        return await super().__call__(episode)

    def _next_url(self) -> str:
        return next(self._urls)

    def _encode(self, episode: EpisodeView) -> orjson.Fragment:
        judge = self._judge
        body = {
            "model": judge.model,
            "messages": [{"role": "user", "content": self._prompt(episode)}],
            "temperature": judge.temperature,
            "max_tokens": judge.max_tokens,
            **judge.request,
        }
        return orjson.Fragment(orjson.dumps(body))

    def _prompt(self, episode: EpisodeView) -> str:
        values = {
            "question": _written(episode.task.messages),
            "conversation": _written(episode.messages),
            "answer": episode.answer,
            "label": "" if episode.label is None else str(episode.label),
            "low": f"{self._judge.low:g}",
            "high": f"{self._judge.high:g}",
        }
        # In one pass: what an answer has in braces is its own.
        return re.sub(rf"\{{({'|'.join(PLACES)})\}}", lambda found: values[found[1]], self._judge.prompt)

    def _content(self, batch: Sequence[Waiting]) -> bytes:
        (item,) = batch
        return orjson.dumps(item.body)

    def _read(self, answer: Any, batch: Sequence[Waiting]) -> str:
        try:
            reply = answer["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError) as error:
            raise EnvironmentFault(
                f"{self._url} answered no chat completion: {answer!r:.{MAX_SHOWN}}"
            ) from error
        grade = read_grade(str(reply), self._judge)
        if grade is None:
            return f"{self._url}: no grade in the judge's reply {str(reply)[-MAX_SHOWN:]!r}"
        settle(batch, grade)
        return ""


def read_grade(reply: str, config: JudgeReward) -> float | None:
    """The reward that a reply stands for; None where there is no grade in it, or one that is out of range."""
    found = [match[1] for match in re.finditer(config.pattern, reply.rpartition(THOUGHT_END)[2])]
    if not found or found[-1] is None:
        return None
    if config.values:
        by_name = {name.lower(): value for name, value in config.values.items()}
        return by_name.get(found[-1].strip().lower())
    try:
        number = float(found[-1])
    except ValueError:
        return None
    if not config.low <= number <= config.high:
        return None
    return (number - config.low) / (config.high - config.low)


def _written(messages: Sequence[Message]) -> str:
    """Messages as a text: one alone as it is, several each behind its role."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
