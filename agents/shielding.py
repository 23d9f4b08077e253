"""Text that stays text: whatever a message says, it never becomes a token that marks a conversation's structure."""

from __future__ import annotations

import itertools
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson

from polyturn.envs.messages import Message


class TextFinder:
    """Finds texts of a fixed set in other texts: from left to right, the longest at each place, none overlapping.

    A regular expression of thousands of alternatives would try them one by one; here each length is looked up once.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = frozenset(filter(None, texts))
        by_first: dict[str, set[int]] = {}
        for text in self._texts:
            by_first.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(lengths, reverse=True) for first, lengths in by_first.items()}
        firsts = "".join(map(re.escape, by_first))
        self._first = re.compile(f"[{firsts}]" if firsts else r"(?!)")
        self._beginnings = frozenset(text[:end] for text in self._texts for end in range(1, len(text)))
        self._longest = max(map(len, self._texts), default=0)

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Where each found text begins and ends."""
        end = 0
        for first in self._first.finditer(text):
            start = first.start()
            if start < end:
                continue
            for length in self._lengths[first[0]]:
                found = text[start : start + length]
                if len(found) == length and found in self._texts:
                    end = start + length
                    yield start, end
                    break

    def may_find(self, text: str) -> bool:
        """Whether a text holds what one of them begins with; quickly."""
        return self._first.search(text) is not None

    def replace(self, text: str, replacement: Callable[[str], str], *, also_begun: bool = False) -> str:
        """The text with what is found replaced, and with `also_begun` what may be the beginning of one at its end."""
        # Nearly every text holds nothing that any of them begins with.
        if not self.may_find(text):
            return text
        parts, position = [], 0
        for start, end in self.find(text):
            parts += [text[position:start], replacement(text[start:end])]
            position = end
        rest = text[position:]
        if also_begun:
            for start in range(max(0, len(rest) - self._longest), len(rest)):
                if rest[start:] in self._beginnings:
                    parts += [rest[:start], replacement(rest[start:])]
                    return "".join(parts)
        return "".join((*parts, rest)) if parts else text


LONG_TEXT_CHARS = 8_192
"""From here on a text is encoded without the interpreter, which others need meanwhile; to let it go and take it back
costs as much as to encode a few hundred characters."""


class Shield:
    """Messages in which the text of tokens is hidden behind words that no template takes for anything."""

    def __init__(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), *, foreign: TextFinder, own: TextFinder
    ) -> None:
        """
        Args:
            foreign: What is hidden in the messages of others and in the tools.
            own: What is hidden in the assistant's own, which may think and call.
        """
        self.prefix = next(
            prefix
            for prefix in (f"standin{number}n" for number in itertools.count())
            if not _occurs(prefix, messages) and not _occurs(prefix, tools)
        )
        self.hidden: list[str] = []
        self.messages: list[Any] = [
            self._hide(message, own if message.get("role") == "assistant" else foreign)
            for message in messages
        ]
        self.tools: list[Any] = [self._hide(tool, foreign) for tool in tools]

    def fresh_word(self) -> str:
        """A word that occurs nowhere in the messages."""
        return f"{self.prefix}reply"

    def reveal(self, text: str) -> str:
        """The text with all that was hidden in its place."""
        return re.sub(rf"{self.prefix}(\d+)e", lambda word: self.hidden[int(word[1])], text)

    def _hide(self, value: Any, finder: TextFinder) -> Any:
        if isinstance(value, str):
            return finder.replace(value, self._keep, also_begun=True)
        if isinstance(value, Mapping):
            return {self._hide(key, finder): self._hide(item, finder) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._hide(item, finder) for item in value]
        return value

    def _keep(self, text: str) -> str:
        self.hidden.append(text)
        return f"{self.prefix}{len(self.hidden) - 1}e"


