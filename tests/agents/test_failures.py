"""What is kept of a failure: no credentials, no unprintable text, and not too much."""

from __future__ import annotations

import pytest
from typer import Exit

from polyturn.agents.episode import failure_text, sentence_of
from polyturn.cli.outcome import reported
from polyturn.configs.errors import ConfigError
from polyturn.envs.faults import MAX_SENTENCE_CHARS, EnvironmentFault

URL = "https://somebody:hunter2@judge.example/grade?api_key=sk-123456"


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize("error", [EnvironmentFault(f"{URL} is down"), RuntimeError(f"{URL} is down")])
def test_credentials_are_in_no_message_and_no_traceback(error: Exception) -> None:
    text = failure_text(raised(error, cause=ValueError(f"Authorization: Bearer sk-987654 at {URL}")))
    assert "hunter2" not in text and "sk-" not in text
    assert "https://[credentials]@judge.example/grade?api_key=[credentials] is down" in sentence_of(text)


def test_a_message_is_bounded_and_printable() -> None:
    text = failure_text(raised(RuntimeError("\ud800" + "x" * 100_000)))
    assert len(sentence_of(text)) < MAX_SENTENCE_CHARS + 50
    text.encode("utf-8")


def test_the_command_line_shows_no_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exit), reported():
        raise ConfigError(f"recipe.yaml:3: cannot reach {URL}")
    shown = capsys.readouterr().err
    assert shown.startswith("error: recipe.yaml:3: cannot reach https://[credentials]@judge.example/grade")
    assert "hunter2" not in shown and "sk-" not in shown
