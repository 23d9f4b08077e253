"""`polyturn template check`: what it says, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.chat_families import FAMILIES
from tests.support.command_line import in_this_process


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer, and nothing else."""
    directory = tmp_path_factory.mktemp("qwen3")
    FAMILIES["qwen3"].tokenizer.save_pretrained(directory)
    return directory


def check(*arguments: str) -> tuple[int, str, str]:
    done = in_this_process("template", "check", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_a_shipped_model_goes_on_everywhere() -> None:
    code, told, _ = check("builtin:tiny-searcher")
    assert code == 0
    assert "branches in 0 of 7 cases" in told
    assert "a result behind a call: goes on" in told


def test_where_it_branches_the_first_difference_is_shown(qwen3: Path) -> None:
    code, told, _ = check(str(qwen3))
    assert code == 0
    behind = told.partition("a user's message behind a thought and an answer: a new segment")[2].splitlines()
    assert behind[2].startswith("    turn by turn") and "Wanswer0x" in behind[2]
    assert behind[3].startswith("    the template") and "answer0x<|im_end|>" in behind[3]
    assert "branches in 1 of 7 cases" in told
    code, told, _ = check(str(qwen3), "--option", "enable_thinking=false")
    assert (code, "<think>\\n\\n</think>" in told) == (0, True)
    assert "a user's message behind an answer: a new segment" in told
    assert "written as text by Polyturn" in check(str(qwen3), "--tool-prompt", "text")[1]


def test_a_template_of_ones_own_is_looked_at_in_its_place(qwen3: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(FAMILIES["qwen2.5"].template)
    assert "branches in 0 of 7 cases" in check(str(qwen3), "--template", str(own))[1]
    said = "{{ message.content }}<|im_end|>"
    own.write_text(FAMILIES["qwen2.5"].template.replace(said, said.replace("content", "content[:20]", 1), 1))
    cut = "{{ message.content if loop.last else message.content[:20] }}<|im_end|>"
    own.write_text(FAMILIES["qwen2.5"].template.replace(said, cut))
    code, told, errors = check(str(qwen3), "--template", str(own))
    assert code == 1
    assert "is another than the template makes of the whole" in errors
    assert "    behind        " in told


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--option", "enable_thinkin=false"), "reads no option 'enable_thinkin'; did you mean"),
        (("--option", "enable_thinking"), "is not of the form key=value"),
        (("--template", "nowhere.jinja"), "the chat template nowhere.jinja cannot be read"),
        (("--tool-prompt", "both"), "tool_prompt"),
    ],
)
def test_what_a_run_would_refuse_is_bad_input(qwen3: Path, arguments: tuple[str, ...], why: str) -> None:
    code, told, errors = check(str(qwen3), *arguments)
    assert (code, told) == (2, "")
    assert why in errors and errors.startswith("error: ")


def test_a_model_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    code, _, errors = check(str(tmp_path / "nothing"))
    assert code == 2 and "there is no directory" in errors
    (tmp_path / "empty").mkdir()
    code, _, errors = check(str(tmp_path / "empty"))
    assert code == 2 and "tokenizer cannot be read" in errors
