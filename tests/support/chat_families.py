"""Small tokenizers with chat templates in the shapes of published model families.

The templates are written here, after what those of the families do: which marks stand around which text, what is closed
by what, what is dropped from earlier turns, what is refused. Only the shape matters; instructions are left out.
"""

# ruff: noqa: RUF001 - the bars of DeepSeek's tokens are what they are
from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Mara Lindqvist works for Holloway Mills. Holloway Mills is based in Ashford.",
    "In which town is the employer of Mara Lindqvist based?",
    json.dumps({"name": "search", "arguments": {"query": "Mara Lindqvist"}}),
    "system user assistant tool Search the knowledge base. Answer with the town alone.",
]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What makes a family's tokenizer and template."""

    name: str
    template: str
    special: tuple[str, ...]
    """Added tokens that the tokenizer flags as special."""
    plain: tuple[str, ...] = ()
    """Added tokens that it does not."""
    eos: str
    bos: str | None = None
    listed_eos: tuple[str, ...] = ()
    """The eos tokens of generation_config.json."""
    arguments_as_text: bool = False
    tools_as_text: bool = False
    """Whether the template has no place for tool results."""
    call_id: str = "call_{}"
    text_parts: bool = False
    """Whether a content is a list of parts."""
    tools_listed: bool = False
    """Whether there has to be a list of tools, if an empty one."""

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build(self)


def build(family: Family, *, vocab_size: int = 420, **flags: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, byte-level BPE; `flags` are of its special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, **flags) for text in family.special]
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=family.eos,
        bos_token=family.bos,
        chat_template=family.template,
    )


_QWEN_TOOLS = """
{%- if tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif -%}
# Tools
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' -%}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}"""

_QWEN_RESULT = """
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|im_start|>user{% endif -%}
{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\n' }}{% endif -%}"""

_QWEN_CALLS = """
{%- for call in message.tool_calls or [] -%}
{%- if message.content or not loop.first %}{{ '\n' }}{% endif -%}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}"""

QWEN25 = Family(
    name="qwen2.5",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    plain=("<tool_call>", "</tool_call>"),
    eos="<|im_end|>",
    listed_eos=("<|im_end|>", "<|endoftext|>"),
    template=_QWEN_TOOLS
    + """
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' -%}
<|im_start|>assistant
{{ message.content or '' }}"""
    + _QWEN_CALLS
    + "{{ '<|im_end|>\\n' }}"
    + _QWEN_RESULT
    + """
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}""",
)

_QWEN3_BODY = (
    _QWEN_TOOLS
    + """
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|im_start|>user
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' -%}
{%- set ns.content = message.content or '' -%}
{%- set ns.thought = '' -%}
{%- if message.reasoning_content is string -%}
{%- set ns.thought = message.reasoning_content -%}
{%- elif '</think>' in ns.content -%}
{%- set ns.thought = ns.content.split('</think>')[0].split('<think>')[-1] -%}
{%- set ns.content = ns.content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
<|im_start|>assistant
{% if loop.index0 > ns.last_user and (loop.last or ns.thought) -%}
<think>
{{ ns.thought.strip('\n') }}
</think>

{{ ns.content.lstrip('\n') }}
{%- else %}{{ ns.content }}{% endif -%}"""
    + _QWEN_CALLS
    + "{{ '<|im_end|>\\n' }}"
    + _QWEN_RESULT
    + """
{%- endif -%}
{%- endfor -%}
"""
)

QWEN3 = Family(
    name="qwen3",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    plain=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    eos="<|im_end|>",
    listed_eos=("<|im_end|>", "<|endoftext|>"),
    template=_QWEN3_BODY
    + """
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false -%}
<think>

</think>

{% endif -%}
{%- endif -%}""",
)

QWEN3_THINKING = Family(
    name="qwen3-thinking",
    special=QWEN3.special,
    plain=QWEN3.plain,
    eos=QWEN3.eos,
    listed_eos=QWEN3.listed_eos,
    template=_QWEN3_BODY
    + """
{%- if add_generation_prompt -%}<|im_start|>assistant
<think>
{% endif -%}""",
)

LLAMA31 = Family(
    name="llama3.1",
    special=(
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
        "<|end_of_text|>",
    ),
    eos="<|eot_id|>",
    bos="<|begin_of_text|>",
    listed_eos=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    template="""{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content | trim -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
<|start_header_id|>system<|end_header_id|>

{{ system }}
{%- for tool in tools or [] %}{{ '\n' + (tool | tojson) }}{% endfor -%}<|eot_id|>
{%- for message in messages -%}
{%- if message.role in ('tool', 'ipython') -%}
<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson }}<|eot_id|>
{%- elif message.tool_calls -%}
{%- if message.tool_calls | length != 1 -%}{{ raise_exception('Only one call at once!') }}{%- endif -%}
{%- set call = message.tool_calls[0].function -%}
<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- else -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>

{% endif -%}""",
)

