"""Small real tokenizers: byte-level BPE with the special tokens and chat templates of two model families."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from polyturn.trainer.base_model.initial import CHAT_TEMPLATE_PATH

LLAMA_TEMPLATE = """{{- bos_token }}
{%- if tools %}<|start_header_id|>system<|end_header_id|>

{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|eot_id|>{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}<|start_header_id|>assistant<|end_header_id|>

{{ message.content }}{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|eot_id|>
{%- else %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

THINKING_TEMPLATE = """{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set content = message.content.split('</think>')[-1] -%}
<|im_start|>assistant
{% if loop.last %}<think>

</think>

{% endif %}{{ content }}<|im_end|>
{% else -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
"""Drops earlier thoughts, and shows an empty one in the last turn, as Qwen3's template does."""

TEXTS = [
    "Mara Lindqvist works for Holloway Mills. Holloway Mills is based in Ashford.",
    "In which town is the employer of Mara Lindqvist based?",
    json.dumps({"name": "search", "arguments": {"query": "Mara Lindqvist"}}),
    "system user assistant tool Search the knowledge base. Answer with the town alone.",
]


def build_tokenizer(template, specials, *, eos, bos=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in ("<tool_call>", "</tool_call>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        bos_token=bos,
        chat_template=template,
        pad_token=specials[0],
    )


@pytest.fixture(scope="session")
def chatml():
    """The tokenizer family and template of the model that the package ships."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return build_tokenizer(CHAT_TEMPLATE_PATH.read_text(encoding="utf-8"), specials, eos="<|im_end|>")


@pytest.fixture(scope="session")
def llama():
    specials = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return build_tokenizer(LLAMA_TEMPLATE, specials, eos="<|eot_id|>", bos="<|begin_of_text|>")


@pytest.fixture(scope="session")
def thinking():
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return build_tokenizer(THINKING_TEMPLATE, specials, eos="<|endoftext|>")


@pytest.fixture(scope="session", params=["chatml", "llama"])
def tokenizer(request):
    """Each family in turn."""
    return request.getfixturevalue(request.param)
