"""Secrets in every spelling, credentials in any message, and plain values that stay."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyturn.tools.secrets import (
    Secrets,
    blank_credentials,
    public_url,
    secrets_in_arguments,
    secrets_in_mapping,
    secrets_in_url,
)


@pytest.mark.parametrize(
    ("text", "blanked"),
    [
        ("http://u:pw@h:1/x failed", "http://[credentials]@h:1/x failed"),
        ("GET https://h/x?api_key=abcd1234&b=1", "GET https://h/x?api_key=[credentials]&b=1"),
        ("?key=AIzaSy12345", "?key=[credentials]"),
        ("Authorization: Basic dTpw\nHost: h", "Authorization: [credentials]\nHost: h"),
        ("{'authorization': 'Bearer abc.def'}", "{'authorization': '[credentials]'}"),
        ("sent Bearer abc.def-ghi", "sent Bearer [credentials]"),
        ("npx x --api-key=sk-123456 --token abcdef", "npx x --api-key=[credentials] --token [credentials]"),
        ('{"access_token": "abcdef", "a": 1}', '{"access_token": "[credentials]", "a": 1}'),
        (r'"headers: {\"X-API-KEY\":\"abcdef\"}"', r'"headers: {\"X-API-KEY\":\"[credentials]\"}"'),
        ("https://mcp.example/mcp?exaApiKey=exa-abc123", "https://mcp.example/mcp?exaApiKey=[credentials]"),
        ("postgres://u:p@ss@h/db", "postgres://[credentials]@h/db"),
        (
            "401: Incorrect API key provided: sk-proj-abcdefghijk12345678.",
            "401: Incorrect API key provided: [credentials]",
        ),
        ("no access with hf_abcdefghijklmnop1234, 403", "no access with [credentials], 403"),
        ("Set-Cookie: sid=abcdefgh12\nHost: h", "Set-Cookie: [credentials]\nHost: h"),
        ("tried Basic dXNlcjpwYXNzd29yZA==", "tried Basic [credentials]"),
    ],
)
def test_credentials_go(text: str, blanked: str) -> None:
    assert blank_credentials(text) == blanked
    assert blank_credentials(blanked) == blanked


@pytest.mark.parametrize(
    "text",
    [
        "unknown key 'env.topkk', did you mean 'env.topk'?",
        "at most max_tokens: 4096",
        "pad_token=<|endoftext|> is no key: 1234",
        "git@github.com:x/y, mail a@b.org, http://x/y@2",
        "the author: somebody",
        "Basic understanding of sk-learn: hf_qwen3_tiny_model_2024/config.json",
        "config.yaml:3: trainer.seed=70000",
    ],
)
def test_plain_messages_stay(text: str) -> None:
    assert blank_credentials(text) == text


WORDS = (
    *(
        "://",
        "u",
        "@h",
        "Authorization",
        "cookie",
        ": ",
        "Bearer ",
        "basic ",
        "dXNlcjpwYXNzd29yZA==",
        "?",
        "&",
        "--",
    ),
    *(
        "api",
        "Key",
        "toKen",
        "SIG",
        "auth",
        "Secret",
        "passwd",
        "credential",
        "=",
        "abcd1234",
        "id",
        " ",
        "http",
    ),
)


@given(st.lists(st.sampled_from(WORDS), max_size=12))
def test_what_is_not_tried_would_find_nothing(words: list[str]) -> None:
    """Behind a letter beyond ASCII every pattern is tried."""
    text = "".join(words)
    assert blank_credentials(f"\u00e9 {text}") == f"\u00e9 {blank_credentials(text)}"


def test_secrets_are_told_by_name_and_by_look() -> None:
    values = {
        "LANG": "en_US.UTF-8",
        "PWD": "/home/somebody",
        "MODE": "production",
        "NOTEBOOK_KEY": "hunter2",
        "GH_PAT": "ghp_abcd",
        "DATABASE_URL": "postgres://u:hidden@h/db",
        "Content-Type": "application/json",
        "ANYTHING": "sk-THIS-IS-A-SECRET",
        "X-Drawn": "a8f7d6e5c4b3a2918273a8f7d6",
    }
    assert [value for _, value in secrets_in_mapping(values)] == [
        "hunter2",
        "ghp_abcd",
        "hidden",
        "sk-THIS-IS-A-SECRET",
        "a8f7d6e5c4b3a2918273a8f7d6",
    ]
    command = [
        "python",
        "s.py",
        "--api-key=abcd",
        "--token",
        "zzzz",
        "http://a:b%21@h/?token=qq12",
        "--mode=fast",
    ]
    assert [value for _, value in secrets_in_arguments(command)] == ["abcd", "zzzz", "b!", "qq12"]
    assert secrets_in_url("http://[broken") == []
    assert public_url("https://u:p@h:8/p/a?x=1#f") == "https://h:8/p/a"


@given(st.text(min_size=6, max_size=40).filter(lambda text: len(text.strip()) >= 6 and "[" not in text))
def test_no_spelling_of_a_secret_is_left(secret: str) -> None:
    text = f"a {secret} b {json.dumps({'k': secret})} c {secret!r}"
    blanked = Secrets([("KEY", f"Bearer {secret}")]).blank(text)
    assert secret.strip() not in blanked
    assert json.dumps(secret.strip())[1:-1] not in blanked


def test_short_values_are_no_secrets() -> None:
    assert Secrets([("DEBUG_KEY", "1")]).blank("11 of 12") == "11 of 12"


@pytest.mark.parametrize(
    "piece", ["a://", "api_key", "?key= ", "--a-key", "authorization: ", "Bearer ", "secret", "a", "-"]
)
def test_the_time_of_blanking_grows_with_the_text_and_no_faster(piece: str) -> None:
    def seconds(count: int) -> float:
        text = piece * count
        started = time.process_time()
        blank_credentials(text)
        return time.process_time() - started

    # A quadratic pattern would take a hundred times as long for ten times the text.
    assert seconds(100_000) < 40 * max(min(seconds(10_000) for _ in range(3)), 1e-3)
