"""Secrets and credentials: how they are told from other values, and how they are blanked in what anybody may read.

A secret is named, not written: by the file that holds it, or as `env:NAME` (`read_secret`). A config that has one in it
is refused, since configs are stored (`literal_secrets`).

Two kinds of text leave the program. What a tool or service *that we gave secrets* says is searched for those secrets,
in every spelling that a program is likely to give them (`Secrets`). Any message of a fault is searched for what looks
like a credential, whoever's it is (`blank_credentials`).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

_SECRET_NAME = re.compile(
    r"(?:key|token|secret|pass(?:word|wd|phrase)|credentials?|authorization|cookie|signature|bearer"
    r"|(?:\A|[-_.])(?:auth|dsn|jwt|pass|pat|sig)|[-_.]pwd)(?:[-_.]?(?:id|value|base64|b64))?\Z",
    re.IGNORECASE,
)
_CERTAIN_NAME = re.compile(
    r"(?:api[-_.]?(?:key|token)|(?:access|auth|bearer|secret|private)[-_.]?(?:key|token)|passw(?:or)?d|passphrase"
    r"|(?:\A|[-_.])secret|authorization|credentials?)\Z",
    re.IGNORECASE,
)
"""Names of nothing but secrets."""
_OPAQUE = re.compile(
    r"(?:sk-|sk_|ghp_|gho_|ghs_|github_pat_|glpat-|hf_|xox[a-z]-|AKIA|AIza|eyJ|npm_|pypi-)[A-Za-z0-9+/=_.~-]{8,}\Z"
    r"|(?=[^A-Za-z]*[A-Za-z])(?=[^0-9]*[0-9])[A-Za-z0-9+/=_.~-]{20,}\Z"
)
"""Begins as the keys of well-known services do; or long, without spaces, letters and digits mixed: drawn at random."""
_SHORTEST = 4
"""Values below it, such as "1", are no secrets, and hiding them would garble texts."""
_SCHEME_WORD = re.compile(r"(?:bearer|basic|token|apikey|digest)\s+(?=\S)", re.IGNORECASE)

_USERINFO = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]{0,20}://)[^\s/?#'\"<>]{1,400}@")
_NAMED_VALUE = re.compile(
    r"((?:[?&](?:key|token|sig|auth)=)"
    r"|(?:--(?:key|token|auth)[= ])"
    r"|(?:(?:api|access|account|secret|private|subscription|refresh|auth|bearer|session|id)[-_.]?(?:key|token)"
    r"|(?:client[-_.]?)?secret|password|passwd|signature|credential)\\?[\"']?\s{0,3}[=:]\s{0,3}\\?[\"']?"
    r"|--[a-z-]{0,30}(?:key|token|secret|password)[= ])"
    r"(?!\[)[^\s&;,\"'\\)}]{4,4000}",
    re.IGNORECASE,
)
_AUTHORIZATION = re.compile(
    r"\b((?:(?:proxy-)?authorization|(?:set-)?cookie)[\"']?\s{0,3}[=:]\s{0,3}[\"']?)[^\r\n\"']{4,4000}",
    re.IGNORECASE,
)
_BEARER = re.compile(
    r"\b(Bearer\s{1,3})[A-Za-z0-9._~+/=-]{6,4000}|\b(Basic\s{1,3})(?=[A-Za-z+/]{0,60}[0-9=])[A-Za-z0-9+/=]{8,4000}"
)
_KNOWN_KEY = re.compile(
    r"(?<![A-Za-z0-9_-])(?:(?:sk-|github_pat_|glpat-|xox[a-z]-|AIza|eyJ)(?=[A-Za-z_.-]{0,60}[0-9])[A-Za-z0-9_.-]{16,4000}"
    r"|(?:gh[ops]_|hf_|npm_|AKIA|sk_live_|sk_test_)(?=[A-Za-z]{0,60}[0-9])[A-Za-z0-9]{16,4000})"
)
"""A key that nothing names, known by how those of its service begin and by its length."""


def blank_credentials(text: str) -> str:
    """`text` without user names and passwords in URLs, values of keys and tokens, and authorization headers.

    Takes time linear in the text's length. A pattern is not tried where no word is that all it finds would have; beyond
    ASCII, where letters have more cases than two, each is.
    """
    is_ascii, lowered = text.isascii(), text.lower()

    def may_have(*words: str) -> bool:
        return not is_ascii or any(word in lowered for word in words)

    if may_have("://"):
        text = _USERINFO.sub(r"\1[credentials]@", text)
    if may_have("authorization", "cookie"):
        text = _AUTHORIZATION.sub(r"\1[credentials]", text)
    if may_have("bearer", "basic"):
        text = _BEARER.sub(r"\1\2[credentials]", text)
    if may_have("key", "token", "sig", "auth", "secret", "passw", "credential"):
        text = _NAMED_VALUE.sub(r"\1[credentials]", text)
    return _KNOWN_KEY.sub("[credentials]", text)


def public_url(url: str) -> str:
    """A URL as it may be read: without user name, password, query and fragment."""
    scheme, separator, rest = url.partition("://")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


class Secrets:
    """Values that must not be read, each with the name that stands for it."""

    def __init__(self, named: Iterable[tuple[str, str]]) -> None:
        spellings: dict[str, str] = {}
        for name, value in named:
            for spelling in _spellings(value):
                if len(spelling) >= _SHORTEST:
                    spellings.setdefault(spelling, name)
        self._names = spellings
        # Longest first: a secret may contain another.
        ordered = sorted(spellings, key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(spelling) for spelling in ordered)) if ordered else None

    def blank(self, text: str) -> str:
        """`text` with the name of each secret in the place of its value."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: f"[{self._names[match.group()]}]", text)

    def blank_tree(self, value: Any) -> Any:
        """A JSON value with every text in it blanked, keys included."""
        if isinstance(value, str):
            return self.blank(value)
        if isinstance(value, Mapping):
            return {self.blank(str(key)): self.blank_tree(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.blank_tree(item) for item in value]
        return value


def secrets_in_mapping(values: Mapping[str, str]) -> list[tuple[str, str]]:
    """The secrets among environment variables or headers: by their names, or because they look drawn at random.

    Plain ones, such as `LANG` or `Content-Type`, are none: hiding their values would garble what a server says.
    """
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if _SECRET_NAME.search(name) or _OPAQUE.match(value):
            found.append((name, value))
        elif "://" in value:
            found += [(name, secret) for _, secret in secrets_in_url(value)]
    return found


VARIABLE = "env:"
"""Begins the name of a variable of the environment, where a secret is named."""


def read_secret(reference: str | Path, *, option: str) -> str:
    """The secret that stands in a file, or with `env:NAME` in a variable of this process's environment.

    Args:
        option: what names it, for messages.

    Raises:
        ValueError: the file cannot be read, there is no such variable, or it holds not one key and nothing else.
    """
    where = str(reference)
    if where.startswith(VARIABLE):
        name = where.removeprefix(VARIABLE)
        if name not in os.environ:
            raise ValueError(f"{option}: there is no variable {name} in the environment")
        secret, where = os.environ[name].strip(), f"the variable {name}"
    else:
        try:
            secret = Path(reference).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ValueError(f"{option}: {where} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{option}: {where} cannot be read: it is no text") from error
    if not secret or not secret.isprintable() or not secret.isascii() or " " in secret:
        raise ValueError(f"{option}: {where} must hold one key and nothing else")
    return secret


def literal_secrets(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The settings of a tree that hold a secret themselves: the path of each, and what says so.

    A reference (`env:NAME`), and what only ends like a secret's name, such as `pad_token`, is none.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from literal_secrets(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from literal_secrets(item, f"{key}.{index}")
    elif isinstance(value, str) and value and not value.startswith(VARIABLE):
        leaf = key.rpartition(".")[2]
        if _CERTAIN_NAME.search(leaf) or (_SECRET_NAME.search(leaf) and _OPAQUE.match(value)):
            yield key, "is a secret by its name"
        elif "://" in value and secrets_in_url(value):
            yield key, "has a secret in its URL"
        elif _KNOWN_KEY.search(value) or _BEARER.search(value):
            yield key, "looks like a secret"


def secrets_in_url(url: str) -> list[tuple[str, str]]:
    """User name and password of a URL, and the values of its query's keys and tokens."""
    try:
        parts = urlsplit(url)
        found = [("password", parts.password or "")]
        found += [("user", parts.username or "")] if not parts.password else []
        query = parse_qsl(parts.query)
    except ValueError:
        return []
    found += [(name, value) for name, value in query if _SECRET_NAME.search(name) or _OPAQUE.match(value)]
    return [(name, unquote(value)) for name, value in found if value]


def secrets_in_arguments(command: Sequence[str]) -> list[tuple[str, str]]:
    """The secrets in a command line: `--api-key=VALUE`, `--token VALUE`, `NAME=VALUE` and credentials in URLs."""
    found: list[tuple[str, str]] = []
    for position, argument in enumerate(command):
        name, equals, value = argument.partition("=")
        if "://" in name:
            found += secrets_in_url(argument)
        elif equals and _SECRET_NAME.search(name.strip("-")):
            found.append((name.strip("-"), value))
        elif not equals and argument.startswith("-") and _SECRET_NAME.search(argument.strip("-")):
            found += [(argument.strip("-"), following) for following in command[position + 1 : position + 2]]
        elif "://" in value:
            found += secrets_in_url(value)
    return found


def _spellings(value: str) -> set[str]:
    """How a program may write a value down: bare, without its scheme, in JSON, in a URL, in base64, as bytes' hex."""
    bare = value.strip()
    values = {bare, _SCHEME_WORD.sub("", bare, count=1)}
    for encoded in list(values):
        # Basic authentication: user:password.
        try:
            user, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            continue
        if colon and user.isprintable() and password.isprintable():
            values |= {password, f"{user}:{password}"}
    spelled: set[str] = set()
    for item in values:
        raw = item.encode("utf-8", "surrogatepass")
        in_json = {json.dumps(item)[1:-1], json.dumps(item, ensure_ascii=False)[1:-1]}
        # JSON within JSON: a server's answer in the text of a protocol's.
        spelled |= {item, repr(item)[1:-1], *in_json, *(json.dumps(text)[1:-1] for text in in_json)}
        spelled |= {quote(raw), quote(raw, safe=""), quote_plus(raw)}
        spelled |= {
            base64.b64encode(raw).decode(),
            base64.urlsafe_b64encode(raw).decode().rstrip("="),
            raw.hex(),
        }
    return spelled
