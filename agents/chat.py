"""Conversations as tokens: the prompt once, and after that only what the chat template adds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyturn.envs.messages import Message
from polyturn.tools.types import ToolSpec


def load_tokenizer(path: str | Path) -> Any:
    """The `transformers` tokenizer of a model directory.

    Raises:
        ValueError: the directory is missing, or its tokenizer has no chat template.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path}: no such model directory")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ValueError(f"{path}: the tokenizer has no chat template")
    return tokenizer


class ChatRenderer:
    """Renders messages with a tokenizer's chat template.

    The text of messages never turns into special tokens: where a message holds the text of one (`<|im_end|>`), that
    text is encoded by itself as ordinary tokens. All else is encoded in one go with the template's own text.

    Raises:
        ValueError: the template cannot be used turn by turn, or nothing tells where a turn ends.
    """

    def __init__(self, tokenizer: Any, *, template_options: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            tokenizer: A `transformers` tokenizer with a chat template.
            template_options: Further variables of the template, such as `enable_thinking`.
        """
        self._tokenizer = tokenizer
        self._options = dict(template_options or {})
        self._special_text = _pattern_of_specials(tokenizer)
        self._special_ids = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        closing = self._after_reply(({"role": "user", "content": "Go on."},))[:1]
        ends = {token_id for token_id in closing if token_id in self._special_ids} | {tokenizer.eos_token_id}
        self._stop_token_ids = tuple(sorted(token_id for token_id in ends if token_id is not None))
        if not self._stop_token_ids:
            raise ValueError(
                "the chat template ends a turn with no special token, and the tokenizer has no eos token"
            )

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a turn: the template's own and the tokenizer's eos."""
        return self._stop_token_ids

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end a turn too; they belong to it."""
        return ()

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The tokens that no message text can turn into."""
        return self._special_ids

    def start(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        """The tokens of the conversation so far and of the head of the assistant's turn."""
        shield = _Shield(self._special_text, (messages, [tool.to_openai() for tool in tools]))
        shielded_messages, shielded_tools = shield.value
        return self._encode(self._render(shielded_messages, shielded_tools), shield)

    def extend(self, observation: Sequence[Message], *, last_token_id: int) -> list[int]:
        """The tokens that follow a sampled turn: the end of that turn, `observation`, the head of the next turn.

        Args:
            observation: The new messages.
            last_token_id: The last sampled token. A turn that was cut before its end is closed first.
        """
        token_ids = self._after_reply(observation)
        closed = token_ids[0] == last_token_id and last_token_id in self._stop_token_ids
        return token_ids[1:] if closed else token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a sampled turn without the token that ended it. Bytes that are not UTF-8 become U+FFFD."""
        end = len(token_ids) - 1 if token_ids and token_ids[-1] in self._stop_token_ids else len(token_ids)
        return self._tokenizer.decode(
            list(token_ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _after_reply(self, observation: Sequence[Message]) -> list[int]:
        """All tokens that the template puts after the text of an assistant turn when `observation` follows it.

        What the template makes of a turn does not depend on the turns before it, so a stand-in conversation of one
        short turn serves for any history: its text is found again, and what stands behind it is the delta.
        """
        shield = _Shield(self._special_text, list(observation))
        reply = shield.fresh_word()
        head: list[Message] = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": reply}]
        rendered = self._render([*head, *shield.value], None)
        if rendered.count(reply) != 1:
            times = rendered.count(reply)
            raise ValueError(
                f"the chat template renders an assistant turn {times} times, so turns cannot be appended"
            )
        return self._encode(rendered.partition(reply)[2], shield)

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
        return self._tokenizer.apply_chat_template(
            list(messages), tools=tools or None, tokenize=False, add_generation_prompt=True, **self._options
        )

    def _encode_text(self, text: str) -> list[int]:
        """A text by itself, none of it as special tokens."""
        shield = _Shield(self._special_text, text)
        return self._encode(shield.value, shield)

    def _encode(self, text: str, shield: _Shield) -> list[int]:
        token_ids: list[int] = []
        for part, ordinary in shield.split(text):
            token_ids += self._tokenizer.encode(part, add_special_tokens=False, split_special_tokens=ordinary)
        return token_ids


class _Shield:
    """Hides the text of special tokens in messages behind words that no template or tokenizer takes for anything."""

    def __init__(self, specials: re.Pattern[str], value: Any) -> None:
        texts = list(_strings(value))
        self._prefix = next(
            prefix
            for prefix in (f"standin{number}n" for number in itertools.count())
            if not any(prefix in text for text in texts)
        )
        self._hidden: list[str] = []
        self._specials = specials
        self.value = self._hide(value)

    def fresh_word(self) -> str:
        """A word that occurs nowhere in the messages."""
        return f"{self._prefix}reply"

    def split(self, rendered: str) -> Iterable[tuple[str, bool]]:
        """The parts of a rendered text in order, and whether each is hidden text: to be encoded as ordinary tokens."""
        for index, part in enumerate(re.split(rf"{self._prefix}(\d+)e", rendered)):
            if index % 2:
                yield self._hidden[int(part)], True
            elif part:
                yield part, False

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._specials.sub(self._replace, value)
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._hide(item) for item in value]
        return value

    def _replace(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._prefix}{len(self._hidden) - 1}e"


def _pattern_of_specials(tokenizer: Any) -> re.Pattern[str]:
    """Matches the text of a special token, and at the end of a text also the beginning of one.

    A text that ends in `<|im_` must not grow into a special token with what the template puts behind it.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    beginnings = sorted(
        {text[:length] for text in specials for length in range(1, len(text))}, key=len, reverse=True
    )
    alternatives = [re.escape(text) for text in specials] + [rf"{re.escape(text)}\Z" for text in beginnings]
    return re.compile("|".join(alternatives) or r"(?!)")


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(_strings, (*value.keys(), *value.values())))
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(map(_strings, value))