class ShieldedEncoder:
    """Encodes what a template made of shielded messages: its own marks as tokens, what was hidden as plain text.

    It has a copy of the tokenizer in which every mark is spelled in a way that nobody can know. There the template's
    marks are respelled and the hidden texts put back, and all is encoded in one go: the tokens are the tokenizer's own
    in every respect but that the marks in hidden texts are none.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises `ValueError` for a tokenizer that is not made by the `tokenizers` library."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not hasattr(backend, "to_str"):
            raise ValueError(
                f"a tokenizer of the class {type(tokenizer).__name__} cannot be used: it has no tokenizer.json; "
                "save the model with a fast tokenizer"
            )
        self._tokenizer = tokenizer
        self.ids = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.content
        }
        """Every added token's id by its text."""
        self.texts = {token_id: text for text, token_id in self.ids.items()}
        self.special = frozenset(
            {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
            | set(tokenizer.all_special_tokens)
        )
        """The texts of those that the tokenizer itself flags as special."""
        self.marks = frozenset(text for text in self.ids if is_mark(text, special=text in self.special))
        """The texts of added tokens that mean something by themselves; others are words or white space."""
        self.anchor = next(
            (
                token.content
                for token in tokenizer.added_tokens_decoder.values()
                if token.content in self.marks and not (token.lstrip or token.rstrip or token.single_word)
            ),
            None,
        )
        """A token to put before a text that begins no conversation; None where every one changes what follows."""
        self.foreign = TextFinder(self.marks)
        self._all = TextFinder(self.ids)
        self._backend: Any = backend
        self._respelled: Any = None
        self._respelling = threading.Lock()
        self._spelling: dict[str, str] = {}
        self._real_ids: dict[int, int] = {}

    def tokens_in(self, text: str) -> list[tuple[int, str]]:
        """The added tokens in a text that a template wrote, with the places where they begin."""
        return [(start, text[start:end]) for start, end in self._all.find(text)]

    def encode(self, text: str, shield: Shield | None = None, *, behind: str | None = None) -> list[int]:
        """The tokens of a rendered text.

        Args:
            shield: Of the messages that it was rendered from.
            behind: The text of an added token that stands before, so that nothing is taken for the beginning of a text.
        """
        whole = (behind or "") + text
        if shield is not None and shield.hidden:
            token_ids = self._encode_revealed(whole, shield)
        else:
            token_ids = _encode(self._plain_backend(), whole)
        if behind is not None:
            assert token_ids[0] == self.ids[behind], f"{behind!r} did not become a token of its own"
            return token_ids[1:]
        return token_ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens, those that mark something included."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=False)
        return text

    def _encode_revealed(self, text: str, shield: Shield) -> list[int]:
        if self._respelled is None:
            self._respelled = self._respell()
        tokenizer, spelling, real_ids = self._respelled
        spelled = shield.reveal(self.foreign.replace(text, spelling.__getitem__))
        return [real_ids.get(token_id, token_id) for token_id in _encode(tokenizer, spelled)]

    def _plain_backend(self) -> Any:
        """The tokenizer's backend, set up for all of a text and nothing else, as `transformers` does at every call."""
        backend = self._backend
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens:
            backend.encode_special_tokens = False
        return backend

    def _respell(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """The copy of the tokenizer, each mark's spelling in it, and the real ids of the marks by those in the copy."""
        from tokenizers import Tokenizer

        nonce = secrets.token_hex(8)
        spelling = {text: f"\u2991{nonce}x{self.ids[text]:x}\u2992" for text in self.marks}
        data = respelled(orjson.loads(self._backend.to_str()), spelling)
        tokenizer = Tokenizer.from_str(orjson.dumps(data).decode())
        ids: dict[int, int] = {}
        for text, spelled in spelling.items():
            token_id = tokenizer.token_to_id(spelled)
            assert token_id is not None, f"{text!r} is lost"
            ids[token_id] = self.ids[text]
        return tokenizer, spelling, ids


def _encode(backend: Any, text: str) -> list[int]:
    encoding = (
        backend.encode(text, add_special_tokens=False)
        if len(text) < LONG_TEXT_CHARS
        else backend.encode_batch_fast([text], add_special_tokens=False)[0]
    )
    token_ids: list[int] = encoding.ids
    return token_ids


def is_mark(text: str, *, special: bool) -> bool:
    """Whether an added token marks something. Words, digits and white space that are no special tokens do not."""
    bare = text.replace("\u2581", "").strip()
    return bool(bare) and (special or not bare.isalnum())


def respelled(data: dict[str, Any], spelling: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json in which some tokens have another text, and the same id wherever the vocabulary has them.

    Merges that would make one of them from plain text are left out.
    """
    data["truncation"] = data["padding"] = data["post_processor"] = None
    for token in data["added_tokens"]:
        token["content"] = spelling.get(token["content"], token["content"])
    model = data["model"]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {spelling.get(text, text): token_id for text, token_id in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[spelling.get(text, text), score] for text, score in vocab]
    if model.get("unk_token") is not None:
        model["unk_token"] = spelling.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, spelling)]
    return data


def _makes(merge: str | Sequence[str], spelling: Mapping[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in spelling or right in spelling or left + right in spelling


def _occurs(word: str, value: Any) -> bool:
    """Whether a word stands in any text of a value."""
    if isinstance(value, str):
        return word in value
    # Loops, because a generator for each message would cost more than the search.
    if isinstance(value, Mapping):
        for key, item in value.items():
            if word in key or _occurs(word, item):
                return True
    elif isinstance(value, (list, tuple)):
        for item in value:
            if _occurs(word, item):
                return True
    return False
