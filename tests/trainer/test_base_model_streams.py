"""The tokenizer, the first weights and the curriculum of the base model."""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.chat import ChatRenderer
from polyturn.envs.two_hop.world import employer_names, make_world, people_names, town_names
from polyturn.trainer.base_model.initial import train_tokenizer, training_texts
from polyturn.trainer.base_model.streams import EpisodeStream, played_episodes, readings, repeated_sequences

VOCAB_SIZE = 1280


def split_words(tokenizer: Any, texts: Iterable[str]) -> Iterator[str]:
    """The pre-tokens of `texts` that `tokenizer` spells with more than one token."""
    for text in texts:
        for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text):
            if tokenizer.backend_tokenizer.model.token_to_id(word) is None:
                yield word


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(training_texts(), vocab_size=VOCAB_SIZE)


def test_the_vocabulary_is_full_and_every_word_of_the_world_is_one_token(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert set(split_words(tokenizer, training_texts())) == set()
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id} <= set(range(VOCAB_SIZE))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_no_text_is_lost(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_name_has_the_same_tokens_wherever_it_stands(tokenizer):
    name = tokenizer.encode("Mara Lindqvist")
    assert len(name) == 2
    for text in (
        '{"query": "Mara Lindqvist"}',
        "of Mara Lindqvist based",
        "(Title: Mara Lindqvist) x",
        "Mara Lindqvist.",
    ):
        ids = tokenizer.encode(text)
        assert any(ids[i : i + 2] == name for i in range(len(ids)))


def test_the_template_can_be_appended_to_turn_by_turn(tokenizer):
    renderer = ChatRenderer(tokenizer)
    call = '<tool_call>\n{"name": "search", "arguments": {"query": "Mara"}}\n</tool_call>'
    tool = {"role": "tool", "content": "Nothing was found."}
    start = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    turn = [*tokenizer.encode(call), tokenizer.eos_token_id]
    appended = [*renderer.start(start), *turn, *renderer.extend([tool, tool], last_token_id=turn[-1])]
    arguments = {"query": "Mara"}
    reply = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "search", "arguments": arguments}}],
    }
    assert tokenizer.decode(appended) == tokenizer.decode(renderer.start([*start, reply, tool, tool]))


def test_streams_follow_from_their_seed(tokenizer):
    def first(seed):
        return list(itertools.islice(played_episodes(tokenizer, EpisodeStream(skill=0.6), seed=seed), 20))

    assert first(3) == first(3)
    assert first(3) != first(4)


def test_repeated_sequences_teach_only_what_can_be_copied():
    for ids, taught in itertools.islice(repeated_sequences(vocab_size=500, length=64, longest_period=20), 50):
        period = taught.index(True)
        assert len(set(ids[:period])) == period
        assert all(ids[i] == ids[i - period] for i in range(period, 64))
        assert taught == [False] * period + [True] * (64 - period)


def test_episodes_teach_only_the_players_own_tokens_and_end_with_the_answer(tokenizer):
    for ids, taught in itertools.islice(played_episodes(tokenizer, EpisodeStream()), 30):
        turns = "".join(tokenizer.decode([i]) for i, own in zip(ids, taught, strict=True) if own)
        calls, answer = turns.split("<|im_end|>")[:2], turns.split("<|im_end|>")[2]
        assert all(call.startswith("<tool_call>\n{") and call.endswith("}\n</tool_call>") for call in calls)
        assert answer in town_names()
        assert "Doc 1(Title: " in tokenizer.decode(ids)
        assert "Doc" not in turns


def test_a_share_of_the_observations_is_taught_where_asked_for(tokenizer):
    plain, shared = (
        list(itertools.islice(played_episodes(tokenizer, EpisodeStream(observation_share=share)), 40))
        for share in (0.0, 0.5)
    )
    own = sum(sum(taught) for _, taught in plain)
    rest = sum(len(ids) for ids, _ in plain) - own
    assert 0.2 * rest < sum(sum(taught) for _, taught in shared) - own < 0.5 * rest


def test_readings_teach_what_the_results_above_say(tokenizer):
    num_towns = num_calls = 0
    for ids, taught in itertools.islice(readings(tokenizer, EpisodeStream()), 20):
        text = tokenizer.decode(ids)
        turns = "".join(tokenizer.decode([i]) for i, own in zip(ids, taught, strict=True) if own)
        for turn in turns.split("<|im_end|>")[:-1]:
            name = re.sub(r".*: .([A-Z][a-z]+ [A-Z][a-z]+).}}.*", r"\1", turn, flags=re.DOTALL)
            assert re.search(rf"(in|from|for|at|by|with) {name}\.", text)
            num_towns += name in town_names()
            num_calls += name not in town_names()
    assert num_towns > num_calls > 10


def test_demonstrations_tell_nothing_about_any_world_that_is_played(tokenizer):
    """No person or employer of any train or held-out pool stands in them, so no link of such a world can."""
    played = {
        name for pool in ("train", "heldout") for f in (people_names, employer_names) for name in f(pool)
    }
    name = re.compile(r"(?=\b([A-Z][a-z]+ [A-Z][a-z]+))")
    seen = set()
    for ids, _ in itertools.islice(played_episodes(tokenizer, EpisodeStream(skill=0.5)), 200):
        seen |= set(name.findall(tokenizer.decode(ids)))
    assert len(seen) > 300
    assert not seen & played
    assert make_world(1).questions["heldout"][0].person in played


def test_the_first_weights_copy_before_any_training(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    from polyturn.trainer.base_model.initial import write_initial_model

    write_initial_model(tokenizer, tmp_path / "initial", seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "initial")
    examples = list(
        itertools.islice(repeated_sequences(vocab_size=VOCAB_SIZE, length=64, longest_period=24), 32)
    )
    ids = torch.tensor([example[0] for example in examples])
    taught = torch.tensor([example[1] for example in examples])[:, 1:]
    with torch.no_grad():
        right = model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert right[taught].float().mean() > 0.05  # chance is 0.001