GLM4 = Family(
    name="glm-4",
    special=(
        "<|endoftext|>",
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ),
    eos="<|endoftext|>",
    listed_eos=("<|endoftext|>", "<|user|>", "<|observation|>"),
    template="""[gMASK]<sop>
{%- if tools -%}
<|system|>
{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- if message.content or not message.tool_calls -%}
<|assistant|>
{{ message.content or '' }}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
<|assistant|>{{ call.function.name }}
{{ call.function.arguments | tojson }}
{%- endfor -%}
{%- elif message.role == 'tool' -%}
<|observation|>
{{ message.content }}
{%- else -%}
<|{{ message.role }}|>
{{ message.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}""",
)

GLM45 = Family(
    name="glm-4.5",
    special=(
        "<|endoftext|>",
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ),
    plain=(
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "/nothink",
    ),
    eos="<|endoftext|>",
    listed_eos=("<|endoftext|>", "<|user|>", "<|observation|>"),
    template="""[gMASK]<sop>
{%- if tools -%}
<|system|>
{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor -%}
{%- endif -%}
{%- set ns = namespace(last_user=-1, thought='') -%}
{%- for message in messages -%}
{%- if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|user|>
{{ message.content }}
{{- '/nothink' if enable_thinking is defined and not enable_thinking else '' -}}
{%- elif message.role == 'assistant' -%}
<|assistant|>
{%- set ns.thought = message.reasoning_content or '' -%}
{%- if loop.index0 > ns.last_user and ns.thought -%}
{{ '\n<think>' + ns.thought.strip() + '</think>' }}
{%- else -%}{{ '\n<think></think>' }}{%- endif -%}
{%- if message.content %}{{ '\n' + message.content.strip() }}{% endif -%}
{%- for call in message.tool_calls or [] -%}
{{ '\n<tool_call>' + call.function.name }}
{% for key, value in call.function.arguments.items() -%}
<arg_key>{{ key }}</arg_key>
<arg_value>{{ value if value is string else value | tojson }}</arg_value>
{% endfor -%}
</tool_call>
{%- endfor -%}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|observation|>{%- endif -%}
{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- else -%}
<|system|>
{{ message.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{{- '\n<think></think>' if enable_thinking is defined and not enable_thinking else '' -}}
{%- endif -%}""",
)

_DEEPSEEK_PLAIN = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<think>",
    "</think>",
)

_DEEPSEEK_BODY = """{%- set ns = namespace(results=false, content='') -%}
{{- bos_token -}}
{%- for message in messages %}{% if message.role == 'system' %}{{ message.content }}{% endif %}{% endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- if ns.results %}<｜tool▁outputs▁end｜>{% endif %}{% set ns.results = false -%}
<｜User｜>{{ message.content }}
{%- elif message.role == 'assistant' -%}
{%- if ns.results %}<｜tool▁outputs▁end｜>{% else %}<｜Assistant｜>{% endif %}{% set ns.results = false -%}
{%- set ns.content = message.content or '' -%}
{%- if '</think>' in ns.content %}{% set ns.content = ns.content.split('</think>')[-1] %}{% endif -%}
{{ ns.content }}
{%- if message.tool_calls -%}<｜tool▁calls▁begin｜>
{%- for call in message.tool_calls -%}
{{ '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\n```json\n' + call.function.arguments
 + '\n```<｜tool▁call▁end｜>' }}
{%- if not loop.last %}{{ '\n' }}{% endif -%}
{%- endfor -%}<｜tool▁calls▁end｜>
{%- endif -%}
<｜end▁of▁sentence｜>
{%- elif message.role == 'tool' -%}
{%- if not ns.results %}<｜tool▁outputs▁begin｜>{% else %}{{ '\n' }}{% endif %}{% set ns.results = true -%}
<｜tool▁output▁begin｜>{{ message.content }}<｜tool▁output▁end｜>
{%- endif -%}
{%- endfor -%}
{%- if ns.results %}<｜tool▁outputs▁end｜>{% endif -%}
{%- if add_generation_prompt and not ns.results -%}<｜Assistant｜>"""

DEEPSEEK_V3 = Family(
    name="deepseek-v3",
    special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    plain=_DEEPSEEK_PLAIN,
    eos="<｜end▁of▁sentence｜>",
    bos="<｜begin▁of▁sentence｜>",
    arguments_as_text=True,
    template=_DEEPSEEK_BODY + "{%- endif -%}",
)

