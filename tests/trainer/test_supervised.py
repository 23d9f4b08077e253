"""Supervised training learns, repeats itself, and writes a model that transformers loads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from polyturn.trainer.base_model.supervised import SupervisedConfig, train_supervised
from tests.support.megatron.policies import make_policy

CONFIG = SupervisedConfig(
    num_updates=40,
    tokens_per_update=256,
    learning_rate=0.01,
    warmup_updates=5,
    max_tokens_per_gpu=150,
)


def counting(num_examples: int | None = None):
    """Sequences that count upwards from anywhere; the first half is not taught."""
    rng = np.random.default_rng(0)
    number = 0
    while num_examples is None or number < num_examples:
        length = int(rng.integers(6, 20))
        token_ids = int(rng.integers(0, 50)) + np.arange(length)
        yield token_ids.tolist(), [False] * (length // 2) + [True] * (length - length // 2)
        number += 1


def test_it_learns_and_saves(make_model, tmp_path):
    seen = []
    losses = train_supervised(
        make_model(), counting(), tmp_path / "a", CONFIG, progress=lambda update, metrics: seen.append(update)
    )
    assert seen == list(range(1, 41)) and len(losses) == 40
    assert losses[0] > 4.0 and losses[-1] < 0.5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    logits = model(input_ids=torch.arange(20, 30)[None]).logits[0]
    assert logits.argmax(-1)[3:].tolist() == list(range(24, 31))


def test_it_repeats_bit_for_bit(make_model, tmp_path):
    short = replace(CONFIG, num_updates=6)
    losses = [train_supervised(make_model(), counting(), tmp_path / name, short) for name in "ab"]
    assert losses[0] == losses[1]
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_the_loss_is_transformers_loss_on_the_taught_tokens(make_model, tmp_path):
    path = make_model()
    examples = list(counting(3))
    size = sum(len(token_ids) for token_ids, _ in examples)
    config = SupervisedConfig(num_updates=1, tokens_per_update=size)
    (loss,) = train_supervised(path, examples, tmp_path / "out", config)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    total, number = 0.0, 0
    for token_ids, mask in examples:
        labels = torch.where(torch.tensor(mask), torch.tensor(token_ids), -100)
        with torch.no_grad():
            mean = model(input_ids=torch.tensor(token_ids)[None], labels=labels[None]).loss.item()
        total += mean * sum(mask)
        number += sum(mask)
    assert loss == pytest.approx(total / number, abs=1e-5)


def test_a_stream_that_ends_or_is_crooked_is_refused(make_model, tmp_path):
    with pytest.raises(ValueError, match="ended after 0 of 40 updates"):
        train_supervised(make_model(), counting(3), tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match="example 0: 3 tokens with a mask of 2"):
        train_supervised(make_model(), iter([([1, 2, 3], [False, True])]), tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()
    make_policy(make_model()).close()
