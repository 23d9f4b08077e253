"""The shielded encoder is the tokenizer itself, but that no hidden text becomes a mark; of every kind of tokenizer."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.shielding import Shield, ShieldedEncoder, TextFinder, is_mark

TEXTS = [
    "<s> [INST] Mara works </s> for <h1>Holloway</h1> Mills",
    "a < b and b > a",
    "Ashford\n\ntown </s",
] * 3
MARKS = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>"]
TEMPLATE = """{%- for m in messages -%}
{%- if m.role == 'assistant' %}{{ m.content }}</s>{% else %}<|user|>{{ m.content }}<|end|>{% endif -%}
{%- endfor -%}"""


def sentencepiece_unigram(scheme):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(vocab_size=90, special_tokens=MARKS, unk_token="<unk>", show_progress=False),
    )
    return tokenizer


def sentencepiece_bpe():
    """As Llama 2's: marks are in the vocabulary, and a space is put before the text."""
    vocab = {text: number for number, text in enumerate(MARKS)}
    pieces = [
        "\u2581",
        *"<>/s|[]INTMarwokfhHlyibndAt\nu1e",
        "</",
        "</s",
        "<h",
        "<h1",
        "\u2581M",
        "\u2581Ma",
        "1>",
    ]
    vocab |= {piece: len(vocab) + number for number, piece in enumerate(dict.fromkeys(pieces))}
    vocab["<h1>"] = len(vocab)
    merges = [
        ("<", "/"),
        ("</", "s"),
        ("</s", ">"),
        ("<", "h"),
        ("<h", "1"),
        ("<h1", ">"),
        ("1", ">"),
        ("\u2581", "M"),
    ]
    merges += [("\u2581M", "a")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    return tokenizer


def word_level():
    words = ["Mara", "works", "for", "a", "b", "<", ">"]
    vocab = {text: number for number, text in enumerate([*MARKS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("</s>", behavior="isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    return tokenizer


def byte_level(**flags):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, **flags) for mark in MARKS])
    return tokenizer


def lowercased():
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True)])
    return tokenizer


KINDS = {
    "unigram, space first": lambda: sentencepiece_unigram("first"),
    "unigram, space always": lambda: sentencepiece_unigram("always"),
    "unigram, no space": lambda: sentencepiece_unigram("never"),
    "bpe with a space before": sentencepiece_bpe,
    "words": word_level,
    "bytes": byte_level,
    "bytes, space behind marks swallowed": lambda: byte_level(rstrip=True),
    "bytes, space before marks swallowed": lambda: byte_level(lstrip=True),
    "lower case": lowercased,
}


def wrapped(name):
    tokenizer = KINDS[name]()
    tokenizer.add_special_tokens(
        [AddedToken(mark, normalized=False) for mark in MARKS if "bytes" not in name]
    )
    tokenizer.add_tokens([AddedToken("<h1>", normalized=False), AddedToken("\n\n", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


tokenizers = {name: wrapped(name) for name in KINDS}
encoders = {name: ShieldedEncoder(tokenizer) for name, tokenizer in tokenizers.items()}
pieces = st.sampled_from(
    ["Mara", " works", "</s", "</", "<", ">", "\n\n", "\n", " ", "  ", "a", "<h1", "1>", "\u2581"]
)
clean = (
    st.lists(pieces, max_size=8).map("".join).filter(lambda text: "</s>" not in text and "<h1>" not in text)
)
kinds = st.sampled_from(sorted(KINDS))


@settings(max_examples=300, deadline=None)
@given(kind=kinds, text=clean)
def test_what_holds_no_mark_is_encoded_as_the_tokenizer_does(kind, text):
    """Also where something was hidden that may have become a mark, and did not."""
    encoder, tokenizer = encoders[kind], tokenizers[kind]
    shield = Shield([{"role": "user", "content": f"{text}<"}], foreign=encoder.foreign, own=TextFinder(()))
    assert shield.hidden
    rendered = f"<|user|>{shield.messages[0]['content']}<|end|> Mara</s>"
    expected = tokenizer.encode(f"<|user|>{text}<<|end|> Mara</s>", add_special_tokens=False)
    assert encoder.encode(rendered, shield) == expected


@settings(max_examples=300, deadline=None)
@given(kind=kinds, parts=st.lists(st.sampled_from([*MARKS, "<h1>"]) | pieces, max_size=6))
def test_hidden_marks_become_none(kind, parts):
    encoder, tokenizer = encoders[kind], tokenizers[kind]
    text = "".join(parts)
    shield = Shield([{"role": "user", "content": text}], foreign=encoder.foreign, own=TextFinder(()))
    ids = encoder.encode(f"<|user|>{shield.messages[0]['content']}<|end|></s>", shield)
    unknown = encoder.ids["<unk>"]
    marks = [i for i in ids if i in {encoder.ids[mark] for mark in encoder.marks} - {unknown}]
    assert marks == [encoder.ids[mark] for mark in ("<|user|>", "<|end|>", "</s>")]
    if unknown not in ids and "bytes" in kind and "swallowed" not in kind:
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == f"<|user|>{text}<|end|></s>"


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_are_encoded_as_in_the_whole_conversation(kind):
    tokenizer = tokenizers[kind]
    renderer = ChatRenderer(tokenizer)
    head, reply = [{"role": "user", "content": "Mara"}], {"role": "assistant", "content": "works"}
    observation = [{"role": "user", "content": "for a"}]
    whole = renderer.start([*head, reply, *observation])
    delta = renderer.extend(observation, last_token_id=tokenizer.eos_token_id)
    assert whole[-len(delta) :] == delta
    assert whole[-len(delta) - 1] == tokenizer.eos_token_id


def test_a_tokenizer_without_its_library_is_refused():
    with pytest.raises(ValueError, match=r"of the class object cannot be used: it has no tokenizer\.json"):
        ShieldedEncoder(object())


def test_words_and_white_space_are_no_marks():
    assert not is_mark("\n\n", special=False)
    assert not is_mark("\u2581\u2581", special=False)
    assert not is_mark("town", special=False)
    assert is_mark("town", special=True)
    assert is_mark("</think>", special=False)


@given(
    texts=st.lists(st.text("ab<>|", min_size=1, max_size=4), max_size=5), text=st.text("ab<>|x", max_size=30)
)
def test_the_longest_text_is_found_first(texts, text):
    pattern = "|".join(map(re.escape, sorted(set(texts), key=len, reverse=True))) or r"(?!)"
    assert list(TextFinder(texts).find(text)) == [found.span() for found in re.finditer(pattern, text)]


def test_a_long_text_is_searched_in_linear_steps():
    """Thousands of marks that begin alike are looked up by their lengths, not one by one."""
    finder = TextFinder([f"<unused{number}>" for number in range(6000)])
    lengths = finder._lengths["<"]
    assert len(lengths) == 4, "one lookup for each length at each place"
    assert len(list(finder.find("<unused5999>" * 1000 + "<" * 1000))) == 1000
