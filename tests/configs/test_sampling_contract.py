"""What is left out of the vocabulary can be recorded; what the trainer could not replay is refused, with the reason."""

from pathlib import Path

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.rollout import SamplingConfig


@pytest.mark.catalogue("B24")
@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("top_k", 1, "top_k must not be 1: a token that is drawn from itself alone teaches nothing"),
        ("top_k", 4097, "top_k must be -1 or from 2 to 4096, got 4097: the engines record no more"),
        ("top_k", 0, "top_k must be -1 or from 2 to 4096, got 0"),
        ("top_p", 0.0, "must be a value greater than 0.0, got 0.0"),
        ("top_p", 1.1, "must be a value of at most 1.0, got 1.1"),
        ("min_p", 1.0, "must be a value less than 1.0, got 1.0"),
        ("min_p", -0.1, "must be a value of at least 0.0, got -0.1"),
    ],
)
def test_what_leaves_nothing_or_cannot_be_recorded_is_refused(key, value, problem, tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"extends: quickstart\nrollout:\n  sampling: {{{key}: {value}}}\n", "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(recipe)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{recipe}:3: ") and f"rollout.sampling.{key}" in line and problem in line


@pytest.mark.catalogue("B24")
@pytest.mark.parametrize(
    ("options", "vocab_size", "top_k", "cuts_off"),
    [
        ({"top_p": 0.7, "top_k": 20}, 150_000, 20, False),
        ({"top_p": 0.7}, 300, 300, False),
        ({"top_p": 0.7}, 150_000, 4096, True),
        ({"min_p": 0.1}, 4096, 4096, False),
        ({"top_k": 50}, 40, 40, False),
    ],
)
def test_engines_are_asked_for_a_finite_top_k(options, vocab_size, top_k, cuts_off):
    sampling = SamplingConfig(**options)
    assert sampling.is_restricted and sampling.finite_top_k(vocab_size) == top_k
    assert sampling.cuts_off(vocab_size) == cuts_off
    assert sampling.largest_support is not None and sampling.largest_support > top_k


@pytest.mark.catalogue("B24")
def test_records_are_asked_of_engines_and_of_none_without_need():
    routed = "engines.router.policy=cache_aware"
    plain = load_config("quickstart", [routed])
    assert not plain.rollout.sampling.is_restricted and plain.rollout.sampling.largest_support is None
    assert not plain.asks_engines_directly
    for option in ("top_p=0.9", "top_k=20", "min_p=0.1"):
        assert load_config("quickstart", [routed, f"rollout.sampling.{option}"]).asks_engines_directly
    assert load_config("quickstart").asks_engines_directly


@pytest.mark.catalogue("B24")
@pytest.mark.parametrize("key", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_penalties_are_no_options(key):
    with pytest.raises(ConfigError, match=f"unknown key 'rollout.sampling.{key}'"):
        load_config("quickstart", [f"rollout.sampling.{key}=1.1"])
