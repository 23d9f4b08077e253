"""A secret is named, not written: whatever it is, and wherever somebody writes it, nothing says it."""

from __future__ import annotations

from pathlib import Path
from secrets import token_urlsafe

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.endpoint import ChatEndpoint
from polyturn.configs.schema.tasks import JudgeReward
from polyturn.tools.chat.client import ChatClient
from polyturn.tools.secrets import literal_secrets, read_secret
from tests.support.command_line import in_this_process

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
SECRETS = st.text(ALPHABET, min_size=12, max_size=60).map(lambda text: f"Zq{text}7x")
"""Nothing that could stand in an output by chance."""
PLACES = (
    "environment.options.api_key={}",
    "environment.options={{nested: [{{password: '{}'}}]}}",
    "environment.options.url=http://me:{}@host/v1",
    "environment.options.url=http://host/v1?api_key={}",
    "environment.options.header='Authorization: Bearer {}'",
    "reward={{kind: remote, url: 'http://me:{}@host/grade'}}",
    "reward={{kind: judge, judge: null, urls: ['http://host/v1?token={}'], model: m}}",
    "reward={{kind: judge, api_key: '{}'}}",
    "api_key={}",
    "sglang.api_key={}",
    "model.path=/nowhere?api_key={}",
)


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=4, deadline=None)
@given(secret=SECRETS)
def test_a_secret_in_a_config_is_refused_and_not_said(place: str, secret: str) -> None:
    done = in_this_process("train", "quickstart", place.format(secret), "--dry-run")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not done.stdout
    assert secret not in done.stderr


@given(secret=SECRETS)
@settings(max_examples=25, deadline=None)
def test_a_secret_that_is_named_is_sent_and_stands_nowhere(
    tmp_path_factory: pytest.TempPathFactory, secret: str
) -> None:
    file = tmp_path_factory.mktemp("keys") / "judge"
    file.write_text(f"{secret}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYTURN_TEST_KEY", secret)
        for reference in (file, "env:POLYTURN_TEST_KEY"):
            assert read_secret(reference, option="x") == secret
            options = {"url": "http://host/v1", "model": "m", "api_key_file": reference}
            client = ChatClient(ChatEndpoint.model_validate(options))
            assert client._headers["Authorization"] == f"Bearer {secret}"
            assert secret not in f"{client!r} {client._fault(f'refused: Bearer {secret}, {secret}')}"
            judge = JudgeReward.model_validate({"kind": "judge", "judge": "j", "api_key_file": reference})
            assert secret not in judge.model_dump_json() + repr(judge) and str(reference) in repr(judge)


def test_a_plan_with_a_named_secret_does_not_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = f"Zq{token_urlsafe(24)}"
    monkeypatch.setenv("POLYTURN_TEST_KEY", secret)
    judge = "{kind: judge, urls: ['http://host/v1'], model: m, api_key_file: 'env:POLYTURN_TEST_KEY', deadline_s: 60}"
    done = in_this_process("train", "quickstart", f"reward={judge}", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "env:POLYTURN_TEST_KEY" in done.stdout and secret not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["quickstart", "search_r1_3b", "fp8_rollout"])
def test_recipes_have_no_secrets_and_names_alone_make_none(name: str) -> None:
    assert list(literal_secrets(load_config(name).model_dump(mode="json"))) == []
    plain = {"pad_token": "<pad>", "sort_key": "length", "api_key_file": "/keys/a", "url": "http://h:8000/v1"}
    named = {"api_key": "env:KEY", "urls": ["http://h/v1?api-version=2024"]}
    assert list(literal_secrets({"options": [plain, named]})) == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no variable"),
        ("", "must hold one key"),
        ("two words", "must hold one key"),
        ("\x00", "must hold one key"),
    ],
)
def test_a_variable_that_holds_no_key_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, told: str
) -> None:
    monkeypatch.delenv("POLYTURN_TEST_KEY", raising=False)
    if content is not None and "\x00" not in content:
        monkeypatch.setenv("POLYTURN_TEST_KEY", content)
        with pytest.raises(ValueError, match=f"option: .*{told}"):
            read_secret("env:POLYTURN_TEST_KEY", option="option")
    elif content is None:
        with pytest.raises(ValueError, match=f"option: .*{told} POLYTURN_TEST_KEY"):
            read_secret("env:POLYTURN_TEST_KEY", option="option")
    else:
        (tmp_path / "key").write_text(content)
        with pytest.raises(ValueError, match=f"option: .*{told}"):
            read_secret(tmp_path / "key", option="option")
