"""A person at the terminal."""

import pytest

from polyturn.agents.policies.human import HumanPolicy, read_line, tool_help
from polyturn.tools.search.retrieval import SEARCH_SPEC


async def test_only_what_is_new_is_shown_and_lines_are_read():
    shown, lines = [], iter(['search {"query": "Mara"}', "Ashford"])
    policy = HumanPolicy(read=lambda prompt: next(lines), write=shown.append)
    messages = [{"role": "user", "content": "Where?"}]
    call = await policy.reply(messages=messages, tools=[SEARCH_SPEC])
    assert (call.tool_calls[0].name, call.tool_calls[0].arguments) == ("search", {"query": "Mara"})
    assert shown == [tool_help([SEARCH_SPEC]), "[user] Where?"]
    messages += [call.to_message(), {"role": "tool", "content": "Doc 1"}]
    answer = await policy.reply(messages=messages, tools=[SEARCH_SPEC])
    assert (answer.content, answer.tool_calls) == ("Ashford", ())
    assert shown[2:] == ["[tool] Doc 1"]
    assert 'search {"query": ...}' in shown[0]


@pytest.mark.parametrize("line", ["search for it", "searching {}", "", "  Ashford "])
def test_anything_that_is_no_call_is_an_answer(line):
    message = read_line(line, [SEARCH_SPEC])
    assert (message.content, message.tool_calls) == (line.strip(), ())


def test_arguments_that_are_no_json_are_told():
    (call,) = read_line('search {"query": Mara}', [SEARCH_SPEC]).tool_calls
    assert "not valid JSON" in call.error
