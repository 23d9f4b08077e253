"""Build the small tokenizer of the base model: byte-level BPE whose tokens are the words of the two-hop world.

The pre-tokenizer gives a name the same tokens wherever it stands. A capitalised word never takes the space before
it: that space ends the token before (`in `, `. `, `Mara `), while a lower-case word or a number takes its own
leading space. So copying a name from a passage into a query is copying token by token.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from polyturn.envs.two_hop.world import Pool
from polyturn.tools.search.retrieval import NOTHING_FOUND

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


def split_words(tokenizer: Any, texts: Iterable[str]) -> Iterator[str]:
    """The pre-tokens of `texts` that `tokenizer` spells with more than one token."""
    for text in texts:
        for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text):
            if tokenizer.backend_tokenizer.model.token_to_id(word) is None:
                yield word


def training_texts() -> Iterator[str]:
    """What the vocabulary is made from: every name, passages, questions and whole conversations."""
    from polyturn.envs.two_hop.env import GIVE_UP, SYSTEM_PROMPT, write_call
    from polyturn.envs.two_hop.world import employer_names, make_world, people_names, town_names
    from polyturn.tools.search.retrieval import SEARCH_SPEC

    for pool in get_args(Pool):
        yield from people_names(pool)
        yield from employer_names(pool)
    world = make_world(0, pools=("demonstration",))
    for passage in world.passages:
        yield passage.contents
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
