"""Rows are read as they are meant, and what is wrong with one is a sentence with file, line and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyturn.configs.errors import ConfigError
from polyturn.rollout.fine_tuning.rows import read_rows, row_of, spans_of

CALL = {"id": "a", "type": "function", "function": {"name": "search", "arguments": '{"query": "x"}'}}
USER, ANSWER = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


def row(*messages: Any, **others: Any) -> bytes:
    return json.dumps({"messages": list(messages), **others}).encode()


def test_openais_form_is_taken_with_its_variants(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        row(
            {
                "role": "developer",
                "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
            },
            USER,
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "Hm.",
                "tool_calls": [CALL],
                "weight": 0,
            },
            {"role": "tool", "tool_call_id": "a", "content": "There\u2028it is"},
            ANSWER,
            tools=[TOOL],
            metadata={"environment": "e", "task_id": "t", "score": 0.5},
        ),
        b"\n",
        row(USER, ANSWER, tools=json.dumps([TOOL])),
    ]
    path.write_bytes(b"\n".join(lines))
    first, second = read_rows(path)
    assert first.where == f"{path}:1" and second.where == f"{path}:4"
    assert [message["role"] for message in first.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert first.messages[0]["content"] == "Be brief." and first.messages[2]["reasoning"] == "Hm."
    assert first.messages[2]["tool_calls"][0]["function"]["arguments"] == {"query": "x"}
    assert first.messages[3]["name"] == "search"
    assert first.taught == (False, False, False, False, True) and second.taught == (False, True)
    assert [tool.name for tool in (*first.tools, *second.tools)] == ["search", "search"]
    assert (first.environment, first.task_id, first.score) == ("e", "t", 0.5)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"{", "this line is no JSON"),
        (b"[1]", "a row is a JSON object, not [1]"),
        (
            b'{"conversations": [{"from": "human", "value": "x"}]}',
            "is ShareGPT's form ('from' and 'value'); write",
        ),
        (
            b'{"prompt": "x", "completion": "y"}',
            "'prompt' is a prompt and its completion; write OpenAI messages",
        ),
        (row(), "messages: it must be a list of messages, not []"),
        (row(USER, "there"), "messages[1]: a message is an object, not 'there'"),
        (
            row(USER, {"role": "human", "content": "x"}),
            "messages[1].role: it must be one of system, developer",
        ),
        (
            row(USER, {"role": "assistant", "content": ""}),
            "messages[1].content: an assistant's message has a text",
        ),
        (row(USER, {"role": "assistant", "content": 3}), "messages[1].content: it must be a text, not 3"),
        (
            row({"role": "user", "content": [{"type": "image_url"}]}, ANSWER),
            "messages[0].content: only parts of text",
        ),
        (row(ANSWER), "messages[0].role: a conversation does not begin with 'assistant'"),
        (row(USER, ANSWER, ANSWER), "messages[2]: an assistant's message follows another one"),
        (row(USER), "messages: no message of the assistant is taught"),
        (row(USER, {**ANSWER, "weight": 0}), "messages: no message of the assistant is taught"),
        (row(USER, {**ANSWER, "weight": 2}), "messages[1].weight: it is 0 or 1, not 2"),
        (row(USER, {**ANSWER, "function_call": {}}), "messages[1].function_call: write tool_calls"),
        (
            row(USER, ANSWER, {"role": "tool", "tool_call_id": "b", "content": "x"}),
            "messages[2].tool_call_id: no call before it has the id 'b'",
        ),
        (row(USER, {"role": "assistant", "tool_calls": ["search"]}), "messages[1].tool_calls[0]: a call is"),
        (
            row(USER, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": ""}}]}),
            "messages[1].tool_calls[0].function.name: it is empty",
        ),
        (
            row(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
            "messages[1].tool_calls[0].function.arguments: they are no JSON",
        ),
        (
            row(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}),
            "messages[1].tool_calls[0].function.arguments: they must be an object",
        ),
        (row(USER, ANSWER, tools={"a": 1}), "tools: they must be a list"),
        (row(USER, ANSWER, tools=[{"name": "search"}]), "tools[0]: a tool is"),
        (row(USER, ANSWER, tokens=[1]), "tokens: they are"),
        (
            row(USER, ANSWER, tokens={"segments": [{"token_ids": ["a"], "taught": []}]}),
            "tokens.segments[0].token_ids: they must be numbers",
        ),
        (
            row(USER, ANSWER, tokens={"segments": [{"token_ids": [1, 2, 3], "taught": [[0, 2]]}]}),
            "tokens.segments[0].taught: spans [first, behind the last] of places from 1 to 3, in order, not [0, 2]",
        ),
    ],
)
def test_a_bad_row_is_one_sentence_with_its_place(line: bytes, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        row_of(line, where="rows.jsonl:7")
    told = str(refused.value)
    assert told.startswith("rows.jsonl:7: ") and sentence in told and "\n" not in told


def test_spans_are_the_runs_of_a_mask() -> None:
    mask = np.array([0, 1, 1, 0, 1], dtype=np.bool_)
    assert spans_of(mask) == [[1, 3], [4, 5]] and spans_of(mask[:1]) == []
    line = row(
        USER,
        ANSWER,
        tokens={"tokenizer": "t", "segments": [{"token_ids": [5] * 5, "taught": [[1, 3], [4, 5]]}]},
    )
    (segment,) = row_of(line, where="x").segments
    assert segment.taught.tolist() == mask.tolist()
