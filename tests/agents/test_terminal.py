"""What environments, models and rows say reaches a terminal as text, and moves nothing there."""

import asyncio
import io

import pytest
import typer

from polyturn.agents.policies.human import HumanPolicy
from polyturn.cli.outcome import print_error, reported, table
from polyturn.configs.errors import ConfigError
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.plain import printable
from polyturn.trainer.run.progress import LiveProgress, PlainProgress

ESCAPES = "a\x1b[2J\x1b]0;owned\x07b\x9b31m\rc\u202ed\ud800"
SHOWN = "a\\x1b[2J\\x1b]0;owned\\x07b\\x9b31m\\rc\\u202ed\ufffd"


def test_controls_and_marks_of_direction_are_shown_and_other_text_stays():
    assert printable(ESCAPES) == SHOWN
    text = "Zürich\n\tقطة 漢字 \U0001f600 [bold]"
    assert printable(text) == text


def test_a_person_reads_no_escapes():
    written = []
    policy = HumanPolicy(read=lambda prompt: "fine", write=written.append)
    messages = [{"role": "user", "content": ESCAPES}]
    assert asyncio.run(policy.reply(messages=messages, tools=())).content == "fine"
    assert written == [f"[user] {SHOWN}"]


@pytest.mark.parametrize("line", ["look {" + '"a": ' * 3 + "}", 'look {"a": ' + "1" * 5_000 + "}"])
def test_a_typed_call_that_cannot_be_read_is_told(line):
    from polyturn.agents.policies.human import read_line
    from polyturn.tools.types import ToolSpec

    (call,) = read_line(line, [ToolSpec(name="look", description="", parameters={})]).tool_calls
    assert call.error is not None and "not valid JSON" in call.error


class Says(ToolEnv):
    def grade(self, message):
        return {"x": 1.0}


def test_a_rendered_transcript_has_none():
    env = Says(tasks=ListTasks([Task.from_prompt("t", ESCAPES)]), render_mode="ansi")
    env.reset()
    env.step(AssistantMessage(content=ESCAPES))
    assert env.render() == f"user: {SHOWN}\nassistant: {SHOWN}"


def test_errors_and_tables_have_none(capsys):
    print_error(ConfigError(f"rows.jsonl:1: unknown key {ESCAPES}"))
    with pytest.raises(typer.Exit), reported():
        raise ConfigError(ESCAPES)
    assert "\x1b" not in capsys.readouterr().err
    assert "\x1b" not in table([(ESCAPES, "x")])


def test_progress_prints_what_failed_as_it_stands(capsys):
    stream = io.StringIO()
    PlainProgress(num_steps=1, stream=stream).message(f"failed: [/bold] {ESCAPES}")
    assert stream.getvalue().endswith(f"failed: [/bold] {SHOWN}\n")
    live = LiveProgress(num_steps=1)
    try:
        live.message(f"failed: [/bold] [red] {ESCAPES}")
    finally:
        live.close()
    assert "failed: [/bold] [red] a\\x1b[2J" in capsys.readouterr().out
