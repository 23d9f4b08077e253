"""The real engine's record of routed experts: over turns, against transformers' routers, and in the trainer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import SamplingParams
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.configs.schema.engines import EnginesConfig
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.fleet import EngineFleet
from polyturn.rollout.engines.load import LoadPoller
from polyturn.rollout.engines.server import EngineSpec, SGLangServer
from polyturn.rollout.factory import open_client
from tests.support.engines import engine_checksums
from tests.support.samples import sample_of

pytestmark = pytest.mark.stack

NUM_LAYERS, TOP_K = 2, 2


@pytest.fixture(scope="module")
def moe_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model's tokenizer with a mixture of experts."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    directory = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "moe")
    config = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    torch.manual_seed(1)
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engine_url(moe_model, tmp_path_factory) -> Iterator[str]:
    """An engine that serves it and records the routing."""
    spec = EngineSpec(
        config=EnginesConfig(device="cpu", start_timeout_s=400),
        records_routing=True,
        model_path=moe_model,
        sglang={"max_total_tokens": 4096, "max_running_requests": 4},
        dtype="float32",
        seeded=False,
        log_directory=tmp_path_factory.mktemp("logs"),
    )
    with SGLangServer(spec) as server:
        server.wait_ready()
        yield server.url


async def play(url: str) -> Ledger:
    """Three turns, each with a longer prompt."""
    ledger = Ledger()
    async with open_client(timeout_s=120) as client:
        policy = SGLangPolicy(client=client, url=url, stop_token_ids=(2,), record_routing=True)
        for turn in range(3):
            ledger.append_observation(list(range(20 + turn, 52)))
            sampling = SamplingParams(max_tokens=12, routing_from=ledger.num_routed)
            ledger.append_generation(await policy.generate(prompt_ids=ledger.token_ids, sampling=sampling))
            assert ledger.num_routed == len(ledger) - 1
    return ledger


def routers_choice(path: Path, token_ids: np.ndarray) -> np.ndarray:
    """[tokens, layers, experts per token], sorted, of transformers' routers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    chosen: list[np.ndarray] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _m, _i, output: chosen.append(output[2].numpy()))
    with torch.no_grad():
        model(torch.from_numpy(token_ids)[None])
    return np.sort(np.stack(chosen, 1), -1)


@pytest.mark.catalogue("B40")
async def test_the_engine_records_what_its_routers_chose(moe_model, engine_url):
    from tests.support.megatron.policies import make_policy

    segment = (await play(engine_url)).to_segment()
    record = segment.routed_experts
    assert record is not None and record.shape == (len(segment), NUM_LAYERS * TOP_K)
    assert (record[-1] == -1).all()
    found = np.sort(record[:-1].reshape(-1, NUM_LAYERS, TOP_K), -1)
    same = (found == routers_choice(moe_model, segment.token_ids)[:-1]).all(-1)
    # A tie that rounding decides otherwise is no fault of the record.
    assert same.mean() > 0.98

    sample = sample_of(segment)
    policy = make_policy(moe_model, routing_replay=True)
    try:
        (column,) = policy.logprobs([sample])
    finally:
        policy.close()
    assert abs(column - sample.behavior_logprobs)[sample.sampled].max() < 1e-4


@pytest.mark.catalogue("B49")
def test_the_checksums_of_stacked_experts_are_the_engines(moe_model, engine_url):
    from safetensors.torch import load_file

    engine = EngineControl(engine_url)
    try:
        found = engine.weight_checksums()
    finally:
        engine.close()
    weights = load_file(moe_model / "model.safetensors")
    assert engine_checksums(weights, tied_embeddings=False, num_experts=8) == found
    swapped = dict(weights)
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    swapped[name.format(2)], swapped[name.format(5)] = weights[name.format(5)], weights[name.format(2)]
    differing = engine_checksums(swapped, tied_embeddings=False, num_experts=8).items() ^ found.items()
    assert {key for key, _ in differing} == {"model.layers.1.mlp.experts.w2_weight"}


async def test_the_next_turn_of_an_episode_finds_its_kv_and_the_load_is_told(engine_url):
    """Of any engine that samples without seeds: SGLang keeps no KV of prompts where seeds count."""
    prompt = np.arange(100, 160, dtype=np.int32)
    async with open_client(timeout_s=120) as client:
        fleet = EngineFleet([SGLangPolicy(client=client, url=engine_url, stop_token_ids=())])
        sampling = SamplingParams(max_tokens=8)
        with fleet.for_episode() as policy:
            first = await policy.generate(prompt_ids=prompt, sampling=sampling)
            longer = np.concatenate([prompt, first.token_ids, prompt[:9]])
            second = await policy.generate(prompt_ids=longer, sampling=sampling)
            num_known = len(prompt) + len(first) - 1
            assert second.num_cached_tokens >= num_known > first.num_cached_tokens
            await policy.generate(prompt_ids=np.concatenate([longer, second.token_ids]), sampling=sampling)
        [traffic] = fleet.traffic.values()
        assert traffic.num_known_tokens > 0 and traffic.num_lost_tokens == 0
        [load] = (await LoadPoller({0: engine_url}, client=client).poll()).values()
    assert load is not None
    assert load.max_tokens == 4096
    assert load.num_running == load.num_waiting == 0 and 0 <= load.kv_use < 0.1
