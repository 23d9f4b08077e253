"""The dialect of a model's family, told from its chat template or its config."""

# ruff: noqa: RUF001 - the bars of DeepSeek's tokens are what they are
from __future__ import annotations

from pathlib import Path
from typing import Any

from polyturn.configs.models import read_json

TEMPLATES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<ifm|tool_call>",), "sglang:k2_horizon/k2_horizon"),
    (("<|iquest_assistant|>",), "sglang:iquest_q1"),
    (("<｜GCML｜tool_calls>",), "sglang:gigachat35"),
    (("<|content_invoke_tool_json|>",), "sglang:inkling/inkling"),
    (("<rfl:parameter",), "sglang:beam/beam"),
    (("<|channel|>", "commentary"), "sglang:gpt-oss/gpt-oss"),
    (("<|tool_calls_section_begin|>",), "sglang:kimi_k2"),
    (("]<]minimax[>[",), "sglang:minimax-m3/minimax-m3"),
    (("<minimax:tool_call>",), "sglang:minimax-m2"),
    (("<｜DSML｜ calls>",), "sglang:deepseekv41"),
    (("<｜DSML｜tool_calls>",), "sglang:deepseekv4"),
    (("<｜DSML｜function_calls>",), "sglang:deepseekv32"),
    (("<｜tool▁calls▁begin｜>", "```json"), "sglang:deepseekv3"),
    (("<｜tool▁calls▁begin｜>",), "sglang:deepseekv31"),
    (("<|tool_call_start|>",), "sglang:lfm2"),
    (("<steptml:invoke",), "sglang:step3"),
    (("<atem:invoke",), "sglang:muse/muse"),
    (("<|tools_prefix|>",), "sglang:apertus2509"),
    (("<|START_ACTION|>", "<|START_TEXT|>"), "sglang:cohere_command4/cohere_command4"),
    (("<|START_ACTION|>",), "sglang:cohere_command4"),
    (("<|action_start|>",), "sglang:interns1"),
    (("<|tool_call>", "call:"), "sglang:gemma4"),
    (("[TOOL_CALLS]",), "sglang:mistral"),
    (("<tool_sep>",), "sglang:hunyuan"),
    (("<dots_function_call>",), "sglang:dots"),
    (("<function name=", "<param name="), "sglang:minicpm5"),
    (("<function=", "<parameter="), "sglang:qwen3_coder"),
    (("<arg_key>", "<role>ASSISTANT</role>"), "sglang:ling3"),
    (("<arg_key>", "unescaped XML-like object"), "sglang:poolside_v1"),
    (("<arg_key>", "<tool_call>' + tc.name"), "sglang:glm47"),
    (("<arg_key>", "<tool_call>' ~ tc.name"), "sglang:glm47"),
    (("<arg_key>",), "sglang:glm45"),
    (("<tool_call>",), "hermes"),
    (("<|python_start|>", '"parameters": '), "json"),
    (("<|python_start|>",), "pythonic"),
    (("<|python_tag|>",), "json"),
    (('{"name": ', '"parameters": '), "json"),
)
"""What all stands in a chat template, and the dialect of its models; the first that fits."""

MODEL_TYPES: dict[str, str] = {
    "bailing_hybrid": "sglang:ling3",
    "bailing_moe_v3_vl": "sglang:ling3",
    "deepseek_v4": "sglang:deepseekv4",
    "deepseek_v32": "sglang:deepseekv32",
    "gpt_oss": "sglang:gpt-oss/gpt-oss",
    "kimi_k3": "sglang:kimi_k3/kimi_k3",
    "llama4": "pythonic",
    "minimax_m2": "sglang:minimax-m2",
    "minimax_m3": "sglang:minimax-m3/minimax-m3",
    "minimax_m3_vl": "sglang:minimax-m3/minimax-m3",
    "muse_spark": "sglang:muse/muse",
}
"""The dialect of families whose templates say nothing of calls, or that have none, by `model_type`."""


def dialect_of_model(directory: Path, template_file: Path | None = None) -> str:
    """The name of the dialect that a model's chat template, or else its config, calls for.

    Args:
        template_file: A chat template in place of the model's own.

    Raises:
        ValueError: neither says.
    """
    own = directory / "chat_template.jinja" if template_file is None else template_file
    template = _text_of(own) if own.is_file() else _template_in_config(directory)
    for marks, dialect in TEMPLATES:
        if all(mark in template for mark in marks):
            return dialect
    config = directory / "config.json"
    model_type = read_json(config).get("model_type", "") if config.is_file() else ""
    if model_type in MODEL_TYPES:
        return MODEL_TYPES[model_type]
    raise ValueError(
        f"model.dialect: auto: neither the chat template nor the model_type {model_type!r} of {directory} tells how "
        "the model writes calls; name a dialect"
    )


def _text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _template_in_config(directory: Path) -> str:
    """All of the chat templates of a tokenizer's config as one text; empty without any."""
    config = directory / "tokenizer_config.json"
    template: Any = read_json(config).get("chat_template") if config.is_file() else None
    named = template if isinstance(template, list) else [{"template": template}]
    return "\n".join(str(one.get("template") or "") for one in named if isinstance(one, dict))
