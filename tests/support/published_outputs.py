"""Malformed calls that models were seen to write, as issues of inference engines report them, with names of ours."""

# ruff: noqa: RUF001 - the bars of DeepSeek's tokens are what they are
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Expected = Sequence[tuple[str, dict[str, Any]]] | Literal["told", "content"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """One text."""

    source: str
    """The thread on GitHub that reports its shape."""
    text: str
    read_as: Mapping[str, Expected]
    """By dialect: its calls, `told` where the model is told that one cannot be read, `content` where none is meant."""


X: tuple[str, dict[str, Any]] = ("search", {"query": "x"})
_CALL = '{"name": "search", "arguments": {"query": "x"}}'


def _tagged(inside: str) -> str:
    return f"<tool_call>\n{inside}\n</tool_call>"


def _kimi(call_id: str, section: str = "tool_calls_section") -> str:
    return (
        f"<|{section}_begin|><|tool_call_begin|>{call_id}<|tool_call_argument_begin|>"
        f'{{"query": "x"}}<|tool_call_end|><|{section}_end|>'
    )


OUTPUTS = (
    Output(
        source="vllm-project/vllm/pull/25729",
        text=_tagged('{"name": "search", "arguments": "{\\n  \\"query\\": \\"x\\"\\n}"}'),
        read_as={"hermes": [X], "sglang:hermes": [X]},
    ),
    Output(
        source="vllm-project/vllm/issues/17790",
        text=_tagged(f"{_CALL}\n{_CALL}"),
        read_as={"hermes": [X, X], "sglang:hermes": "told", "sglang:qwen25": "told"},
    ),
    Output(
        source="sgl-project/sglang/pull/3960",
        text="I can help.\n" + _tagged(f"{{{_CALL}}}"),
        read_as={"hermes": [X], "sglang:qwen25": "told"},
    ),
    Output(
        source="yigit353/langchain-qwq/issues/30",
        text=_tagged(_CALL + "}"),
        read_as={"hermes": [X], "sglang:qwen25": "told"},
    ),
    Output(
        source="ml-explore/mlx-lm/pull/899",
        text=_tagged('{"name": "search", "arguments": {"query": "\\d+\\.py"}}'),
        read_as={"hermes": "told", "sglang:qwen25": "told"},
    ),
    Output(
        source="vllm-project/vllm/issues/21544",
        text=_tagged('{"name": "search", "arguments": {"query": "mkdir -p test/{test1,test2"}}'),
        read_as={
            "hermes": [("search", {"query": "mkdir -p test/{test1,test2"})],
            "sglang:qwen25": [("search", {"query": "mkdir -p test/{test1,test2"})],
        },
    ),
    Output(
        source="sgl-project/sglang/issues/26790",
        text=_tagged("<function=search>\n<parameter=query>\nx\n</parameter>\n</function>"),
        read_as={"hermes": "told", "sglang:qwen25": "told", "sglang:qwen3_coder": [X]},
    ),
    Output(
        source="nicedreamzapp/claude-code-local/pull/43",
        text='{\n  "name": "search",\n  "arguments": {\n    "query": "x"\n  }\n}',
        read_as={"json": [X], "hermes": "content", "sglang:qwen25": "content"},
    ),
    Output(
        source="ggml-org/llama.cpp/issues/18183",
        text=f"Such a call looks like this:\n```python\n{_CALL}\n```",
        read_as={"hermes": "content", "json": "content", "sglang:qwen25": "content"},
    ),
    Output(
        source="ai-dynamo/dynamo/pull/9536",
        text=f"<|python_tag|>{_CALL};{_CALL}",
        read_as={"json": [X, X], "sglang:llama3": [X, X]},
    ),
    Output(
        source="ollama/ollama/issues/16686",
        text="I'll look.\n\n<function=search>\n<parameter=query>\nx\n</parameter>\n</function>\n</tool_call>",
        read_as={"sglang:qwen3_coder": "told"},
    ),
    Output(
        source="ollama/ollama/issues/17353",
        text=_tagged("<function=search>\n<parameter=query>\nx\n</function>"),
        read_as={"sglang:qwen3_coder": [X]},
    ),
    Output(
        source="QwenLM/Qwen3.8/issues/178",
        text=_tagged(
            "<function=search>\n<parameter=query>\nx\n</parameter>\n</function>\n</function>\n</function_invocation>"
        ),
        read_as={"sglang:qwen3_coder": [X]},
    ),
    Output(
        source="sgl-project/sglang/pull/21377",
        text=_kimi("functionssearch5"),
        read_as={"sglang:kimi_k2": "told"},
    ),
    Output(
        source="exo-explore/exo/issues/2281",
        text=_kimi("functions_search_1"),
        read_as={"sglang:kimi_k2": "told"},
    ),
    Output(
        source="vllm-project/vllm/pull/32146",
        text=_kimi("call_abc123def456"),
        read_as={"sglang:kimi_k2": "told"},
    ),
    Output(
        source="ggml-org/llama.cpp/pull/17376",
        text=_kimi("functions.search:0", "tool_call_section"),
        read_as={"sglang:kimi_k2": "told"},
    ),
    Output(
        source="ml-explore/mlx-lm/issues/1374",
        text=f"[TOOL_CALLS][{_CALL}]",
        read_as={"sglang:mistral": [X], "json": [X]},
    ),
    Output(
        source="vllm-project/vllm/pull/54844",
        text=f"[TOOL_CALLS] {_CALL}",
        read_as={"sglang:mistral": "told", "json": [X]},
    ),
    Output(
        source="vllm-project/vllm/issues/49248",
        text="<tool_call>search<arg_key>query</arg_key>x</arg_value></tool_call>",
        read_as={"sglang:glm47": "told"},
    ),
    Output(
        source="vllm-project/vllm/pull/47190",
        text="<tool_call>searchquery</arg_key><arg_value>x</arg_value></tool_call>",
        read_as={"sglang:glm47": "told"},
    ),
    Output(
        source="vllm-project/vllm/pull/54971",
        text="<tool_call>search<arg_key>query</arg_key></arg_key><arg_value>x</arg_value></tool_call>",
        read_as={"sglang:glm47": "told"},
    ),
    Output(
        source="raullenchai/Rapid-MLX/pull/795",
        text=(
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n```json\n{"query": "x"}\n```'
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        read_as={"sglang:deepseekv31": "told", "sglang:deepseekv3": [X]},
    ),
    Output(
        source="vllm-project/vllm/issues/26897",
        text=(
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>search<｜tool▁sep｜>{"query": "x"<｜tool▁call▁end｜>'
            "<｜tool▁calls▁end｜>"
        ),
        read_as={"sglang:deepseekv31": "told"},
    ),
)
