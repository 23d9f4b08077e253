"""A tiny random model and one engine behind a router that serves it, shared by the session."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from polyturn.configs.schema.engines import EnginesConfig, RouterConfig
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.launch import Engines, LocalLauncher
from polyturn.rollout.engines.server import EngineSpec

TEMPLATE = "chat_template.jinja"


def make_model(directory: Path, *, seed: int, tied: bool) -> Path:
    """A random Qwen3 of 100k parameters with a byte-level tokenizer; its vocabulary is no multiple of 64."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=tied,
        initializer_range=0.15,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    wrapped.chat_template = resources.files("polyturn.trainer.base_model").joinpath(TEMPLATE).read_text()
    wrapped.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an output layer of its own."""
    return make_model(tmp_path_factory.mktemp("models") / "untied", seed=0, tied=False)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return make_model(tmp_path_factory.mktemp("models") / "other", seed=1, tied=False)


@pytest.fixture(scope="session")
def engines(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """One engine with seeded sampling behind the router."""
    spec = EngineSpec(
        config=EnginesConfig(device="cpu", start_timeout_s=240),
        model_path=tiny_model,
        dtype="float32",
        seeded=True,
        router=RouterConfig(policy="cache_aware"),
        log_directory=tmp_path_factory.mktemp("engines"),
    )
    with Engines(spec, LocalLauncher(spec)) as running:
        yield running


@pytest.fixture(scope="session")
def control(engines: Engines) -> Iterator[EngineControl]:
    """Control calls to that engine."""
    [url] = engines.engine_urls
    with EngineControl(url) as control:
        yield control
