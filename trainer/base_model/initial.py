"""What the base model starts from: its tokenizer, and weights that are random but for one circuit laid down by hand.

The tokenizer is a small byte-level BPE whose tokens are the words of the two-hop world. Its pre-tokenizer gives a name
the same tokens wherever it stands. A capitalised word never takes the space before it: that space ends the token
before (`in `, `. `, `Mara `), while a lower-case word or a number takes its own leading space. So copying a name from a
passage into a query is copying token by token.

A transformer copies from its context with an induction circuit (arXiv 2209.11895): a head of one layer writes into
each position what the token before it was, a head of the next layer looks for positions whose previous token is the
current one and copies what stands there. A small model finds this circuit only after millions of tokens. Here the
first two layers begin with a rough form of it, which copies one token in five; a few hundred thousand tokens of
repeated sequences make that 0.99. The heads of the third layer begin with values and outputs that copy whatever they
attend to, so that they have only to learn where to look: without it, reading a fact from a passage stays at chance for
two million tokens. Where to look, and everything else that the task needs, is learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from polyturn.envs.two_hop.world import Pool, employer_names, make_world, people_names, town_names
from polyturn.tools.search.retrieval import NOTHING_FOUND, SEARCH_SPEC

ROPE_THETA = 10_000.0


def model_config(tokenizer: Any) -> Any:
    """A `Qwen3Config` of 0.8 million parameters: 3 layers, 128 wide, tied embeddings."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.05,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )


def write_initial_model(tokenizer: Any, directory: Path, *, seed: int = 0) -> None:
    """Write a Hugging Face directory with the untrained model and its tokenizer."""
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(model_config(tokenizer)).to(torch.float32)
        lay_induction_circuit(model)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def lay_induction_circuit(
    model: Any, *, sharpness: float = 2.0, background: float = 0.1, match: float = 0.2
) -> None:
    """Set the first two layers' attention to a rough induction circuit, in place, and let later layers copy.

    Draws from torch's generator.

    Args:
        model: A Qwen3 model of two layers or more, with as many key-value heads as heads.
        sharpness: Of the query and key norms: how far the heads' attention is from uniform.
        background: By how much all that does not belong to the circuit is damped at first.
        match: Scale of the matching weights.
    """
    import torch

    config = model.config
    width, head_dim, num_heads = config.hidden_size, config.head_dim, config.num_attention_heads
    assert num_heads == config.num_key_value_heads and num_heads * head_dim // 2 < width
    half = head_dim // 2
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    slow = torch.zeros(head_dim)
    slow[half // 2 : half] = slow[half + half // 2 :] = (
        1.0  # rotary dimensions that hardly turn within a context
    )
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(width, width))[0]
        constant = basis[
            :, 0
        ]  # a direction that all embeddings share, so that a head can act on position alone
        embeddings = model.model.embed_tokens.weight
        embeddings -= torch.outer(embeddings @ constant, constant)
        size = embeddings.norm(dim=1).mean()
        embeddings += size * constant
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= background
            layer.self_attn.o_proj.weight *= background
        first, second = (layer.self_attn for layer in model.model.layers[:2])
        for attention in (first, second):
            attention.q_norm.weight.fill_(sharpness)
            attention.k_norm.weight.fill_(sharpness)
        # A constant query that is the constant key turned back by one position attends to the token before.
        key, query, fast = torch.zeros(head_dim), torch.zeros(head_dim), slice(0, 4)
        key[fast] = 1.0
        query[fast] = torch.cos(frequencies[fast])
        query[half : half + 4] = -torch.sin(frequencies[fast])
        for head in range(num_heads):
            rows = slice(head * head_dim, (head + 1) * head_dim)
            written = torch.zeros(width, head_dim)
            written[:, slow.bool()] = basis[:, 1 + head * half : 1 + (head + 1) * half]
            read = _random_reader(head_dim, width, constant) * slow[:, None]
            copied = _random_reader(head_dim, width, constant)
            for weight, vector in ((first.q_proj.weight, query), (first.k_proj.weight, key)):
                weight[rows] = 0.2 * weight[rows] + torch.outer(vector, constant)
            first.v_proj.weight[rows] = read
            first.o_proj.weight[:, rows] = size / (width / 2) ** 0.5 * 2 * written
            second.q_proj.weight[rows] = read * width**0.5 * match
            second.k_proj.weight[rows] = written.T * match
            second.v_proj.weight[rows] = copied
            second.o_proj.weight[:, rows] = copied.T
            for layer in model.model.layers[2:]:
                copied = _random_reader(head_dim, width, constant)
                layer.self_attn.v_proj.weight[rows] = copied
                layer.self_attn.o_proj.weight[:, rows] = copied.T


def _random_reader(rows: int, width: int, constant: Any) -> Any:
    """A random projection that does not see the constant direction. Shape (rows, width)."""
    import torch

    reader = torch.randn(rows, width) / width**0.5
    return reader - torch.outer(reader @ constant, constant)


PRE_TOKEN_PATTERN = (
    r" ?[a-z]+(?: (?=[A-Z]))?"
    r"|[A-Z][a-z]*(?: (?=[A-Z]))?"
    r"| ?\d{1,2}(?: (?=[A-Z]))?"
    r"| ?[^\sA-Za-z0-9]+(?: [^\sA-Za-z0-9]+)*(?: (?=[A-Z]))?"
    r"|\s"
)
"""Words, numbers by two digits, runs of punctuation (blanks between them included), single white space."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>")
"""One token each, as in Qwen3, and not special: decoding keeps them."""

CHAT_TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Any:
    """A `transformers` fast tokenizer with exactly `vocab_size` tokens, lossless on any text.

    Raises:
        ValueError: the texts do not hold enough different words for that many tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKERS),
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False, special=False) for marker in MARKERS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts give only {tokenizer.get_vocab_size()} tokens, not {vocab_size}: ask for fewer or add texts"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE_PATH.read_text(encoding="utf-8"),
    )


def training_texts() -> Iterator[str]:
    """What the vocabulary is made from: every name, passages, questions and whole conversations."""
    from polyturn.envs.two_hop.env import GIVE_UP, SYSTEM_PROMPT, write_call

    for pool in get_args(Pool):
        yield from people_names(pool)
        yield from employer_names(pool)
    world = make_world(0, pools=("demonstration",))
    for passage in world.passages:
        yield f'"{passage.title}"\n{passage.text}'
    for question in world.questions["demonstration"]:
        yield question.text
    chat = (
        SYSTEM_PROMPT,
        "\n\n# Tools\n<tools>\n",
        json.dumps(SEARCH_SPEC.to_openai()),
        "system\nuser\nassistant\n",
        write_call("Name"),
        "Doc 1(Title: Name) Name.\nDoc 2(Title: Name) Name.\n",
        GIVE_UP,
        NOTHING_FOUND,
        "The tool call: not valid JSON: Expecting",
    )
    # Whole words before parts of names: each of these must become one token.
    for _ in range(1000):
        yield from chat
        yield from (f"in {town}." for town in town_names())
