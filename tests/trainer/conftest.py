"""Small random models, samples and one Ray session for the trainer's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import Generation
from polyturn.trainer.data.samples import TrainSample
from tests.support.samples import random_samples

VOCAB_SIZE = 301
"""Odd, so that two tensor-parallel ranks need a padded vocabulary."""


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a Hugging Face directory of a small random model: `make_model("qwen3", tied=True)`."""
    import torch
    import transformers

    made: dict[tuple[str, bool], Path] = {}

    def make(family: str = "qwen3", *, tied: bool = True) -> Path:
        if (family, tied) in made:
            return made[family, tied]
        config_class = {
            "qwen3": transformers.Qwen3Config,
            "qwen2": transformers.Qwen2Config,
            "llama": transformers.LlamaConfig,
        }[family]
        settings = {} if family == "qwen2" else {"head_dim": 12}
        config = config_class(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,  # SGLang pads other widths on a CPU
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            max_position_embeddings=512,
            initializer_range=0.2,
            # transformers starts a padding token's embedding at 0 and never trains it.
            pad_token_id=None,
            bos_token_id=1,
            eos_token_id=2,
            **settings,
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "norm" in name or "bias" in name:
                    # Ones and zeros would hide a swapped or forgotten one.
                    param.copy_(1 + 0.3 * torch.randn_like(param))
        directory = tmp_path_factory.mktemp(f"{family}-{'tied' if tied else 'untied'}")
        model.save_pretrained(directory)
        (directory / "tokenizer_config.json").write_text('{"model_max_length": 512}\n', encoding="utf-8")
        made[family, tied] = directory
        return directory

    return make


@pytest.fixture(scope="session")
def make_samples() -> Callable[..., list[TrainSample]]:
    """Makes random samples with about half of their tokens trainable."""

    return random_samples


@pytest.fixture(scope="session")
def make_episode() -> Callable[..., Episode]:
    """Makes an episode of one answer: `make_episode("g", 0, 1.0, num_sampled=5, truncated=True)`."""

    def make(
        group_id: str,
        sample: int,
        reward: float,
        *,
        num_sampled: int = 3,
        num_segments: int = 1,
        truncated: bool = False,
    ) -> Episode:
        ledger = Ledger()
        ledger.append_observation([1, 2])
        if num_sampled:
            ledger.append_generation(
                Generation(
                    token_ids=tuple(range(num_sampled)),
                    logprobs=(-1.0,) * num_sampled,
                    policy_versions=(0,) * num_sampled,
                    finish_reason="stop",
                )
            )
        return Episode(
            episode_id=f"{group_id}.{sample}.0",
            group_id=group_id,
            env_id="env",
            task_id="task",
            seed=0,
            outcome=Outcome.TRUNCATED if truncated else Outcome.COMPLETED,
            stop_reason="max_turns" if truncated else "terminated",
            reward=reward,
            segments=(ledger.to_segment(),) * num_segments,
        )

    return make


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A private Ray on this machine with room for four ranks; other modules start one of their own."""
    import ray

    ray.init(
        address="local",  # else it joins what another process started on this machine
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()