DEEPSEEK_R1 = Family(
    name="deepseek-r1",
    special=DEEPSEEK_V3.special,
    plain=_DEEPSEEK_PLAIN,
    eos=DEEPSEEK_V3.eos,
    bos=DEEPSEEK_V3.bos,
    arguments_as_text=True,
    template=_DEEPSEEK_BODY + "{{ '<think>\\n' }}{%- endif -%}",
)

KIMI_K2 = Family(
    name="kimi-k2",
    special=("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>"),
    plain=(
        "<|im_middle|>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    ),
    eos="[EOS]",
    bos="[BOS]",
    listed_eos=("<|im_end|>",),
    call_id="functions.search:{}",
    template="""{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|im_assistant|>{{ message.get('name') or 'assistant' }}<|im_middle|>
{{- message.content or '' -}}
{%- if message.tool_calls -%}<|tool_calls_section_begin|>
{%- for call in message.tool_calls -%}
<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}
<|tool_call_end|>
{%- endfor -%}<|tool_calls_section_end|>
{%- endif -%}
{%- elif message.role == 'tool' -%}
<|im_system|>{{ message.get('name') or 'tool' }}<|im_middle|>{{ '## Return of ' + message.tool_call_id + '\n' }}
{{- message.content -}}
{%- else -%}
<|im_{{ message.role }}|>{{ message.get('name') or message.role }}<|im_middle|>{{ message.content }}
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}""",
)

MISTRAL = Family(
    name="mistral",
    special=(
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    eos="</s>",
    bos="<s>",
    call_id="call{:05d}",
    template="""{{- bos_token -}}
{%- set ns = namespace(turn=0, last_user=-1, system='') -%}
{%- if messages[0].role == 'system' -%}
{%- set ns.system = messages[0].content + '\n\n' -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) -%}
{%- if (message.role == 'user') != (ns.turn % 2 == 0) -%}
{{ raise_exception('user and assistant must alternate') }}
{%- endif -%}
{%- set ns.turn = ns.turn + 1 -%}
{%- endif -%}
{%- if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- if tools and loop.index0 == ns.last_user -%}
[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]
{%- endif -%}
{{ '[INST]' + (ns.system if loop.index0 == ns.last_user else '') + message.content + '[/INST]' }}
{%- elif message.tool_calls -%}
[TOOL_CALLS][
{%- for call in message.tool_calls -%}
{%- if call.id is not defined or call.id | length != 9 -%}
{{ raise_exception('call ids have nine letters or digits') }}
{%- endif -%}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}
{%- if not loop.last %}, {% endif -%}
{%- endfor -%}]</s>
{%- elif message.role == 'assistant' -%}
{{ ' ' + message.content | trim + '</s>' }}
{%- elif message.role == 'tool' -%}
{%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 -%}
{{ raise_exception('call ids have nine letters or digits') }}
{%- endif -%}
[TOOL_RESULTS]{"content": {{ message.content | tojson }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]
{%- else -%}
{{ raise_exception('only user, assistant, system and tool') }}
{%- endif -%}
{%- endfor -%}""",
)

GEMMA3 = Family(
    name="gemma-3",
    special=("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    plain=("\n\n", "<table>"),
    eos="<eos>",
    bos="<bos>",
    listed_eos=("<eos>", "<end_of_turn>"),
    tools_as_text=True,
    template="""{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set first = messages[0].content + '\n\n' -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate') }}
{%- endif -%}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ (first if loop.first else '') + message.content | trim }}<end_of_turn>
{% endfor -%}
{%- if add_generation_prompt -%}<start_of_turn>model
{% endif -%}""",
)

GEMMA2 = Family(
    name="gemma-2",
    special=GEMMA3.special,
    plain=GEMMA3.plain,
    eos="<eos>",
    bos="<bos>",
    listed_eos=("<eos>", "<end_of_turn>"),
    tools_as_text=True,
    template="""{{- bos_token -}}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate') }}
{%- endif -%}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor -%}
{%- if add_generation_prompt -%}<start_of_turn>model
{% endif -%}""",
)

GEMMA4 = Family(
    name="gemma-4",
    special=(
        "<pad>",
        "<eos>",
        "<bos>",
        "<|turn>",
        "<turn|>",
        "<|channel>",
        "<channel|>",
        "<|tool>",
        "<tool|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
        '<|"|>',
    ),
    eos="<eos>",
    bos="<bos>",
    listed_eos=("<eos>", "<turn|>", "<|tool_response>"),
    template="""{%- macro text(value) -%}<|"|>{{ value }}<|"|>{%- endmacro -%}
{{- bos_token -}}
{%- set ns = namespace(before='', open=false) -%}
{%- if tools or messages[0].role == 'system' -%}
<|turn>system
{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif -%}
{%- for tool in tools or [] -%}<|tool>{{ tool.function | tojson }}<tool|>{%- endfor -%}<turn|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|turn>user
{{ message.content | trim }}<turn|>
{% set ns.before = 'user' -%}
{%- elif message.role == 'assistant' -%}
{%- if ns.before != 'result' -%}<|turn>model
{% endif -%}
{{ (message.content or '') | trim }}
{%- for call in message.tool_calls or [] -%}
<|tool_call>call:{{ call.function.name }}{
{%- for key, value in call.function.arguments.items() -%}
{{ key }}:{{ text(value) }}{% if not loop.last %},{% endif -%}
{%- endfor -%}}<tool_call|>
{%- endfor -%}
{%- if message.tool_calls -%}
{%- set ns.open = true -%}{%- set ns.before = 'call' -%}
{%- for follow in messages[loop.index0 + 1:] -%}
{%- if follow.role != 'tool' %}{% set ns.open = false %}{% endif -%}
{%- if ns.open -%}
<|tool_response>response:{{ follow.name }}{value:{{ text(follow.content) }}}<tool_response|>
{%- set ns.before = 'result' -%}
{%- endif -%}
{%- endfor -%}
{%- else -%}<turn|>
{% set ns.before = 'answer' -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.before != 'result' -%}<|turn>model
{% endif -%}""",
)

GPT_OSS = Family(
    name="gpt-oss",
    special=(
        "<|startoftext|>",
        "<|endoftext|>",
        "<|return|>",
        "<|constrain|>",
        "<|channel|>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|call|>",
    ),
    eos="<|return|>",
    bos="<|startoftext|>",
    listed_eos=("<|return|>", "<|endoftext|>", "<|call|>"),
    template="""{%- set ns = namespace(called='') -%}
<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>
{%- if tools or messages[0].role == 'system' -%}
<|start|>developer<|message|>
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif -%}
{%- for tool in tools or [] %}{{ tool.function | tojson }}{% endfor -%}<|end|>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- if message.tool_calls -%}
{%- if message.content and message.thinking %}{{ raise_exception('content and thinking beside a call') }}{% endif -%}
{%- if message.content or message.thinking -%}
<|start|>assistant<|channel|>analysis<|message|>{{ message.content or message.thinking }}<|end|>
{%- endif -%}
{%- set call = message.tool_calls[0].function -%}
<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>
{{- call.arguments | tojson }}<|call|>
{%- set ns.called = call.name -%}
{%- elif loop.last and not add_generation_prompt -%}
{%- if message.thinking -%}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{%- endif -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|return|>
{%- set ns.called = '' -%}
{%- else -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>
{%- set ns.called = '' -%}
{%- endif -%}
{%- elif message.role == 'tool' -%}
{%- if not ns.called %}{{ raise_exception('a tool message, but no call before it') }}{% endif -%}
<|start|>functions.{{ ns.called }} to=assistant<|channel|>commentary<|message|>{{ message.content | tojson }}<|end|>
{%- elif message.role == 'user' -%}
<|start|>user<|message|>{{ message.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}""",
)

PHI3 = Family(
    name="phi-3",
    special=("<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
    eos="<|endoftext|>",
    bos="<s>",
    listed_eos=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    tools_as_text=True,
    template="""{%- for message in messages -%}
{%- if message.role == 'system' -%}
<|system|>
{{ message.content }}<|end|>
{% elif message.role == 'user' -%}
<|user|>
{{ message.content }}<|end|>
{% elif message.role == 'assistant' -%}
<|assistant|>
{{ message.content }}<|end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{% else %}{{ eos_token }}{%- endif -%}""",
)

COHERE = Family(
    name="cohere",
    special=(
        "<BOS_TOKEN>",
        "<|START_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|USER_TOKEN|>",
        "<|CHATBOT_TOKEN|>",
        "<|SYSTEM_TOKEN|>",
        "<|START_RESPONSE|>",
        "<|END_RESPONSE|>",
        "<|START_ACTION|>",
        "<|END_ACTION|>",
        "<|START_TOOL_RESULT|>",
        "<|END_TOOL_RESULT|>",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
    ),
    eos="<|END_OF_TURN_TOKEN|>",
    bos="<BOS_TOKEN>",
    template="""{%- macro results(messages, start, ids) -%}
{%- set ns = namespace(open=true, first=true) -%}
{%- for message in messages[start:] -%}
{%- if message.role != 'tool' %}{% set ns.open = false %}{% endif -%}
{%- if ns.open and message.tool_call_id in ids -%}
{%- if not ns.first %}, {% endif %}{% set ns.first = false -%}
{"tool_call_id": "{{ ids.index(message.tool_call_id) }}", "content": {{ message.content | tojson }}}
{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if tools or messages[0].role == 'system' -%}
<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif -%}
{%- if tools %}{{ tools | tojson }}{% endif -%}<|END_OF_TURN_TOKEN|>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ message.content }}<|END_OF_TURN_TOKEN|>
{%- elif message.role == 'assistant' and message.tool_calls -%}
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_ACTION|>[
{%- for call in message.tool_calls -%}
{"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ call.function.name }}", "parameters":
{{- ' ' + (call.function.arguments | tojson) }}}
{%- if not loop.last %}, {% endif -%}
{%- endfor -%}]<|END_ACTION|><|END_OF_TURN_TOKEN|>
{%- set found = results(messages, loop.index0 + 1, message.tool_calls | map(attribute='id') | list) -%}
{%- if found -%}
<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[{{ found }}]<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>
{%- endif -%}
{%- elif message.role == 'assistant' -%}
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{{ message.content }}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{%- endif -%}""",
)

LLAMA2 = Family(
    name="llama2",
    special=("<unk>", "<s>", "</s>"),
    eos="</s>",
    bos="<s>",
    tools_as_text=True,
    template="""{%- if messages[0].role == 'system' -%}
{%- set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate') }}
{%- endif -%}
{%- if message.role == 'user' -%}
{{ bos_token + '[INST] ' + (first if loop.first else '') + message.content.strip() + ' [/INST]' }}
{%- else -%}
{{ ' ' + message.content.strip() + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}""",
)

SMOLLM3 = Family(
    name="smollm3",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    plain=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    eos="<|im_end|>",
    template="""{%- set mode = '/think' if enable_thinking | default(true) else '/no_think' -%}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if '/no_think' in system %}{% set mode = '/no_think' %}{% endif -%}
<|im_start|>system
Today Date: {{ strftime_now('%d %B %Y') }}
{{ system.replace('/no_think', '') }}
{%- for tool in tools or [] %}{{ '\n' + (tool | tojson) }}{% endfor -%}<|im_end|>
{% for message in messages -%}
{%- if message.role in ('user', 'tool') -%}
<|im_start|>user
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' -%}
<|im_start|>assistant
{{ '<think>\n\n</think>\n' if mode == '/no_think' else '' }}{{ message.content.lstrip('\n') }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{{ '<think>\n\n</think>\n' if mode == '/no_think' else '' }}
{%- endif -%}""",
)

MISTRAL_NEMO = Family(
    name="mistral-nemo",
    special=MISTRAL.special,
    eos="</s>",
    bos="<s>",
    call_id="call{:05d}",
    template=MISTRAL.template.replace(
        "(ns.system if loop.index0 == ns.last_user else '')", "(ns.system if loop.last else '')"
    ),
)

LLAMA32 = Family(
    name="llama3.2",
    special=LLAMA31.special,
    eos="<|eot_id|>",
    bos="<|begin_of_text|>",
    listed_eos=LLAMA31.listed_eos,
    template="""{%- if date_string is not defined -%}
{%- if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}
{%- else %}{% set date_string = '26 Jul 2024' %}{% endif -%}
{%- endif -%}"""
    + LLAMA31.template.replace("{{ system }}", "Today Date: {{ date_string }}\n\n{{ system }}"),
)

MINIMAX_M2 = Family(
    name="minimax-m2",
    special=("]!p~[", "]~!b[", "]~b]", "[e~["),
    plain=("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"),
    eos="[e~[",
    bos="]~!b[",
    template="""{%- set ns = namespace(last_user=-1, thought='', text='') -%}
{{- ']~!b[' + ']~b]system\n' -}}
{{- messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' -}}
{%- for tool in tools or [] %}{{ '\n<tool>' + (tool.function | tojson) + '</tool>' }}{% endfor -%}
{{- '[e~[\n' -}}
{%- for message in messages -%}
{%- if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- ']~b]user\n' + message.content + '[e~[\n' -}}
{%- elif message.role == 'assistant' -%}
{{- ']~b]ai\n' -}}
{%- set ns.text = message.content or '' -%}
{%- set ns.thought = message.reasoning_content or '' -%}
{%- if '</think>' in ns.text -%}
{%- set ns.thought = ns.text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set ns.text = ns.text.split('</think>')[-1].strip('\n') -%}
{%- endif -%}
{%- if ns.thought and loop.index0 > ns.last_user %}{{ '<think>\n' + ns.thought + '\n</think>\n\n' }}{% endif -%}
{{- ns.text -}}
{%- if message.tool_calls -%}
{{- '\n<minimax:tool_call>\n' -}}
{%- for call in message.tool_calls -%}
{{- '<invoke name="' + call.function.name + '">' -}}
{%- for key, value in call.function.arguments.items() -%}
{{- '\n<parameter name="' + key + '">' + (value if value is string else value | tojson) + '</parameter>' -}}
{%- endfor -%}
{{- '\n</invoke>\n' -}}
{%- endfor -%}
{{- '</minimax:tool_call>' -}}
{%- endif -%}
{{- '[e~[\n' -}}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ ']~b]tool' }}{% endif -%}
{{- '\n<response>' + message.content + '</response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '[e~[\n' }}{% endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ ']~b]ai\n<think>\n' }}{% endif -%}""",
)

QWEN3_CODER = Family(
    name="qwen3-coder",
    special=QWEN3.special,
    plain=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    eos="<|im_end|>",
    listed_eos=QWEN3.listed_eos,
    template=QWEN25.template.replace(
        """{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>""",
        """<function={{ call.function.name }}>
{% for key, value in call.function.arguments | items -%}
<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor -%}
</function>
</tool_call>""",
    ).replace("</tools><|im_end|>", "</tools>\nYou may call several at once.<|im_end|>"),
)

GEMMA4_THOUGHTS = Family(
    name="gemma-4-thoughts",
    special=GEMMA4.special,
    eos="<eos>",
    bos="<bos>",
    listed_eos=GEMMA4.listed_eos,
    template=GEMMA4.template.replace(
        "{{ (message.content or '') | trim }}",
        """{%- if message.reasoning and message.tool_calls -%}
<|channel>thought
{{ message.reasoning }}
<channel|>
{%- endif -%}
{{ (message.content or '').split('<channel|>')[-1] | trim }}""",
    ).removesuffix("{% endif -%}")
    + """{{ '<|channel>thought\\n<channel|>' if not enable_thinking | default(false) else '' }}{% endif -%}""",
)

DEEPSEEK_V31 = Family(
    name="deepseek-v3.1",
    special=DEEPSEEK_V3.special,
    plain=_DEEPSEEK_PLAIN,
    eos=DEEPSEEK_V3.eos,
    bos=DEEPSEEK_V3.bos,
    arguments_as_text=True,
    template=_DEEPSEEK_BODY.replace(
        "{% else %}<｜Assistant｜>{% endif %}", "{% else %}<｜Assistant｜></think>{% endif %}"
    )
    + "{{ '<think>' if thinking | default(false) else '</think>' }}{%- endif -%}",
)

HERMES2 = Family(
    name="hermes-2-pro",
    tools_listed=True,
    special=("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    bos="<|begin_of_text|>",
    template="""{{- bos_token -}}
<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor -%}<|im_end|>
{% for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|im_start|>tool
{% endif -%}
{{ '<tool_response>\n' + message.content + '\n</tool_response>\n' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}<|im_end|>
{% endif -%}
{%- else -%}
<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
{{ '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}}
</tool_call>
{%- endfor -%}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}""",
)

LLAVA = Family(
    name="llava",
    text_parts=True,
    special=("<s>", "</s>", "<unk>", "<image>"),
    eos="</s>",
    bos="<s>",
    tools_as_text=True,
    template="""{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
<<SYS>>
{{ message.content[0].text }}<</SYS>>
{% elif message.role == 'user' -%}
[INST]
{%- for part in message.content if part.type == 'image' %}<image>{% endfor -%}
{%- for part in message.content if part.type == 'text' %} {{ part.text }} {% endfor -%}[/INST]
{%- elif message.role == 'assistant' -%}
{%- for part in message.content %} {{ part.text }} {% endfor -%}{{ eos_token }}
{%- endif -%}
{%- endfor -%}""",
)

FALCON = Family(
    name="falcon",
    special=("<|endoftext|>", ">>TITLE<<"),
    eos="<|endoftext|>",
    tools_as_text=True,
    template="""{%- for message in messages -%}
{%- if not loop.first %}{{ '\n' }}{% endif -%}
{%- if message.role == 'system' -%}System: {{ message.content }}
{%- elif message.role == 'user' -%}User: {{ message.content }}
{%- elif message.role == 'assistant' -%}Falcon: {{ message.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '\nFalcon:' }}{% endif -%}""",
)

COMMAND_R7B = Family(
    name="command-r7b",
    special=COHERE.special,
    eos=COHERE.eos,
    bos=COHERE.bos,
    template="""{{- bos_token -}}
{%- macro number_of(call_id) -%}
{%- set ns = namespace(count=0, found=false) -%}
{%- for message in messages -%}
{%- for call in message.tool_calls or [] -%}
{%- if call.id == call_id and not ns.found %}{{ ns.count }}{% set ns.found = true %}{% endif -%}
{%- set ns.count = ns.count + 1 -%}
{%- endfor -%}
{%- endfor -%}
{%- endmacro -%}
{%- macro result_of(message) -%}
{"tool_call_id": "{{ number_of(message.tool_call_id) }}", "results": {"0": {{ message.content | tojson }}}}
{%- endmacro -%}
{%- set ns = namespace(number=0, seen=[]) -%}
<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># System
{%- for tool in tools or [] -%}
{{ '\n' }}{"name": "{{ tool.function.name }}", "parameters": {{ tool.function.parameters | tojson }}}
{%- endfor -%}
{%- if messages[0].role == 'system' %}{{ '\n' + messages[0].content }}{% endif -%}<|END_OF_TURN_TOKEN|>
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ message.content }}<|END_OF_TURN_TOKEN|>
{%- elif message.role == 'assistant' -%}
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>
{%- if message.tool_calls -%}
<|START_THINKING|>{{ message.tool_plan }}<|END_THINKING|><|START_ACTION|>[
{%- for call in message.tool_calls %}
    {"tool_call_id": "{{ ns.number }}", "tool_name": "{{ call.function.name }}", "parameters":
{{- ' ' + (call.function.arguments | tojson) }}}
{%- if not loop.last %},{% endif %}{% set ns.number = ns.number + 1 -%}
{%- endfor %}
]<|END_ACTION|>
{%- else -%}<|START_RESPONSE|>{{ message.content }}<|END_RESPONSE|>{%- endif -%}<|END_OF_TURN_TOKEN|>
{%- elif message.role == 'tool' and message.tool_call_id not in ns.seen -%}
<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[
{{ result_of(message) }}
{%- for other in messages[loop.index0 + 1:] -%}
{%- if other.role != 'tool' %}{% break %}{% endif -%},
{{ result_of(other) }}{% set ns.seen = ns.seen + [other.tool_call_id] -%}
{%- endfor %}
]<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{%- endif -%}""",
)

LLAMA4 = Family(
    name="llama4",
    special=(
        "<|begin_of_text|>",
        "<|header_start|>",
        "<|header_end|>",
        "<|eot|>",
        "<|eom|>",
        "<|python_start|>",
        "<|python_end|>",
        "<|end_of_text|>",
    ),
    eos="<|eot|>",
    bos="<|begin_of_text|>",
    listed_eos=("<|end_of_text|>", "<|eom|>", "<|eot|>"),
    template="""{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content | trim -%}{%- set messages = messages[1:] -%}
<|header_start|>system<|header_end|>

{{ ('Environment: ipython\n' if tools else '') + system }}<|eot|>
{%- endif -%}
{%- if tools -%}
{%- if not messages -%}{{ raise_exception('no first user message') }}{%- endif -%}
<|header_start|>user<|header_end|>

{% for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor -%}
{{ messages[0].content | trim }}<|eot|>
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message.tool_calls -%}
<|header_start|>assistant<|header_end|>

{% if message.content %}<|python_start|>{{ message.content }}<|python_end|>{% endif -%}
{%- for call in message.tool_calls -%}
{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}
{%- endfor -%}<|eot|>
{%- elif message.role in ('tool', 'ipython') -%}
<|header_start|>ipython<|header_end|>

{{ message.content | tojson }}<|eot|>
{%- else -%}
<|header_start|>{{ message.role }}<|header_end|>

{{ message.content }}<|eot|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|header_start|>assistant<|header_end|>

{% endif -%}""",
)

PHI4_MINI = Family(
    name="phi-4-mini",
    special=("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|tool|>", "<|/tool|>"),
    eos="<|endoftext|>",
    bos="<|endoftext|>",
    listed_eos=("<|endoftext|>", "<|end|>"),
    template="""{%- for message in messages -%}
{%- if message.role == 'system' and message.get('tools') is not none and message.get('tools') -%}
{{ '<|system|>' + message.content + '<|tool|>' + message.tools + '<|/tool|><|end|>' }}
{%- else -%}
{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- else -%}{{ eos_token }}{%- endif -%}""",
)

GRANITE33 = Family(
    name="granite-3.3",
    special=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
    eos="<|end_of_text|>",
    bos="<|end_of_text|>",
    template="""{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = "Today's Date: " + strftime_now('%B %d, %Y') + '.' -%}{%- endif -%}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' -}}
{%- if tools -%}
{{- '<|start_of_role|>available_tools<|end_of_role|>' + (tools | tojson(indent=4)) + '<|end_of_text|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\n' -}}
{%- if loop.last and add_generation_prompt -%}
{{- '<|start_of_role|>assistant<|end_of_role|>' -}}
{%- endif -%}
{%- endfor -%}""",
)

GRANITE4 = Family(
    name="granite-4",
    special=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
    plain=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"),
    eos="<|end_of_text|>",
    bos="<|end_of_text|>",
    template="""{%- set ns = namespace(system='') -%}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content + '\n\n' %}{% endif -%}
{%- if tools -%}
{%- set ns.system = ns.system + '<tools>' -%}
{%- for tool in tools %}{% set ns.system = ns.system + '\n' + (tool | tojson) %}{% endfor -%}
{%- set ns.system = ns.system + '\n</tools>' -%}
{%- endif -%}
{%- if ns.system -%}{{ '<|start_of_role|>system<|end_of_role|>' + ns.system + '<|end_of_text|>\n' }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{ '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\n' }}
{%- elif message.role == 'assistant' -%}
{{ '<|start_of_role|>assistant<|end_of_role|>' + message.content }}
{%- for call in message.tool_calls or [] -%}
{{ ('\n' if message.content or not loop.first else '') + '<tool_call>\n{"name": "' + call.function.name }}
{{- '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}
{%- endfor -%}
{{ '<|end_of_text|>\n' }}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|start_of_role|>user<|end_of_role|>{%- endif -%}
{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|end_of_text|>\n' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start_of_role|>assistant<|end_of_role|>{%- endif -%}""",
)

FAMILIES = {
    family.name: family
    for family in (
        QWEN25,
        QWEN3,
        QWEN3_THINKING,
        LLAMA31,
        GLM4,
        GLM45,
        DEEPSEEK_V3,
        DEEPSEEK_R1,
        KIMI_K2,
        MISTRAL,
        GEMMA2,
        GEMMA3,
        GEMMA4,
        GPT_OSS,
        PHI3,
        COHERE,
        LLAMA2,
        SMOLLM3,
        MISTRAL_NEMO,
        LLAMA32,
        MINIMAX_M2,
        QWEN3_CODER,
        GEMMA4_THOUGHTS,
        DEEPSEEK_V31,
        HERMES2,
        LLAVA,
        FALCON,
        COMMAND_R7B,
        LLAMA4,
        PHI4_MINI,
        GRANITE33,
        GRANITE4,
    )
}

ENDS = {
    "llama3.1": ("<|eot_id|>", "<|eot_id|>"),
    "glm-4": ("<|user|>", "<|observation|>"),
    "glm-4.5": ("<|user|>", "<|observation|>"),
    "deepseek-v3": ("<｜end▁of▁sentence｜>",) * 2,
    "deepseek-r1": ("<｜end▁of▁sentence｜>",) * 2,
    "mistral": ("</s>", "</s>"),
    "gemma-2": ("<end_of_turn>",) * 2,
    "gemma-3": ("<end_of_turn>",) * 2,
    "gemma-4": ("<turn|>", "<|tool_response>"),
    "gpt-oss": ("<|return|>", "<|call|>"),
    "phi-3": ("<|end|>", "<|end|>"),
    "cohere": ("<|END_OF_TURN_TOKEN|>",) * 2,
    "llama2": ("</s>", "</s>"),
    "mistral-nemo": ("</s>", "</s>"),
    "llama3.2": ("<|eot_id|>", "<|eot_id|>"),
    "minimax-m2": ("[e~[", "[e~["),
    "gemma-4-thoughts": ("<turn|>", "<|tool_response>"),
    "deepseek-v3.1": ("<｜end▁of▁sentence｜>",) * 2,
    "llava": ("</s>", "</s>"),
    "falcon": ("<|endoftext|>",) * 2,
    "command-r7b": ("<|END_OF_TURN_TOKEN|>",) * 2,
    "llama4": ("<|eot|>", "<|eot|>"),
    "phi-4-mini": ("<|end|>", "<|end|>"),
    "granite-3.3": ("<|end_of_text|>",) * 2,
    "granite-4": ("<|end_of_text|>",) * 2,
}
"""With what a policy ends a turn that answers, and one that calls; `<|im_end|>` where nothing is said."""


def ends(name: str) -> tuple[str, str]:
    """With what a policy ends a turn that answers, and one that calls."""
    return ENDS.get(name, ("<|im_end|>", "<|im_end|>"))
