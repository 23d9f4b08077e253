"""SmolLM2-135M-Instruct from the package index: real weights and text through transformers, engine and trainer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import SamplingParams
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.engines import EnginesConfig
from polyturn.envs.registry import make
from polyturn.rollout.engines.launch import Engines, LocalLauncher
from polyturn.rollout.engines.server import EngineSpec
from polyturn.rollout.factory import dialect_of, open_client, renderer_of
from polyturn.rollout.fine_tuning.rendering import RowRenderer
from polyturn.rollout.fine_tuning.rows import row_of
from polyturn.trainer.models.published import find_published, get_published
from polyturn.trainer.run.preflight import preflight
from tests.support.megatron.policies import make_policy
from tests.support.samples import sample_of

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_an_unknown_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'smollm2-135m'"):
        find_published("smollm2")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("published") / "smollm2"
    get_published(find_published("smollm2-135m"), target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2_words", "smollm2_calculator", "smollm2_search_r1"])
def test_what_the_solution_plays_is_taught_within_a_recipes_limits(name: str, smollm2: Path) -> None:
    config = load_config(name, [f"model.path={smollm2}"])
    preflight(config, dry_run=True)
    dialect = dialect_of(config.model, smollm2)
    renderer = renderer_of(config.model, smollm2, dialect)
    taught = RowRenderer(renderer, dialect, tokenizer="", vocab_size=49152, stored=False)
    limits = config.environment
    env = make(limits.id, **limits.options)
    tools = [tool.to_openai() for tool in env.tools]
    for task in itertools.islice(env.tasks("train"), 48):
        history, reward, done = list(env.reset(options={"task": task})[0]), 0.0, False
        while not done:
            action = env.oracle(history, env.tools)
            observation, reward, done, *_ = env.step(action)
            history += [action.to_message(), *observation]
        assert reward == 1.0
        [segment] = taught(row_of(json.dumps({"messages": history, "tools": tools}).encode(), where="rows"))
        # Room for an answer that goes astray, and for the next turn behind it.
        assert len(segment.token_ids) + limits.max_tokens_per_turn <= limits.max_tokens_per_episode
        turns = [int(((segment.turns == turn) & segment.sampled).sum()) for turn in range(limits.max_turns)]
        assert 0 < max(turns) <= limits.max_tokens_per_turn and sum(map(bool, turns)) <= limits.max_turns


@pytest.mark.slow
@pytest.mark.stack
async def test_engine_trainer_and_transformers_agree_on_real_text(smollm2: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    # Each digit is a token of its own, and a space in front of one goes to no word.
    assert tokenizer.tokenize("it's  3.14, 2026") == ["it", "'s", "ĠĠ", "3", ".", "1", "4", ",", "Ġ", *"2026"]
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    spec = EngineSpec(
        config=EnginesConfig(device="cpu", start_timeout_s=240),
        model_path=smollm2,
        dtype="float32",
        seeded=True,
        log_directory=tmp_path,
    )
    ledger, greedy = Ledger(), SamplingParams(max_tokens=16, temperature=0.0, seed=0)
    with Engines(spec, LocalLauncher(spec)) as engines:
        [url] = engines.engine_urls
        async with open_client(timeout_s=120) as client:
            policy = SGLangPolicy(client=client, url=url, stop_token_ids=(tokenizer.eos_token_id,))
            ledger.append_observation(prompt)
            ledger.append_generation(await policy.generate(prompt_ids=prompt, sampling=greedy))
            ledger.append_observation(
                tokenizer.encode("\n<|im_start|>user\nAnd of Japan in 1900?<|im_end|>\n")
            )
            drawn = SamplingParams(max_tokens=32, seed=1)
            ledger.append_generation(await policy.generate(prompt_ids=ledger.token_ids, sampling=drawn))
    segment = ledger.to_segment()
    assert "Paris" in tokenizer.decode(segment.token_ids[segment.turns == 0])

    sample = sample_of(segment)
    trainer = make_policy(smollm2)
    try:
        [trained] = trainer.logprobs([sample], temperature=1.0)
    finally:
        trainer.close()
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    token_ids = torch.from_numpy(sample.token_ids)
    with torch.no_grad():
        logits = model(token_ids[None]).logits[0, :-1]
    reference = torch.log_softmax(logits, -1).gather(1, token_ids[1:, None])[:, 0].numpy()
    taken = sample.sampled[1:]
    assert taken.sum() > 20
    assert abs(trained[1:] - reference)[taken].max() < 1e-4
    # What is greedy is drawn at a temperature of its own: its logprobs are not those of the policy at 1.
    drawn_later = taken & (sample.turns[1:] == 1)
    assert abs(sample.behavior_logprobs[1:] - reference)[drawn_later].max() < 1e-4
